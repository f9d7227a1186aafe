"""PEFT's LoRA: the factors of one module, how they fold into its weight, and their ranks and scalings.

Linear, Conv1D, Embedding, torch's convolutions and MultiheadAttention; CorDA, PiSSA and OLoRA are LoRA too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.factors import Additive, Block, Initialization, Layout, UsualChange
from corda_convert.adapters.patterns import check_pattern
from corda_convert.adapters.source import CONFIG_FILE, integer, number
from corda_convert.checkpoint.layout import matrix_shape
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.structure import LayerKind
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.checkpoint.transposed_file import LARGE_BYTES, transposed
from corda_convert.errors import AdapterMismatch, UnsupportedInput

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RESIDUAL_INITS = ("corda", "pissa", "olora", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraFactors(UsualChange):
    """LoRA factors of one module: `ΔW = s·B·A`, or `s·(BA − B₀A₀)` where the initial factors are given.

    `lora_A` is (r, d_in), `lora_B` (d_out, r), as PEFT stores them for every layer type but a convolution, whose factors
    are seen as such matrices: its d_in is in·k₁·k₂….

    Attributes:
        kernel: a convolution's; nothing for a matrix.
        parameter: what the module calls its weight.
        kinds: types of module that the factors can be for.
        rounds_delta: see `ParameterChange`.
    """

    module_name: str
    lora_A: TensorRef
    lora_B: TensorRef
    scaling: float
    is_embedding: bool = False
    initial_lora_A: TensorRef | None = None
    initial_lora_B: TensorRef | None = None
    kernel: tuple[int, ...] = ()
    parameter: str = "weight"
    kinds: tuple[LayerKind, ...] = ("linear", "conv1d")
    rounds_delta: bool = False

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        return (f"{self.module_name}.{self.parameter}",)

    def fit(self, target: Target) -> Layout:
        layouts = self._layouts(target)
        fitting = [layout for layout in layouts if self._has_shape(target, layout)]
        if len(fitting) == 2:
            raise UnsupportedInput(
                f"{target.name} is square, and without the model's class it is not known whether it is stored as "
                "(d_out, d_in) or transposed.",
                next_step="Put the model's config.json beside its weights, of an architecture that transformers knows.",
            )
        if not fitting:
            shape = target.shape if self.kernel or len(target.shape) != 2 else oriented(target.shape, layouts[0])
            columns = (self.lora_A.shape[1] // math.prod(self.kernel), *self.kernel)
            raise AdapterMismatch(
                f"Adapter does not fit {self.module_name}: the weight is {shape}, "
                f"lora_B gives {self.lora_B.shape[0]} rows and lora_A {' × '.join(map(str, columns))} columns."
            )
        return fitting[0]

    def _layouts(self, target: Target) -> tuple[Layout, ...]:
        """How the matrix may lie. Raises one of our errors if the factors are for another type of module."""
        if target.kind == "parameter" and target.is_plain and len(target.shape) == 2 and "linear" in self.kinds:
            return ("out_in",)  # a router, which was a Linear in transformers 4
        if target.kind in ("other", "parameter"):
            raise UnsupportedInput(
                f"{self.module_name} is no Linear, Conv1D, Embedding, convolution or MultiheadAttention."
            )
        if target.kind is not None and target.kind not in self.kinds:
            raise AdapterMismatch(
                f"{self.module_name} is of type {target.kind}, the adapter's factors are not for that."
            )
        if self.is_embedding or target.kind == "conv1d":
            return ("in_out",)
        if target.kind is None and "conv1d" in self.kinds:
            return ("out_in", "in_out")
        return ("out_in",)

    def _has_shape(self, target: Target, layout: Layout) -> bool:
        if len(target.shape) != 2 + len(self.kernel) or target.shape[2:] != self.kernel:
            return False
        matrix = matrix_shape(target.shape)
        return (self.lora_B.shape[0], self.lora_A.shape[1]) == oriented(matrix, layout)

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        read_columns = self._reads_columns(block)
        return {
            name: ref.rows(*block.outputs) if name.endswith("_B") else (transposed(ref) if read_columns else ref)
            for name, ref in self.tensors().items()
        }

    def _reads_columns(self, block: Block) -> bool:
        """Whether A, of a large vocabulary, is read by its columns, with the stored rows."""
        whole = (0, self.lora_A.shape[-1])
        return block.layout == "in_out" and block.inputs == whole and self.lora_A.spec.nbytes >= LARGE_BYTES

    def tensors(self) -> Mapping[str, TensorRef]:
        """Every factor, whole, by its name in PEFT."""
        named = {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "initial_lora_A": self.initial_lora_A,
            "initial_lora_B": self.initial_lora_B,
        }
        return {name: ref for name, ref in named.items() if ref is not None}

    def streams(self, block: Block) -> frozenset[str]:
        streamed = {"lora_B", "initial_lora_B"} if block.layout == "out_in" else set()
        if self._reads_columns(block):
            streamed = {"lora_A", "initial_lora_A"}
        return frozenset(streamed & set(self.tensors()))

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> LoraFold:
        own = {
            name: tensor[:, slice(*block.inputs)] if name.endswith("_A") and not self._reads_columns(block) else tensor
            for name, tensor in whole.items()
        }
        if block.layout == "out_in":
            return _LinearFold(self.scaling * scale, own)
        if self._reads_columns(block):
            return _ColumnFold(self.scaling * scale, own)
        return _TransposedFold(self.scaling * scale, own)

    def describe(self) -> dict[str, object]:
        return {"kind": "lora", "rank": self.rank, "scaling": self.scaling}


def oriented(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """(d_out, d_in) of a matrix of this shape."""
    return (shape[0], shape[1]) if layout == "out_in" else (shape[1], shape[0])


@dataclass(frozen=True, slots=True)
class LoraFold(Additive):
    """Folding `ΔW` into a block."""

    scaling: float
    whole: Mapping[str, Tensor]

    def change(self, first: int, stop: int, streamed: Mapping[str, Tensor]) -> Tensor:
        """`ΔW` in rows `first … stop` of the block. Valid until the thread's next call."""
        raise NotImplementedError

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        from corda_convert.linalg.lora import square

        change = self.change(first, first + rows.shape[0], streamed)
        rows += change
        return square(change)


