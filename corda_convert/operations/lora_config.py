"""The `adapter_config.json` of a converted LoRA: PEFT, given it, computes the very scalings that the factors need."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from corda_convert.adapters.lora import LoraScaling
from corda_convert.operations.initial_config import plain

_OF_THE_TRAINING = ("corda_config", "eva_config", "lora_ga_config", "velora_config", "runtime_config", "revision")
"""What a LoRA config says of how the training began, or of the model that was loaded for it."""

_COMMON = (
    "auto_mapping", "bias", "exclude_modules", "layers_pattern", "layers_to_transform", "modules_to_save", "peft_version",
    "target_modules", "task_type",
)  # fmt: skip
"""What the configs of all kinds of adapter say alike."""


def doubled_config(config: Mapping[str, Any], scaling: LoraScaling, base: str | None) -> dict[str, Any]:
    """The config for twice the rank, so that PEFT computes the same scaling from it: what PEFT's own conversion writes."""
    factor = math.sqrt(2) if scaling.use_rslora else 2
    return _plain_lora(config, base) | {
        "r": 2 * scaling.rank,
        "rank_pattern": {key: 2 * rank for key, rank in scaling.rank_pattern.items()},
        "lora_alpha": plain(factor * scaling.alpha),
        "alpha_pattern": {key: plain(factor * alpha) for key, alpha in scaling.alpha_pattern.items()},
    }


def baked_config(config: Mapping[str, Any], ranks: Mapping[str, int], base: str | None) -> dict[str, Any]:
    """The config for these ranks, by module path, and a scaling of 1: alpha is the rank, also where that is another one."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = _pattern({module: rank for module, rank in ranks.items() if rank != common}, ranks)
    return _plain_lora(config, base) | {
        "r": common,
        "rank_pattern": pattern,
        "lora_alpha": common,
        "alpha_pattern": pattern,
        "use_rslora": False,
    }


def _plain_lora(config: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """What stays of a trained adapter's config, whatever its kind."""
    if str(config.get("peft_type")).upper() == "LORA":
        kept = {key: None if key in _OF_THE_TRAINING else value for key, value in config.items()}
    else:
        kept = {key: config[key] for key in _COMMON if key in config}
    return kept | {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _pattern(differing: Mapping[str, int], modules: Collection[str]) -> dict[str, int]:
    """Each path, in sorted order; from its start on, where another module's path ends in one of them."""
    if any(end in differing for module in modules for end in _ends(module)):
        return {f"^{re.escape(module)}": differing[module] for module in sorted(differing)}
    return {module: differing[module] for module in sorted(differing)}


def _ends(module: str) -> Iterable[str]:
    """What a path ends in, from the second of its parts on."""
    parts = module.split(".")
    return (".".join(parts[first:]) for first in range(1, len(parts)))
