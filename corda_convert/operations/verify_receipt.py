"""A sealed folder as its receipt describes it: every entry checked before it is believed, for it may come from anyone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from corda_convert.checkpoint.folder import RECEIPT_FILE, missing_path
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorSpec
from corda_convert.errors import InputNotFound, MalformedFile, UnsupportedInput
from corda_convert.output.receipt import read_receipt

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as the receipt has it. `sha256` is None for an input whose digest was not taken."""

    name: str
    nbytes: int
    sha256: str | None
    header_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class ListedTensor:
    """An output tensor as the receipt has it: where it lies, what it is, and what was done to it.

    `owner` is the tensor whose entry has the facts, of one that was made together with others.
    """

    spec: TensorSpec
    file: str
    action: str
    owner: str
    facts: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True)
class ListedInput:
    """A folder or file that the command read: its part in it, its own name, and its files."""

    role: str
    name: str
    files: tuple[ListedFile, ...]


@dataclass(frozen=True, slots=True)
class Sealed:
    """An output folder with its receipt, whose parts are of the right types.

    Attributes:
        folder: where it is.
        command: what made it.
        options: what the user chose then.
        files: by name.
        tensors: in the order of the receipt.
        inputs: what was read.
        receipt: all of it.
    """

    folder: Path
    command: str
    options: Mapping[str, Any]
    files: Mapping[str, ListedFile]
    tensors: tuple[ListedTensor, ...]
    inputs: tuple[ListedInput, ...]
    receipt: Mapping[str, Any]

    @property
    def weight_files(self) -> dict[str, list[ListedTensor]]:
        """The files of tensors, each with those that the receipt puts there."""
        found: dict[str, list[ListedTensor]] = {}
        for tensor in self.tensors:
            found.setdefault(tensor.file, []).append(tensor)
        return found


def read_sealed(folder: Path) -> Sealed:
    """Reads a folder's receipt. Raises `InputNotFound` without one, `UnsupportedInput` for a newer one, `MalformedFile`."""
    if not folder.is_dir():
        if folder.exists():
            raise InputNotFound(f"{folder} is a file; an output folder of corda-convert was expected.")
        raise missing_path(folder, "folder")
    receipt = _read(folder)
    try:
        files = {file.name: file for file in (_file(entry) for entry in receipt["files"])}
        if len(files) != len(receipt["files"]):
            raise ValueError("a file stands twice")
        tensors = tuple(_tensor(entry) for entry in receipt["tensors"])
        if len({(tensor.file, tensor.name) for tensor in tensors}) != len(tensors):
            raise ValueError("a tensor stands twice")
        unlisted = {tensor.file for tensor in tensors} - files.keys()
        if unlisted:
            raise ValueError(f"tensors lie in {sorted(unlisted)[0]!r}, which is not among its files")
        return Sealed(
            folder=folder,
            command=_text(receipt["command"]),
            options=_object(receipt["options"]),
            files=files,
            tensors=tensors,
            inputs=tuple(_input(entry) for entry in receipt["inputs"]),
            receipt=receipt,
        )
    except KeyError as missing:
        raise _damaged(folder, f"it has no {missing}") from None
    except (TypeError, ValueError) as error:
        raise _damaged(folder, str(error)) from None


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RECEIPT_FILE
    try:
        receipt = read_receipt(folder)
    except MalformedFile as problem:
        if problem.next_step is not None:  # a receipt, of another version
            raise UnsupportedInput(
                problem.what, next_step="Install a version of corda-convert that knows it."
            ) from None
        raise MalformedFile(
            problem.what, why="It was cut off or altered.", next_step="Make the folder again."
        ) from None
    if receipt is None:
        raise InputNotFound(
            f"{folder} holds no {path.name}, so nobody can tell what should be in it.",
            why="It is no finished output of corda-convert.",
            next_step="Make it again, or give the folder that a command wrote with -o.",
        )
    return receipt


def _damaged(folder: Path, reason: str) -> MalformedFile:
    return MalformedFile(
        f"{folder / RECEIPT_FILE} is damaged: {reason}.",
        why="It was cut off or altered.",
        next_step="Make the folder again.",
    )


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{_shown(value)} stands where an object was expected")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{_shown(value)} stands where a name was expected")
    return value


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise TypeError(f"{_shown(value)} stands where a size was expected")
    return value


def _digest(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise TypeError(f"{_shown(value)} stands where a SHA-256 was expected")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path(value: object) -> str:
    """A path inside the folder, in its one spelling."""
    name = _text(value)
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or str(pure) != name or {"\\", "\0"} & set(name):
        raise ValueError(f"{_shown(name)} is no path of a file in the folder")
    return name


def _file(entry: object) -> ListedFile:
    listed = _object(entry)
    return ListedFile(_path(listed["name"]), _size(listed["bytes"]), _digest(listed["sha256"]))


def _tensor(entry: object) -> ListedTensor:
    listed = _object(entry)
    dtype, shape = listed["dtype"], listed["shape"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS or not isinstance(shape, list):
        raise ValueError(f"{_shown(listed['name'])} has the dtype {_shown(dtype)} and the shape {_shown(shape)}")
    name = _text(listed["name"])
    spec = TensorSpec(name, dtype, tuple(_size(side) for side in shape))
    return ListedTensor(spec, _path(listed["file"]), _text(listed["action"]), str(listed.get("with", name)), listed)


def _input(entry: object) -> ListedInput:
    listed = _object(entry)
    files = tuple(
        ListedFile(
            _text(file["name"]),
            _size(file["bytes"]),
            None if file.get("sha256") is None else _digest(file["sha256"]),
            None if file.get("header_sha256") is None else _digest(file["header_sha256"]),
        )
        for file in map(_object, listed["files"])
    )
    return ListedInput(_text(listed["role"]), _text(listed["name"]), files)
