"""A vocabulary that training resized: every tensor that it sizes must come with the adapter, and the config follows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.names import NameMap, Target
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations.ties import Edit, structure_with
from corda_convert.output.side_files import config_with_vocabulary, tokenizer_files


@dataclass(frozen=True, slots=True)
class Resized:
    """A change of the vocabulary's size, and the config that says so; None where the model has none."""

    before: int
    after: int
    config: dict[str, Any] | None

    def facts(self) -> dict[str, int]:
        return {"before": self.before, "after": self.after}


def resized_shape(target: Target, shape: tuple[int, ...], names: NameMap) -> tuple[int, ...] | None:
    """The shape of a tensor that takes a parameter's place, if it is the vocabulary's size alone in which they differ."""
    stored = names.checkpoint.spec(target.tensor_name).shape
    is_resized = target.is_plain and 0 < len(stored) <= 2 and stored[1:] == shape[1:] and stored[:1] != shape[:1]
    return shape if is_resized and _is_vocabulary(target, stored[0], names) else None


def _is_vocabulary(target: Target, rows: int, names: NameMap) -> bool:
    structure = names.structure
    if structure is None:
        config = names.checkpoint.config or {}
        text = config.get("text_config")
        return rows in (config.get("vocab_size"), text.get("vocab_size") if isinstance(text, dict) else None)
    sharing = names.shared.get(target.name, (target.name,))
    return any(
        structure.parameters[name].kind == "embedding" or name.rpartition(".")[0] == structure.output_embedding
        for name in sharing
        if name in structure.parameters
    )


def resize(edits: Mapping[str, Edit], config: dict[str, Any] | None, names: NameMap) -> Resized | None:
    """The new size, if any tensor has another one than in the base. Raises every problem together.

    `config` is the model's so far.
    """
    sizes = {
        name: (names.checkpoint.spec(edit.source).shape[0], edit.replacement.shape[0])
        for name, edit in sorted(edits.items())
        if edit.replacement is not None and _is_resized(edit, names)
    }
    if not sizes:
        return None
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {before} → {after}" for name, (before, after) in sizes.items())
        raise AdapterMismatch(f"The adapter resizes the vocabulary in several ways: {listed}.")
    ((before, after),) = set(sizes.values())
    changed = None if config is None else config_with_vocabulary(config, before, after)
    problems = _left(sizes, before, after, names) if names.structure is None else _misfits(edits, changed or {}, names)
    raise_problems(problems)
    return Resized(before, after, changed)


def _is_resized(edit: Edit, names: NameMap) -> bool:
    return edit.replacement is not None and edit.replacement.shape != names.checkpoint.spec(edit.source).shape


def _left(sizes: Mapping[str, Any], before: int, after: int, names: NameMap) -> list[CordaConvertError]:
    """Without the model's class: the tensors of as many rows that keep them."""
    left = [name for name, ref in names.checkpoint.tensors.items() if ref.shape[:1] == (before,) and name not in sizes]
    return [_unsized(f"{some(left)} would keep {before} rows", after, ", ".join(sizes))] if left else []


def _misfits(edits: Mapping[str, Edit], config: dict[str, Any], names: NameMap) -> list[CordaConvertError]:
    """The parameters that would not have the shape that the class gives them with the new config."""
    after = structure_with(config, names)
    if after is None or names.structure is None:
        return [UnsupportedInput("With the new vocab_size the model's class cannot be built.")]
    resized = [name for name, edit in sorted(edits.items()) if _is_resized(edit, names)]
    misfits = [
        f"{tensor_name} is {shape}, {after.parameters[name].shape} is needed"
        for name, tensor_name, shape in _output_shapes(edits, names)
        if name in after.parameters
        and shape != after.parameters[name].shape
        and (tensor_name in edits or after.parameters[name].shape != names.structure.parameters[name].shape)
    ]
    return [_unsized("; ".join(misfits), None, some(resized))] if misfits else []


def _output_shapes(edits: Mapping[str, Edit], names: NameMap) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Each parameter that will lie in the output as it is, its tensor's name and shape there."""
    assert names.structure is not None  # noqa: S101 - parameters are known from the class alone
    own = {run_time: disk for disk, run_time in names.structure.run_time_names.items()}
    for name in names.structure.parameters:
        target = names.target(name)
        if target is None or not target.is_plain:
            continue
        tensor_name = own.get(name) or names.structure.disk_name(name) or target.tensor_name
        tensor_name = tensor_name if name in own or tensor_name in edits else target.tensor_name
        edit = edits.get(tensor_name)
        replacement = None if edit is None else edit.replacement
        yield (
            name,
            tensor_name,
            names.checkpoint.spec(target.tensor_name).shape if replacement is None else replacement.shape,
        )


def _unsized(what: str, rows: int | None, resized: str) -> CordaConvertError:
    needed = f", {rows} are needed" if rows is not None else ""
    return UnsupportedInput(
        f"The adapter resizes the vocabulary with {resized}, but not all that goes with it: {what}{needed}.",
        why="Training resized the model's embeddings, and the adapter holds only some of what that changed.",
        next_step="Save the adapter again with save_embedding_layers=True, or merge into the resized base model.",
    )


def tokenizer_warnings(adapter_name: str, folder: Path, resized: Resized | None, names: NameMap) -> tuple[str, ...]:
    """What does not fit between the adapter's tokenizer, which the output takes over, and the output's vocabulary."""
    if not tokenizer_files(folder):
        kept = f"{adapter_name} resizes the vocabulary to {resized.after} and has no tokenizer" if resized else ""
        return (f"{kept} with it: the base's is kept.",) if kept else ()
    rows = resized.after if resized is not None else _rows(names)
    highest = _highest_token(folder / "tokenizer.json")
    if highest is not None and rows is not None and highest >= rows:
        lost = "" if resized is not None else " If the training added tokens, the adapter lacks their embeddings."
        return (f"{adapter_name}: its tokenizer has token {highest}, the vocabulary has {rows} rows.{lost}",)
    return ()


def _rows(names: NameMap) -> int | None:
    """The vocabulary's size in the model's config; None where it does not say."""
    config = names.checkpoint.config or {}
    text = config.get("text_config")
    rows = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return rows if isinstance(rows, int) else None


def _highest_token(path: Path) -> int | None:
    """The highest token id of a tokenizer.json; None where there is none, or its form is unknown."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        ids = [len(vocabulary) - 1] if isinstance(vocabulary, list) else list(vocabulary.values())
        return int(max([*ids, *(token["id"] for token in content.get("added_tokens", ()))]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
