"""A file as `torch.save` writes it, its tensors' bytes coming one after the other."""

from __future__ import annotations

import zlib
from pathlib import Path

from corda_convert.checkpoint.torch_archive import Archive
from corda_convert.output.digests import WrittenDigest
from corda_convert.output.direct import DirectWriting
from corda_convert.output.shard_writer import ShardWriter

_READ_BYTES = 8 << 20


class ArchiveWriter(ShardWriter):
    """Writes one archive whose layout is known before its first tensor, and the checksums as the bytes pass.

    Bytes that come out of order are read again at the end, for checksums and digest.
    """

    def __init__(
        self, path: Path, archive: Archive, direct: DirectWriting | None = None, begun: WrittenDigest | None = None
    ) -> None:
        self._archive = archive
        self._checksums: list[int] = []
        self._checksum = 0
        if begun is not None:  # the checksums of what was written before are not known
            begun.is_broken = True
        super().__init__(path, archive.header, archive.nbytes, direct, begun)

    def digest(self, offset: int, view: memoryview | bytes) -> None:
        super().digest(offset, view)
        done = len(self._checksums)
        if self.written.is_broken or done == len(self._archive.storages) or offset < self._archive.storages[done].begin:
            return
        self._checksum = zlib.crc32(view, self._checksum)
        if offset + len(view) == self._archive.storages[done].end:
            self._checksums.append(self._checksum)
            self._checksum = 0
            self._join(done)

    def finish(self) -> tuple[int, str]:
        for index in range(len(self._checksums), len(self._archive.storages)):
            self._checksums.append(self._read_checksum(index))
            self._join(index)
        return super().finish()

    def _join(self, index: int) -> None:
        """Writes what stands between the storage `index` and the next."""
        begin, behind = self._archive.storages[index].end, self._archive.behind(index, self._checksums)
        self.write(begin, memoryview(behind))
        super().digest(begin, behind)

    def _read_checksum(self, index: int) -> int:
        storage = self._archive.storages[index]
        checksum = 0
        for begin in range(storage.begin, storage.end, _READ_BYTES):
            checksum = zlib.crc32(self.read(begin, min(_READ_BYTES, storage.end - begin)), checksum)
        return checksum
