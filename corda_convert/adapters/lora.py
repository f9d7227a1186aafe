"""PEFT's LoRA on Linear, Conv1D and Embedding, with rank and alpha patterns and rsLoRA; CorDA, PiSSA and OLoRA too.

Everything is driven by the keys in the file. What this version does not fold is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.factors import Adapter, Additive, Block, Initialization, Layout, RowFold
from corda_convert.adapters.replacements import same_place, split_replacements
from corda_convert.adapters.source import CONFIG_FILE, AdapterSource, integer, number
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.structure import LayerKind
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import (
    AdapterMismatch,
    CordaConvertError,
    UnsupportedInput,
    raise_problems,
    some,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>A|B)\.weight$")
_EMBEDDING_FACTOR = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>A|B)$")

_RESIDUAL_INITS = ("corda", "pissa", "olora", "lora_ga")

_UNSUPPORTED_OPTIONS = {
    "use_dora": "DoRA", "lora_bias": "LoRA biases", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA", "arrow_config": "Arrow", "alora_invocation_tokens": "aLoRA",
    "monteclora_config": "MonteCLoRA", "layer_replication": "layer replication",
    "target_parameters": "LoRA on parameters (target_parameters)", "trainable_token_indices": "trainable tokens",
    "loftq_config": "LoftQ",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoraFactors:
    """LoRA factors of one module: `ΔW = s·B·A`, or `s·(BA − B₀A₀)` where the initial factors are given.

    `lora_A` is (r, d_in), `lora_B` (d_out, r), as PEFT stores them for every layer type.
    """

    module_name: str
    lora_A: TensorRef
    lora_B: TensorRef
    scaling: float
    is_embedding: bool = False
    initial_lora_A: TensorRef | None = None
    initial_lora_B: TensorRef | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def rounds_delta(self) -> bool:
        return self.is_embedding

    @property
    def follows_ties(self) -> bool:
        return False

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        return (f"{self.module_name}.weight",)

    def fit(self, target: Target) -> Layout:
        if len(target.shape) != 2:
            raise UnsupportedInput(
                f"{self.module_name}: its weight has {len(target.shape)} dimensions {target.shape}; this version "
                "folds LoRA into matrices only."
            )
        if target.kind is not None and self.is_embedding != (target.kind == "embedding"):
            raise AdapterMismatch(
                f"{self.module_name} is of type {target.kind}, the adapter's factors are not for that."
            )
        layouts = self._layouts(target.kind)
        fitting = [layout for layout in layouts if self._has_shape(target, layout)]
        if len(fitting) == 2:
            raise UnsupportedInput(
                f"{target.name} is square, and without the model's class it is not known whether it is stored as "
                "(d_out, d_in) or transposed.",
                next_step="Put the model's config.json beside its weights, of an architecture that transformers knows.",
            )
        if not fitting:
            d_out, d_in = oriented(target.shape, layouts[0])
            raise AdapterMismatch(
                f"Adapter does not fit {self.module_name}: the weight is ({d_out}, {d_in}), "
                f"lora_B gives {self.lora_B.shape[0]} rows and lora_A {self.lora_A.shape[1]} columns."
            )
        return fitting[0]

    def _layouts(self, kind: LayerKind | None) -> tuple[Layout, ...]:
        if self.is_embedding or kind == "conv1d":
            return ("in_out",)
        if kind == "linear":
            return ("out_in",)
        if kind is None:
            return ("out_in", "in_out")
        raise UnsupportedInput(f"{self.module_name} is no Linear, Conv1D or Embedding layer.")

    def _has_shape(self, target: Target, layout: Layout) -> bool:
        return (self.lora_B.shape[0], self.lora_A.shape[1]) == oriented(target.shape, layout)

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        refs = self.tensors()
        return {name: ref.rows(*block.outputs) if name.endswith("_B") else ref for name, ref in refs.items()}

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
        return (
            frozenset({"lora_B", "initial_lora_B"} & set(self.tensors())) if block.layout == "out_in" else frozenset()
        )

    def row_quantum(self, block: Block) -> int:
        return 1

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        own = {
            name: tensor[:, slice(*block.inputs)] if name.endswith("_A") else tensor for name, tensor in whole.items()
        }
        if block.layout == "out_in":
            return _LinearFold(self.scaling * scale, own)
        return _TransposedFold(self.scaling * scale, own)

    def describe(self) -> dict[str, object]:
        return {"kind": "lora", "rank": self.rank, "scaling": self.scaling}


def oriented(shape: tuple[int, ...], layout: Layout) -> tuple[int, int]:
    """(d_out, d_in) of a matrix of this shape."""
    return (shape[0], shape[1]) if layout == "out_in" else (shape[1], shape[0])


@dataclass(frozen=True, slots=True)
class _LinearFold(Additive):
    """Rows are outputs: rows of B against the whole of A."""

    scaling: float
    whole: Mapping[str, Tensor]

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        from corda_convert.linalg import lora

        stop = first + rows.shape[0]
        lefts = {name: tensor[first:stop] for name, tensor in self.whole.items() if name.endswith("_B")} | dict(
            streamed
        )
        right, left = self.whole["lora_A"], lefts["lora_B"]
        if "initial_lora_A" in self.whole:
            right, left = lora.difference(right, left, self.whole["initial_lora_A"], lefts["initial_lora_B"])
        return add(rows, lora.delta(right, left, self.scaling))


@dataclass(frozen=True, slots=True)
class _TransposedFold(Additive):
    """Rows are inputs: columns of A against the whole of B. The product is taken before the transpose, as PEFT does."""

    scaling: float
    whole: Mapping[str, Tensor]

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        from corda_convert.linalg import lora

        columns = slice(first, first + rows.shape[0])
        right, left = self.whole["lora_A"][:, columns], self.whole["lora_B"]
        if "initial_lora_A" in self.whole:
            initial = self.whole["initial_lora_A"][:, columns]
            right, left = lora.difference(right, left, initial, self.whole["initial_lora_B"])
        return add(rows, lora.delta(right, left, self.scaling).T)


def add(rows: Tensor, change: Tensor) -> float:
    """Adds a change to rows in place, and gives its squared norm."""
    from corda_convert.linalg.lora import square

    rows += change
    return square(change)


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


class LoraFormat:
    """`peft_type: LORA`."""

    peft_types = ("LORA",)

    def parse(self, source: AdapterSource) -> Adapter:
        problems: list[CordaConvertError] = list(_unsupported(source))
        scaling = read_scaling(source.config)
        sides: dict[str, dict[str, TensorRef]] = {}
        embeddings: set[str] = set()
        rest: dict[str, TensorRef] = {}
        for key, ref in source.tensors.items():
            match = _FACTOR.match(key) or _EMBEDDING_FACTOR.match(key)
            if match is None:
                rest[key] = ref
                continue
            pair = sides.setdefault(match["module"], {})
            if match["side"] in pair:
                problems.append(same_place(source, pair[match["side"]], ref))
            pair[match["side"]] = ref
            if match.re is _EMBEDDING_FACTOR:
                embeddings.add(match["module"])
        modules = []
        for module, pair in sides.items():
            factors = _factors(source, module, pair, scaling, module in embeddings)
            if isinstance(factors, LoraFactors):
                modules.append(factors)
            else:
                problems.append(factors)
        problems += _pattern_problems(scaling, sides)
        bases = {module: rest.pop(key) for module in sides if (key := f"{module}.base_layer.weight") in rest}
        replacements, leftovers = split_replacements(source, rest)
        problems += leftovers
        raise_problems(problems)
        return Adapter(source, "lora", initialization(source.config), tuple(modules), replacements, bases)


def _unsupported(source: AdapterSource) -> Iterable[CordaConvertError]:
    for option, what in _UNSUPPORTED_OPTIONS.items():
        if source.config.get(option):
            yield UnsupportedInput(
                f"{source.name} uses {what} ({option} in {CONFIG_FILE}), which this version does not fold.",
                next_step="Merge it with PEFT's merge_and_unload for now.",
            )
    if str(source.config.get("init_lora_weights")).lower() == "loftq":
        yield UnsupportedInput(f"{source.name} was initialized with LoftQ, which needs the quantized base.")


def _factors(
    source: AdapterSource, module: str, pair: dict[str, TensorRef], scaling: LoraScaling, is_embedding: bool
) -> LoraFactors | CordaConvertError:
    if set(pair) != {"A", "B"}:
        (present,) = pair
        return AdapterMismatch(
            f"{source.name}: {module} has lora_{present} but no lora_{'B' if present == 'A' else 'A'}.",
            why="The adapter file is incomplete.",
        )
    A, B = pair["A"], pair["B"]
    for side, ref in pair.items():
        if ref.spec.dtype not in COMPUTABLE_DTYPES:
            return UnsupportedInput(f"{source.name}: lora_{side} of {module} has the dtype {ref.spec.dtype}.")
    if len(A.shape) > 2 or len(B.shape) > 2:
        return UnsupportedInput(
            f"{source.name}: {module} is a convolution (lora_A {A.shape}), which this version does not fold."
        )
    rank = scaling.rank_of(module)
    if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != rank or B.shape[1] != rank:
        return AdapterMismatch(
            f"{source.name}: {module} has lora_A {A.shape} and lora_B {B.shape}; {CONFIG_FILE} says rank {rank}, so "
            f"({rank}, d_in) and (d_out, {rank}) were expected.",
            why="The config and the weights are not of one adapter.",
        )
    return LoraFactors(module, A, B, scaling.scaling_of(module), is_embedding)


def _pattern_problems(scaling: LoraScaling, modules: Iterable[str]) -> list[CordaConvertError]:
    unmatched = scaling.unmatched(modules)
    if not unmatched:
        return []
    return [
        AdapterMismatch(
            f"{CONFIG_FILE}: no adapted module matches the rank or alpha pattern {some(unmatched)}.",
            why="The patterns and the weights are not of one adapter, or a name was mistyped in training.",
            next_step="Correct or remove the pattern in the config.",
        )
    ]
