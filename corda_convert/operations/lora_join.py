"""Putting LoRA factors together as they are: `[A; A₀]`, `[B | −B₀]`, with zeros where a higher rank is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, TensorSpec
from corda_convert.errors import NotFinite
from corda_convert.plan.model import Facts, Session, Step
from corda_convert.plan.model import Part as Rows
from corda_convert.plan.packing import row_blocks

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

    A block of the output's rows is one step: side by side the same rows of all parts, one below the other those of one part.

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
    is_in_any_order = True
    described = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def steps(self) -> Sequence[Step]:
        """The blocks, in the order of the rows."""
        rows = self.output.shape[0] if self.rows is None else self.rows
        width = self.output.elements // max(rows, 1)
        named = [(str(index), part.ref) for index, part in enumerate(self.parts)]
        if self.dim == 1:
            return [
                self._step({name: ref.rows(begin, end) for name, ref in named}, begin, end, rows)
                for begin, end in row_blocks((rows, width))
            ]
        steps, first = [], 0
        for name, ref in named:
            for begin, end in row_blocks(ref.shape):
                steps.append(self._step({name: ref.rows(begin, end)}, first + begin, first + end, rows))
            first += ref.shape[0]
        zeros = row_blocks((rows - first, width)) if rows > first else []
        return steps + [self._step({}, first + begin, first + end, rows) for begin, end in zeros]

    def _step(self, operands: Mapping[str, TensorRef], begin: int, end: int, rows: int) -> Step:
        return Step(operands, {self.output.name: Rows(begin, end, rows)})

    def workspace_bytes(self, rows: int) -> int:
        """Of one step: a part times its factor in float64, and the output in float32 for its norm."""
        elements = max((ref.spec.elements for step in self.steps for ref in step.operands.values()), default=0)
        scaled = 16 * elements if any(part.factor != 1.0 for part in self.parts) else 0
        return scaled + max(4, DTYPE_BITS[self.output.dtype] // 8) * elements * len(self.parts)

    def begin(self, device: torch.device) -> Session:
        return _JoinSession(self)


@dataclass(slots=True)
class _JoinSession:
    transform: JoinTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Fills one block of rows, with what is in `inputs` and zeros."""
        from corda_convert.linalg.finite import is_finite

        (output,) = outputs.values()
        dim, begin = self.transform.dim, 0
        parts = {str(index): part for index, part in enumerate(self.transform.parts)}
        for name, tensor in inputs.items():
            factor, size = parts[name].factor, tensor.shape[dim]
            output.narrow(dim, begin, size).copy_(tensor if factor == 1.0 else _times(tensor, factor))
            begin += size
        output.narrow(dim, begin, output.shape[dim] - begin).zero_()
        if not is_finite(output):
            for name, tensor in inputs.items():
                check_finite(parts[name].ref, tensor)
            raise out_of_range(self.transform.output)

    def facts(self) -> Facts:
        return {"parts": [part.ref.name for part in self.transform.parts]}


def _times(tensor: Tensor, factor: float) -> Tensor:
    """Exact for −1; else in float64, which the output rounds once."""
    return -tensor if factor == -1.0 else tensor.double() * factor


def check_finite(ref: TensorRef, tensor: Tensor) -> None:
    """Raises `NotFinite` that names the tensor."""
    from corda_convert.linalg.finite import is_finite

    if not is_finite(tensor):
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
