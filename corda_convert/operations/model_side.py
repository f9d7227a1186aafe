"""What every command that writes a model folder does with the source's side files and its card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.options import RunOptions
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


def transformers_card(checkpoint: Checkpoint, what: str, *, relation: str, tags: tuple[str, ...]) -> Card:
    """A card for a folder that transformers loads."""
    config = checkpoint.config or {}
    architectures = config.get("architectures") or ["AutoModelForCausalLM"]
    class_name = "AutoModelForCausalLM" if str(architectures[0]).endswith("ForCausalLM") else "AutoModel"
    named = str(config.get("_name_or_path") or "")
    return Card(
        what=what,
        base_model=named if is_hub_id(named) else checkpoint.name,
        relation=relation,
        library_name="transformers",
        tags=tags,
        snippet=(
            f"from transformers import AutoTokenizer, {class_name}\n\n"
            f'model = {class_name}.from_pretrained("{{repo}}")\n'
            'tokenizer = AutoTokenizer.from_pretrained("{repo}")'
        ),
    )


def with_snippet(card: Card, snippet: str) -> Card:
    """The card with another loading snippet."""
    return replace(card, snippet=snippet)
