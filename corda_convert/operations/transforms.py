"""The transforms that need no method of their own: folding an adapter, casting, replacing, joining factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite, prod, sqrt
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
        block = rows * prod(self.weight.shape[1:])
        operands = sum(ref.spec.elements for ref in self.factors.operands().values())
        return _bytes(3 * block + 3 * operands, self.compute_dtype)

    def begin(self, device: torch.device) -> Session:
        return _FoldSession(self, device)


@dataclass(slots=True)
class _FoldSession:
    transform: FoldTransform
    device: torch.device
    fold: RowFold | None = None
    first: int = 0
    squares: dict[str, float] = field(default_factory=lambda: {"weight": 0.0, "delta": 0.0, "rounding": 0.0})

    def step(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        (output,) = outputs.values()
        dtype = torch_dtype(self.transform.compute_dtype)
        on_device = {name: tensor.to(self.device, copy=True) for name, tensor in inputs.items() if name != "weight"}
        if self.fold is None:
            whole = {name: on_device[name] for name in self.transform.whole}
            self.fold = self.transform.factors.begin(self.transform.layout, whole, dtype)
        stored = inputs["weight"]
        rows = stored.to(self.device, copy=True).to(dtype)
        self._add("weight", rows)
        if self.transform.rounding == "peft" and self.transform.layout == "in_out" and _is_embedding(self.transform):
            rows = self._twice_rounded(rows, on_device)
        else:
            change = self.fold.fold(rows, self.first, on_device)
            self.squares["delta"] += change
        if not isfinite(self.squares["delta"]) or not isfinite(self.squares["weight"]):
            raise self._culprit(inputs)
        if self.squares["delta"] == 0.0:
            rows = stored  # bit for bit, the sign of zero included
        output.copy_(rows)
        if output.dtype != dtype and rows is not stored:
            rows -= output.to(self.device)
            self._add("rounding", rows)
            if not isfinite(self.squares["rounding"]):
                raise _overflow(self.transform.weight.name, self.transform.dtype)
        elif output.dtype == torch.float16 and not bool(torch.isfinite(output).all()):
            raise _overflow(self.transform.weight.name, self.transform.dtype)
        self.first += stored.shape[0]

    def _twice_rounded(self, rows: Tensor, streamed: Mapping[str, Tensor]) -> Tensor:
        import torch

        assert self.fold is not None  # noqa: S101 - set by the caller
        change = torch.zeros_like(rows)
        self.squares["delta"] += self.fold.fold(change, self.first, streamed)
        dtype = torch_dtype(self.transform.weight.spec.dtype)
        return (rows.to(dtype) + change.to(dtype)).to(rows.dtype)

    def _add(self, name: str, tensor: Tensor) -> None:
        import torch

        self.squares[name] += float(torch.linalg.vector_norm(tensor)) ** 2

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
        norms = {name: sqrt(square) for name, square in self.squares.items()}
        return {
            **self.transform.factors.describe(),
            "module": self.transform.factors.module_name,
            "weight_norm": norms["weight"],
            "delta_norm": norms["delta"],
            "rounding_norm": norms["rounding"],
        }


def _is_embedding(transform: FoldTransform) -> bool:
    return bool(getattr(transform.factors, "is_embedding", False))


def _overflow(name: str, dtype: str) -> NotFinite:
    return NotFinite(
        f"{name} holds values outside the range of {dtype}.", next_step="Choose --dtype bfloat16 or float32."
    )


@dataclass(frozen=True, slots=True)
class CastTransform:
    """One tensor in another dtype (`cast`), or the adapter's own tensor in place of the base's (`replaced`)."""

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

    def step(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        (output,) = outputs.values()
        source = inputs["source"]
        output.copy_(source)
        if bool(torch.isfinite(output).all()):
            return
        ref = self.transform.source
        if bool(torch.isfinite(source).all()):
            raise _overflow(ref.name, self.transform.dtype)
        if self.transform.action == "replaced":
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

    def step(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
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
