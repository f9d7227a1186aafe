"""Writing past the page cache: the same bytes, whatever the disk allows."""

from __future__ import annotations

import hashlib
import mmap
import os
import random as python_random
from pathlib import Path

import pytest

from corda_convert.checkpoint.byte_file import PAGE_BYTES
from corda_convert.output import direct
from corda_convert.output.direct import FIRST_TRIAL_BYTES, LEAST_BYTES, TRIAL_BYTES, DirectWriting, whole_pages
from corda_convert.output.shard_writer import ShardWriter

SIZE = 5 << 20
HEADER = b"header!!"


@pytest.fixture(scope="module")
def content() -> bytes:
    return HEADER + python_random.Random(0).randbytes(SIZE)


def pieces(seed: int) -> list[tuple[int, int]]:
    """Ranges that cover the file behind its header, short and long ones."""
    generator = python_random.Random(seed)
    cuts = [*sorted(generator.sample(range(len(HEADER) + 1, SIZE), 6)), SIZE + len(HEADER)]
    return list(zip([len(HEADER), *cuts], cuts, strict=False))


def written(path: Path, content: bytes, direct_writing: DirectWriting, seed: int) -> str:
    """Writes the pieces from memory that lies as the file does, and returns the digest."""
    with mmap.mmap(-1, len(content)) as memory, memoryview(memory) as view:
        view[:] = content
        writer = ShardWriter(path, HEADER, len(content), direct_writing)
        for begin, end in pieces(seed):
            with view[begin:end] as piece:
                writer.write(begin, piece)
                writer.digest(begin, piece)
    return writer.finish()[1]


@pytest.mark.parametrize("seed", range(6))
def test_pieces_at_any_offset_make_the_file(seed: int, content: bytes, tmp_path: Path) -> None:
    direct_writing = DirectWriting()
    digest = written(tmp_path / "x", content, direct_writing, seed)
    assert (tmp_path / "x").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()
    if direct_writing.is_on:
        assert direct_writing._nbytes > SIZE // 2


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_file_system_that_refuses_gets_ordinary_writes(
    refused: int, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it refuses the first direct write or a later one."""
    direct_writing = DirectWriting()
    (tmp_path / "probe").touch()
    descriptor = direct_writing.open(tmp_path / "probe")
    if descriptor is None:
        pytest.skip("no direct writes here")
    os.close(descriptor)
    calls: list[int] = []
    pwrite = os.pwrite

    def refusing(target: int, view: memoryview, offset: int) -> int:
        if offset % PAGE_BYTES == 0 and len(view) % PAGE_BYTES == 0 and len(view) >= LEAST_BYTES // 2:
            calls.append(offset)
            if len(calls) > refused:
                raise OSError(22, "Invalid argument")
        return pwrite(target, view, offset)

    monkeypatch.setattr(direct.os, "pwrite", refusing)
    monkeypatch.setattr("corda_convert.output.shard_writer.os.pwrite", pwrite)
    digest = written(tmp_path / "x", content, direct_writing, seed=1)
    assert (tmp_path / "x").read_bytes() == content
    assert digest == hashlib.sha256(content).hexdigest()


def test_where_there_are_no_direct_writes_there_are_ordinary_ones(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(direct.os, "O_DIRECT", raising=False)
    direct_writing = DirectWriting()
    assert not direct_writing.is_on
    written(tmp_path / "x", content, direct_writing, seed=2)
    assert (tmp_path / "x").read_bytes() == content


@pytest.mark.parametrize(
    ("rates", "written"),
    [
        ([100e6], FIRST_TRIAL_BYTES),
        ([300e6], TRIAL_BYTES),
        ([2e9], None),
        ([300e6] * 4 + [2e9], None),
        ([2e9] * 4 + [350e6], TRIAL_BYTES),
    ],
    ids=["very slow", "slow", "fast", "slow at first", "slow in the end"],
)
def test_a_slow_disk_is_left_to_the_page_cache(
    rates: list[float], written: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates of the first pieces; the last one goes on."""
    piece = memoryview(bytearray(FIRST_TRIAL_BYTES // 4))
    clock = [0.0]

    passed = [0]

    def pwrite(_target: int, view: memoryview, _offset: int) -> int:
        clock[0] += len(view) / rates[min(passed[0] // len(piece), len(rates) - 1)]
        passed[0] += len(view)
        return len(view)

    monkeypatch.setattr(direct.os, "pwrite", pwrite)
    monkeypatch.setattr(direct.time, "perf_counter", lambda: clock[0])
    direct_writing = DirectWriting()
    direct_writing.is_on = True
    while direct_writing.is_on and passed[0] < 2 * TRIAL_BYTES:
        assert direct_writing.write(0, piece, 0) == len(piece)
    assert (None if direct_writing.is_on else passed[0]) == written


@pytest.mark.parametrize(
    ("offset", "nbytes", "expected"),
    [
        (0, PAGE_BYTES, (0, PAGE_BYTES)),
        (1, PAGE_BYTES, (1, 1)),
        (1, 2 * PAGE_BYTES, (PAGE_BYTES, 2 * PAGE_BYTES)),
        (PAGE_BYTES - 1, 1, (PAGE_BYTES - 1, PAGE_BYTES - 1)),
        (5 * PAGE_BYTES, 3 * PAGE_BYTES + 7, (5 * PAGE_BYTES, 8 * PAGE_BYTES)),
    ],
)
def test_whole_pages_of_a_piece(offset: int, nbytes: int, expected: tuple[int, int]) -> None:
    assert whole_pages(offset, nbytes) == expected
