"""SHA-256 of files while their bytes pass through, so that no file is read twice for its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path

from corda_convert.errors import MalformedFile


class SequentialDigest:
    """The SHA-256 of a file whose bytes are offered front to back.

    A piece out of order breaks it: then there is no digest, rather than a wrong one. Bytes of a head that was hashed
    before (`skip_head`) may be offered again, in any order, and are passed over.
    """

    def __init__(self, file_bytes: int) -> None:
        self._hash = hashlib.sha256()
        self.head = 0
        self._file_bytes = file_bytes
        self.position = 0
        self.is_broken = False

    def skip_head(self) -> None:
        """Takes what has been hashed so far for the head: it is passed over from now on."""
        self.head = self.position

    def update(self, offset: int, view: memoryview | bytes) -> None:
        if offset < self.head:
            view = view[self.head - offset :]
            offset = self.head
            if not len(view):
                return
        if self.is_broken or offset != self.position:
            self.is_broken = True
            return
        self._hash.update(view)
        self.position += len(view)

    def hexdigest(self) -> str | None:
        """The digest, or None unless every byte has passed in order."""
        return self._hash.hexdigest() if not self.is_broken and self.position == self._file_bytes else None


class WrittenDigest:
    """The SHA-256 of what was written of a file, in the order of writing, and which bytes those are.

    Attributes:
        chain: names the sequence of writes that is hashed; several processes may write one file.
        ranges: half-open ranges of the bytes that were hashed, in that order.
        position: where the last of them ended.
        is_broken: whether they are not the file's first bytes front to back.
    """

    def __init__(self, nbytes: int, *, chain: str = "", is_broken: bool = False) -> None:
        self.chain = chain
        self.ranges: list[tuple[int, int]] = []
        self.position = 0
        self.is_broken = is_broken
        self._nbytes = nbytes
        self._hash = hashlib.sha256()
        self._unmarked: list[tuple[int, int]] = []

    def update(self, offset: int, view: memoryview | bytes) -> None:
        if not len(view):
            return
        self._hash.update(view)
        self.is_broken = self.is_broken or offset != self.position
        self.position = offset + len(view)
        for ranges in (self.ranges, self._unmarked):
            _append(ranges, offset, self.position)

    def copy(self) -> WrittenDigest:
        """One that goes on from here on its own, all marked."""
        other = WrittenDigest(self._nbytes, chain=self.chain, is_broken=self.is_broken)
        other.ranges, other.position, other._hash = list(self.ranges), self.position, self._hash.copy()
        return other

    def mark(self) -> tuple[list[tuple[int, int]], str]:
        """The ranges that were hashed since the last mark, and the digest of all so far."""
        ranges, self._unmarked = self._unmarked, []
        return ranges, self._hash.hexdigest()

    @property
    def is_whole(self) -> bool:
        return not self.is_broken and self.position == self._nbytes

    def hexdigest(self) -> str | None:
        """The file's digest, or None unless all its bytes were written front to back."""
        return self._hash.hexdigest() if self.is_whole else None


def _append(ranges: list[tuple[int, int]], begin: int, end: int) -> None:
    if ranges and ranges[-1][1] == begin:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((begin, end))


def file_sha256(path: Path, *, head: bytes = b"") -> str:
    """The SHA-256 of a whole file, in hex, with `head` in the place of its first bytes.

    Raises `MalformedFile` where it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(len(head))
            return hashlib.file_digest(stream, lambda: hashlib.sha256(head)).hexdigest()
    except OSError as error:
        raise MalformedFile(f"{path} cannot be read: {error.strerror}.") from None
