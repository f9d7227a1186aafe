"""The frozen plan: files to write, jobs that fill them in order, bytes and memory.

A command builds `OutputFileSpec`s; `packing.pack` turns them into a `Plan`; the engine runs it. Everything here exists
before one weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from corda_convert.checkpoint.byte_file import PAGE_BYTES

if TYPE_CHECKING:
    import torch

    from corda_convert.checkpoint.byte_file import ExtentFile
    from corda_convert.checkpoint.tensors import TensorFile, TensorRef, TensorSpec
    from corda_convert.checkpoint.torch_archive import Archive

Facts = dict[str, Any]
"""What a receipt says of one tensor: JSON values by name."""


class Session(Protocol):
    """One job while it runs: `prepare` once, then `step` for each chunk, in any order and on several threads at once.

    Tensors are buffers in host memory that the engine takes back when the call returns; what is kept must be copied.
    Both raise one of our errors to stop the run.
    """

    def prepare(self, operands: Mapping[str, torch.Tensor]) -> None:
        """Takes the operands that are read whole, by operand name. A job without streamed operands gets them in `step`."""
        ...

    def step(self, first_row: int, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        """Reads the rows of the streamed operands from `first_row` on, and fills `outputs`, by tensor name."""
        ...

    def facts(self) -> Facts:
        """For the receipt, once the last chunk is done."""
        ...


class Transform(Protocol):
    """What one job needs and yields, known from headers alone, and how to start it."""

    @property
    def action(self) -> str:
        """One word for the receipt: folded, decomposed, cast, replaced, concatenated."""
        ...

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        """Operands that are read whole."""
        ...

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        """Operands read by the same blocks of rows; none for a job done in one step.

        The first has as many elements as an output with `rows_each` 1, and tells how that is cut into rows.
        """
        ...

    @property
    def row_quantum(self) -> int:
        """Row blocks begin at multiples of this."""
        ...

    def workspace_bytes(self, rows: int) -> int:
        """Memory for the computation on `rows` rows beside operands and outputs (0 rows: all of them)."""
        ...

    def begin(self, device: torch.device) -> Session: ...


@runtime_checkable
class NeedsByRows(Protocol):
    """A streaming transform with operands that only some of its rows need."""

    def needed(self, begin: int, end: int) -> Mapping[str, TensorRef]:
        """What rows `begin … end` need: read whole with each block of rows that has such, and among `step`'s inputs."""
        ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows `begin … end` of an output that is seen as a matrix of so many `rows`."""

    begin: int
    end: int
    rows: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one step of a job reads, by operand name, and the parts of outputs that it fills, by tensor name."""

    operands: Mapping[str, TensorRef]
    outputs: Mapping[str, Part]


@runtime_checkable
class InSteps(Protocol):
    """A transform without streamed operands that does its work in several steps, one after the other.

    Its session gets each step's number as `first_row`. Its facts are by output: `{"outputs": {tensor name: facts}}`.
    """

    @property
    def steps(self) -> Sequence[Step]: ...

    @property
    def described(self) -> int:
        """How many outputs have facts of their own; the others refer to one of those."""
        ...


@runtime_checkable
class InAnyOrder(InSteps, Protocol):
    """One whose steps may be done in any order, and several at once, each on one thread.

    Where it has one output, its facts are of that, as a transform's without steps.
    """

    @property
    def is_in_any_order(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Produced:
    """A tensor that a transform yields. Tensors of one transform may lie in several files.

    `rows_each`: so many rows of the streamed operands make one row of this tensor.
    """

    spec: TensorSpec
    transform: Transform
    rows_each: int = 1


@dataclass(frozen=True, slots=True)
class Copied:
    """A tensor whose bytes go through untouched; the source has them in one piece."""

    spec: TensorSpec
    source: ExtentFile
    source_name: str


@dataclass(frozen=True, slots=True)
class OutputFileSpec:
    """A file to write: its path inside the output folder and its tensors in order.

    In torch's own format for a name that ends in `.pth` or `.pt`, else safetensors.
    """

    name: str
    tensors: tuple[Produced | Copied, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Read:
    """Bytes of one operand: `nbytes` from `begin` of the tensor, seen as `shape`."""

    operand: str
    file: TensorFile
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes of one output: `nbytes` at the absolute `offset` of the file, seen as `shape`."""

    tensor: str
    file_name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a compute job: what is read and what it writes. The first of a streaming job has `prepare`'s operands."""

    first_row: int
    whole: tuple[Read, ...]
    reads: tuple[Read, ...]
    writes: tuple[Write, ...]

    @property
    def all_reads(self) -> tuple[Read, ...]:
        return (*self.whole, *self.reads)

    @property
    def read_bytes(self) -> int:
        return sum(_aligned(read.nbytes) for read in self.all_reads)

    @property
    def write_bytes(self) -> int:
        return sum(_aligned(write.nbytes) + PAGE_BYTES for write in self.writes)


@dataclass(frozen=True, slots=True)
class ComputeJob:
    """A transform and its chunks. `workspace_bytes` is what one chunk's computation needs beside the buffers."""

    name: str
    transform: Transform
    chunks: tuple[Chunk, ...]
    workspace_bytes: int


@dataclass(frozen=True, slots=True)
class CopyJob:
    """A run of bytes that the kernel copies: adjacent untouched tensors of one source file."""

    names: tuple[str, ...]
    source: ExtentFile
    source_offset: int
    file_name: str
    offset: int
    nbytes: int


Job = ComputeJob | CopyJob

COPY_BYTES = 8 << 20
"""Copies are cut at this length: the step of progress, and of the digests' reading."""


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file's header as bytes, its tensors in order, and its whole size; for torch's own format its layout, too."""

    name: str
    header: bytes
    specs: tuple[TensorSpec, ...]
    nbytes: int
    archive: Archive | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All weight files of an output and the jobs that fill them, each file front to back.

    `buffer_bytes` is one slot's memory for operands and outputs; the engine has `slots` of them.
    """

    files: tuple[PackedFile, ...]
    jobs: tuple[Job, ...]
    slots: int
    workers: int
    read_buffer_bytes: int
    write_buffer_bytes: int
    workspace_bytes: int
    worst_job: str

    @property
    def write_bytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @property
    def read_bytes(self) -> int:
        return sum(
            job.nbytes
            if isinstance(job, CopyJob)
            else sum(read.nbytes for chunk in job.chunks for read in chunk.all_reads)
            for job in self.jobs
        )

    @property
    def work_bytes(self) -> int:
        """Bytes written by jobs: the unit of progress."""
        return sum(
            job.nbytes
            if isinstance(job, CopyJob)
            else sum(write.nbytes for chunk in job.chunks for write in chunk.writes)
            for job in self.jobs
        )

    @property
    def copy_bytes(self) -> int:
        """What is held of a copy while it is hashed, once on reading and once on writing."""
        return 2 * max((min(job.nbytes, COPY_BYTES) for job in self.jobs if isinstance(job, CopyJob)), default=0)

    @property
    def memory_bytes(self) -> int:
        """The bound on what the engine allocates, beside the interpreter with its libraries."""
        slots = self.slots * (self.read_buffer_bytes + self.write_buffer_bytes)
        return slots + self.workers * self.workspace_bytes + self.copy_bytes


BUFFER_ALIGNMENT = 64
"""Operands begin at multiples of this in a buffer, for vector loads."""


def _aligned(nbytes: int) -> int:
    return -(-nbytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
