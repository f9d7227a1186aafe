"""Putting LoRA factors together as they are: `[A; A₀]`, `[B | −B₀]`, with zeros where a higher rank is wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, TensorSpec
from corda_convert.errors import NotFinite
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """One operand of a join, a matrix, and the number it is multiplied with."""

    ref: TensorRef
    factor: float


@dataclass(frozen=True, slots=True)
class JoinTransform:
    """Puts LoRA factors together along one dimension, each times its factor; zeros follow where the output is larger.

    Attributes:
        parts: the factors as matrices.
        dim: 0 for lora_A, 1 for lora_B.
        output: of any shape; its first two dimensions, or its first and the rest, are the matrix's.
        action: for the receipt.
        rows: of the output seen as a matrix, where that is not its first dimension.
    """

    parts: tuple[Part, ...]
    dim: int
    output: TensorSpec
    action: str = "concatenated"
    rows: int | None = None

    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {str(index): part.ref for index, part in enumerate(self.parts)}

    def workspace_bytes(self, rows: int) -> int:
        wide = max((part.ref.spec.elements for part in self.parts if part.factor != 1.0), default=0)
        return 16 * wide + self.output.elements * DTYPE_BITS[self.output.dtype] // 8

    def begin(self, device: torch.device) -> Session:
        return _JoinSession(self)


@dataclass(slots=True)
class _JoinSession:
    transform: JoinTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        (output,) = outputs.values()
        matrix = output.view(self.transform.rows or output.shape[0], -1)
        begin = 0
        for index, part in enumerate(self.transform.parts):
            tensor = inputs[str(index)]
            size = tensor.shape[self.transform.dim]
            target = matrix.narrow(self.transform.dim, begin, size)
            target.copy_(tensor if part.factor == 1.0 else _times(tensor, part.factor))
            begin += size
        matrix.narrow(self.transform.dim, begin, matrix.shape[self.transform.dim] - begin).zero_()
        if not _is_finite(output):
            for index, part in enumerate(self.transform.parts):
                check_finite(part.ref, inputs[str(index)])
            raise out_of_range(self.transform.output)

    def facts(self) -> Facts:
        return {"parts": [part.ref.name for part in self.transform.parts]}


def _is_finite(tensor: Tensor) -> bool:
    """By the norm, in one pass; entry by entry where that is out of float32's range."""
    import torch

    norm = torch.linalg.vector_norm(tensor, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(norm)) or bool(torch.isfinite(tensor).all())


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Exact for −1; else in float64, which the output rounds once."""
    return -tensor if factor == -1.0 else tensor.double() * factor


def check_finite(ref: TensorRef, tensor: Tensor) -> None:
    """Raises `NotFinite` that names the tensor."""
    import torch

    if not bool(torch.isfinite(tensor).all()):
        raise NotFinite(
            f"{ref.name} in {ref.file.path} holds NaN or Inf.",
            why="The training diverged, or the file is damaged.",
            next_step="Use an earlier checkpoint of the training.",
        )


def out_of_range(output: TensorSpec) -> NotFinite:
    """A result that its dtype cannot hold."""
    return NotFinite(
        f"{output.name} holds values outside the range of {output.dtype}.",
        next_step="Choose --dtype bfloat16 or float32.",
    )
