"""The transform behind `decompose`: one weight and its context → residual weight and initial LoRA factors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Literal

from corda_convert.adapters.factors import Layout, dimensions
from corda_convert.checkpoint.tensors import TensorRef, read_tensor
from corda_convert.errors import NotFinite
from corda_convert.operations.contexts import ContextMethod, Method, SharedContexts, Weighed
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.projection import Factors
    from corda_convert.linalg.subspace import Solver, Subspace
    from corda_convert.linalg.threads import Team

Mode = Literal["ipm", "kpm"]
"""`ipm` takes the largest singular values, `kpm` the smallest."""


@dataclass(frozen=True, slots=True)
class Names:
    """Output names of residual, lora_A and lora_B; None for what is not made.

    `singular_values` is for the ones at the wanted end alone, (rank,) float64, with nothing else.
    """

    residual: str | None
    lora_A: str | None
    lora_B: str | None
    singular_values: str | None = None

    @property
    def made(self) -> tuple[str, ...]:
        return tuple(name for name in (self.residual, self.lora_A, self.lora_B) if name is not None)


@dataclass(frozen=True, slots=True)
class DecomposeTransform:
    """`W_res = W − s·B·A` with `s·B·A = U Uᵀ W`, U the left singular vectors of `W T`, T the method's own.

    Attributes:
        weight: the stored weight.
        context: the covariance (d_in, d_in) for corda and svd-llm, mean absolute inputs (d_in,) for asvd, None for svd.
        damp: corda's: a factor of the mean diagonal, or `peft` for the reference's doubling rule.
        asvd_alpha: the exponent of asvd's scale.
        shared: the contexts of all modules, of which some may be the same; None where this one stands alone.
    """

    module_name: str
    weight: TensorRef
    context: TensorRef | None
    layout: Layout
    mode: Mode
    method: Method
    rank: int
    scaling: float
    damp: float | Literal["peft"]
    names: Names
    solver: Solver = "auto"
    asvd_alpha: float = 0.5
    shared: SharedContexts | None = None
    tokens: int | None = None

    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def action(self) -> str:
        """`truncated` where the components are kept nowhere."""
        return "decomposed" if self.names.lora_A is not None else "truncated"

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        operands = {"weight": self.weight}
        return {**operands, "context": self.context} if self.context is not None and self._reads_context else operands

    @property
    def _reads_context(self) -> bool:
        return self.shared is None or self.module_name in self.shared.reads

    @property
    def weighing(self) -> ContextMethod:
        if self.shared is not None:
            return self.shared.method
        return ContextMethod(self.method, self.damp, self.asvd_alpha, tokens=self.tokens)

    def workspace_bytes(self, rows: int) -> int:
        """Of the solver that needs most of those that may run, and of the panels that its threads hold."""
        from corda_convert.linalg.subspace import workspace_elements

        shape = dimensions(self.weight.spec, self.layout)
        end: Literal["top", "bottom"] = "top" if self.mode == "ipm" else "bottom"
        elements = workspace_elements(shape, self.rank, end, self.solver)
        if self.context is None:
            return 8 * elements
        weighing, d_in = self.weighing, shape[1]
        elements = max(elements + weighing.workspace_elements(d_in), weighing.trial_elements(d_in))
        held = self.shared.held_bytes if self.shared is not None else 0
        return 8 * elements + held + (0 if self._reads_context else self.context.spec.nbytes)

    def begin(self, device: torch.device) -> Session:
        return _DecomposeSession(self, device)


@dataclass(slots=True)
class _DecomposeSession:
    transform: DecomposeTransform
    device: torch.device
    result: Facts = field(default_factory=dict)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none: all the work is one step."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        from corda_convert.linalg.threads import Team

        begun = time.perf_counter()
        try:
            with Team(self.device) as team:
                self._decompose(team, inputs, outputs)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise NotFinite(
                f"The singular vectors of {self.transform.module_name} cannot be computed in float64.",
                why="The values of its weight or its covariance are far too large, or far too small.",
            ) from None
        self.result["seconds"] = time.perf_counter() - begun

    def _decompose(self, team: Team, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        from corda_convert.linalg.projection import balanced_factors
        from corda_convert.linalg.subspace import left_subspace
        from corda_convert.linalg.weighted_matrix import WeightedMatrix

        transform = self.transform
        self._check_finite(team, inputs["weight"])
        stored = inputs["weight"].to(self.device)
        weight = stored.T if transform.layout == "in_out" else stored
        weighed = self._weigh(team, inputs)
        found = left_subspace(
            team,
            WeightedMatrix(weight, weighed.weighting),
            rank=transform.rank,
            end="top" if transform.mode == "ipm" else "bottom",
            solver=transform.solver,
        )
        if transform.names.singular_values is not None:
            outputs[transform.names.singular_values].copy_(found.singular_values)
            self.result = {**self._facts(found, 0), **weighed.facts}
            return
        factors = balanced_factors(found, scaling=transform.scaling)
        for name, factor in ((transform.names.lora_A, factors.lora_A), (transform.names.lora_B, factors.lora_B)):
            if name is not None:
                outputs[name].copy_(factor)
        norms = self._write_residual(team, weight, factors, outputs)
        self.result = {**self._facts(found, factors.zero_components), **weighed.facts, **norms}

    def _write_residual(self, team: Team, weight: Tensor, factors: Factors, outputs: Mapping[str, Tensor]) -> Facts:
        """The residual in its place, or only the norms where it is not asked for."""
        import torch

        from corda_convert.linalg.projection import write_residual

        name = self.transform.names.residual
        target = outputs[name] if name is not None else None
        dtype = target.dtype if target is not None else torch.float64
        is_ours = target is not None and target.device == weight.device
        if target is not None and is_ours:
            out = target.T if self.transform.layout == "in_out" else target
        else:
            out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        norms = write_residual(team, weight, factors, scaling=self.transform.scaling, out=out)
        if not norms.is_finite:
            raise NotFinite(
                f"The residual of {self.transform.weight.name} is outside the range of {dtype}.",
                next_step="Choose --dtype bfloat16 or float32.",
            )
        if target is not None and not is_ours:
            target.copy_(out.T if self.transform.layout == "in_out" else out)
        facts: Facts = {"weight_norm": sqrt(norms.weight), "delta_norm": sqrt(norms.delta)}
        if target is not None:
            facts["rounding_norm"] = sqrt(norms.rounding)
            facts["reconstruction_error"] = sqrt(norms.rounding / norms.weight) if norms.weight > 0 else 0.0
        return facts

    def _check_finite(self, team: Team, weight: Tensor) -> None:
        from corda_convert.linalg.panels import all_finite

        ref = self.transform.weight
        if not all_finite(team, weight):
            raise NotFinite(f"{ref.name} in {ref.file.path} holds NaN or Inf.")

    def _weigh(self, team: Team, inputs: Mapping[str, Tensor]) -> Weighed:
        """T, as another module with the same context has left it, or made of the context."""
        from corda_convert.linalg.weighting import NoWeighting

        ref, module, shared = self.transform.context, self.transform.module_name, self.transform.shared
        if ref is None:
            return Weighed(NoWeighting(), {"damping": None})
        weighed = shared.take(ref) if shared is not None else None
        if weighed is None:
            is_kept = shared is not None and shared.is_shared(module, ref)
            stored = inputs["context"] if "context" in inputs else read_tensor(ref)
            context = stored.to(self.device, copy=is_kept and "context" in inputs)
            weighed = self.transform.weighing.weigh(team, context, ref, module)
        if shared is not None:
            shared.keep(module, ref, weighed)
        return weighed

    def _facts(self, found: Subspace, zero_components: int) -> Facts:
        taken = float(found.singular_values.square().sum())
        return {
            "module": self.transform.module_name,
            "method": self.transform.method,
            "rank": self.transform.rank,
            "scaling": self.transform.scaling,
            "solver": found.solver,
            "fallback_from": list(found.fallback_from),
            "steps": found.steps,
            "certificate": {
                "residual": found.residual,
                "relative_residual": found.relative,
                "angle": found.angle,
                "orthonormality": found.orthonormality,
                "holds": found.is_certified,
            },
            "singular_values": {
                "largest": found.largest,
                "smallest": found.smallest,
                "taken_largest": float(found.singular_values[0]),
                "taken_smallest": float(found.singular_values[-1]),
                "next": found.neighbour,
            },
            "taken_share": min(taken / found.energy, 1.0) if found.energy > 0 else 0.0,
            "taken_share_is_estimate": found.energy_is_estimated,
            "zero_components": zero_components,
        }

    def facts(self) -> Facts:
        return self.result
