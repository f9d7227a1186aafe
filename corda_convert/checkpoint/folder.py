"""A checkpoint folder: its shards, its index, its config, and the side files that belong to it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.errors import CordaConvertError, InputNotFound, MalformedFile, UnsupportedInput, raise_problems, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
RECEIPT_FILE = "corda_convert.json"
INITIAL_ADAPTER_FOLDER = "corda_init"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A dense model on disk, as its headers describe it.

    `shards` keep the index's file names; `tensors` maps each tensor's disk name to the shard that holds it.
    """

    root: Path
    name: str
    shards: tuple[SafetensorsFile, ...]
    tensors: dict[str, TensorRef]
    index_metadata: dict[str, Any] | None
    config: dict[str, Any] | None

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    @property
    def nbytes(self) -> int:
        return sum(ref.spec.nbytes for ref in self.tensors.values())

    def spec(self, name: str) -> TensorSpec:
        return self.tensors[name].spec

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads every header of a checkpoint: a folder with an index or one file, or a single safetensors file.

    Raises `InputNotFound`, `MalformedFile` (truncated shard, missing shard, a shard outside the folder, an index that
    contradicts its shards) or `UnsupportedInput`; several problems come together as `PlanRefused`.
    """
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UnsupportedInput(f"{path} is no safetensors file.", next_step="Give the model's folder.")
        return _collect(path, path.stem, (SafetensorsFile(path),), None, None)
    if not path.is_dir():
        raise missing_path(path, "model")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    if (path / SINGLE_FILE).is_file():  # where both are, transformers loads this one
        return _collect(path, model_name(path), (SafetensorsFile(path / SINGLE_FILE),), None, config)
    if (path / INDEX_FILE).is_file():
        index = read_json(path / INDEX_FILE)
        shards = _read_shards(path, index)
        metadata = index.get("metadata")
        return _collect(path, model_name(path), shards, metadata if isinstance(metadata, dict) else {}, config)
    raise _no_weights(path)


def model_name(folder: Path) -> str:
    """The folder's name; for a snapshot in the Hub's cache (`models--owner--name/snapshots/…`) `owner/name`."""
    resolved = folder.resolve()
    cache = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/", 1)
    return resolved.name


def missing_path(path: Path, what: str) -> InputNotFound:
    """The error for a path that is not there, telling apart a mistyped path and a Hub id."""
    text = str(path)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return InputNotFound(
            f"No such {what}: {text}",
            why="It is no local folder. If it is a model on the Hub: this version reads local folders.",
            next_step=f"Download it first:  hf download {text} --local-dir {path.name}",
        )
    return InputNotFound(f"No such {what}: {text}", next_step="Check the path.")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `InputNotFound` or `MalformedFile`."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputNotFound(f"No such file: {path}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise MalformedFile(f"{path} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise MalformedFile(f"{path} is not a JSON object.")
    return parsed


def _read_shards(root: Path, index: dict[str, Any]) -> tuple[SafetensorsFile, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFile(f"{root / INDEX_FILE} has no weight_map.")
    problems: list[CordaConvertError] = []
    shards: dict[str, SafetensorsFile] = {}
    for file_name in sorted({str(value) for value in weight_map.values()}):
        try:
            shards[file_name] = SafetensorsFile(_inside(root, file_name))
        except InputNotFound:
            count = sum(value == file_name for value in weight_map.values())
            problems.append(
                InputNotFound(
                    f"{root / INDEX_FILE} names the shard {file_name} for {count} tensors, but there is no such file.",
                    why="The download or copy is incomplete.",
                    next_step="Get the missing shard.",
                )
            )
        except CordaConvertError as problem:
            problems.append(problem)
    raise_problems(problems)
    _check_index(root, weight_map, shards)
    return tuple(shards.values())


def _inside(root: Path, file_name: str) -> Path:
    pure = PurePosixPath(file_name)
    is_beside = not pure.is_absolute() and len(pure.parts) == 1 and not {"\\", "\0"} & set(file_name)
    if not is_beside or pure.suffix != ".safetensors":
        raise MalformedFile(
            f"{root / INDEX_FILE} names the shard {file_name!r}, which is no safetensors file of this folder.",
            why="An index may only name safetensors files beside it.",
            next_step="Do not trust this checkpoint before you know who wrote its index.",
        )
    return root / file_name


def _check_index(root: Path, weight_map: dict[str, Any], shards: dict[str, SafetensorsFile]) -> None:
    problems: list[CordaConvertError] = []
    found = {name: file_name for file_name, shard in shards.items() for name in shard.specs}
    absent = [name for name, file_name in weight_map.items() if name not in shards[str(file_name)].specs]
    if absent:
        problems.append(
            MalformedFile(f"{root / INDEX_FILE} names {len(absent)} tensors that its shards lack: {some(absent)}.")
        )
    unlisted = [name for name in found if name not in weight_map]
    if unlisted:
        problems.append(
            MalformedFile(f"{root / INDEX_FILE} does not name {len(unlisted)} tensors of its shards: {some(unlisted)}.")
        )
    counted = sum(len(shard.specs) for shard in shards.values())
    if counted != len(found):
        problems.append(MalformedFile(f"{counted - len(found)} tensors of {root} stand in two shards."))
    raise_problems(problems)


def _collect(
    root: Path,
    name: str,
    shards: tuple[SafetensorsFile, ...],
    index_metadata: dict[str, Any] | None,
    config: dict[str, Any] | None,
) -> Checkpoint:
    tensors = {spec.name: TensorRef(shard, spec) for shard in shards for spec in shard.specs.values()}
    return Checkpoint(root, name, shards, tensors, index_metadata, config)


def _no_weights(path: Path) -> CordaConvertError:
    if (path / "adapter_config.json").is_file():
        return InputNotFound(
            f"{path} holds an adapter, not a model.", next_step="Give the model's folder, and this one as --adapter."
        )
    if list(path.glob("pytorch_model*.bin")):
        return UnsupportedInput(
            f"{path} holds pickled weights (pytorch_model*.bin) and no safetensors; this version reads safetensors.",
            next_step="Load the model once with transformers and save it again: save_pretrained writes safetensors.",
        )
    others = sorted(entry.name for entry in path.glob("*.safetensors"))
    if others:
        return InputNotFound(
            f"{path} has no {INDEX_FILE} and no {SINGLE_FILE}, but {some(others)}.",
            why="Without an index it is not known which files make up the model.",
            next_step="Give the one file itself, or restore the index.",
        )
    return InputNotFound(f"{path} holds no safetensors weights.", next_step="Give a model's folder.")
