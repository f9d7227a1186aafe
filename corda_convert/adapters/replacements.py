"""Tensors of an adapter that replace the base's own: modules_to_save and trained biases, in every format."""

from __future__ import annotations

import re

from corda_convert.adapters.source import CONFIG_FILE, AdapterSource
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, MalformedFile, UnsupportedInput, some

SAVED_EMBEDDINGS = (
    "embed_tokens", "lm_head", "shared", "wte", "word_embeddings", "embed_in", "embed_out", "tok_embeddings", "proj_out",
    "decoder",
)  # fmt: skip
"""Names of input and output embeddings, which PEFT's `save_embedding_layers` saves whole, adapted or not."""

_ORIGINAL = ".original_module."


def split_replacements(
    source: AdapterSource, rest: dict[str, TensorRef]
) -> tuple[dict[str, TensorRef], list[CordaConvertError]]:
    """Tells parameters that replace the base's (modules_to_save, saved embeddings, biases) from keys that nobody knows."""
    replacements: dict[str, TensorRef] = {}
    unknown: list[str] = []
    doubled: list[CordaConvertError] = []
    saved = source.config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise AdapterMismatch(f"{CONFIG_FILE}: modules_to_save is {saved!r}, a list of names was expected.")
    bias = str(source.config.get("bias", "none"))
    beneath = originals(source)
    for key, ref in rest.items():
        name = _parameter_name(key)
        if _ORIGINAL in key and name in beneath:
            continue  # what shares it takes it; the module itself has a copy, which was trained
        module = name.rpartition(".")[0]
        is_saved = is_module_to_save(source, name)
        is_saved = is_saved or (name.endswith((".weight", ".bias")) and module.rpartition(".")[2] in SAVED_EMBEDDINGS)
        is_bias = "bias" in name if bias == "all" else name.endswith(".bias") and bias != "none"  # both as PEFT
        if is_saved or is_bias:
            if name in replacements and not same_values(replacements[name], ref):
                doubled.append(same_place(source, replacements[name], ref))
            replacements[name] = ref
        else:
            unknown.append(key)
    if not unknown:
        return replacements, doubled
    return replacements, [
        *doubled,
        UnsupportedInput(
            f"{source.name}: {len(unknown)} tensors are of no kind that this version folds: {some(unknown)}.",
            why="Nothing of an adapter is dropped silently.",
        ),
    ]


def originals(source: AdapterSource) -> dict[str, TensorRef]:
    """The base's own weights below modules of which PEFT trained a copy, by the parameters' names."""
    trained = {_parameter_name(key) for key in source.tensors if _ORIGINAL not in key}
    named = {_parameter_name(key): ref for key, ref in source.tensors.items() if _ORIGINAL in key}
    return {name: ref for name, ref in named.items() if name in trained and is_module_to_save(source, name)}


def _parameter_name(key: str) -> str:
    return re.sub(r"\.(base_layer|modules_to_save(\.default)?|original_module)(?=\.)", "", key)


def is_module_to_save(source: AdapterSource, name: str) -> bool:
    """Whether a parameter is of a module of modules_to_save, of which PEFT trains a copy; by any path's end, as in PEFT."""
    module = name.rpartition(".")[0]
    return any(f"{module}.".find(f"{saved}.") >= 0 for saved in source.config.get("modules_to_save") or ())


def same_place(source: AdapterSource, first: TensorRef, second: TensorRef) -> CordaConvertError:
    """The problem of two tensors of which one would be dropped."""
    return MalformedFile(
        f"{source.name}: {first.name} and {second.name} stand for the same part of one module.",
        why="Nothing of an adapter is dropped silently.",
    )
