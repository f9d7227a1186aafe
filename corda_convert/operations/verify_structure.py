"""What a sealed folder's headers, index and adapters say, against its receipt. Headers and configs only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.dora import lora_factors
from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.checkpoint.byte_file import ExtentFile
from corda_convert.checkpoint.folder import (
    INDEX_FILE,
    INITIAL_ADAPTER_FOLDER,
    PICKLED_SUFFIXES,
    RECEIPT_FILE,
    read_json,
)
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.errors import CordaConvertError, MalformedFile, some
from corda_convert.operations.verify_receipt import ListedTensor, Sealed
from corda_convert.output.receipt import streamed_files


@dataclass(slots=True)
class Structure:
    """What was found without reading a weight.

    Attributes:
        problems: everything that is not as the receipt says.
        files: the weight files that could be opened, by name.
        sound: the listed files that are there in their sizes: the only ones worth reading.
        ignored: hidden files, which are not part of an output.
    """

    problems: list[CordaConvertError] = field(default_factory=list)
    files: dict[str, ExtentFile] = field(default_factory=dict)
    sound: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def check_structure(sealed: Sealed) -> Structure:
    """Compares files, headers, index and adapters with the receipt."""
    found = Structure()
    found.problems += _check_presence(sealed, found)
    for name, tensors in sealed.weight_files.items():
        if name in found.sound:
            found.problems += _check_header(sealed, name, tensors, found)
    found.problems += _check_index(sealed, found)
    for folder in ("", INITIAL_ADAPTER_FOLDER):
        if f"{folder}/{CONFIG_FILE}".lstrip("/") in found.sound:
            found.problems += _check_adapter(sealed, sealed.folder / folder)
    return found


def _check_presence(sealed: Sealed, found: Structure) -> Iterator[CordaConvertError]:
    present: set[str] = set()
    for path in sorted(sealed.folder.rglob("*")):
        relative = path.relative_to(sealed.folder)
        if path.is_dir() and not path.is_symlink():
            continue
        if any(part.startswith(".") for part in relative.parts):
            found.ignored.append(relative.as_posix())
        elif relative.as_posix() != RECEIPT_FILE:
            present.add(relative.as_posix())
    elsewhere = streamed_files(sealed.receipt)
    for name in sorted(sealed.files.keys() - present - elsewhere):
        yield MalformedFile(f"{name} is missing.", why="The copy or download is incomplete.")
    if gone := sorted((sealed.files.keys() - present) & elsewhere):
        yield MalformedFile(
            f"{some(gone)} cannot be verified here.",
            why="The folder was made with --stream: its shards are on the Hub only, as streamed_to in its receipt says.",
            next_step="Download the repository (hf download REPO_ID --local-dir DIR) and verify that folder.",
        )
    for name in sorted(present - sealed.files.keys()):
        yield MalformedFile(f"{name} was added: the receipt does not list it.", next_step="Remove it.")
    for name in sorted(present & sealed.files.keys()):
        expected, path = sealed.files[name].nbytes, sealed.folder / name
        if not path.is_file():
            yield MalformedFile(f"{name} is no file.", why="It is a link to nothing, or something special.")
        elif path.stat().st_size != expected:
            yield MalformedFile(
                f"{name} has {path.stat().st_size:,} bytes, the receipt says {expected:,}.",
                why="It was cut off or altered.",
            )
        else:
            found.sound.append(name)


def _check_header(
    sealed: Sealed, name: str, tensors: Iterable[ListedTensor], found: Structure
) -> Iterator[CordaConvertError]:
    path = sealed.folder / name
    try:
        file = PickleFile(path) if path.suffix in PICKLED_SUFFIXES else SafetensorsFile(path)
    except CordaConvertError as problem:
        yield problem
        return
    found.files[name] = file
    specs = dict(file.specs)
    aliases = file.aliases if isinstance(file, PickleFile) else {}
    lacking = []
    for tensor in tensors:
        stored = specs.pop(tensor.name, None)
        if stored is None:
            lacking.append(tensor.name)
        elif stored != tensor.spec:
            yield MalformedFile(
                f"{tensor.name} is {_described(stored)} in {name}, {_described(tensor.spec)} by the receipt."
            )
    if lacking:
        yield MalformedFile(f"{name} lacks {len(lacking)} tensors that the receipt puts there: {some(lacking)}.")
    more = [name for name in specs if name not in aliases]
    if more:
        yield MalformedFile(f"{name} holds {len(more)} tensors that the receipt does not know: {some(more)}.")


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} {spec.shape}"


def _check_index(sealed: Sealed, found: Structure) -> Iterator[CordaConvertError]:
    """Whether the index names every tensor of the shards beside it, in its shard, and their size."""
    shards = {name: tensors for name, tensors in sealed.weight_files.items() if name.endswith(".safetensors")}
    beside = {name: tensors for name, tensors in shards.items() if "/" not in name}
    if INDEX_FILE not in sealed.files:
        if len(beside) > 1:
            yield MalformedFile(f"{len(beside)} shards have no {INDEX_FILE}: no program would find their tensors.")
        return
    if INDEX_FILE not in found.sound:
        return
    try:
        index = read_json(sealed.folder / INDEX_FILE)
    except CordaConvertError as problem:
        yield problem
        return
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        yield MalformedFile(f"{INDEX_FILE} has no weight_map.")
        return
    expected = {tensor.name: name for name, tensors in beside.items() for tensor in tensors}
    lacking = [name for name in expected if name not in weight_map]
    unknown = [name for name in weight_map if name not in expected]
    elsewhere = [name for name, file in expected.items() if weight_map.get(name, file) != file]
    for names, what in (
        (lacking, "does not name {} tensors of its shards"),
        (unknown, "names {} tensors that the receipt does not know"),
        (elsewhere, "names the wrong shard for {} tensors"),
    ):
        if names:
            yield MalformedFile(f"{INDEX_FILE} {what.format(len(names))}: {some(map(str, names))}.")
    metadata: Any = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.spec.nbytes for tensors in beside.values() for tensor in tensors)
    if total != size:
        yield MalformedFile(f"{INDEX_FILE} has the total_size {total!r}; the tensors have {size:,} bytes.")


def _check_adapter(sealed: Sealed, folder: Path) -> Iterator[CordaConvertError]:
    """Whether PEFT would find every factor in the file, and each fits the weight that it was made from."""
    try:
        adapter = read_adapter(folder)
    except CordaConvertError as problem:
        yield problem
        return
    adapter.source.close()
    weights = {tensor.name: tensor for tensor in sealed.tensors}
    for factors in lora_factors(adapter.modules):
        weight = _weight_of(weights.get(factors.lora_A.name), weights)
        matrix = (factors.lora_B.shape[0], factors.lora_A.shape[1])
        if weight is not None and len(weight.spec.shape) == 2 and weight.spec.shape not in (matrix, matrix[::-1]):
            yield MalformedFile(f"{factors.module_name} is {matrix} in {folder.name}, {weight.spec.shape} beside it.")


def _weight_of(factor: ListedTensor | None, weights: Mapping[str, ListedTensor]) -> ListedTensor | None:
    """The residual that was made together with a factor."""
    return weights.get(factor.owner) if factor is not None and factor.owner != factor.name else None
