"""A file whose bytes are read in place, in any order, into the caller's buffer."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from corda_convert.checkpoint.remote_file import absent, announced
from corda_convert.checkpoint.tensors import TensorFile
from corda_convert.errors import MalformedFile

PAGE_BYTES = 4096
"""The unit in which files are cached, and written past the cache."""

_RUN_AGAIN = "Run the same command again once the file is whole."


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor's bytes lie in the file: absolute offset and length."""

    begin: int
    nbytes: int


class ExtentFile(TensorFile, Protocol):
    """A file that holds tensors row-major in one piece, so that the kernel can copy them."""

    @property
    def descriptor(self) -> int: ...

    def extent(self, name: str) -> Extent | None:
        """Where the tensor's bytes lie; None for one that is not in one piece."""
        ...

    def read_bytes_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the file's bytes from the absolute `offset` on."""
        ...


class ByteFile(ABC):
    """A file of tensors that is opened on first use and read with `pread`. One that is still on the Hub is fetched first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._stamp = _stamp(path)

    @property
    def descriptor(self) -> int:
        if self._descriptor is None:
            remote = absent(self.path)
            opened = self.path if remote is None else remote.fetch()
            try:
                self._descriptor = os.open(opened, os.O_RDONLY)
            except OSError as error:
                raise MalformedFile(f"{opened} cannot be opened: {error.strerror}.") from None
            self.check_unchanged()
        return self._descriptor

    @abstractmethod
    def extent(self, name: str) -> Extent | None:
        """Where the tensor's bytes lie; None for one that is not in one piece."""

    @property
    def file_bytes(self) -> int:
        """The size of the whole file."""
        remote = absent(self.path) if self._descriptor is None else None
        return os.fstat(self.descriptor).st_size if remote is None else remote.nbytes

    def read_bytes_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the file's bytes from the absolute `offset` on."""
        if self._descriptor is None:
            remote = absent(self.path)
            if remote is not None and not (remote.is_awaited and offset + len(view) > len(remote.head)):
                remote.read_into(offset, view)
                return
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise MalformedFile(
                    f"{self.path} cannot be read at byte {offset + done:,}: {error.strerror}."
                ) from None
            if count == 0:
                raise MalformedFile(
                    f"{self.path} ended at byte {offset + done:,} while it was read.",
                    why="Another program changed it since its header was read.",
                    next_step=_RUN_AGAIN,
                )
            done += count

    def check_unchanged(self) -> None:
        """Raises `MalformedFile` if the file is not the one, of the size and time, that it was when it was first seen.

        Files of the Hub have their digest instead.
        """
        if announced(self.path) is None and _stamp(self.path) != self._stamp:
            raise MalformedFile(
                f"{self.path} was changed while it was read.",
                why="Another program writes it, replaced it or removed it.",
                next_step=_RUN_AGAIN,
            )

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells that a file was changed; None for one that is not there."""
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
