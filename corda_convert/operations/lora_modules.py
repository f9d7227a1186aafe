"""What a converted LoRA is made of: for each module factors to be added up, and perhaps a dense change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from corda_convert.checkpoint.tensors import TensorRef

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.checkpoint.names import NameMap
    from corda_convert.linalg.threads import Team
    from corda_convert.operations.production import Input
    from corda_convert.output.side_files import SideFile

OUT_PROJ = ".base_layer.out_proj"
"""What PEFT adds to a MultiheadAttention's path for its output projection."""


@dataclass(frozen=True, slots=True)
class Summand:
    """`factor · B·A`: `lora_A` (r, d_in), `lora_B` (d_out, r).

    Of a stack of E experts, as PEFT lays them out: `lora_A` (E·r, d_in), expert after expert, and `lora_B` (d_out, r·E), column
    e of each of the r groups for expert e.
    """

    lora_A: TensorRef
    lora_B: TensorRef
    factor: float
    experts: int = 1

    @property
    def rank(self) -> int:
        """That of each expert."""
        return self.lora_A.shape[0] // self.experts


class DenseChange(Protocol):
    """A change of a weight that no factors are known of: computed from whole tensors."""

    @property
    def operands(self) -> Mapping[str, TensorRef]: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        ...

    def matrix(self, team: Team, operands: Mapping[str, Tensor], device: torch.device) -> Tensor:
        """The change (d_out, d_in) in float32, or float64 where an operand is."""
        ...


@dataclass(frozen=True, slots=True)
class LoraModule:
    """What one module of the result adds up to: `ΔW = Σ factorᵢ·BᵢAᵢ`, and `dense` where that is given.

    Attributes:
        key: the module's path in the result's tensor names.
        pattern_name: the path that PEFT's rank and alpha patterns are matched with.
        summands: factors, as they are stored.
        scaling: what all summands are multiplied with, of either sign, where they are of one adapter.
        dense: a change without factors.
        dense_rank: of the factors that are taken out of `dense`.
        is_embedding: whether the factors are named as an Embedding's.
        kernel: a convolution's.
        is_parameter: whether they are for a parameter (`target_parameters`), mostly a stack of experts.
        is_named: whether `pattern_name` is known to be that parameter's path; without the model it may be another's of the
            same module.
    """

    key: str
    pattern_name: str
    summands: tuple[Summand, ...]
    scaling: float = 1.0
    dense: DenseChange | None = None
    dense_rank: int = 0
    is_embedding: bool = False
    kernel: tuple[int, ...] = ()
    is_parameter: bool = False
    is_named: bool = True

    @property
    def experts(self) -> int:
        """How many matrices the parameter has; 1 for one that is no stack."""
        return self.summands[0].experts if self.summands else 1

    @property
    def rank(self) -> int:
        """The rank of the exact result, for each expert."""
        return sum(summand.rank for summand in self.summands) + self.dense_rank

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in); of a convolution's matrix, of one expert."""
        if self.summands:
            return self.summands[0].lora_B.shape[0], self.summands[0].lora_A.shape[1]
        assert self.dense is not None  # noqa: S101 - a module has one or the other
        return self.dense.shape

    @property
    def operands(self) -> tuple[TensorRef, ...]:
        """All that it is computed from."""
        factors = [ref for summand in self.summands for ref in (summand.lora_A, summand.lora_B)]
        return (*factors, *(() if self.dense is None else self.dense.operands.values()))

    @property
    def names(self) -> tuple[str, str]:
        """The names of the result's lora_A and lora_B, without PEFT's prefix."""
        if self.is_embedding:
            return f"{self.key}.lora_embedding_A", f"{self.key}.lora_embedding_B"
        return f"{self.key}.lora_A.weight", f"{self.key}.lora_B.weight"

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Those of lora_A and lora_B as PEFT stores them."""
        d_out, d_in = self.shape
        if not self.kernel:
            return (self.experts * rank, d_in), (d_out, rank * self.experts)
        return (rank, d_in // prod(self.kernel), *self.kernel), (d_out, rank, *(1 for _ in self.kernel))


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor that goes into the result beside the factors: `factor` times it, plus others so many times, as `name`."""

    name: str
    ref: TensorRef
    factor: float = 1.0
    others: tuple[tuple[TensorRef, float], ...] = ()

    @property
    def parts(self) -> tuple[tuple[TensorRef, float], ...]:
        """All that are added up, each so many times."""
        return ((self.ref, self.factor), *self.others)


@dataclass(frozen=True, slots=True)
class LoraSource:
    """Everything that a conversion knows before it computes.

    Attributes:
        modules: in the order of the result.
        carried: tensors that stay as they are.
        config: `adapter_config.json` that the result's is made from.
        inputs: what is read.
        options: for the receipt.
        what: one sentence for the card.
        tags: for the card.
        side_files: tokenizer files.
        keeps_scaling: whether PEFT's scaling of the config, with twice the rank, is that of every summand.
        base: the base's name, where it is known.
        names: of the base, where it was read.
        warnings: for the user.
        facts: for the receipt.
    """

    modules: tuple[LoraModule, ...]
    carried: tuple[Carried, ...]
    config: Mapping[str, Any]
    inputs: tuple[Input, ...]
    options: Mapping[str, Any]
    what: str
    tags: tuple[str, ...] = ("lora",)
    side_files: tuple[SideFile, ...] = ()
    keeps_scaling: bool = False
    base: str | None = None
    names: NameMap | None = None
    warnings: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
