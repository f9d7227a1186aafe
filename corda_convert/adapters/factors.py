"""What every adapter format offers: typed changes of one parameter each, and how they fold into its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, Self

from corda_convert.adapters.source import AdapterSource
from corda_convert.checkpoint.layout import Piece
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Layout = Literal["out_in", "in_out"]
"""How a matrix is stored: (d_out, d_in) as Linear does, or (d_in, d_out) as Conv1D and, read as LoRA, Embedding do."""

Initialization = Literal["plain", "residual"]
"""`plain`: the delta belongs on the base. `residual`: the adapter was trained beside `W − s·B₀A₀`."""


@dataclass(frozen=True, slots=True)
class Block:
    """The part of a matrix that a block of stored rows holds.

    Attributes:
        layout: whether the stored rows are outputs or inputs.
        outputs: half-open range of the matrix's outputs that the block holds.
        inputs: half-open range of its inputs. One of the two ranges is whole.
        expert: which matrix of a stack; None for a parameter that is one matrix.
        experts: how many the stack has; 1 for a parameter that is one matrix.
    """

    layout: Layout
    outputs: tuple[int, int]
    inputs: tuple[int, int]
    expert: int | None = None
    experts: int = 1

    @property
    def rows(self) -> tuple[int, int]:
        """The range that the stored rows go through."""
        return self.outputs if self.layout == "out_in" else self.inputs


def block_of(piece: Piece, layout: Layout, shape: tuple[int, int], experts: int = 1) -> Block:
    """The block that a piece of a stored tensor holds; `layout` and `shape` are those of the matrix at run time."""
    part, other = (piece.first, piece.first + piece.count), (0, shape[1])
    outputs, inputs = (part, other) if layout == "out_in" else (other, part)
    flipped: Layout = "in_out" if layout == "out_in" else "out_in"
    return Block(flipped if piece.transposed else layout, outputs, inputs, piece.expert, experts)


class RowFold(Protocol):
    """Folding into one block while it runs. Tensors are on the compute device; several threads call at once."""

    @property
    def needs_sweep(self) -> bool:
        """Whether `sweep` must see all the rows before the first `fold`."""
        ...

    def sweep(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> None:
        """Takes note of `rows`, as `fold` will get them. Called for the whole block, front to back."""
        ...

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        """Changes `rows` in place: rows `first …` of the stored block, in float32 or float64.

        Returns the squared Frobenius norm of the change. `streamed` holds the same rows of the streamed operands.
        """
        ...


class ParameterChange(Protocol):
    """What an adapter does to one parameter: which tensors it needs, whether they fit, and the folding."""

    @property
    def module_name(self) -> str: ...

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        """Names that the parameter may have at run time, the likeliest first.

        `known` are the model's parameters in the order of their registration, or nothing without the model's class.
        """
        ...

    @property
    def is_embedding(self) -> bool:
        """Whether it is for an Embedding, whose weight the head may share."""
        ...

    @property
    def rounds_delta(self) -> bool:
        """Whether PEFT rounds the change to the weight's dtype before it adds it."""
        ...

    @property
    def is_linear(self) -> bool:
        """Whether it can be taken any number of times; false for a norm that is set, or rows that are replaced."""
        ...

    @property
    def keeps_tie(self) -> bool:
        """Whether PEFT makes the same change to every weight that is tied to this one (trainable tokens)."""
        ...

    def for_target(self, target: Target) -> ParameterChange:
        """The change with what only its parameter tells: nothing for most of them."""
        ...

    def fit(self, target: Target) -> Layout:
        """How the matrix lies at run time. Raises one of our errors if the factors do not fit the target."""
        ...

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        """What folding into the block reads, by operand name."""
        ...

    def streams(self, block: Block) -> frozenset[str]:
        """The operands whose rows go with the block's rows; the others are read whole."""
        ...

    def row_quantum(self, block: Block) -> int:
        """Rows are folded in blocks that begin at multiples of this."""
        ...

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        """Starts folding `scale` times the change, with the operands that are read whole.

        They are on the device, in `dtype`, and may be kept.
        """
        ...

    def describe(self) -> dict[str, object]:
        """Kind, rank, scaling and mode, for the receipt."""
        ...


class UsualChange:
    """Base of changes: what most of them answer. A change that differs says so."""

    __slots__ = ()

    @property
    def is_embedding(self) -> bool:
        return False

    @property
    def rounds_delta(self) -> bool:
        return False

    @property
    def is_linear(self) -> bool:
        return True

    @property
    def keeps_tie(self) -> bool:
        return False

    def for_target(self, target: Target) -> Self:
        return self

    def streams(self, block: Block) -> frozenset[str]:
        return frozenset()

    def row_quantum(self, block: Block) -> int:
        return 1


class Additive:
    """Base of folds that add something that does not depend on the weight: they need no sweep."""

    __slots__ = ()

    @property
    def needs_sweep(self) -> bool:
        return False

    def sweep(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> None:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed adapter.

    Attributes:
        modules: changes of parameters, in the order in which they apply.
        replacements: parameters that replace the base's, by run-time name.
        bases: weights that the adapter brings along for adapted modules: each replaces the base's before the folding.
    """

    source: AdapterSource
    kind: str
    initialization: Initialization
    modules: tuple[ParameterChange, ...]
    replacements: Mapping[str, TensorRef] = field(default_factory=dict)
    bases: Mapping[str, TensorRef] = field(default_factory=dict)


class AdapterFormat(Protocol):
    """Parses the adapters of some peft types."""

    @property
    def peft_types(self) -> tuple[str, ...]: ...

    def parse(self, source: AdapterSource) -> Adapter:
        """Accounts for every tensor of the file. Raises one of our errors, all problems together."""
        ...


def dimensions(weight: TensorSpec, layout: Layout) -> tuple[int, int]:
    """(d_out, d_in) of a 2D weight."""
    return (weight.shape[0], weight.shape[1]) if layout == "out_in" else (weight.shape[1], weight.shape[0])
