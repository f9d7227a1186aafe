"""Factors of a chosen rank for one module: the best ones for what its summands and its dense change add up to."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.tensors import TensorRef, TensorSpec, read_tensor
from corda_convert.errors import CovarianceMismatch, NotFinite
from corda_convert.operations.lora_join import check_finite, out_of_range
from corda_convert.operations.lora_modules import DenseChange, LoraModule
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.low_rank import Extracted
    from corda_convert.linalg.threads import Team

_COVARIANCE = "covariance"


def _operands(module: LoraModule, covariance: TensorRef | None) -> dict[str, TensorRef]:
    """Everything that a module is computed from, by operand name."""
    operands: dict[str, TensorRef] = {}
    for place, summand in enumerate(module.summands):
        operands |= {f"lora_A {place}": summand.lora_A, f"lora_B {place}": summand.lora_B}
    if module.dense is not None:
        operands |= module.dense.operands
    return operands if covariance is None else {**operands, _COVARIANCE: covariance}


@dataclass(frozen=True, slots=True)
class ReduceTransform:
    """The module's factors, of the best product of `rank`, in two outputs that may be wider; zeros follow then.

    Attributes:
        module: what is added up.
        rank: of the result. Nothing is lost where it is that of the module and there is no dense change.
        lora_A: the first output.
        lora_B: the second.
        covariance: of the module's inputs, where the outputs' error counts; else None.
    """

    module: LoraModule
    rank: int
    lora_A: TensorSpec
    lora_B: TensorSpec
    covariance: TensorRef | None = None

    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def action(self) -> str:
        return "reduced" if self.module.summands else "extracted"

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return _operands(self.module, self.covariance)

    def workspace_bytes(self, rows: int) -> int:
        """The stacked factors, their bases, LAPACK's copies, the result and its error; and the dense solver's matrices."""
        d_out, d_in = self.module.shape
        side_by_side = self.module.rank + self.rank
        elements = 8 * side_by_side * (d_out + d_in) + 6 * side_by_side**2
        if self.covariance is not None:
            elements += (2 * d_in + 4 * side_by_side) * d_in
        if self.module.dense is not None:
            from corda_convert.linalg.subspace import workspace_elements

            rank = self.module.dense_rank or self.rank
            elements += (
                2 * d_out * d_in
                + _factor_elements(self.module.dense)
                + workspace_elements((d_out, d_in), rank, "top", "auto")
            )
        return 8 * elements

    def begin(self, device: torch.device) -> Session:
        return _ReduceSession(self, device)


@dataclass(slots=True)
class _ReduceSession:
    transform: ReduceTransform
    device: torch.device
    result: Facts = field(default_factory=dict)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none: all the work is one step."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        from corda_convert.linalg.threads import Team

        begun = time.perf_counter()
        for name, ref in self.transform.whole.items():
            check_finite(ref, inputs[name])
        with Team(self.device) as team, _in_float64(self.transform.module):
            if self.transform.module.is_parameter:
                self._reduce_experts(team, inputs, outputs)
            else:
                self._reduce(team, inputs, outputs)
        self.result["seconds"] = time.perf_counter() - begun

    def _reduce(self, team: Team, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        from corda_convert.linalg import low_rank

        module = self.transform.module
        covariance = inputs.get(_COVARIANCE)
        covariance = None if covariance is None else covariance.to(self.device)
        if covariance is not None:
            _check_covariance(team, module, covariance)
        if module.dense is not None and not module.summands:
            matrix = module.dense.matrix(team, inputs, self.device)
            found = low_rank.extracted(team, matrix, self.transform.rank, covariance)
            stored = self._write(found.lora_A, found.lora_B, outputs)
            error, _ = low_rank.difference_norms(team, matrix, stored[1], stored[0])
            self.result = self._facts(found.norm, error, found.weighted_norm, found.weighted_error) | _solver(found)
            return
        right, left = stacked(module, inputs, self.device)
        facts: Facts = {}
        if module.dense is not None:
            lost = low_rank.extracted(
                team, module.dense.matrix(team, inputs, self.device), module.dense_rank, covariance=None
            )
            right, left = torch.cat([right, lost.lora_A]), torch.cat([left, lost.lora_B], dim=1)
            facts = {"recovered": {"norm": lost.norm, "error": lost.error}} | _solver(lost)
        core = low_rank.core_of(team, left, right, covariance)
        if self.transform.rank < module.rank:
            best = low_rank.reduced(core, self.transform.rank)
            stored = self._write(best.lora_A, best.lora_B, outputs)
            kept = best.spectrum
            facts |= {"singular_values": _ends(kept, self.transform.rank)}
        else:
            stored = self._write(right, left, outputs)
        rest = torch.cat([left, -stored[1]], dim=1), torch.cat([right, stored[0]])
        error = low_rank.product_norm(team, *rest)
        weighted: tuple[float | None, float | None] = (None, None)
        if covariance is not None:
            weighted = (
                low_rank.product_norm(team, left, right, covariance),
                low_rank.product_norm(team, *rest, covariance),
            )
        norm = float(torch.linalg.matrix_norm(core.core))
        self.result = self._facts(norm, error, *weighted) | facts

    def _reduce_experts(self, team: Team, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Each expert on its own. The facts have the norms of all together, and how far the worst of them is off."""
        import torch

        from corda_convert.linalg import low_rank

        module, rank = self.transform.module, self.transform.rank
        for spec in (self.transform.lora_A, self.transform.lora_B):
            outputs[spec.name].zero_()
        norms: list[float] = []
        errors: list[float] = []
        for expert in range(module.experts):
            right, left = stacked(module, inputs, self.device, expert)
            core = low_rank.core_of(team, left, right)
            best = low_rank.reduced(core, rank) if rank < module.rank else None
            found = (right, left) if best is None else (best.lora_A, best.lora_B)
            stored = self._write_expert(*found, outputs, expert)
            rest = torch.cat([left, -stored[1]], dim=1), torch.cat([right, stored[0]])
            errors.append(low_rank.product_norm(team, *rest))
            norms.append(float(torch.linalg.matrix_norm(core.core)))
        self.result = self._facts(math.hypot(*norms), math.hypot(*errors), None, None)
        shares = [error / norm for error, norm in zip(errors, norms, strict=True) if norm]
        self.result |= {"experts": module.experts, "largest_relative_error": max(shares, default=0.0)}

    def _write_expert(
        self, right: Tensor, left: Tensor, outputs: Mapping[str, Tensor], expert: int
    ) -> tuple[Tensor, Tensor]:
        """Puts one expert's factors where PEFT has them. Returns them in float64 as they were rounded."""
        from corda_convert.linalg.finite import is_finite

        transform, experts = self.transform, self.transform.module.experts
        rank = right.shape[0]
        rows = outputs[transform.lora_A.name].view(experts, -1, right.shape[1])[expert, :rank]
        columns = outputs[transform.lora_B.name].view(left.shape[0], -1, experts)[:, :rank, expert]
        for spec, place, factor in ((transform.lora_A, rows, right), (transform.lora_B, columns, left)):
            place.copy_(factor)
            if not is_finite(place):
                raise out_of_range(spec)
        return rows.to(self.device).double(), columns.to(self.device).double()

    def _write(self, right: Tensor, left: Tensor, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Puts lora_A and lora_B into the outputs. Returns them in float64 as they were rounded."""
        from corda_convert.linalg.finite import is_finite

        transform = self.transform
        rank = right.shape[0]
        for spec, factor, dim in ((transform.lora_A, right, 0), (transform.lora_B, left, 1)):
            matrix = outputs[spec.name].view(spec.shape[0], -1)
            matrix.zero_()
            matrix.narrow(dim, 0, rank).copy_(factor)
            if not is_finite(matrix):
                raise out_of_range(spec)
        stored_A = outputs[transform.lora_A.name].view(transform.lora_A.shape[0], -1)[:rank]
        stored_B = outputs[transform.lora_B.name].view(transform.lora_B.shape[0], -1)[:, :rank]
        return stored_A.to(self.device).double(), stored_B.to(self.device).double()

    def _facts(self, norm: float, error: float, weighted_norm: float | None, weighted_error: float | None) -> Facts:
        module = self.transform.module
        facts: Facts = {
            "module": module.key,
            "rank": self.transform.rank,
            "from_rank": module.rank if module.summands else min(module.shape),
            "delta_norm": norm,
            "error": error,
            "relative_error": error / norm if norm else 0.0,
        }
        if weighted_norm is not None and weighted_error is not None:
            facts["output_error"] = weighted_error
            facts["relative_output_error"] = weighted_error / weighted_norm if weighted_norm else 0.0
        return facts

    def facts(self) -> Facts:
        return self.result


def _factor_elements(dense: DenseChange) -> int:
    """Numbers of the factors that a sum with a dense change takes to float64."""
    return sum(ref.spec.elements for name, ref in dense.operands.items() if "lora_" in name)


def _ends(spectrum: Tensor, rank: int) -> dict[str, float | None]:
    return {
        "largest": float(spectrum[0]),
        "smallest_kept": float(spectrum[rank - 1]),
        "largest_dropped": float(spectrum[rank]) if rank < len(spectrum) else None,
    }


def _solver(found: Extracted) -> dict[str, Any]:
    return {"solver": found.solver, "certificate": found.certificate}


def stacked(
    module: LoraModule, inputs: Mapping[str, Tensor], device: torch.device, expert: int = 0
) -> tuple[Tensor, Tensor]:
    """All summands side by side in float64: A (n, d_in), and B (d_out, n) with the factors and the scaling in it."""
    import torch

    rights, lefts = [], []
    for place, summand in enumerate(module.summands):
        rows = slice(expert * summand.rank, (expert + 1) * summand.rank)
        columns = slice(expert, None, summand.experts)
        rights.append(inputs[f"lora_A {place}"][rows].to(device).double())
        left = inputs[f"lora_B {place}"][:, columns].to(device).double()
        lefts.append(left * (summand.factor * module.scaling))
    return torch.cat(rights), torch.cat(lefts, dim=1)


class _in_float64:  # noqa: N801 - used as a with statement only
    """Says in words what LAPACK refuses."""

    def __init__(self, module: LoraModule) -> None:
        self._module = module

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        import torch

        if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            raise NotFinite(
                f"The singular values of {self._module.key} cannot be computed in float64.",
                why="Its values are far too large or too small, or its covariance is none: not positive semidefinite.",
            ) from None


def _check_covariance(team: Team, module: LoraModule, covariance: Tensor) -> None:
    """Raises `CovarianceMismatch` for what no sum of products of inputs is."""
    from corda_convert.linalg.covariance import is_symmetric

    diagonal = covariance.diagonal()
    if not bool(diagonal.any()):
        raise CovarianceMismatch(
            f"The covariance of {module.key} is zero: no sample reached this layer.",
            next_step="Collect covariances on data that uses this layer.",
        )
    if bool((diagonal < 0).any()) or not is_symmetric(team, covariance):
        raise CovarianceMismatch(
            f"What is given as the covariance of {module.key} is none: it "
            f"{'is not symmetric' if bool((diagonal >= 0).all()) else 'has negative squares on its diagonal'}.",
            why="The file is damaged, or holds something else.",
            next_step="Collect covariances again.",
        )


def energy_rank_of(
    module: LoraModule, energy: float, covariance: TensorRef | None, most: int, device: torch.device
) -> int:
    """The smallest rank that keeps `energy` of the square of what is minimized, `most` at most, 1 at least.

    Of a stack every expert keeps it. Reads the module's tensors. Raises one of our errors for NaN and Inf.
    """
    from corda_convert.linalg import low_rank
    from corda_convert.linalg.threads import Team

    inputs = {name: read_tensor(ref) for name, ref in _operands(module, covariance).items()}
    for name, ref in _operands(module, covariance).items():
        check_finite(ref, inputs[name])
    weight = inputs.get(_COVARIANCE)
    weight = None if weight is None else weight.to(device)
    with Team(device) as team, _in_float64(module):
        if weight is not None:
            _check_covariance(team, module, weight)
        if module.dense is not None and not module.summands:
            matrix = module.dense.matrix(team, inputs, device)
            return max(low_rank.energy_rank(team, matrix, energy, weight, most), 1)
        if module.is_parameter:
            cores = (
                low_rank.core_of(team, *reversed(stacked(module, inputs, device, e))) for e in range(module.experts)
            )
            found = [low_rank.rank_for_energy(core.spectrum(), energy) or 0 for core in cores]
            return max(min(max(found), most), 1)
        right, left = stacked(module, inputs, device)
        if module.dense is not None:
            import torch

            lost = low_rank.extracted(team, module.dense.matrix(team, inputs, device), module.dense_rank)
            right, left = torch.cat([right, lost.lora_A]), torch.cat([left, lost.lora_B], dim=1)
        chosen = low_rank.rank_for_energy(low_rank.core_of(team, left, right, weight).spectrum(), energy)
    return max(min(chosen or 0, most), 1)
