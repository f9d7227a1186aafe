"""The bytes of a sealed folder: sizes, SHA-256, and whether every number is finite, in one pass over each file."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from corda_convert.checkpoint.byte_file import ExtentFile
from corda_convert.checkpoint.tensors import DTYPE_BITS

CHUNK_BYTES = 8 << 20
"""So much of a file is held at a time, for each file that is read at once."""

_FINITE: Mapping[str, tuple[str, int, int]] = {
    "F64": ("<u8", (1 << 63) - 1, 0x7FF << 52),
    "F32": ("<u4", (1 << 31) - 1, 0xFF << 23),
    "C64": ("<u4", (1 << 31) - 1, 0xFF << 23),
    "F16": ("<u2", (1 << 15) - 1, 0x1F << 10),
    "BF16": ("<u2", (1 << 15) - 1, 0xFF << 7),
    "F8_E5M2": ("<u1", 0x7F, 0x1F << 2),
    "F8_E4M3": ("<u1", 0x7F, 0x7F),
    "F8_E8M0": ("<u1", 0xFF, 0xFF),
}
"""Integers of as many bits, the bits without the sign, and the least that is NaN or Inf."""


@dataclass(frozen=True, slots=True)
class Scan:
    """A file to read through: tensors of floating-point numbers lie in it as `tensors` says (begin, end, dtype, name)."""

    path: Path
    tensors: tuple[tuple[int, int, str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Scanned:
    """What was found: the SHA-256 in hex, and the tensors that hold NaN or Inf."""

    sha256: str
    not_finite: tuple[str, ...]


def scan_of(file: ExtentFile) -> Scan:
    """The scan of a file whose header was read. A tensor whose bytes lie scattered is left out."""
    placed = [
        (extent.begin, extent.begin + extent.nbytes, spec.dtype, spec.name)
        for spec in file.specs.values()
        if spec.dtype in _FINITE and (extent := file.extent(spec.name)) is not None and extent.nbytes
    ]
    return Scan(file.path, tuple(sorted(placed)))


def scan_all(scans: Sequence[Scan], advance: Callable[[int], None]) -> dict[Path, Scanned | OSError]:
    """Reads all files, the largest first, on every core. `advance` is told of the bytes read, from any thread."""
    cores = max(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 1)
    ordered = sorted(scans, key=lambda scan: -_size(scan.path))

    def one(scan: Scan) -> Scanned | OSError:
        try:
            return _scan(scan, checkers, advance)
        except OSError as error:
            return error

    with ThreadPoolExecutor(cores) as checkers, ThreadPoolExecutor(cores) as readers:
        return dict(zip((scan.path for scan in ordered), readers.map(one, ordered), strict=True))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _scan(scan: Scan, checkers: ThreadPoolExecutor, advance: Callable[[int], None]) -> Scanned:
    digest = hashlib.sha256()
    found: dict[str, None] = {}
    buffer = memoryview(bytearray(CHUNK_BYTES))
    begins = [begin for begin, _, _, _ in scan.tensors]
    with scan.path.open("rb", buffering=0) as stream:
        for begin, end, dtype in _spans(scan, os.fstat(stream.fileno()).st_size):
            for first in range(begin, end, CHUNK_BYTES):
                view = buffer[: min(CHUNK_BYTES, end - first)]
                _fill(stream.readinto, view)
                checking = checkers.submit(_is_finite, view, dtype) if dtype is not None else None
                digest.update(view)
                if checking is not None and dtype is not None and not checking.result():
                    place = bisect.bisect_right(begins, first) - 1
                    found |= dict.fromkeys(_not_finite(scan.tensors[place:], first, view, dtype))
                advance(len(view))
    return Scanned(digest.hexdigest(), tuple(found))


def _fill(readinto: Callable[[memoryview], int | None], view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = readinto(view[done:])
        if not count:
            raise OSError(f"it ended while it was read, {len(view) - done:,} bytes early")
        done += count


def _spans(scan: Scan, file_bytes: int) -> Iterator[tuple[int, int, str | None]]:
    """The file cut into runs of numbers of one dtype, and of what is none."""
    position, dtype = 0, None
    begin = 0
    for first, end, own, _ in scan.tensors:
        if end > file_bytes:
            break
        if own != dtype or first != position:
            if position > begin:
                yield begin, position, dtype
            if first > position:
                yield position, first, None
            begin, dtype = first, own
        position = end
    if position > begin:
        yield begin, position, dtype
    if file_bytes > position:
        yield position, file_bytes, None


def _is_finite(view: memoryview, dtype: str) -> bool:
    import numpy as np

    integers, bits, least = _FINITE[dtype]
    numbers = np.frombuffer(view, dtype=integers)
    return not numbers.size or int(np.bitwise_and(numbers, numbers.dtype.type(bits)).max()) < least


def _not_finite(
    tensors: Iterable[tuple[int, int, str, str]], first: int, view: memoryview, dtype: str
) -> Iterator[str]:
    """The tensors of which the piece at `first` holds NaN or Inf."""
    size = DTYPE_BITS[dtype] // 8
    for begin, end, _, name in tensors:
        if begin >= first + len(view):
            return
        part = view[max(begin - first, 0) : min(end - first, len(view))]
        if not _is_finite(part[: len(part) // size * size], dtype):
            yield name
