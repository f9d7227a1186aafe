"""Initial factors that nobody kept, made again from the base as PEFT does when it loads such an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Literal

from corda_convert.adapters.dora import lora_factors
from corda_convert.adapters.factors import Adapter, Layout
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.dequantized import stored_as
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.tensors import TensorRef, torch_dtype
from corda_convert.errors import CordaConvertError, NotFinite, UnsupportedInput, raise_problems
from corda_convert.operations.edits import Applied, Fitted
from corda_convert.operations.transforms import FoldTransform, described, norm_facts
from corda_convert.plan.model import Facts, Produced, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Method = Literal["pissa", "olora"]


def method_of(adapter: Adapter) -> Method | None:
    """The initialization of an adapter if it follows from the base's weights alone, and exactly."""
    init = str(adapter.source.config.get("init_lora_weights")).lower()
    if adapter.kind != "lora":
        return None
    return "pissa" if init == "pissa" else "olora" if init == "olora" else None


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The initial factors of one module, by what makes them: they are taken out of the weight `scale` times."""

    method: Method
    module_name: str
    rank: int
    scaling: float
    layout: Layout
    scale: float


def reproductions(one: Applied, fitted: Sequence[Fitted], method: Method, model: Checkpoint) -> dict[str, Reproduction]:
    """For each weight that the adapter's training took factors out of, by tensor name, how. Raises all problems together.

    PEFT initializes embeddings of such an adapter plainly; they are left out.
    """
    found: dict[str, Reproduction] = {}
    problems: list[CordaConvertError] = []
    for each in fitted:
        factors = next(iter(lora_factors([each.change])), None)
        if factors is None or factors.is_embedding:
            continue
        problem = _problem(each, factors, method, model)
        if problem is not None:
            problems.append(problem)
            continue
        found[each.target.tensor_name] = Reproduction(
            method, factors.module_name, factors.rank, factors.scaling, each.layout, one.scale
        )
    raise_problems(problems)
    return found


def _problem(fitted: Fitted, factors: LoraFactors, method: Method, model: Checkpoint) -> CordaConvertError | None:
    target = fitted.target
    weight = model.tensors[target.tensor_name]
    reason = None
    if stored_as(weight) is not None or weight.spec.dtype == "F64":
        reason = f"PEFT makes none from {stored_as(weight) or 'float64'} weights"
    elif not target.is_plain:
        reason = "its weight lies on disk in several tensors or in another form"
    elif len(target.shape) != 2 or factors.parameter != "weight":
        reason = "it is no Linear or Conv1D layer"
    elif method == "olora" and fitted.layout == "in_out":
        reason = "PEFT decomposes the transposed weight of Conv1D there"
    elif factors.rank > min(target.shape):
        reason = f"rank {factors.rank} is more than its weight has"
    if reason is None:
        return None
    return UnsupportedInput(
        f"{factors.module_name}: its initial {method} factors cannot be made again: {reason}.",
        next_step="Give the initial adapter of the training with --init, or the residual with --residual.",
    )


def reproduced(
    touched: Mapping[str, tuple[Produced, ...]], found: Sequence[Mapping[str, Reproduction]]
) -> dict[str, tuple[Produced, ...]]:
    """The productions with the initial factors taken out of each weight that some adapter was trained beside."""
    result = dict(touched)
    for name in dict.fromkeys(name for each in found for name in each):
        initials = tuple(each[name] for each in found if name in each)
        result[name] = tuple(_without_initial(produced, initials) for produced in result[name])
    return result


def _without_initial(produced: Produced, initials: tuple[Reproduction, ...]) -> Produced:
    fold = produced.transform
    modules = {initial.module_name for initial in initials}
    if not isinstance(fold, FoldTransform) or not modules & {placed.change.module_name for placed in fold.changes}:
        return produced
    return Produced(produced.spec, ReproduceTransform(fold, initials))


@dataclass(frozen=True, slots=True)
class ReproduceTransform:
    """Takes the initial factors out of one weight, `W_res = W − s·B₀A₀` in the weight's dtype, and folds into that.

    It needs the whole weight, and does all in one step with torch's own threads.
    """

    fold: FoldTransform
    initials: tuple[Reproduction, ...]

    action = "folded"
    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {"weight": self.fold.weight, **self.fold.refs}

    def workspace_bytes(self, rows: int) -> int:
        """In float32: the weight, its residual and a delta, what LAPACK makes of a copy, and the operands."""
        d_out, d_in = self.fold.weight.shape
        side = min(d_out, d_in)
        operands = sum(ref.spec.elements for ref in self.fold.refs.values())
        return 4 * (8 * d_out * d_in + 6 * side * side + 2 * operands)

    def begin(self, device: torch.device) -> Session:
        return _ReproduceSession(self, device)


@dataclass(slots=True)
class _ReproduceSession:
    transform: ReproduceTransform
    device: torch.device
    result: Facts = field(default_factory=dict)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none: all the work is one step."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        from corda_convert.linalg.finite import is_finite
        from corda_convert.linalg.lora import square

        (output,) = outputs.values()
        self._check_finite(inputs)
        weight = inputs["weight"].to(self.device, torch.float32)
        rows = self._residual(weight)
        self._fold(rows, inputs)
        if not is_finite(rows):
            raise NotFinite(
                f"Folding into {self.transform.fold.weight.name} overflows float32, although its inputs are finite.",
                why="The adapter's values or its scaling are far too large.",
            )
        output.view(rows.shape).copy_(rows)
        if not is_finite(output):
            raise NotFinite(
                f"{self.transform.fold.weight.name} holds values outside the range of {self.transform.fold.dtype}.",
                next_step="Choose --dtype bfloat16 or float32.",
            )
        rounded = output.view(rows.shape).to(self.device, torch.float32)
        self.result = {
            "changes": described(self.transform.fold.changes),
            "reproduced": [{"method": each.method, "rank": each.rank} for each in self.transform.initials],
            **norm_facts(*(sqrt(square(part)) for part in (weight, rows - weight, rows - rounded))),
        }

    def _residual(self, weight: Tensor) -> Tensor:
        """`W_res`, rounded to the weight's own dtype as in the training; several of them one beside the other."""
        from corda_convert.linalg import initial as algebra

        stored = torch_dtype(self.transform.fold.weight.spec.dtype)
        rows = weight.clone()
        for each in self.transform.initials:
            matrix = weight.T if each.layout == "in_out" else weight
            if each.method == "pissa":
                A, B = algebra.pissa(matrix, each.rank, each.scaling)
            else:
                A, B = algebra.olora(matrix, each.rank)
            residual = algebra.residual(matrix, A, B, each.scaling).to(stored).to(weight.dtype)
            residual = residual.T if each.layout == "in_out" else residual
            if len(self.transform.initials) == 1 and each.scale == 1.0:
                return residual.contiguous()
            rows += (residual - weight) * each.scale
        return rows

    def _fold(self, rows: Tensor, inputs: Mapping[str, Tensor]) -> None:
        fold = self.transform.fold
        stored = torch_dtype(fold.weight.spec.dtype)
        for placed, names in zip(fold.changes, fold.operands, strict=True):
            whole = {name: inputs[own].to(self.device, rows.dtype, copy=True) for name, own in names.items()}
            part = rows[placed.row : placed.row + placed.rows]
            change = placed.change.begin(placed.block, whole, rows.dtype, placed.scale)
            if change.needs_sweep:
                change.sweep(part.clone(), 0, {})
            change.fold(part, 0, {})
            if fold.rounding == "peft" and len(fold.changes) > 1:
                rows.copy_(rows.to(stored))

    def _check_finite(self, inputs: Mapping[str, Tensor]) -> None:
        from corda_convert.linalg.finite import is_finite

        for name, ref in self.transform.whole.items():
            if not is_finite(inputs[name]):
                raise NotFinite(
                    f"{ref.name} in {ref.file.path} holds NaN or Inf.",
                    why="The model is damaged."
                    if name == "weight"
                    else "The training diverged, or the file is damaged.",
                )

    def facts(self) -> Facts:
        return self.result
