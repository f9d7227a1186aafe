"""The transforms that need no method of their own: folding an adapter, casting, replacing, joining factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import fsum, isfinite, lcm, prod, sqrt
from typing import TYPE_CHECKING, Literal

from corda_convert.adapters.factors import Layout, ModuleFactors, RowFold
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, TensorSpec, torch_dtype
from corda_convert.errors import CordaConvertError, NotFinite
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rounding = Literal["nearest", "peft"]
"""`nearest` rounds once, at the end. `peft` gives PEFT's bits where PEFT rounds the delta first (embeddings)."""


def _bytes(elements: int, dtype: str = "F32") -> int:
    return elements * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class FoldTransform:
    """Adds one module's adapter to its weight, block of rows by block of rows, and rounds once."""

    weight: TensorRef
    factors: ModuleFactors
    layout: Layout
    dtype: str
    rounding: Rounding = "nearest"

    action = "folded"

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        streams = self.factors.streams(self.layout)
        return {name: ref for name, ref in self.factors.operands().items() if name not in streams}

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        streams = self.factors.streams(self.layout)
        operands = self.factors.operands()
        return {"weight": self.weight, **{name: operands[name] for name in operands if name in streams}}

    @property
    def row_quantum(self) -> int:
        return self.factors.row_quantum()

    @property
    def compute_dtype(self) -> str:
        return "F64" if "F64" in (self.weight.spec.dtype, self.dtype) else "F32"

    def workspace_bytes(self, rows: int) -> int:
        """Four copies of the rows, and the operands twice: as prepared, and on their way there."""
        block = rows * prod(self.weight.shape[1:])
        operands = sum(ref.spec.elements for ref in self.whole.values())
        streamed = sum(rows * prod(ref.shape[1:]) for name, ref in self.streamed.items() if name != "weight")
        return _bytes(4 * block + 2 * operands + 2 * streamed, self.compute_dtype)

    def begin(self, device: torch.device) -> Session:
        return _FoldSession(self, device)


PASS_ELEMENTS = 1 << 18
"""On a CPU a chunk is folded in passes of about this many elements, 1 MB in float32: what fits a core's own cache."""


