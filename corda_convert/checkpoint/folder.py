"""A checkpoint folder: its shards, its index, its config, and the side files that belong to it."""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from corda_convert.checkpoint.byte_file import ExtentFile
from corda_convert.checkpoint.hub_id import parse_hub_id, snapshot_of
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.remote_file import is_there
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.errors import CordaConvertError, InputNotFound, MalformedFile, UnsupportedInput, raise_problems, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SINGLE_FILE = "pytorch_model.bin"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLED_SUFFIXES = (".bin", ".pth", ".pt")
RECEIPT_FILE = "corda_convert.json"
INITIAL_ADAPTER_FOLDER = "corda_init"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A dense model on disk, as its headers describe it.

    Attributes:
        root: the folder, or the one file.
        name: what the model is called.
        shards: the weight files, under the index's names.
        tensors: each tensor's disk name, and the shard that holds it.
        index_metadata: the index's metadata; None without an index.
        config: the content of config.json.
        aliases: names in a pickled shard that are left out, since the class ties them to the tensor whose bytes they share:
            name left out → name kept.
    """

    root: Path
    name: str
    shards: tuple[ExtentFile, ...]
    tensors: dict[str, TensorRef]
    index_metadata: dict[str, Any] | None
    config: dict[str, Any] | None
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        return self.root.is_dir()

    @property
    def is_pickled(self) -> bool:
        return any(isinstance(shard, PickleFile) for shard in self.shards)

    @property
    def nbytes(self) -> int:
        return sum(ref.spec.nbytes for ref in self.tensors.values())

    def spec(self, name: str) -> TensorSpec:
        return self.tensors[name].spec

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads every header of a checkpoint: a folder with an index or one file, or a single file, safetensors or pickled.

    Where a folder has several, it is the one that transformers loads.

    Raises `InputNotFound`, `MalformedFile` (truncated shard, missing shard, a shard outside the folder, an index that
    contradicts its shards) or `UnsupportedInput`; several problems come together as `PlanRefused`.
    """
    if is_there(path):
        if path.suffix not in (".safetensors", *PICKLED_SUFFIXES):
            raise UnsupportedInput(
                f"{path} is no file of weights: {', '.join(('.safetensors', *PICKLED_SUFFIXES))} are.",
                next_step="Give the model's folder.",
            )
        return _collect(path, path.stem, (_open(path),), None, None)
    if not path.is_dir():
        raise missing_path(path, "model")
    config = read_json(path / "config.json") if (path / "config.json").is_file() else None
    for single_name, index_name in ((SINGLE_FILE, INDEX_FILE), (PICKLED_SINGLE_FILE, PICKLED_INDEX_FILE)):
        if is_there(path / single_name):
            return _collect(path, model_name(path), (_open(path / single_name),), None, config)
        if (path / index_name).is_file():
            index = read_json(path / index_name)
            shards = _read_shards(path / index_name, index)
            metadata = index.get("metadata")
            return _collect(path, model_name(path), shards, metadata if isinstance(metadata, dict) else {}, config)
    raise _no_weights(path)


def _open(path: Path) -> ExtentFile:
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path)


def model_name(folder: Path) -> str:
    """The folder's name; for a snapshot in the Hub's cache (`models--owner--name/snapshots/…`) `owner/name`."""
    snapshot = snapshot_of(folder) or snapshot_of(folder.resolve())
    return folder.resolve().name if snapshot is None else snapshot.name


