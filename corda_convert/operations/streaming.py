"""`--stream`: models on the Hub come a file at a time, and a file goes once no job is left that reads it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.checkpoint.byte_file import ByteFile
from corda_convert.checkpoint.dequantized import DequantizedFile
from corda_convert.checkpoint.remote_file import absent
from corda_convert.checkpoint.tensors import TensorFile
from corda_convert.engine import FileRecord, Watch
from corda_convert.errors import UnsupportedInput
from corda_convert.hub_streaming import Downloads
from corda_convert.operations.options import RunOptions
from corda_convert.plan.model import ComputeJob, CopyJob, Plan

if TYPE_CHECKING:
    from corda_convert.operations.production import Input

INPUT_FOLDER = "input"
"""Where the files lie, in the work folder beside the output."""


def streamed_paths(inputs: Iterable[Input]) -> list[Path]:
    """The files that are streamed: those of models that are on the Hub. Adapters and covariances are read out of order."""
    return [
        file.path
        for source in inputs
        for file in source.files
        if not source.digest_always and source.role != "covariances" and absent(file.path) is not None
    ]


def check_streaming(run: RunOptions) -> None:
    """Raises `UnsupportedInput` where the files would be needed in several processes."""
    if run.stream and run.ranks.place.size > 1:
        raise UnsupportedInput(
            "--stream is for a single process.",
            why="Each process would download what it reads, and they divide tensors, not files.",
            next_step="Leave it out: then the model is downloaded first. Or start one process.",
        )


def idle_stream(run: RunOptions, inputs: Iterable[Input]) -> tuple[str, ...]:
    """What to tell of `--stream` where nothing comes from the Hub and nothing goes there; else nothing."""
    if not run.stream or run.push_to is not None or streamed_paths(inputs):
        return ()
    return ("--stream has no effect: the model's weights are here already, and without --push-to nothing goes up.",)


@contextlib.contextmanager
def streamed(inputs: Sequence[Input], plan: Plan, jobs: Sequence[int], work: Path) -> Iterator[Watch | None]:
    """Inside, the models' files come into the work folder as these jobs of the plan read them; the engine tells when.

    Yields what the engine has to tell; None where nothing is streamed.
    """
    paths = set(streamed_paths(inputs))
    if not paths:
        yield None
        return
    uses = {number: _paths_of(plan.jobs[number]) & paths for number in jobs}
    order = list(dict.fromkeys(path for number in jobs for path in sorted(uses[number])))
    downloads = Downloads(order, work / INPUT_FOLDER)
    with downloads.running():
        yield _Releasing(downloads, uses, [file for source in inputs for file in source.files])


class _Releasing:
    """Closes and deletes each file after the last job that reads it. Implements `Watch`."""

    def __init__(self, downloads: Downloads, uses: dict[int, set[Path]], files: Iterable[TensorFile]) -> None:
        self._downloads = downloads
        self._uses = uses
        self._left = Counter(path for paths in uses.values() for path in paths)
        self._opened = {file.path: file for file in map(_stored, files) if isinstance(file, ByteFile)}

    def beginning(self, number: int) -> None:
        """A read waits for its file by itself."""

    def finished(self, record: FileRecord) -> None:
        """What is written is no matter of downloads."""

    def written(self, number: int) -> None:
        for path in self._uses.pop(number, ()):
            self._left[path] -= 1
            if not self._left[path]:
                if path in self._opened:
                    self._opened[path].close()
                self._downloads.release(path)

    def stopped(self) -> None:
        self._downloads.stop()


def _paths_of(job: ComputeJob | CopyJob) -> set[Path]:
    """The files that a job reads."""
    if isinstance(job, CopyJob):
        return {job.source.path}
    reads = {(id(read.file), read.tensor): read for chunk in job.chunks for read in chunk.all_reads}
    return {path for read in reads.values() for path in _paths_behind(read.file, read.tensor)}


def _paths_behind(file: TensorFile, tensor: str) -> set[Path]:
    """The files that hold a tensor: of a dequantized weight, its scales may lie in another one."""
    weight = file.weights.get(tensor) if isinstance(file, DequantizedFile) else None
    return {file.path} if weight is None else {ref.file.path for ref in weight.stored}


def _stored(file: TensorFile) -> TensorFile:
    return file.stored if isinstance(file, DequantizedFile) else file