@dataclass(frozen=True, slots=True)
class _LinearFold(LoraFold):
    """Rows are outputs: rows of B against the whole of A."""

    def change(self, first: int, stop: int, streamed: Mapping[str, Tensor]) -> Tensor:
        from corda_convert.linalg import lora

        lefts = {name: tensor[first:stop] for name, tensor in self.whole.items() if name.endswith("_B")} | dict(
            streamed
        )
        right, left = self.whole["lora_A"], lefts["lora_B"]
        if "initial_lora_A" in self.whole:
            right, left = lora.difference(right, left, self.whole["initial_lora_A"], lefts["initial_lora_B"])
        return lora.delta(right, left, self.scaling)


@dataclass(frozen=True, slots=True)
class _TransposedFold(LoraFold):
    """Rows are inputs: columns of A against the whole of B. The product is taken before the transpose, as PEFT does."""

    def change(self, first: int, stop: int, streamed: Mapping[str, Tensor]) -> Tensor:
        from corda_convert.linalg import lora

        right, left = self.whole["lora_A"][:, first:stop], self.whole["lora_B"]
        if "initial_lora_A" in self.whole:
            initial = self.whole["initial_lora_A"][:, first:stop]
            right, left = lora.difference(right, left, initial, self.whole["initial_lora_B"])
        return lora.delta(right, left, self.scaling).T


@dataclass(frozen=True, slots=True)
class _ColumnFold(LoraFold):
    """Rows are inputs, and A comes by its columns with them; those of a change that goes through some of the rows, whole."""

    def change(self, first: int, stop: int, streamed: Mapping[str, Tensor]) -> Tensor:
        from corda_convert.linalg import lora

        rights = {name: tensor[first:stop] for name, tensor in self.whole.items() if name.endswith("_A")} | dict(
            streamed
        )
        right, left = rights["lora_A"].T, self.whole["lora_B"]
        if "initial_lora_A" in rights:
            right, left = lora.difference(right, left, rights["initial_lora_A"].T, self.whole["initial_lora_B"])
        return lora.delta(right, left, self.scaling).T


@dataclass(frozen=True, slots=True)
class LoraScaling:
    """Rank and scaling of each module, by PEFT's own rules (`get_pattern_key`, `LoraLayer.update_layer`)."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module_name: str) -> int:
        return self.rank_pattern.get(pattern_key(self.rank_pattern, module_name), self.rank)

    def alpha_of(self, module_name: str) -> float:
        return self.alpha_pattern.get(pattern_key(self.alpha_pattern, module_name), self.alpha)

    def scaling_of(self, module_name: str) -> float:
        rank, alpha = self.rank_of(module_name), self.alpha_of(module_name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def unmatched(self, module_names: Iterable[str]) -> list[str]:
        """Patterns that no module takes."""
        names = list(module_names)
        used = {pattern_key(pattern, name) for pattern in (self.rank_pattern, self.alpha_pattern) for name in names}
        return [key for key in {**self.rank_pattern, **self.alpha_pattern} if key not in used]


def pattern_key(patterns: Iterable[str], module_name: str) -> str:
    """The first pattern that the end of the module's path matches, or the path itself. Raises `AdapterMismatch`."""
    for pattern in patterns:
        try:
            if re.match(rf"(.*\.)?({pattern})$", module_name):
                return pattern
        except re.error as error:
            raise AdapterMismatch(
                f"{CONFIG_FILE}: the pattern {pattern!r} is no regular expression: {error}."
            ) from None
    return module_name


def read_scaling(config: dict[str, Any]) -> LoraScaling:
    """Rank, alpha and patterns of a LoRA config. Raises `AdapterMismatch`."""
    rank_pattern = config.get("rank_pattern") or {}
    alpha_pattern = config.get("alpha_pattern") or {}
    if not isinstance(rank_pattern, dict) or not isinstance(alpha_pattern, dict):
        raise AdapterMismatch(f"{CONFIG_FILE}: rank_pattern and alpha_pattern must be objects.")
    for pattern in (*rank_pattern, *alpha_pattern):
        check_pattern(pattern)
    return LoraScaling(
        rank=integer(config, "r", 8),
        alpha=number(config, "lora_alpha", 8),
        use_rslora=bool(config.get("use_rslora", False)),
        rank_pattern={key: integer(rank_pattern, key, 1) for key in rank_pattern},
        alpha_pattern={key: number(alpha_pattern, key, 1) for key in alpha_pattern},
    )


def initialization(config: dict[str, Any]) -> Initialization:
    """Whether the config itself says that the adapter was trained beside a residual."""
    init = str(config.get("init_lora_weights", True)).lower()
    return "residual" if init.startswith(_RESIDUAL_INITS) else "plain"
