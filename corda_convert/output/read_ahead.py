"""Hashing inputs on a thread of its own: ahead, while the program still imports its libraries and makes its plan.

It also brings the bytes into the page cache. The engine goes on from where it stopped. Files whose bytes the engine does
not read in their order are hashed beside it, to their end.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from corda_convert.output.digests import SequentialDigest

PIECE_BYTES = 32 << 20
"""Read at once: long enough that the thread seldom waits for the interpreter's lock."""

BESIDE_BYTES = 8 << 20
"""The same beside the engine, whose memory is bounded."""


class ReadAhead:
    """Hashes files front to back, one after the other, until it is stopped.

    Used in a with statement; at its end the thread has stopped. A file that cannot be read is left to the engine, which
    says so.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        most_bytes: int | None = None,
        begun: Mapping[Path, SequentialDigest] | None = None,
        piece_bytes: int | None = None,
    ) -> None:
        self._paths = list(dict.fromkeys(paths))
        self._most_bytes = most_bytes if most_bytes is not None else _spare_memory()
        self._piece_bytes = piece_bytes or PIECE_BYTES
        self._digests = {path: digest for path, digest in (begun or {}).items() if path in self._paths}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="read ahead", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> dict[Path, SequentialDigest]:
        """Stops the thread. Returns what was hashed so far: digests that the engine may go on with."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        return {path: digest for path, digest in self._digests.items() if digest.position}

    def finish(self) -> dict[Path, str]:
        """Waits until all is hashed. Returns the digests of the files that could be read."""
        self._thread.join()
        return {path: text for path, digest in self._digests.items() if (text := digest.hexdigest()) is not None}

    def _run(self) -> None:
        with mmap.mmap(-1, self._piece_bytes) as memory, memoryview(memory) as buffer:  # given back at once at the end
            left = self._most_bytes
            for path in self._paths:
                with contextlib.suppress(OSError), path.open("rb", buffering=0) as stream:
                    new = SequentialDigest(os.fstat(stream.fileno()).st_size)
                    digest = self._digests.setdefault(path, new)
                    stream.seek(digest.position)
                    while not self._stopping.is_set() and left > 0 and (count := stream.readinto(buffer)):
                        with buffer[:count] as piece:
                            digest.update(digest.position, piece)
                        left -= count


def _spare_memory() -> int:
    """A quarter of the memory that the system could give: what is read ahead shall still be there when it is used."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // 4
    except OSError:
        pass
    return 1 << 30
