"""A safetensors file written header first, then its tensors at their known places, hashed on the way."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType

from corda_convert.errors import MalformedFile, OutputRefused
from corda_convert.output.digests import WrittenDigest, file_sha256
from corda_convert.output.direct import LEAST_BYTES, DirectWriting, whole_pages


class ShardWriter:
    """Writes one file whose header and size are known before its first tensor.

    With `begun`, the digest of what was written of it before, the file is there already and is gone on with.
    Raises `OutputRefused` when the disk is full or fails.
    """

    def __init__(
        self,
        path: Path,
        header: bytes,
        nbytes: int,
        direct: DirectWriting | None = None,
        begun: WrittenDigest | None = None,
    ) -> None:
        self.path = path
        self.nbytes = nbytes
        self._direct = direct
        self._direct_descriptor: int | None = None
        self._digest = begun or WrittenDigest(nbytes)
        self._descriptor = -1
        try:
            if begun is None:
                path.parent.mkdir(parents=True, exist_ok=True)
            created = os.O_CREAT | os.O_TRUNC if begun is None else 0
            self._descriptor = os.open(path, os.O_RDWR | created, 0o666)
            self._direct_descriptor = direct.open(path) if direct is not None else None
        except OSError as error:
            raise self._refusal(error) from None
        if begun is None:
            try:
                self.write(0, memoryview(header))
            except BaseException:
                self._close()
                raise
            self.digest(0, header)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def write(self, offset: int, view: memoryview) -> None:
        """Writes the bytes at the absolute `offset`, whole pages of long pieces directly, where that is on."""
        if self._direct is None or self._direct_descriptor is None or len(view) < LEAST_BYTES:
            return self._write(offset, view)
        begin, end = whole_pages(offset, len(view))
        self._write(offset, view[: begin - offset])
        while self._direct.is_on and begin < end:
            begin += self._direct.write(self._direct_descriptor, view[begin - offset : end - offset], begin)
        return self._write(begin, view[begin - offset :])

    def _write(self, offset: int, view: memoryview) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], offset + done)
        except OSError as error:
            raise self._refusal(error) from None

    def copy(self, offset: int, source: int, source_offset: int, nbytes: int) -> None:
        """Copies bytes of another open file inside the kernel, where the file systems can."""
        done = 0
        try:
            while done < nbytes:
                count = self._copy_range(source, nbytes - done, source_offset + done, offset + done)
                if count == 0:
                    raise MalformedFile(
                        f"The source of {self.path.name} became shorter while it was copied.",
                        next_step="Run the same command again once the file is whole.",
                    )
                done += count
        except OSError as error:
            raise self._refusal(error) from None

    def _copy_range(self, source: int, count: int, source_offset: int, offset: int) -> int:
        """Copies up to `count` bytes. Returns how many; 0 at the source's end."""
        with contextlib.suppress(AttributeError, OSError):  # between file systems, or on one without it: through memory
            if copied := os.copy_file_range(source, self._descriptor, count, source_offset, offset):
                return copied
        try:
            piece = os.pread(source, min(count, 8 << 20), source_offset)
        except OSError as error:
            raise MalformedFile(
                f"The source of {self.path.name} cannot be read at byte {source_offset:,}: {error.strerror}."
            ) from None
        return os.pwrite(self._descriptor, piece, offset)

    def digest(self, offset: int, view: memoryview | bytes) -> None:
        """Takes bytes that were written at `offset` into the file's digest. May run on a thread of its own."""
        self._digest.update(offset, view)

    def digest_copied(self, offset: int, nbytes: int) -> None:
        """Takes bytes that were copied to `offset` into the file's digest."""
        self.digest(offset, self.read(offset, nbytes))

    @property
    def written(self) -> WrittenDigest:
        """What was taken into the digest so far. Bytes out of order cost a second reading at the end."""
        return self._digest

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes that were written."""
        try:
            return os.pread(self._descriptor, nbytes, offset)
        except OSError as error:
            raise self._refusal(error) from None

    def finish(self) -> tuple[int, str]:
        """Closes the file. Returns its size and SHA-256. Raises `OutputRefused` if a byte is missing."""
        written = os.fstat(self._descriptor).st_size
        self._close()
        if written != self.nbytes:
            raise OutputRefused(f"{self.path.name} has {written:,} bytes, {self.nbytes:,} were planned.")
        return written, self._digest.hexdigest() or file_sha256(self.path)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._direct_descriptor is not None:
            os.close(self._direct_descriptor)
            self._direct_descriptor = None

    def _refusal(self, error: OSError) -> OutputRefused:
        return OutputRefused(
            f"Writing {self.path.name} failed: {error.strerror}.",
            next_step="Free disk space or choose another --output.",
        )
