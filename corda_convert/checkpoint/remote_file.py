"""Files of the Hub that are named here before their bytes are: planning reads a header, and a few pieces, over the network.

Such a file has a path, where it will lie or would. Nothing stands there until the whole file does, so that no program can
take what is missing for zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class RemoteFile:
    """A file of the Hub.

    Attributes:
        nbytes: its size, as the Hub states it.
        sha256: its digest, as the Hub states it; None for a file that is not stored with LFS.
        read_range: gives the bytes from an offset on, so many, to a function, piece by piece.
        fetch: brings the whole file, and says where it lies.
        head: its first bytes: at least the header, where that is a valid one.
        is_awaited: whether a read waits for the whole file. Before a run a read asks for its bytes alone.
    """

    nbytes: int
    sha256: str | None
    read_range: Callable[[int, int, Callable[[bytes], None]], None]
    fetch: Callable[[], Path]
    head: bytes = b""
    is_awaited: bool = False

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fills `view` with the bytes from `offset` on, without the whole file."""
        if offset + len(view) <= len(self.head):
            view[:] = self.head[offset : offset + len(view)]
            return
        position = 0

        def take(piece: bytes) -> None:
            nonlocal position
            view[position : position + len(piece)] = piece
            position += len(piece)

        self.read_range(offset, len(view), take)


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder of the Hub at one commit: the revision that was asked for, and names of its files that are not downloaded."""

    revision: str
    left: tuple[str, ...]


_ANNOUNCED: dict[Path, RemoteFile] = {}  # a path names a commit, whose files never change
_FOLDERS: dict[Path, RemoteFolder] = {}


def announce(path: Path, file: RemoteFile) -> None:
    """Makes a file of the Hub known under the path where it will lie."""
    _ANNOUNCED[path] = file


def announced(path: Path) -> RemoteFile | None:
    """What the Hub states of a file, whether it is here or not; None for a file that did not come from there."""
    return _ANNOUNCED.get(path)


def absent(path: Path) -> RemoteFile | None:
    """The file of the Hub, where it is not here."""
    remote = _ANNOUNCED.get(path)
    return None if remote is None or path.exists() else remote


def is_there(path: Path) -> bool:
    """Whether there is such a file: here, or on the Hub."""
    return path.is_file() or path in _ANNOUNCED


def announced_in(folder: Path) -> Iterator[Path]:
    """The files of the Hub that lie, or will lie, directly in a folder."""
    return (path for path in _ANNOUNCED if path.parent == folder)


def announce_folder(path: Path, folder: RemoteFolder) -> None:
    """Makes a folder, or a single file, of the Hub known under the path where it lies."""
    _FOLDERS[path] = folder


def remote_folder(path: Path) -> RemoteFolder | None:
    """What was announced of this folder."""
    return _FOLDERS.get(path)


def file_bytes(path: Path) -> int:
    """The size of a file, here or on the Hub."""
    remote = absent(path)
    return path.stat().st_size if remote is None else remote.nbytes
