"""What the config of a LoRA adapter may say: every option that changes the function is handled or refused by name."""

from __future__ import annotations

import re
from collections.abc import Iterator

from corda_convert.adapters.source import CONFIG_FILE, AdapterSource
from corda_convert.errors import CordaConvertError, UnsupportedInput, some

UNSUPPORTED = {
    "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA", "kasa_config": "KaSA", "arrow_config": "Arrow",
    "alora_invocation_tokens": "aLoRA", "monteclora_config": "MonteCLoRA", "layer_replication": "layer replication",
    "loftq_config": "LoftQ",
}  # fmt: skip
"""Options that are refused, and what they are called."""

READ = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "modules_to_save",
    "init_lora_weights", "use_dora", "lora_bias", "trainable_token_indices", "corda_config", "base_model_name_or_path",
    "target_parameters",
})  # fmt: skip
"""Options that are read."""

HARMLESS = frozenset({
    # which keys exist, which the file itself tells
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # how the training went
    "lora_dropout", "eva_config", "lora_ga_config", "velora_config", "runtime_config", "inference_mode",
    # how a layer was stored, parallelized or tied, which the model's class tells
    "fan_in_fan_out", "megatron_config", "megatron_core", "ensure_weight_tying",
    # what belongs to an option of its own
    "qalora_group_size",
    # who wrote it, and for what; `merge_weights` is of PEFT before 0.3
    "revision", "task_type", "auto_mapping", "peft_version", "merge_weights",
})  # fmt: skip
"""Options that do not change what the factors in the file add to the weights."""

TRAINING_ONLY = ("lora_velora_embed",)
"""Ends of keys that PEFT saves for going on with the training; its merge ignores them."""

_INITS = re.compile(
    r"true|false|gaussian|orthogonal|eva|mica|olora|pissa|pissa_niter_\d+|corda|loftq|lora_ga", re.IGNORECASE
)
"""Ways of PEFT to begin."""


def unsupported(source: AdapterSource) -> Iterator[CordaConvertError]:
    """Every option in the config that changes what the adapter does in a way that is not folded."""
    config = source.config
    for option, what in UNSUPPORTED.items():
        if config.get(option):
            yield UnsupportedInput(
                f"{source.name} uses {what} ({option} in {CONFIG_FILE}), which this version does not fold.",
                next_step="Merge it with PEFT's merge_and_unload for now.",
            )
    if str(config.get("init_lora_weights")).lower() == "loftq":
        yield UnsupportedInput(f"{source.name} was initialized with LoftQ, which needs the quantized base.")
    elif not _is_known_init(config.get("init_lora_weights")):
        yield UnsupportedInput(
            f"{source.name}: {CONFIG_FILE} says init_lora_weights={config['init_lora_weights']!r}, which this version does "
            "not know.",
            why="A training may have begun with factors that were taken out of the weights.",
            next_step="If it did not, set init_lora_weights to true.",
        )
    if config.get("use_dora") and config.get("lora_bias"):
        yield UnsupportedInput(f"{source.name} says both use_dora and lora_bias, which PEFT does not allow together.")
    unknown = [option for option, value in config.items() if value and option not in {*UNSUPPORTED, *READ, *HARMLESS}]
    if unknown:
        yield UnsupportedInput(
            f"{source.name}: {CONFIG_FILE} sets options that this version does not know: {some(unknown)}.",
            why="They may change what the adapter does.",
            next_step="Remove those that do not from the config.",
        )


def _is_known_init(init: object) -> bool:
    return init is None or isinstance(init, bool) or (isinstance(init, str) and bool(_INITS.fullmatch(init)))
