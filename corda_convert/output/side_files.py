"""What stands beside the weights in a model folder: which files are carried over, and what must change in the config."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import (
    INDEX_FILE,
    INITIAL_ADAPTER_FOLDER,
    PICKLED_INDEX_FILE,
    RECEIPT_FILE,
    Checkpoint,
)
from corda_convert.checkpoint.remote_file import remote_folder

_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data|tflite|ot)$|.*\.(safetensors|bin|h5)\.index\.json$"
)
_NOT_THE_MODEL = re.compile(
    r"(README\.md|\..*|adapter_config\.json|trainer_state\.json|training_args\.bin|optimizer\.pt|scheduler\.pt|rng_state.*)$",
    re.IGNORECASE,
)
_TOKENIZER = re.compile(
    r"(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|spiece\.model|sentencepiece.*\.model"
    r"|chat_template\..*|chat_templates|.*\.tiktoken)$"
)


@dataclass(frozen=True, slots=True)
class SideFile:
    """A file of the output that holds no planned weights: copied from `source`, or written from `content`."""

    name: str
    source: Path | None = None
    content: bytes | None = None

    @property
    def nbytes(self) -> int:
        return len(self.content) if self.content is not None else (self.source.stat().st_size if self.source else 0)

    def write(self, folder: Path) -> None:
        target = folder / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.content is not None:
            target.write_bytes(self.content)
        elif self.source is not None:
            shutil.copyfile(self.source, target)


@dataclass(frozen=True, slots=True)
class SideFiles:
    """Files to carry over, and the names of those left behind."""

    carried: tuple[SideFile, ...]
    left: tuple[str, ...]


def is_carried(file_name: str) -> bool:
    """Whether a file of this name, beside a model's weights, goes along with them."""
    return not _NOT_THE_MODEL.match(file_name) and not _OTHER_WEIGHTS.match(file_name)


def collect_side_files(checkpoint: Checkpoint) -> SideFiles:
    """Every file of the model's folder that is not a copy of its weights, a card, a receipt or a training state.

    Folders are followed, links to folders are not. Hidden files stay behind.
    """
    if not checkpoint.is_folder:
        return SideFiles((), ())
    index = PICKLED_INDEX_FILE if checkpoint.is_pickled and checkpoint.index_metadata is not None else INDEX_FILE
    weights = {shard.path.name for shard in checkpoint.shards} | {index, RECEIPT_FILE}
    carried: list[SideFile] = []
    left: list[str] = []
    for path in sorted(_walk(checkpoint.root)):
        name = path.relative_to(checkpoint.root).as_posix()
        if name in weights:
            continue
        if is_carried(path.name):
            carried.append(SideFile(name, source=path))
        else:
            left.append(name)
    remote = remote_folder(checkpoint.root)
    if remote is not None:
        left = sorted({*left, *remote.left})
    return SideFiles(tuple(carried), tuple(left))


def _walk(folder: Path) -> list[Path]:
    files: list[Path] = []
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name == INITIAL_ADAPTER_FOLDER:
            continue  # the initial adapter belongs to the residual, not to what is made of it
        if entry.is_dir():
            if not entry.is_symlink():
                files += _walk(entry)
        elif entry.is_file():
            files.append(entry)
    return files


def tokenizer_files(folder: Path) -> tuple[SideFile, ...]:
    """The tokenizer and chat template of an adapter's folder; of a file, none."""
    if not folder.is_dir():
        return ()
    return tuple(
        SideFile(path.name, source=path)
        for path in sorted(folder.iterdir())
        if path.is_file() and _TOKENIZER.match(path.name)
    )


def override(files: tuple[SideFile, ...], others: tuple[SideFile, ...]) -> tuple[SideFile, ...]:
    """The files, with those of `others` in place of the ones of the same name, or added."""
    merged = {file.name: file for file in files} | {file.name: file for file in others}
    return tuple(merged[name] for name in sorted(merged))


def config_with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The model's config with `dtype` (torch's name) at every level that names one; never changes the argument."""
    changed = copy.deepcopy(config)
    stack = [changed]
    seen = False
    while stack:
        level = stack.pop()
        for key in ("dtype", "torch_dtype"):
            if isinstance(level.get(key), str):
                level[key] = dtype
                seen = True
        stack += [value for value in level.values() if isinstance(value, dict)]
    if not seen:
        changed["dtype"] = dtype
    return changed


def untied_config(config: dict[str, Any]) -> dict[str, Any]:
    """The model's config with `tie_word_embeddings` false, in the configs of its language models too."""
    changed = copy.deepcopy(config)
    changed["tie_word_embeddings"] = False
    for name, level in _levels(changed):
        if name in _LANGUAGE_LEVELS or "tie_word_embeddings" in level:
            level["tie_word_embeddings"] = False
    return changed


def config_with_vocabulary(config: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    """The model's config with `vocab_size` `new` at every level where it is `old`, and at one at least."""
    changed = copy.deepcopy(config)
    levels = [changed, *(level for _, level in _levels(changed))]
    sized = [level for level in levels if level.get("vocab_size") == old]
    if not sized:  # left out, as it is the class's default
        sized = [next((level for name, level in _levels(changed) if name in _LANGUAGE_LEVELS), changed)]
    for level in sized:
        level["vocab_size"] = new
    return changed


_LANGUAGE_LEVELS = ("text_config", "language_config", "llm_config", "decoder")
"""Where a config of several models has that of the language model."""


def _levels(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every object inside a config, with the key that it stands under."""
    found = [(name, value) for name, value in config.items() if isinstance(value, dict)]
    return found + [inner for _, value in found for inner in _levels(value)]


def json_file(name: str, content: object) -> SideFile:
    """A side file with this content as JSON."""
    return SideFile(name, content=(json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
