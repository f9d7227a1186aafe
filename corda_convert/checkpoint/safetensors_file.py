"""The safetensors format: a checked header, and `pread` into the caller's buffer.

A header comes from strangers: every size in it is checked against the file before anything is believed.
Format: https://huggingface.co/docs/safetensors (8 bytes of little-endian header length, JSON, data).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.byte_file import ByteFile, Extent
from corda_convert.checkpoint.remote_file import absent
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorSpec
from corda_convert.errors import InputNotFound, MalformedFile

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_FETCH_AGAIN = "Get the file again from where it came, and compare its size."


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header. `specs` and `extents` are in the order of the data."""

    specs: dict[str, TensorSpec]
    extents: dict[str, Extent]
    metadata: dict[str, str]
    data_begin: int
    file_bytes: int


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises `InputNotFound`, or `MalformedFile` for a truncated file, a header that is not valid, and tensors that
    overlap, leave holes or reach outside the file.
    """
    remote = absent(path)
    try:
        if remote is None and not path.is_file():  # to open a pipe would wait for its writer
            raise FileNotFoundError
        with path.open("rb") if remote is None else io.BytesIO(remote.head) as stream:
            file_bytes = os.fstat(stream.fileno()).st_size if remote is None else remote.nbytes
            length_bytes = stream.read(8)
            length = int.from_bytes(length_bytes, "little")
            if len(length_bytes) < 8 or length > file_bytes - 8:
                raise MalformedFile(
                    f"{path} is truncated: {file_bytes:,} bytes do not hold its header.",
                    why="The download or copy was cut off, or this is no safetensors file.",
                    next_step=_FETCH_AGAIN,
                )
            if length > MAX_HEADER_BYTES:
                raise MalformedFile(f"{path} claims a header of {length:,} bytes, above the format's limit.")
            text = stream.read(length)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputNotFound(f"No such file: {path}") from None
    except OSError as error:
        raise MalformedFile(f"{path} cannot be read: {error.strerror}.") from None
    return _check_header(path, _parse_header(path, text), 8 + length, file_bytes)


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name stands twice")
        for text in (*entries, *(value for value in entries.values() if isinstance(value, str))):
            text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
        return entries

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=checked_object)
    except (ValueError, RecursionError) as error:
        raise MalformedFile(f"{path} has no valid safetensors header: {error}.", next_step=_FETCH_AGAIN) from None
    if not isinstance(parsed, dict):
        raise MalformedFile(f"{path} has no valid safetensors header: it is not a JSON object.")
    return parsed


def _check_header(path: Path, parsed: dict[str, Any], data_begin: int, file_bytes: int) -> Header:
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedFile(f"{path}: __metadata__ must map strings to strings.")
    located = [(_check_entry(path, name, entry)) for name, entry in parsed.items()]
    located.sort(key=lambda item: (item[1], item[2]))
    position = 0
    for spec, begin, end in located:
        if begin != position:
            raise MalformedFile(
                f"{path}: the bytes of {spec.name} begin at {begin:,}, where {position:,} was expected: "
                "tensors overlap or leave a hole.",
                next_step=_FETCH_AGAIN,
            )
        position = end
    if data_begin + position != file_bytes:
        raise MalformedFile(
            f"{path} is {'truncated' if data_begin + position > file_bytes else 'too long'}: its header describes "
            f"{data_begin + position:,} bytes, the file has {file_bytes:,}.",
            why="The download or copy was cut off." if data_begin + position > file_bytes else None,
            next_step=_FETCH_AGAIN,
        )
    return Header(
        specs={spec.name: spec for spec, _, _ in located},
        extents={spec.name: Extent(data_begin + begin, end - begin) for spec, begin, end in located},
        metadata=metadata,
        data_begin=data_begin,
        file_bytes=file_bytes,
    )


def _check_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    def is_size(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

    if not isinstance(entry, dict):
        raise MalformedFile(f"{path}: the header's entry for {name} is not an object.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise MalformedFile(f"{path}: {name} has the unknown dtype {dtype!r}.")
    if not isinstance(shape, list) or not all(is_size(size) for size in shape):
        raise MalformedFile(f"{path}: {name} has the invalid shape {shape!r}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
        raise MalformedFile(f"{path}: {name} has the invalid data_offsets {offsets!r}.")
    spec = TensorSpec(name, dtype, tuple(shape))
    begin, end = offsets
    if end - begin != spec.nbytes:
        needed = f"{spec.nbytes:,} bytes" if is_size(spec.nbytes) else "more bytes than a file can have"
        raise MalformedFile(f"{path}: {name} is {dtype} {spec.shape}, {needed}, but its offsets span {end - begin:,}.")
    return spec, begin, end


class SafetensorsFile(ByteFile):
    """A safetensors file, opened on first use. Implements `ExtentFile`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.header = read_header(path)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return self.header.specs

    @property
    def metadata(self) -> dict[str, str]:
        return self.header.metadata

    def extent(self, name: str) -> Extent:
        return self.header.extents[name]

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        extent = self.header.extents[name]
        if begin + len(view) > extent.nbytes:
            raise ValueError(f"{name}: {begin} + {len(view)} is past its {extent.nbytes} bytes")
        self.read_bytes_into(extent.begin + begin, view)

    def header_sha256(self) -> str:
        """The digest of the header alone: it identifies names, dtypes and shapes, not values."""
        header = bytearray(self.header.data_begin)
        self.read_bytes_into(0, memoryview(header))
        return hashlib.sha256(header).hexdigest()
