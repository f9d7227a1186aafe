"""What every adapter format offers: typed factors for one module, and how they fold into its weight by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from corda_convert.adapters.source import AdapterSource
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.errors import CordaConvertError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Layout = Literal["out_in", "in_out"]
"""How a weight is stored: (d_out, d_in) as Linear does, or (d_in, d_out) as Conv1D and, read as LoRA, Embedding do."""

Initialization = Literal["plain", "residual"]
"""`plain`: the delta belongs on the base. `residual`: the adapter was trained beside `W − s·B₀A₀`."""


class RowFold(Protocol):
    """Folding of one module while it runs. Tensors are on the compute device."""

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        """Adds the adapter's part to `rows`, in place: rows `first …` of the stored weight, in float32 or float64.

        Returns the squared Frobenius norm of the change. `streamed` holds the same rows of the streamed operands.
        """
        ...


class ModuleFactors(Protocol):
    """One adapted module: which tensors it needs, whether they fit a weight, and the folding."""

    @property
    def module_name(self) -> str: ...

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are for an Embedding, which only LoRA has."""
        ...

    def operands(self) -> Mapping[str, TensorRef]:
        """Every tensor of this module, by operand name."""
        ...

    def streams(self, layout: Layout) -> frozenset[str]:
        """The operands whose rows go with the weight's rows; the others are read whole."""
        ...

    def row_quantum(self) -> int: ...

    def check(self, weight: TensorSpec, layout: Layout) -> list[CordaConvertError]:
        """What does not fit this weight; nothing if all fits."""
        ...

    def begin(self, layout: Layout, whole: Mapping[str, Tensor], dtype: torch.dtype) -> RowFold:
        """Starts folding, with the operands that are read whole. They are on the device and may be kept."""
        ...

    def describe(self) -> dict[str, object]:
        """Rank, scaling and mode, for the receipt."""
        ...


@dataclass(frozen=True, slots=True)
class Adapter:
    """A parsed adapter.

    Attributes:
        modules: factors by module.
        replacements: parameters that replace the base's, by run-time name.
        bases: weights that the adapter brings along for adapted modules: each replaces the base's before the folding.
    """

    source: AdapterSource
    kind: str
    initialization: Initialization
    modules: tuple[ModuleFactors, ...]
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
