"""SHA-256 of files while their bytes pass through, so that no file is read twice for its digest."""

from __future__ import annotations

import hashlib
from pathlib import Path


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


def file_sha256(path: Path) -> str:
    """The SHA-256 of a whole file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
