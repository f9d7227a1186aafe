"""The archive that `torch.save` writes for a dict of tensors, laid out before one byte of a tensor is known.

A zip archive without compression: a pickle that describes the tensors, then each tensor's bytes as a record of its own.
A record's checksum stands behind its bytes, so that the file can be written front to back.
Zip: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT; the pickle: `torch/_utils.py`, `_rebuild_tensor_v2`.
"""

from __future__ import annotations

import pickle
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.errors import UnsupportedInput, some

SUFFIXES = (".pth", ".pt")
"""An output file with such a name is written in this format."""

ALIGNMENT = 64
"""Storages begin at multiples of this, as in torch's own files, so that they can be mapped."""

_STORAGES = {
    "BOOL": "BoolStorage", "U8": "ByteStorage", "I8": "CharStorage", "I16": "ShortStorage", "I32": "IntStorage",
    "I64": "LongStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "F32": "FloatStorage", "F64": "DoubleStorage",
    "C64": "ComplexFloatStorage",
}  # fmt: skip
_UNTYPED = {
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip

_PREFIX = "archive/"
_UTF8, _CHECKSUM_BEHIND = 0x800, 0x8
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_CENTRAL_HEADER = struct.Struct("<4s6H3L5H2L")
_MOST = 0xFFFFFFFF
_DATE = 0x21  # 1980-01-01, the first of the format: the same bytes on every day


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the archive: where its header begins, where its bytes begin, how many they are."""

    name: str
    header_begin: int
    begin: int
    nbytes: int
    checksum: int | None

    @property
    def end(self) -> int:
        return self.begin + self.nbytes

    @property
    def is_large(self) -> bool:
        return self.nbytes >= _MOST

    def header(self) -> bytes:
        """The bytes before the record's own, padded so that these begin at a multiple of `ALIGNMENT`."""
        name = self.name.encode()
        extra = struct.pack("<2H2Q", 1, 16, 0, 0) if self.is_large else b""
        padding = self.begin - self.header_begin - _LOCAL_HEADER.size - len(name) - len(extra) - 4
        extra += struct.pack("<2s H", b"FB", padding) + bytes(padding)
        known = self.checksum is not None
        return (
            _LOCAL_HEADER.pack(
                b"PK\3\4", 45 if self.is_large else 20, _UTF8 if known else _UTF8 | _CHECKSUM_BEHIND, 0, 0, _DATE,
                self.checksum or 0, *([self.nbytes] * 2 if known else [_MOST if self.is_large else 0] * 2),
                len(name), len(extra),
            )
            + name
            + extra
        )  # fmt: skip

    def descriptor(self, checksum: int) -> bytes:
        """The bytes behind the record's own."""
        sizes = struct.pack("<2Q" if self.is_large else "<2L", self.nbytes, self.nbytes)
        return b"PK\7\10" + struct.pack("<L", checksum) + sizes

    def directory_entry(self, checksum: int) -> bytes:
        name = self.name.encode()
        far = [value for value in (self.nbytes, self.nbytes, self.header_begin) if value >= _MOST]
        extra = struct.pack(f"<2H{len(far)}Q", 1, 8 * len(far), *far) if far else b""
        size, begin = min(self.nbytes, _MOST), min(self.header_begin, _MOST)
        flags = _UTF8 if self.checksum is not None else _UTF8 | _CHECKSUM_BEHIND
        version = 45 if far else 20
        return (
            _CENTRAL_HEADER.pack(
                b"PK\1\2", version, version, flags, 0, 0, _DATE, checksum, size, size, len(name), len(extra), 0, 0, 0, 0,
                begin,
            )
            + name
            + extra
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Archive:
    """The layout of one file.

    Attributes:
        header: every byte before the first storage; the whole file where no tensor has any bytes.
        known: the records in the header, with their checksums.
        storages: the tensors that have bytes, in order; their checksums are known once their bytes are.
        nbytes: the size of the file.
    """

    header: bytes
    known: tuple[Record, ...]
    storages: tuple[Record, ...]
    nbytes: int

    def behind(self, index: int, checksums: Sequence[int]) -> bytes:
        """What stands behind the storage `index`, up to the next one or to the end, by the checksums so far."""
        descriptor = self.storages[index].descriptor(checksums[index])
        if index + 1 < len(self.storages):
            return descriptor + self.storages[index + 1].header()
        begin = self.storages[index].end + len(descriptor)
        return descriptor + _directory((*self.known, *self.storages), checksums, begin)


def lay_out_archive(specs: Sequence[TensorSpec]) -> tuple[Archive, dict[str, int]]:
    """The layout for these tensors, and where the bytes of each begin.

    Raises `UnsupportedInput` for dtypes that torch has no tensors of.
    """
    strangers = [f"{spec.name} {spec.dtype}" for spec in specs if spec.dtype not in (*_STORAGES, *_UNTYPED)]
    if strangers:
        raise UnsupportedInput(
            f"torch.save knows no such tensors: {some(strangers)}.", next_step="Write safetensors instead."
        )
    contents = {"data.pkl": _describe(specs), "byteorder": b"little", "version": b"3\n"}
    contents |= {f"data/{key}": b"" for key, spec in enumerate(specs) if not spec.nbytes}
    known: list[Record] = []
    header = b""
    for name, content in contents.items():
        record = _record(name, len(header), len(content), zlib.crc32(content))
        known.append(record)
        header += record.header() + content
    places = {spec.name: record.begin for record, spec in _empty(known, specs)}
    storages: list[Record] = []
    position = len(header)
    for key, spec in enumerate(specs):
        if spec.nbytes:
            record = _record(f"data/{key}", position, spec.nbytes, None)
            storages.append(record)
            places[spec.name] = record.begin
            position = record.end + len(record.descriptor(0))
    header += storages[0].header() if storages else _directory(known, [], position)
    tail = len(_directory((*known, *storages), [0] * len(storages), position))
    return Archive(header, tuple(known), tuple(storages), position + tail), places


def _empty(known: Iterable[Record], specs: Sequence[TensorSpec]) -> Iterable[tuple[Record, TensorSpec]]:
    records = {record.name: record for record in known}
    return ((records[f"{_PREFIX}data/{key}"], spec) for key, spec in enumerate(specs) if not spec.nbytes)


def _record(name: str, position: int, nbytes: int, checksum: int | None) -> Record:
    name = _PREFIX + name
    least = position + _LOCAL_HEADER.size + len(name.encode()) + (20 if nbytes >= _MOST else 0) + 4
    return Record(name, position, -(-least // ALIGNMENT) * ALIGNMENT, nbytes, checksum)


def _directory(records: Sequence[Record], checksums: Sequence[int], begin: int) -> bytes:
    """The archive's list of records at its end. `checksums` are those that the records do not have themselves."""
    behind = iter(checksums)
    entries = b"".join(
        record.directory_entry(next(behind) if record.checksum is None else record.checksum) for record in records
    )
    end, count = begin + len(entries), len(records)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, len(entries), begin)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    fewer = min(count, 0xFFFF)
    narrow = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, fewer, fewer, min(len(entries), _MOST), min(begin, _MOST), 0)
    return entries + wide + locator + narrow


def _describe(specs: Sequence[TensorSpec]) -> bytes:
    """The pickle of the dict of tensors, each with a storage of its own, named by its place."""
    tensors = b"".join(_text(spec.name) + _tensor(str(key), spec) for key, spec in enumerate(specs))
    return pickle.PROTO + b"\2" + pickle.EMPTY_DICT + pickle.MARK + tensors + pickle.SETITEMS + pickle.STOP


def _tensor(key: str, spec: TensorSpec) -> bytes:
    strides = [1] * len(spec.shape)
    for dim in range(len(spec.shape) - 1, 0, -1):
        strides[dim - 1] = strides[dim] * max(spec.shape[dim], 1)
    typed = spec.dtype in _STORAGES
    storage = _name("torch", _STORAGES[spec.dtype]) if typed else _name("torch.storage", "UntypedStorage")
    length = spec.elements if typed else spec.nbytes
    place = _tuple(_text("storage"), storage, _text(key), _text("cpu"), _integer(length)) + pickle.BINPERSID
    hooks = _name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    sizes = (_tuple(*map(_integer, spec.shape)), _tuple(*map(_integer, strides)))
    arguments = (place, _integer(0), *sizes, pickle.NEWFALSE, hooks)
    if typed:
        return _name("torch._utils", "_rebuild_tensor_v2") + _tuple(*arguments) + pickle.REDUCE
    dtype = _name("torch", _UNTYPED[spec.dtype])
    return _name("torch._utils", "_rebuild_tensor_v3") + _tuple(*arguments, dtype) + pickle.REDUCE


def _text(text: str) -> bytes:
    encoded = text.encode()
    return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _name(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _integer(number: int) -> bytes:
    encoded = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(encoded)]) + encoded


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE
