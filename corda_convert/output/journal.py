"""What an unfinished run has written: notes that the same command reads when it goes on.

A note lists ranges of the output's files with the SHA-256 of what was written there. Nothing is flushed to the disk for it:
whoever goes on reads the ranges again and takes only those whose digest is the noted one, so a note of bytes that never
reached the disk is worth nothing and does no harm.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

from corda_convert.output.digests import WrittenDigest

COMMIT_BYTES = 32 << 20
COMMIT_SECONDS = 1.0
"""A note is made after so many bytes or seconds, and at the end of each file: at most so much work is done again."""

SUFFIX = ".jsonl"
_CARRIED = f"carried{SUFFIX}"
_READ_BYTES = 8 << 20

Facts = dict[str, Any]


class Journal:
    """Appends the notes of one process to a file of its own."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._chain = path.stem
        self._stream = path.open("a", encoding="utf-8")
        self._known_inputs: set[str] = set()
        self._facts: dict[str, Facts] = {}
        self._nbytes = 0
        self._last = time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def add(self, nbytes: int, facts: Mapping[str, Facts]) -> None:
        """Takes what the next note shall hold beside the files: bytes written, and facts of finished jobs."""
        self._nbytes += nbytes
        self._facts |= facts

    @property
    def is_due(self) -> bool:
        return self._nbytes >= COMMIT_BYTES or time.monotonic() - self._last >= COMMIT_SECONDS

    def commit(self, files: Mapping[str, WrittenDigest], inputs: Mapping[Path, str]) -> None:
        """Notes what was written of the files since the last note, and the digests of inputs that were read whole."""
        marks = []
        for name, written in files.items():
            written.chain = written.chain or self._chain
            ranges, sha256 = written.mark()
            if ranges:
                marks.append({"file": name, "chain": written.chain, "ranges": ranges, "sha256": sha256})
        new = {str(path): sha256 for path, sha256 in inputs.items() if str(path) not in self._known_inputs}
        if marks or self._facts or new:
            self._stream.write(_encode({"marks": marks, "facts": self._facts, "inputs": new}))
            self._stream.flush()
        self._known_inputs |= new.keys()
        self._facts, self._nbytes, self._last = {}, 0, time.monotonic()


def _encode(note: Mapping[str, Any]) -> str:
    """The note as a line with its own digest, by which a damaged one is known."""
    return _text({**note, "digest": _digest(note)}) + "\n"


def _digest(note: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(note).encode()).hexdigest()


def _text(note: Mapping[str, Any]) -> str:
    return json.dumps(note, separators=(",", ":"))


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays of an unfinished run.

    Attributes:
        ranges: by file, the sorted half-open ranges that are as they were written.
        digests: by file, the digest of its longest beginning among them, to go on with.
        facts: by the name of a job.
        inputs: digests by the path of the input.
    """

    ranges: Mapping[str, list[tuple[int, int]]] = field(default_factory=dict)
    digests: Mapping[str, WrittenDigest] = field(default_factory=dict)
    facts: Mapping[str, Facts] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def holds(self, file_name: str, begin: int, end: int) -> bool:
        """Whether all bytes from `begin` up to `end` of the file are there."""
        ranges = self.ranges.get(file_name, [])
        place = bisect_right(ranges, begin, key=lambda span: span[0]) - 1
        return begin >= end or (place >= 0 and end <= ranges[place][1])


def take_over(journals: Path, folder: Path, sizes: Mapping[str, int]) -> Kept:
    """Reads the journals of earlier runs, compares `folder` with them, and puts one journal in their place.

    `sizes` of the files that the run will write; notes of others are passed over, as are damaged ones.
    """
    notes = [note for path in _paths(journals) for note in _notes(path)]
    marks = sorted(
        (mark for note in notes for mark in note["marks"] if mark["file"] in sizes), key=lambda mark: str(mark["file"])
    )
    by_file = {name: list(found) for name, found in groupby(marks, key=lambda mark: str(mark["file"]))}
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = pool.map(lambda name: _verified(folder / name, sizes[name], by_file[name]), by_file)
        found = dict(zip(by_file, checked, strict=True))
    kept = Kept(
        {name: _merged(span for digest in digests for span in digest.ranges) for name, digests in found.items()},
        {name: max(whole, key=_position) for name, digests in found.items() if (whole := _beginnings(digests))},
        {name: facts for note in notes for name, facts in note["facts"].items()},
        {path: sha256 for note in notes for path, sha256 in note["inputs"].items()},
    )
    _carry_over(journals, found, kept)
    return kept


def _paths(journals: Path) -> list[Path]:
    """The journals in the order of their runs."""
    found = (path for path in journals.glob(f"*{SUFFIX}") if path.is_file())
    return sorted(found, key=lambda path: (path.name != _CARRIED, path.name))


def _notes(path: Path) -> Iterable[dict[str, Any]]:
    """The journal's notes up to the first that is not as it was written."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                note = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(note, dict) or note.pop("digest", None) != _digest(note):
                return
            yield note


def _verified(path: Path, nbytes: int, marks: Iterable[Mapping[str, Any]]) -> list[WrittenDigest]:
    """For each chain of writes the longest part of it that the file still holds."""
    chains: dict[str, WrittenDigest] = {}
    ended: set[str] = set()
    for mark in marks:
        chain = str(mark["chain"])
        digest = chains.setdefault(chain, WrittenDigest(nbytes, chain=chain)).copy()
        if chain in ended:
            continue
        is_read = all(_read(path, digest, begin, end) for begin, end in mark["ranges"])
        if is_read and digest.mark()[1] == mark["sha256"]:
            chains[chain] = digest
        else:
            ended.add(chain)
    return [digest for digest in chains.values() if digest.ranges]


def _read(path: Path, digest: WrittenDigest, begin: int, end: int) -> bool:
    """Takes a range of the file into the digest; False if the file has no such."""
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(begin)
            while begin < end:
                piece = stream.read(min(_READ_BYTES, end - begin))
                if not piece:
                    return False
                digest.update(begin, piece)
                begin += len(piece)
    except OSError:
        return False
    return True


def _beginnings(digests: Iterable[WrittenDigest]) -> list[WrittenDigest]:
    return [digest for digest in digests if not digest.is_broken]


def _position(digest: WrittenDigest) -> int:
    return digest.position


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def _carry_over(journals: Path, found: Mapping[str, Iterable[WrittenDigest]], kept: Kept) -> None:
    """Writes one journal of what was found to be true, and removes the others."""
    marks = [
        {"file": name, "chain": digest.chain, "ranges": digest.ranges, "sha256": digest.copy().mark()[1]}
        for name, digests in found.items()
        for digest in digests
    ]
    earlier = [path for path in _paths(journals) if path.name != _CARRIED]
    if marks:
        draft = journals / "draft"
        draft.write_text(_encode({"marks": marks, "facts": kept.facts, "inputs": kept.inputs}), encoding="utf-8")
        draft.replace(journals / _CARRIED)
    for path in earlier:
        path.unlink()


def has_notes(journals: Path) -> bool:
    """Whether an unfinished run has noted anything there."""
    return any(path.stat().st_size for path in _paths(journals))
