"""Writing past the page cache, where the system and the disk are good at it.

A checkpoint's bytes are not read again by the one who writes them. Through the page cache they are copied once more, into
memory that the kernel first has to find: on a virtual machine that can cost more than everything else that a merge does.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from corda_convert.checkpoint.byte_file import PAGE_BYTES

LEAST_BYTES = 1 << 18
"""Shorter pieces go through the page cache."""

TRIAL_BYTES = 512 << 20
LEAST_RATE = 500e6
"""A disk that writes fewer bytes a second, after the trial, is left to the page cache, which hides its slowness for a while."""

FIRST_TRIAL_BYTES = 64 << 20
"""One that writes fewer than half as many is left to it earlier. At the beginning many disks read a cold input, too."""


class DirectWriting:
    """Whether to write directly: until a file system refuses, or the disk turns out to be slow. Shared by all files."""

    def __init__(self) -> None:
        self.is_on = hasattr(os, "O_DIRECT")
        self._nbytes = 0
        self._seconds = 0.0

    def open(self, path: Path) -> int | None:
        """A descriptor for direct writes to an existing file; None where there are none."""
        if not self.is_on:
            return None
        try:
            return os.open(path, os.O_WRONLY | os.O_DIRECT)
        except OSError:
            self.is_on = False
            return None

    def write(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Writes whole pages from a page's boundary on. Returns how many bytes were written; 0 where it is refused."""
        begun = time.perf_counter()
        try:
            count = os.pwrite(descriptor, view, offset)
        except OSError:
            self.is_on = False  # what is really wrong, a full disk say, the ordinary write will tell
            return 0
        self._nbytes += count
        self._seconds += time.perf_counter() - begun
        is_slow = self._nbytes < LEAST_RATE * self._seconds
        is_very_slow = 2 * self._nbytes < LEAST_RATE * self._seconds
        if (is_slow and self._nbytes >= TRIAL_BYTES) or (is_very_slow and self._nbytes >= FIRST_TRIAL_BYTES):
            self.is_on = False
        return count // PAGE_BYTES * PAGE_BYTES


def whole_pages(offset: int, nbytes: int) -> tuple[int, int]:
    """The half-open range of whole pages in a piece of a file; empty if it has none."""
    begin, end = -(-offset // PAGE_BYTES) * PAGE_BYTES, (offset + nbytes) // PAGE_BYTES * PAGE_BYTES
    return (begin, end) if begin < end else (offset, offset)
