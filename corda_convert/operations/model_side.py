"""What every command that writes a model folder does with the source's side files and its card."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import replace
from typing import Any

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.options import RunOptions
from corda_convert.output.licence import licence_of
from corda_convert.output.model_card import Card, is_hub_id
from corda_convert.output.side_files import (
    SideFile,
    collect_side_files,
    config_with_dtype,
    json_file,
    override,
)


def model_side_files(
    checkpoint: Checkpoint,
    run: RunOptions,
    overrides: Iterable[tuple[SideFile, ...]] = (),
    config: dict[str, Any] | None = None,
) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """The source's side files with those that win over them, the config in step with `--dtype`; and what stays behind.

    `config` is the model's new config, where it changes.
    """
    if run.dtype is not None and (checkpoint.config or {}).get("quantization_config"):
        raise UnsupportedInput(
            f"{checkpoint.name} is quantized (quantization_config in its config.json): --dtype would cast its scales too.",
            next_step="Leave out --dtype, or use the unquantized model.",
        )
    found = collect_side_files(checkpoint)
    files = found.carried
    for others in overrides:
        files = override(files, others)
    changed = config or checkpoint.config
    if changed is not None and run.dtype is not None:
        changed = config_with_dtype(changed, run.dtype)
    if changed is not None and changed is not checkpoint.config:
        files = override(files, (json_file("config.json", changed),))
    return files, found.left


def transformers_card(
    checkpoint: Checkpoint, what: str, *, relation: str, tags: tuple[str, ...], side_files: Iterable[SideFile] = ()
) -> Card:
    """A card for a folder that transformers loads, with these side files."""
    config = checkpoint.config or {}
    named = str(config.get("_name_or_path") or "")
    return Card(
        what=what,
        base_model=named if is_hub_id(named) and not is_hub_id(checkpoint.name) else checkpoint.name,
        relation=relation,
        library_name="transformers",
        tags=tags,
        snippet=_loading_snippet(_model_class(config), {file.name for file in side_files}),
        licence=licence_of(checkpoint.root),
    )


_TOKENIZERS = frozenset(
    {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt"}
)
_PROCESSORS = frozenset({"processor_config.json", "preprocessor_config.json"})


def _model_class(config: dict[str, Any]) -> str:
    """The class of transformers that loads every weight, the head's too. A class of the model's own code has an Auto class."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else "ForCausalLM"
    if name.endswith("ForCausalLM"):
        return "AutoModelForCausalLM"
    return "AutoModel" if config.get("auto_map") or not name.isidentifier() else name


def _loading_snippet(model_class: str, files: Set[str]) -> str:
    """Python that loads the model, and what prepares its inputs if that is among the files."""
    loaded = [("model", model_class)]
    if files & _PROCESSORS:
        loaded.append(("processor", "AutoProcessor"))
    elif files & _TOKENIZERS:
        loaded.append(("tokenizer", "AutoTokenizer"))
    imports = ", ".join(name for _, name in sorted(loaded, key=lambda pair: pair[1]))
    lines = [f'{variable} = {name}.from_pretrained("{{repo}}")' for variable, name in loaded]
    return "\n".join([f"from transformers import {imports}\n", *lines])


def with_snippet(card: Card, snippet: str) -> Card:
    """The card with another loading snippet."""
    return replace(card, snippet=snippet)
