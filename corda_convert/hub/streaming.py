"""Uploading while a run goes on: each finished file goes up on a thread of its own, and then is deleted here."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from corda_convert.errors import PublishFailed, RunStopped
from corda_convert.hub.client import connected
from corda_convert.hub.files import PublishedFile
from corda_convert.hub.publishing import Publication, Upload

MOST_FILES = 3
"""So many finished files wait for their upload, or are being uploaded; then the run waits."""


class StreamedUpload:
    """Takes finished files while a run goes on, and commits all at its end."""

    def __init__(self, upload: Upload, uploaded: Callable[[PublishedFile], None]) -> None:
        """`uploaded` is called on the uploading thread once the Hub keeps a file, before it is deleted here."""
        self._upload = upload
        self._uploaded = uploaded
        self._expected: set[str] = set()
        self._waiting: deque[PublishedFile] = deque()
        self._failure: BaseException | None = None
        self._is_stopping = self._is_ending = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, files are uploaded. The end waits for them, and raises what an upload failed with."""
        self._thread.start()
        try:
            yield
            with self._changed:
                self._is_ending = True
                self._changed.notify_all()
        except BaseException:
            self.stop()
            raise
        finally:
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def expect(self, names: Sequence[str]) -> None:
        """Waits until there is room for further files, and reserves it for these. Raises what an upload failed with."""
        with self._changed:
            while len(self._expected) >= MOST_FILES and self._failure is None and not self._is_stopping:
                self._changed.wait()
            self._check()
            self._expected |= set(names)

    def take(self, file: PublishedFile) -> None:
        """A file is finished: it will be uploaded and deleted. Raises what an earlier upload failed with."""
        with self._changed:
            self._check()
            self._waiting.append(file)
            self._changed.notify_all()

    def stop(self) -> None:
        """Ends all waiting, and begins no further upload."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def commit(self, files: Sequence[PublishedFile], *, description: str, source: str, retry: str) -> Publication:
        """Makes everything visible, and checks it."""
        where = self._upload.destination
        with connected(f"Publishing to {where} failed.", retry=retry):
            return self._upload.commit(files, description=description, source=source, retry=retry)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._is_stopping:
            raise RunStopped("The run was stopped while it waited for an upload.")

    def _run(self) -> None:
        try:
            with connected(f"Uploading to {self._upload.destination} failed."):
                while (file := self._next()) is not None:
                    self._send(file)
        except BaseException as failure:
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _next(self) -> PublishedFile | None:
        with self._changed:
            while not self._waiting and not self._is_ending and not self._is_stopping:
                self._changed.wait()
            return self._waiting.popleft() if self._waiting and not self._is_stopping else None

    def _send(self, file: PublishedFile) -> None:
        is_kept = bool(self._upload.send([file]))
        if file.is_changed():
            raise PublishFailed(
                f"{file.name} changed while it was uploaded.", why="Something else writes to the folder."
            )
        if is_kept and file.path is not None:
            self._uploaded(file)
            file.path.unlink()
        with self._changed:
            self._expected.discard(file.name)
            self._changed.notify_all()
