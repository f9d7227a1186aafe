"""What is said of a conversion of adapters: the config it starts from, inputs, options, names, warnings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors, read_scaling
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.operations import evidence
from corda_convert.operations.belonging import Part
from corda_convert.operations.edits import Fitted
from corda_convert.operations.half_tied import half_tied_warnings
from corda_convert.operations.initial_config import target_modules
from corda_convert.operations.lora_modules import LoraModule
from corda_convert.operations.production import Input
from corda_convert.operations.residual import Residual
from corda_convert.output.model_card import is_hub_id
from corda_convert.output.receipt import read_receipt
from corda_convert.output.side_files import SideFile, override, tokenizer_files


def keeps_scaling(part: Part) -> bool:
    """Whether twice the rank, and alpha in proportion, give the scaling of every module again."""
    if part.initial is None or part.scale != 1.0 or part.trained.kind != "lora":
        return False
    scaling = read_scaling(part.trained.source.config)
    return not (scaling.use_rslora and bool(scaling.rank_pattern or scaling.alpha_pattern))


def config_of(trained: Sequence[Adapter], modules: Sequence[LoraModule], names: NameMap | None) -> dict[str, Any]:
    """The config of the one adapter; of several, the first LoRA's with what all of them adapt and bring along."""
    configs = [one.source.config for one in trained]
    if len(configs) == 1:
        return dict(configs[0])
    first = dict(next((config for config in configs if config.get("peft_type") == "LORA"), configs[0]))
    saved = sorted({name for config in configs for name in config.get("modules_to_save") or ()})
    biases = {str(config.get("bias", "none")) for config in configs} - {"none"}
    tokens = [value for config in configs if (value := config.get("trainable_token_indices"))]
    parameters = sorted({name for config in configs for name in config.get("target_parameters") or ()})
    if any(config.get("lora_bias") for config in configs):
        first["lora_bias"] = True
    return first | {
        "target_modules": _targets(configs, modules, names),
        "target_parameters": parameters or None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": saved or None,
        "bias": "none" if not biases else biases.pop() if len(biases) == 1 else "all",
        "trainable_token_indices": tokens[0] if tokens else None,
    }


def _targets(
    configs: Sequence[Mapping[str, Any]], modules: Sequence[LoraModule], names: NameMap | None
) -> list[str] | str:
    """What selects exactly the modules in PEFT: what all configs say, else names that the model's class tells, else paths."""
    selections = [tuple(config.get(key) or () for key in _SELECTING) for config in configs]
    if all(selection == selections[0] for selection in selections) and configs[0].get("target_modules"):
        targets = configs[0]["target_modules"]
        if not any(selections[0][1:]):
            return targets if isinstance(targets, str) else list(targets)
    paths = sorted({module.pattern_name for module in modules if not module.is_parameter})
    if paths and names is not None and names.structure is not None:
        return target_modules(names.structure, paths)
    return paths


_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


def inputs_of(parts: Sequence[Part], base: Checkpoint | None, residual: Residual | None) -> tuple[Input, ...]:
    """The adapters, their initial ones, and the models that are read."""
    inputs: dict[Path, Input] = {}
    sources = [("adapter", part.trained) for part in parts]
    sources += [("init", part.initial) for part in parts if part.initial is not None]
    for role, adapter in sources:
        source = adapter.source
        inputs.setdefault(source.folder, Input(role, source.folder, (source.file,), digest_always=True))
    if base is not None:
        inputs[base.root] = Input("base", base.root, base.shards)
    if residual is not None:
        inputs[residual.checkpoint.root] = Input("residual", residual.checkpoint.root, residual.checkpoint.shards)
    return tuple(inputs.values())


def options_of(parts: Sequence[Part], residual: Residual | None) -> dict[str, Any]:
    """For the receipt."""
    initials = dict.fromkeys(part.initial.source.name for part in parts if part.initial is not None)
    return {
        "adapters": [part.name for part in parts],
        "scales": [part.scale for part in parts] if any(part.scale != 1.0 for part in parts) else [],
        "init": list(initials),
        "residual": None if residual is None else residual.name,
    }


def sentence(parts: Sequence[Part], residual: Residual | None) -> str:
    """What the result is, for its card."""
    named = []
    for part in parts:
        text = f"`{part.name}`" + (f" (× {part.scale:g})" if part.scale != 1.0 else "")
        if part.initial is not None:
            text += f", which was trained beside a residual, and its initial factors `{part.initial.source.name}`"
        elif residual is not None:
            text += f", which was trained beside the residual `{residual.name}`"
        elif part.trained.kind != "lora":
            text += f" ({part.trained.kind})"
        named.append(text)
    return f"An ordinary LoRA for the unmodified base model, converted from {'; and '.join(named)}."


def tokenizers(trained: Sequence[Adapter]) -> tuple[SideFile, ...]:
    """Those of the first adapter win."""
    files: tuple[SideFile, ...] = ()
    for one in reversed(trained):
        files = override(files, tokenizer_files(one.source.folder))
    return files


def base_name(parts: Sequence[Part]) -> str | None:
    """The base's name, as far as the adapters tell: their own base, or that of the residual's receipt."""
    for part in parts:
        if part.initial is None:
            if part.trained.source.base_name and evidence.residual_reason(part.trained) is None:
                return part.trained.source.base_name
            continue
        receipt = read_receipt(part.initial.source.folder.parent) or {}
        model = str((receipt.get("options") or {}).get("model") or "")
        if receipt.get("command") == "decompose" and is_hub_id(model):
            return model
    return None


def warnings_of(parts: Sequence[Part], fitted: Sequence[Sequence[Fitted]], names: NameMap | None) -> Iterable[str]:
    """For the user. `fitted` and `names` are of the base, where it was read."""
    bases = {part.trained.source.base_name for part in parts if part.initial is None} - {""}
    if len(bases) > 1:
        yield f"The adapters name different base models: {', '.join(sorted(bases))}. Their sum belongs on one of them at most."
    for part in parts:
        if part.initial is not None and _is_untrained(part.trained, part.initial):
            yield (
                f"{part.name} holds the numbers of {part.initial.source.name}, so what was learned is zero. If it was trained, "
                "one of the two is the wrong one."
            )
    for part, changes in zip(parts, fitted, strict=False):
        if part.trained.kind == "lora" and names is not None:
            yield from half_tied_warnings(part, changes, names)


def _is_untrained(trained: Adapter, initial: Adapter) -> bool:
    """Whether all the factors are the initial ones. Stops at the first that is not."""
    began = {_place(each): each for each in initial.modules if isinstance(each, LoraFactors | ParameterFactors)}
    pairs = [
        (own, first)
        for each in trained.modules
        if isinstance(each, LoraFactors | ParameterFactors)
        for own, first in (
            (each.lora_A, began[_place(each)].lora_A),
            (each.lora_B, began[_place(each)].lora_B),
        )
    ]
    return bool(pairs) and all(same_values(own, first) for own, first in pairs)


def _place(factors: LoraFactors | ParameterFactors) -> str:
    return factors.key if isinstance(factors, ParameterFactors) else factors.module_name
