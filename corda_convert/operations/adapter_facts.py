"""What an adapter is, as plain values: what `inspect` tells and what the rules of servers go by.

Told by its config and headers. Factors are read in one case alone: a config that names CorDA does not tell whether the
adapter was converted since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from corda_convert.adapters.bias import LoraBias
from corda_convert.adapters.dora import DoraFactors, lora_factors
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.replacements import SAVED_EMBEDDINGS
from corda_convert.adapters.source import AdapterSource
from corda_convert.adapters.tokens import TokenRows
from corda_convert.operations.evidence import residual_reason

_DEFAULT_RANK = 8
"""PEFT's, where a config has no `r`."""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """An adapter as a server sees it.

    Attributes:
        kind: `lora`, `miss`, `bone`, `trained_tokens`, or what RWKV-PEFT calls its blocks.
        is_folder: whether it is a folder of PEFT; else a file of RWKV-PEFT.
        mode: how its blocks are meant; nothing for LoRA.
        init: `init_lora_weights` of the config, as text.
        residual: what tells that it was trained beside a residual; nothing where nothing does.
        rank: `r` of the config.
        alpha: `lora_alpha` of the config.
        use_rslora: whether alpha is divided by the root of the rank.
        ranks: rank of each adapted module.
        scalings: scaling of each module with LoRA factors; none where the file does not tell it.
        target_modules: of the config.
        dora: modules with DoRA.
        embeddings: embeddings and heads with factors.
        experts: parameters with factors of their own (`target_parameters`).
        unusual: convolutions and MultiheadAttention.
        lora_biases: modules whose lora_B has a bias.
        tokens: embeddings with trained tokens.
        biases: trained biases, which replace the base's.
        saved: other parameters that replace the base's (modules_to_save, embeddings).
    """

    kind: str
    is_folder: bool = True
    mode: str = ""
    init: str = "true"
    residual: str = ""
    rank: int = 0
    alpha: float | None = None
    use_rslora: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)
    scalings: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | Sequence[str] | None = None
    dora: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    unusual: tuple[str, ...] = ()
    lora_biases: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()

    @property
    def served_rank(self) -> int:
        """The largest rank that a server has to take: twice its own for an adapter that has to be converted first."""
        return max(self.ranks.values(), default=0) * (2 if self.residual else 1)

    @property
    def scaling(self) -> float | None:
        """What the config alone gives for a module: alpha over r, or over its root."""
        if self.alpha is None or not self.rank:
            return None
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def facts_of(adapter: Adapter) -> AdapterFacts:
    """The facts of a parsed adapter."""
    source, changes = adapter.source, adapter.modules
    loras = lora_factors(changes)
    parameters = [change for change in changes if isinstance(change, ParameterFactors)]
    blocks = [change for change in changes if isinstance(change, BlockFactors)]
    rank = source.config.get("r")
    alpha = source.config.get("lora_alpha")
    ranked: list[LoraFactors | ParameterFactors | BlockFactors] = [*loras, *parameters, *blocks]
    scalings = {factors.module_name: factors.scaling for factors in loras}
    scalings |= {each.module_name: each.scalings.scaling_of(each.module_name) for each in parameters}
    is_lora = bool(loras or parameters)
    biases = tuple(name for name in adapter.replacements if name.endswith(".bias"))
    return AdapterFacts(
        kind=adapter.kind,
        is_folder=not source.is_file,
        mode=", ".join(sorted({each.mode for each in blocks})),
        init=_init(source),
        residual=residual_reason(adapter) or "",
        rank=rank if isinstance(rank, int) else _DEFAULT_RANK if is_lora and not source.is_file else 0,
        alpha=float(alpha) if isinstance(alpha, (int, float)) else None,
        use_rslora=bool(source.config.get("use_rslora")),
        ranks={each.module_name: each.rank for each in ranked},
        scalings=scalings if alpha is not None or not source.is_file else {},
        target_modules=source.config.get("target_modules"),
        dora=tuple(change.module_name for change in changes if isinstance(change, DoraFactors)),
        embeddings=tuple(each.module_name for each in loras if is_embedding_or_head(each)),
        experts=tuple(each.module_name for each in parameters),
        unusual=_unique(each.module_name for each in loras if each.kernel or each.parameter != "weight"),
        lora_biases=tuple(change.module for change in changes if isinstance(change, LoraBias)),
        tokens=tuple(change.module_name for change in changes if isinstance(change, TokenRows)),
        biases=biases,
        saved=tuple(name for name in adapter.replacements if name not in biases),
    )


def is_embedding_or_head(factors: LoraFactors) -> bool:
    """Whether the factors are for an embedding, or by its name for a language model's head."""
    return factors.is_embedding or factors.module_name.rpartition(".")[2] in SAVED_EMBEDDINGS


def _init(source: AdapterSource) -> str:
    value = source.config.get("init_lora_weights", source.config.get("init_weights", True))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))