def missing_path(path: Path, what: str) -> InputNotFound:
    """The error for a path that is not there, telling apart a mistyped path and a Hub id."""
    text = str(path)
    if parse_hub_id(text) is not None:
        return InputNotFound(
            f"No such {what}: {text}",
            why="There is no such path here, and what stands on the Hub is not taken in this place.",
            next_step=f"Check the path, or download it first:  hf download {'/'.join(path.parts[:2])} --local-dir {path.name}",
        )
    return InputNotFound(f"No such {what}: {text}", next_step="Check the path.")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises `InputNotFound` or `MalformedFile`."""
    try:
        if path.exists() and not path.is_file():  # to read a pipe or a device may never end
            raise IsADirectoryError(errno.EISDIR, "it is no file")
        text = path.read_text(encoding="utf-8")
        parsed = json.loads(text)
        if "\\ud" in text.lower():  # JSON can spell half a surrogate pair, which is no text
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except FileNotFoundError:
        raise InputNotFound(f"No such file: {path}") from None
    except OSError as error:
        raise MalformedFile(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{path} is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise MalformedFile(f"{path} is not a JSON object.")
    return parsed


def _read_shards(index_file: Path, index: dict[str, Any]) -> tuple[ExtentFile, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MalformedFile(f"{index_file} has no weight_map.")
    problems: list[CordaConvertError] = []
    shards: dict[str, ExtentFile] = {}
    for file_name in sorted({str(value) for value in weight_map.values()}):
        try:
            shards[file_name] = _open(_inside(index_file, file_name))
        except InputNotFound:
            count = sum(value == file_name for value in weight_map.values())
            problems.append(
                InputNotFound(
                    f"{index_file} names the shard {file_name} for {count} tensors, but there is no such file.",
                    why="The download or copy is incomplete.",
                    next_step="Get the missing shard.",
                )
            )
        except CordaConvertError as problem:
            problems.append(problem)
    raise_problems(problems)
    _check_index(index_file, weight_map, shards)
    return tuple(shards.values())


def _inside(index_file: Path, file_name: str) -> Path:
    pure = PurePosixPath(file_name)
    kind = "safetensors" if index_file.name == INDEX_FILE else "bin"
    is_beside = not pure.is_absolute() and len(pure.parts) == 1 and not {"\\", "\0"} & set(file_name)
    if not is_beside or pure.suffix != f".{kind}":
        raise MalformedFile(
            f"{index_file} names the shard {file_name!r}, which is no {kind} file of this folder.",
            why=f"An index may only name {kind} files beside it.",
            next_step="Do not trust this checkpoint before you know who wrote its index.",
        )
    return index_file.parent / file_name


def _check_index(index_file: Path, weight_map: dict[str, Any], shards: dict[str, ExtentFile]) -> None:
    problems: list[CordaConvertError] = []
    found = {name: file_name for file_name, shard in shards.items() for name in shard.specs}
    absent = [name for name, file_name in weight_map.items() if name not in shards[str(file_name)].specs]
    if absent:
        problems.append(
            MalformedFile(f"{index_file} names {len(absent)} tensors that its shards lack: {some(absent)}.")
        )
    unlisted = [name for name in found if name not in weight_map]
    if unlisted:
        problems.append(
            MalformedFile(f"{index_file} does not name {len(unlisted)} tensors of its shards: {some(unlisted)}.")
        )
    counted = sum(len(shard.specs) for shard in shards.values())
    if counted != len(found):
        problems.append(MalformedFile(f"{counted - len(found)} tensors of {index_file.parent} stand in two shards."))
    raise_problems(problems)


def _collect(
    root: Path,
    name: str,
    shards: tuple[ExtentFile, ...],
    index_metadata: dict[str, Any] | None,
    config: dict[str, Any] | None,
) -> Checkpoint:
    tensors = {spec.name: TensorRef(shard, spec) for shard in shards for spec in shard.specs.values()}
    aliases = _tied_aliases(root, shards, config, tensors)
    kept = {name: ref for name, ref in tensors.items() if name not in aliases}
    return Checkpoint(root, name, shards, kept, index_metadata, config, aliases)


def _tied_aliases(
    root: Path, shards: tuple[ExtentFile, ...], config: dict[str, Any] | None, tensors: dict[str, TensorRef]
) -> dict[str, str]:
    """Second names in pickled shards that the model's class ties to the first: what `save_pretrained` leaves out, too.

    Names that only happen to share their bytes are different parameters at run time, and stay.
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for place, shard in enumerate(shards):
        for name, first in (shard.aliases if isinstance(shard, PickleFile) else {}).items():
            groups.setdefault((place, first), [first]).append(name)
    structure = read_structure(root, config, tensors) if groups else None
    if structure is None:
        return {}
    aliases: dict[str, str] = {}
    for names in groups.values():
        parameters = {name: structure.run_time_names.get(name, name) for name in names}
        sources = {name: structure.ties.get(parameter, parameter) for name, parameter in parameters.items()}
        for source in sources.values():
            tied = sorted(
                (name for name in names if sources[name] == source), key=lambda name: parameters[name] != source
            )
            aliases |= dict.fromkeys(tied[1:], tied[0])
    return aliases


def _no_weights(path: Path) -> CordaConvertError:
    if (path / "adapter_config.json").is_file():
        return InputNotFound(
            f"{path} holds an adapter, not a model.", next_step="Give the model's folder, and this one as --adapter."
        )
    for index, single, pattern in (
        (INDEX_FILE, SINGLE_FILE, "*.safetensors"),
        (PICKLED_INDEX_FILE, PICKLED_SINGLE_FILE, "pytorch_model*.bin"),
    ):
        others = sorted(entry.name for entry in path.glob(pattern))
        if others:
            return InputNotFound(
                f"{path} has no {index} and no {single}, but {some(others)}.",
                why="Without an index it is not known which files make up the model.",
                next_step="Give the one file itself, or restore the index.",
            )
    return InputNotFound(
        f"{path} holds no weights: no safetensors, and no {PICKLED_SINGLE_FILE}.", next_step="Give a model's folder."
    )
