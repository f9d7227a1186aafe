"""DoRA (arXiv:2402.09353): LoRA whose result gets a norm of its own for each output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corda_convert.adapters.factors import Block, Layout, ParameterChange, RowFold, UsualChange
from corda_convert.adapters.lora import LoraFactors, LoraFold
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, NotFinite, UnsupportedInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DoraFactors(UsualChange):
    """`W' = (m / ‖V‖) · V` with `V = W + s·B·A`: `‖V‖` is the norm of what goes to each output, `magnitude` m is (d_out)."""

    lora: LoraFactors
    magnitude: TensorRef

    @property
    def module_name(self) -> str:
        return self.lora.module_name

    @property
    def is_embedding(self) -> bool:
        return self.lora.is_embedding

    @property
    def is_linear(self) -> bool:
        return False

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        return self.lora.parameters(known)

    def fit(self, target: Target) -> Layout:
        layout = self.lora.fit(target)
        d_out = self.lora.lora_B.shape[0]
        if self.magnitude.shape != (d_out,):
            raise AdapterMismatch(
                f"Adapter does not fit {self.module_name}: lora_magnitude_vector is {self.magnitude.shape}, the weight has "
                f"{d_out} outputs."
            )
        if layout == "in_out" and any(place.piece.count != target.shape[0] for place in target.places):
            raise UnsupportedInput(
                f"{self.module_name}: {target.name} lies on disk in several tensors, which DoRA's norms would go across."
            )
        return layout

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        return {**self.lora.operands(block), "magnitude": self.magnitude.rows(*block.outputs)}

    def streams(self, block: Block) -> frozenset[str]:
        return self.lora.streams(block)

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        if scale != 1.0:
            raise UnsupportedInput(f"{self.module_name}: DoRA cannot be taken {scale:g} times.")
        inner = self.lora.begin(block, whole, dtype, scale)
        if block.layout == "out_in":
            return _DoraFold(self.module_name, inner, whole["magnitude"])
        return _TransposedDoraFold(self.module_name, inner, whole["magnitude"])

    def describe(self) -> dict[str, object]:
        return {**self.lora.describe(), "kind": "dora"}


def lora_factors(changes: Iterable[ParameterChange]) -> list[LoraFactors]:
    """The LoRA factors of every change that has them, DoRA's too."""
    inner = (change.lora if isinstance(change, DoraFactors) else change for change in changes)
    return [change for change in inner if isinstance(change, LoraFactors)]


@dataclass(slots=True)
class _DoraFold:
    """Rows are outputs: each has its own norm."""

    module_name: str
    lora: LoraFold
    magnitude: Tensor
    needs_sweep: bool = field(default=False, init=False)

    def sweep(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> None:
        raise NotImplementedError

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        import torch

        stop = first + rows.shape[0]
        before = rows.clone()
        rows += self.lora.change(first, stop, streamed)
        norms = torch.linalg.vector_norm(rows, dim=1)
        rows *= _factors(self.module_name, self.magnitude[first:stop], norms)[:, None]
        return _square_of_difference(rows, before)


@dataclass(slots=True)
class _TransposedDoraFold:
    """Rows are inputs: the norms go across all of them."""

    module_name: str
    lora: LoraFold
    magnitude: Tensor
    needs_sweep: bool = field(default=True, init=False)
    squares: Tensor | None = field(default=None, init=False)

    def sweep(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> None:
        rows += self.lora.change(first, first + rows.shape[0], streamed)
        squares = rows.double().square_().sum(dim=0)
        self.squares = squares if self.squares is None else self.squares.add_(squares)

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        assert self.squares is not None  # noqa: S101 - the sweep went before
        before = rows.clone()
        rows += self.lora.change(first, first + rows.shape[0], streamed)
        rows *= _factors(self.module_name, self.magnitude, self.squares.sqrt().to(rows.dtype))
        return _square_of_difference(rows, before)


def _factors(module_name: str, magnitude: Tensor, norms: Tensor) -> Tensor:
    """What each output is multiplied with. Raises `NotFinite` for an output that nothing goes to."""
    if not bool(norms.all()):
        raise NotFinite(
            f"{module_name}: the weight with the adapter's change is zero for an output, and DoRA divides by its norm.",
            why="The model or the adapter is damaged.",
        )
    return magnitude / norms


def _square_of_difference(rows: Tensor, before: Tensor) -> float:
    from corda_convert.linalg.lora import square

    return square(before.sub_(rows))
