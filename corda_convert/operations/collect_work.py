"""Where `collect` keeps what it has finished: a hidden folder beside the output, a file for each part of the model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.operations.collect_stage import StageResult
from corda_convert.output.digests import file_sha256
from corda_convert.output.shard_writer import ShardWriter
from corda_convert.output.staging import LOCK_FILE, can_go_on, left_by_another, locked, work_folder
from corda_convert.plan.packing import encode_header


@dataclass(frozen=True, slots=True)
class Finished:
    """A part of the model whose sums are on disk.

    Attributes:
        path: a safetensors file.
        aliases, tokens: as in `StageResult`.
    """

    path: Path
    aliases: Mapping[str, str]
    tokens: Mapping[str, int]


class Work:
    """The hidden folder of one run, and the thread that writes into it while the next part of the model runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = ThreadPoolExecutor(1, "writer")
        self._writing: Future[None] | None = None

    def keep(self, number: int, result: StageResult) -> Finished:
        """Begins to write what a part gave, after the part before it is written. Raises what that write raised."""
        self.wait()
        self._writing = self._writer.submit(self._write, number, result)
        return Finished(self._path(number), result.aliases, result.tokens)

    def wait(self) -> None:
        """Until all is written. Raises what the last write raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Ends the thread; what it was writing is then written, or has failed."""
        self._writer.shutdown()

    def _write(self, number: int, result: StageResult) -> None:
        """It counts as finished once its note is there."""
        path = self._path(number)
        specs = [TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in result.tensors.items()]
        header = encode_header(specs, {})
        with ShardWriter(path, header, len(header) + sum(spec.nbytes for spec in specs)) as writer:
            place = len(header)
            for tensor in result.tensors.values():
                memory: Any = tensor.numpy()
                view = memoryview(memory).cast("B")
                writer.write(place, view)
                writer.digest(place, view)
                place += len(view)
            _, sha256 = writer.finish()
        note = {"sha256": sha256, "aliases": result.aliases, "tokens": result.tokens}
        draft = self.folder / "draft"
        draft.write_text(json.dumps(note), "utf-8")
        draft.replace(path.with_suffix(".json"))

    def finished(self, number: int) -> Finished | None:
        """What an earlier run has finished of a part, if it still is as it was written."""
        path = self._path(number)
        try:
            note = json.loads(path.with_suffix(".json").read_text("utf-8"))
            if file_sha256(path) == note["sha256"]:
                return Finished(path, dict(note["aliases"]), dict(note["tokens"]))
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.safetensors"


@contextlib.contextmanager
def working(output: Path, identity: Mapping[str, str], *, overwrite: bool) -> Iterator[Work]:
    """The folder of this run, with what an unfinished run of the same `identity` left.

    It vanishes when the block ends or refuses; what stops the block otherwise leaves it, and tells its place in a note of
    the exception. Raises `OutputRefused` while another run holds it, and where a run of another identity left something.
    """
    folder = work_folder(output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, output):
        _begin(folder, identity, overwrite=overwrite)
        work = Work(folder)
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
            raise
        shutil.rmtree(folder)


def _begin(folder: Path, identity: Mapping[str, str], *, overwrite: bool) -> None:
    note = folder / "identity.json"
    try:
        left = json.loads(note.read_text("utf-8"))
    except (OSError, ValueError):
        left = {}
    if left == dict(identity):
        return
    if left and any(folder.glob("part-*.json")) and not overwrite:
        raise left_by_another(folder, left, identity)
    for entry in folder.iterdir():
        if entry.name != LOCK_FILE:
            entry.unlink()
    draft = folder / "draft"
    draft.write_text(json.dumps(dict(identity)), "utf-8")
    draft.replace(note)
