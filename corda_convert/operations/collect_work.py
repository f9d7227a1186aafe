"""Where `collect` keeps what it has finished: a hidden folder beside the output, with the output's files as far as they are.

Tensors are written behind a header that tells what is expected to be found out on the way; where it turns out otherwise, it
is written again at the end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.byte_file import PAGE_BYTES
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.operations.collect_stage import StageResult
from corda_convert.output.digests import WrittenDigest
from corda_convert.output.direct import DirectWriting
from corda_convert.output.shard_writer import ShardWriter
from corda_convert.output.staging import can_go_on, empty, left_by_another, locked, refusal_of, work_folder

if TYPE_CHECKING:
    from torch import Tensor

_IDENTITY_FILE = "identity.json"
READ_BYTES = 16 << 20
PIECE_BYTES = 4 << 20
"""What is written at once: it is hashed while it still is in the processor's cache."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor in the drafts of the output: the number of its file, and where in it the tensor begins."""

    spec: TensorSpec
    file: int
    begin: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A part of the model whose sums are on disk.

    Attributes:
        tensors: where they are.
        aliases, tokens: as in `StageResult`.
    """

    tensors: tuple[Placed, ...]
    aliases: Mapping[str, str]
    tokens: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Room:
    """How tensors are laid out in the drafts.

    Attributes:
        header: bytes that stay free at the beginning of each file.
        most: bytes of tensors in a file, unless one alone has more; None for one file.
    """

    header: int = 0
    most: int | None = None

    def placed(self, specs: Sequence[TensorSpec], after: Placed | None) -> tuple[Placed, ...]:
        """The next tensors behind the last one."""
        tensors = []
        for spec in specs:
            file, begin = (0, self.header) if after is None else (after.file, after.begin + after.spec.nbytes)
            if self.most is not None and begin > self.header and begin + spec.nbytes > self.header + self.most:
                file, begin = file + 1, self.header
            after = Placed(spec, file, begin)
            tensors.append(after)
        return tuple(tensors)


class Work:
    """The hidden folder of one run, and the thread that writes into it while the next part of the model runs."""

    def __init__(self, folder: Path, room: Room) -> None:
        self.folder = folder
        self._room = room
        self._last: Placed | None = None
        self._expected: Mapping[int, bytes] | None = None
        self._headers: dict[int, bytes] = {}
        self._digests: dict[int, WrittenDigest] = {}
        self._direct = DirectWriting()
        self._writer = ThreadPoolExecutor(1, "writer")
        self._writing: Future[None] | None = None

    def keep(
        self, number: int, result: StageResult, expected: Callable[[Finished], Mapping[int, bytes]] = lambda _: {}
    ) -> Finished:
        """Begins to write what a part gave, after the part before it is written. Raises what that write raised.

        `expected` tells the headers of files, as far as they can be told from the first part with tensors.
        """
        specs = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in result.tensors.items()]
        finished = Finished(self._room.placed(specs, self._last), result.aliases, result.tokens)
        self._last = finished.tensors[-1] if finished.tensors else self._last
        self.wait()
        if self._expected is None and finished.tensors:
            self._expected = expected(finished)
        self._writing = self._writer.submit(self._write, number, result, finished)
        return finished

    def wait(self) -> None:
        """Until all is written. Raises what the last write raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the thread; what it was writing is then written, or has failed."""
        self._writer.shutdown()

    def _write(self, number: int, result: StageResult, finished: Finished) -> None:
        """It counts as finished once its note is there."""
        buffer = memoryview(mmap(-1, PIECE_BYTES + PAGE_BYTES))
        for one in finished.tensors:
            self._write_tensor(one, result.tensors[one.spec.name], buffer)
        tensors = [[one.spec.name, list(one.spec.shape), one.file, one.begin] for one in finished.tensors]
        sha256 = self._until_now(finished.tensors)
        note = {"tensors": tensors, "sha256": sha256, "aliases": finished.aliases, "tokens": finished.tokens}
        _write_note(self._note(number), note)

    def _until_now(self, tensors: Sequence[Placed]) -> dict[str, str]:
        """Of each file that holds some of these tensors the SHA-256 of its bytes from its beginning to the last of them."""
        return {str(file): self._digests[file].mark()[1] for file in sorted({one.file for one in tensors})}

    def _write_tensor(self, one: Placed, tensor: Tensor, buffer: memoryview) -> None:
        """By way of memory that lies to pages as the bytes do in the file, which writing past the page cache asks for."""
        values: Any = tensor.numpy()
        view = memoryview(values).cast("B")
        path = self.draft(one.file)
        if one.file not in self._digests:
            header = (self._expected or {}).get(one.file, b"")
            self._headers[one.file] = header if len(header) == self._room.header else bytes(self._room.header)
            self._digests[one.file] = WrittenDigest(0)
            path.touch()
            with ShardWriter(path, b"", 0, begun=self._digests[one.file]) as writer:
                writer.write(0, memoryview(self._headers[one.file]))
                writer.digest(0, self._headers[one.file])
        with ShardWriter(path, b"", 0, self._direct, begun=self._digests[one.file]) as writer:
            done = 0
            while done < len(view):
                phase = (one.begin + done) % PAGE_BYTES
                piece = buffer[phase : phase + min(PIECE_BYTES - phase, len(view) - done)]
                piece[:] = view[done : done + len(piece)]
                writer.write(one.begin + done, piece)
                writer.digest(one.begin + done, piece)
                done += len(piece)

    def finished(self, number: int) -> Finished | None:
        """What an earlier run has finished of a part, if it still is as it was written, and at its place."""
        note = _read_note(self._note(number))
        if not note:
            return None
        self.wait()
        headers, digests = dict(self._headers), {file: digest.copy() for file, digest in self._digests.items()}
        try:
            specs = [TensorSpec(str(name), "F32", tuple(shape)) for name, shape, _, _ in note["tensors"]]
            tensors = self._room.placed(specs, self._last)
            finished = Finished(tensors, dict(note["aliases"]), dict(note["tokens"]))
            places = [[file, begin] for _, _, file, begin in note["tensors"]]
            if places == [[one.file, one.begin] for one in tensors]:
                for one in tensors:
                    self._read_tensor(one)
                if self._until_now(tensors) == note["sha256"]:
                    self._last = tensors[-1] if tensors else self._last
                    return finished
        except OSError:
            pass
        self._headers, self._digests = headers, digests
        return None

    def _read_tensor(self, one: Placed) -> None:
        """Takes what was written of it, and of the file's header before the first one, into the file's digest."""
        with self.draft(one.file).open("rb") as stream:
            if one.file not in self._digests:
                self._headers[one.file] = stream.read(self._room.header)
                self._digests[one.file] = WrittenDigest(0)
                self._digests[one.file].update(0, self._headers[one.file])
            stream.seek(one.begin)
            end = one.begin + one.spec.nbytes
            while stream.tell() < end and (piece := stream.read(min(end - stream.tell(), READ_BYTES))):
                self._digests[one.file].update(stream.tell() - len(piece), piece)

    def hashed(self, file: int) -> tuple[bytes, str]:
        """The header that stands in a draft, and the SHA-256 of it and of all tensors behind it."""
        return self._headers[file], self._digests[file].mark()[1]

    def draft(self, file: int) -> Path:
        """A file of the output that may not have its last header."""
        return self.folder / f"draft-{file + 1:05}.safetensors"

    def _note(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.json"


@contextlib.contextmanager
def working(
    output: Path,
    identity: Mapping[str, str],
    *,
    overwrite: bool,
    room: Room = Room(),
) -> Iterator[Work]:
    """The folder of this run, with what an unfinished run of the same `identity` left.

    It vanishes when the block ends or refuses; what stops the block otherwise leaves it, and tells its place in a note of
    the exception. Raises `OutputRefused` while another run holds it, and where a run of another identity left something.
    """
    folder = work_folder(output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, output):
        try:
            _begin(folder, identity, overwrite=overwrite)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise refusal_of(error, output, folder) from error
        work = Work(folder, room)
        try:
            try:
                yield work
                work.wait()
            finally:
                work.close()
        except BaseException as error:
            if can_go_on(error) and any(folder.glob("part-*.json")):
                error.add_note(str(folder))
            else:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise refusal_of(error, output, folder) from error
            raise
        shutil.rmtree(folder)


def _begin(folder: Path, identity: Mapping[str, str], *, overwrite: bool) -> None:
    left = _read_note(folder / _IDENTITY_FILE)
    if left == dict(identity):
        return
    if left and any(folder.glob("part-*.json")) and not overwrite:
        raise left_by_another(folder, left, identity)
    empty(folder)
    _write_note(folder / _IDENTITY_FILE, identity)


def _write_note(path: Path, note: Mapping[str, Any]) -> None:
    """All or nothing, with a digest of its own."""
    draft = path.with_name("draft")
    draft.write_text(json.dumps({"note": note, "sha256": _digest_of(note)}), "utf-8")
    draft.replace(path)


def _read_note(path: Path) -> dict[str, Any]:
    """Empty where there is none that is as it was written."""
    try:
        found = json.loads(path.read_text("utf-8"))
        note = found["note"]
        return note if isinstance(note, dict) and found["sha256"] == _digest_of(note) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _digest_of(note: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(note).encode()).hexdigest()