@dataclass(slots=True)
class _FoldSession:
    transform: FoldTransform
    device: torch.device
    fold: RowFold | None = None
    squares: list[tuple[float, float, float]] = field(default_factory=list)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        for name, tensor in operands.items():
            self._check_finite(name, tensor)
        dtype = torch_dtype(self.transform.compute_dtype)
        on_device = {name: tensor.to(self.device, dtype, copy=True) for name, tensor in operands.items()}
        self.fold = self.transform.factors.begin(self.transform.layout, on_device, dtype)

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        (output,) = outputs.values()
        for part in self._passes(inputs["weight"]):
            self._pass(first_row + part.start, {name: tensor[part] for name, tensor in inputs.items()}, output[part])

    def _passes(self, stored: Tensor) -> Iterator[slice]:
        rows = stored.shape[0]
        step = rows
        if self.device.type == "cpu":
            quantum = lcm(self.transform.row_quantum, 16)
            step = max(quantum, PASS_ELEMENTS // max(stored.shape[1], 1) // quantum * quantum)
        for begin in range(0, rows, step):
            yield slice(begin, min(begin + step, rows))

    def _pass(self, first_row: int, inputs: Mapping[str, Tensor], output: Tensor) -> None:
        import torch

        dtype = torch_dtype(self.transform.compute_dtype)
        stored = inputs["weight"]
        streamed = {name: tensor.to(self.device, dtype) for name, tensor in inputs.items() if name != "weight"}
        rows = stored.to(self.device, dtype, copy=True)
        weight_square = _square(rows)
        rows, delta_square = self._folded(rows, first_row, streamed)
        if not isfinite(delta_square) or not isfinite(weight_square):
            raise self._culprit(inputs)
        rounding_square = 0.0
        if delta_square == 0.0:
            output.copy_(stored)  # bit for bit, the sign of zero included
        else:
            output.copy_(rows)
            if output.dtype != dtype:
                rounding_square = _square(torch.sub(rows, output.to(self.device, dtype), out=rows))
        if not isfinite(rounding_square) or (output.dtype == torch.float16 and not bool(torch.isfinite(output).all())):
            raise _overflow(self.transform.weight.name, self.transform.dtype)
        self.squares.append((weight_square, delta_square, rounding_square))

    def _folded(self, rows: Tensor, first_row: int, streamed: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        import torch

        assert self.fold is not None  # noqa: S101 - set by `prepare`
        if self.transform.rounding == "nearest" or not self.transform.factors.is_embedding:
            return rows, self.fold.fold(rows, first_row, streamed)
        change = torch.zeros_like(rows)
        square = self.fold.fold(change, first_row, streamed)
        stored = torch_dtype(self.transform.weight.spec.dtype)
        return (rows.to(stored) + change.to(stored)).to(rows.dtype), square

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        import torch

        if not bool(torch.isfinite(tensor).all()):
            raise self._culprit({name: tensor})

    def _culprit(self, inputs: Mapping[str, Tensor]) -> CordaConvertError:
        import torch

        operands = self.transform.factors.operands()
        for name, tensor in inputs.items():
            if not bool(torch.isfinite(tensor).all()):
                ref = self.transform.weight if name == "weight" else operands[name]
                return NotFinite(
                    f"{ref.name} in {ref.file.path} holds NaN or Inf.",
                    why="The training diverged, or the file is damaged."
                    if name != "weight"
                    else "The model is damaged.",
                    next_step="Use an earlier checkpoint of the training." if name != "weight" else "Get it again.",
                )
        return NotFinite(
            f"Folding into {self.transform.weight.name} overflows float32, although its inputs are finite.",
            why="The adapter's values or its scaling are far too large.",
        )

    def facts(self) -> Facts:
        # fsum is exact, so that the order in which the workers came does not show
        weight, delta, rounding = (
            sqrt(fsum(parts)) for parts in zip(*(self.squares or [(0.0, 0.0, 0.0)]), strict=True)
        )
        return {
            **self.transform.factors.describe(),
            "module": self.transform.factors.module_name,
            "weight_norm": weight,
            "delta_norm": delta,
            "rounding_norm": rounding,
        }


def _square(tensor: Tensor) -> float:
    """The squared Frobenius norm; not finite if an entry is not."""
    import torch

    return float(torch.linalg.vector_norm(tensor)) ** 2


def _overflow(name: str, dtype: str) -> NotFinite:
    return NotFinite(
        f"{name} holds values outside the range of {dtype}.", next_step="Choose --dtype bfloat16 or float32."
    )


@dataclass(frozen=True, slots=True)
class CastTransform:
    """One tensor in another dtype (`cast`), or the adapter's own tensor: in place of the base's (`replaced`), or `carried`."""

    source: TensorRef
    dtype: str
    action: str = "cast"

    row_quantum = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        return _bytes(rows * prod(self.source.shape[1:]))

    def begin(self, device: torch.device) -> Session:
        return _CastSession(self)


@dataclass(slots=True)
class _CastSession:
    transform: CastTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        (output,) = outputs.values()
        source = inputs["source"]
        output.copy_(source)
        if bool(torch.isfinite(output).all()):
            return
        ref = self.transform.source
        if bool(torch.isfinite(source).all()):
            raise _overflow(ref.name, self.transform.dtype)
        if self.transform.action != "cast":  # the base's own values are the base's business
            raise NotFinite(f"{ref.name} in {ref.file.path} holds NaN or Inf.", why="The training diverged.")

    def facts(self) -> Facts:
        return {"from": self.transform.source.spec.dtype}


@dataclass(frozen=True, slots=True)
class Part:
    """One operand of a join, and the number it is multiplied with."""

    ref: TensorRef
    factor: float


@dataclass(frozen=True, slots=True)
class JoinTransform:
    """Puts LoRA factors together along one dimension, each times its factor: `[A; A₀]`, `[B | −B₀]`."""

    parts: tuple[Part, ...]
    dim: int
    output: TensorSpec

    action = "concatenated"
    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {str(index): part.ref for index, part in enumerate(self.parts)}

    def workspace_bytes(self, rows: int) -> int:
        return _bytes(2 * self.output.elements)

    def begin(self, device: torch.device) -> Session:
        return _JoinSession(self)


@dataclass(slots=True)
class _JoinSession:
    transform: JoinTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        (output,) = outputs.values()
        begin = 0
        for index, part in enumerate(self.transform.parts):
            tensor = inputs[str(index)]
            if not bool(torch.isfinite(tensor).all()):
                raise NotFinite(
                    f"{part.ref.name} in {part.ref.file.path} holds NaN or Inf.",
                    why="The training diverged, or the file is damaged.",
                    next_step="Use an earlier checkpoint of the training.",
                )
            size = tensor.shape[self.transform.dim]
            target = output.narrow(self.transform.dim, begin, size)
            target.copy_(tensor if part.factor == 1.0 else tensor.float() * part.factor)
            begin += size
        if not bool(torch.isfinite(output).all()):
            raise _overflow(self.transform.output.name, self.transform.output.dtype)

    def facts(self) -> Facts:
        return {"parts": [part.ref.name for part in self.transform.parts]}
