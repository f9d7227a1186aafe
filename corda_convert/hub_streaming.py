"""Files of the Hub one after the other: the next ones come while a run reads the first, and each goes when it is done with."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from corda_convert.checkpoint.remote_file import RemoteFile, absent
from corda_convert.errors import DownloadFailed, RunStopped

MOST_FILES = 3
"""So many are on the disk at once: one that is read, one that is about to be deleted, one that comes."""

_HASHED_BYTES = 1 << 20
_LONGEST_END_SECONDS = 2.0


class Downloads:
    """Downloads files into a folder in the order in which they will be read, a few ahead.

    What a stopped run left in the folder is gone on with, if its digest is right; what is not wanted any more is deleted.
    """

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self._remotes = {path: remote for path in paths if (remote := absent(path)) is not None}
        self._folder = folder
        self._pending = list(self._remotes)
        self._asked: set[Path] = set()
        self._coming: Path | None = None
        self._ready: dict[Path, Path] = {}
        self._failure: BaseException | None = None
        self._stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="downloads", daemon=True)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, reads of the files wait until they are there."""
        self._folder.mkdir(exist_ok=True)
        wanted = {self._place(path).name for path in self._remotes}
        for entry in self._folder.iterdir():
            if entry.name.removesuffix(".part") not in wanted:
                entry.unlink()
        before = {path: remote.fetch for path, remote in self._remotes.items()}
        for path, remote in self._remotes.items():
            remote.is_awaited, remote.fetch = True, _Waiting(self, path)
        self._thread.start()
        try:
            yield
        finally:
            self.stop()
            self._thread.join(_LONGEST_END_SECONDS)  # it may hang on a silent connection, and writes nothing more
            for path, remote in self._remotes.items():
                remote.is_awaited, remote.fetch = False, before[path]

    def wait(self, path: Path) -> Path:
        """Where a file lies, once it is there. Raises what its download failed with."""
        with self._changed:
            self._asked.add(path)
            if path not in self._ready and path not in self._pending and path != self._coming:
                self._pending.append(path)
            self._changed.notify_all()
            while path not in self._ready:
                if self._failure is not None:
                    raise self._failure
                if self._stopping:
                    raise RunStopped("The run was stopped while it waited for a download.")
                self._changed.wait()
            return self._ready[path]

    def release(self, path: Path) -> None:
        """Deletes a file that nobody reads any more, which makes room for the next one."""
        with self._changed:
            self._asked.discard(path)
            place = self._ready.pop(path, None)
            if place is not None:
                place.unlink(missing_ok=True)
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends the download that is going on, and all waiting."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while (path := self._next()) is not None:
                place = self._download(path, self._remotes[path])
                with self._changed:
                    self._ready[path], self._coming = place, None
                    self._changed.notify_all()
        except _Stopped:
            pass
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _next(self) -> Path | None:
        """The next file to download: one that is waited for, else the next in order if there is room. None at the end."""
        with self._changed:
            while not self._stopping:
                chosen = next((path for path in self._pending if path in self._asked), None)
                if chosen is None and self._pending and len(self._ready) < MOST_FILES - 1:
                    chosen = self._pending[0]
                if chosen is not None:
                    self._pending.remove(chosen)
                    self._coming = chosen
                    return chosen
                self._changed.wait()
            return None

    def _place(self, path: Path) -> Path:
        key = hashlib.sha256(str(path).encode("utf-8")).hexdigest()[:12]  # two models may have files of the same name
        return self._folder / f"{key}-{path.name}"

    def _download(self, path: Path, remote: RemoteFile) -> Path:
        place = self._place(path)
        part = place.with_name(f"{place.name}.part")
        if place.exists():
            place.rename(part)
        with part.open("ab+") as stream:
            digest, position = hashlib.sha256(), 0
            stream.seek(0)
            while piece := stream.read(_HASHED_BYTES):
                self._check_going()
                digest.update(piece)
                position += len(piece)

            def take(piece: bytes) -> None:
                self._check_going()
                stream.write(piece)
                digest.update(piece)

            if position < remote.nbytes:
                remote.read_range(position, remote.nbytes - position, take)
        if part.stat().st_size != remote.nbytes or remote.sha256 not in (None, digest.hexdigest()):
            part.unlink()
            raise DownloadFailed(
                f"{path.name} was not downloaded as the Hub has it: its SHA-256 is another one.",
                why="The download was damaged. What was downloaded of it is removed.",
                next_step="Run the same command again.",
            )
        return part.rename(place)

    def _check_going(self) -> None:
        if self._stopping:
            raise _Stopped


class _Stopped(Exception):
    """The run has ended, or failed."""


class _Waiting:
    """What a file's `fetch` is while it is streamed."""

    def __init__(self, downloads: Downloads, path: Path) -> None:
        self._downloads = downloads
        self._path = path

    def __call__(self) -> Path:
        return self._downloads.wait(self._path)


def room_needed(paths: Iterable[Path]) -> int:
    """The bytes that streaming these files takes on the disk at most, if none is read out of order."""
    sizes = sorted((remote.nbytes for path in set(paths) if (remote := absent(path)) is not None), reverse=True)
    return sum(sizes[:MOST_FILES])
