"""Tensors of an output computed again from its inputs: in float64 by other code, or where that is not possible run again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef, TensorSpec, read_rows, read_tensor, torch_dtype
from corda_convert.operations.transforms import CastTransform, FoldTransform
from corda_convert.operations.verbatim import VerbatimTransform
from corda_convert.operations.verify_fold import FoldedExactly, is_known
from corda_convert.operations.verify_ulps import Checked, Exact, Measured, measure, measure_bits
from corda_convert.plan.model import COPY_BYTES, ComputeJob, CopyJob, Plan, Read
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    import torch

    from corda_convert.checkpoint.byte_file import ExtentFile
    from corda_convert.plan.model import Job


@dataclass(slots=True)
class Expected:
    """The plan that the output must be the result of, and the output's own tensors.

    Attributes:
        plan: made again from the inputs.
        stored: the output's tensors, by file and name.
    """

    plan: Plan
    stored: Mapping[tuple[str, str], TensorRef]
    _jobs: dict[tuple[str, str], Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for job in self.plan.jobs:
            if isinstance(job, CopyJob):
                self._jobs |= {(job.file_name, name): job for name in job.names}
            else:
                writes = (write for chunk in job.chunks for write in chunk.writes)
                self._jobs |= {(write.file_name, write.tensor): job for write in writes}

    def specs(self) -> Iterator[tuple[str, TensorSpec]]:
        """File and spec of every tensor of the plan."""
        for file in self.plan.files:
            for spec in file.specs:
                yield file.name, spec

    def check(self, file_name: str, name: str, kind: str) -> Checked:
        """Computes one tensor again, whatever its job makes beside it. Raises one of our errors."""
        job, ref = self._jobs.get((file_name, name)), self.stored[file_name, name]
        if job is None:  # no bytes at all
            return Checked(name, kind, "bits", Measured())
        if isinstance(job, CopyJob):
            return Checked(name, kind, "bits", _same_bytes(ref, _source_of(job, name)))
        transform = job.transform
        if isinstance(transform, FoldTransform) and is_known(transform):
            return Checked(name, kind, "exact", _folded(ref, transform))
        if isinstance(transform, VerbatimTransform):
            return Checked(name, kind, "bits", _same_bytes(ref, transform.source))
        if isinstance(transform, CastTransform):
            return Checked(name, kind, "bits", _cast(ref, transform))
        return Checked(name, kind, "again", self._run_again(job, name))

    def _run_again(self, job: ComputeJob, name: str) -> Measured:
        """Runs a whole job in memory, a chunk at a time, and compares what it yields for this tensor."""
        import torch

        session = job.transform.begin(torch.device("cpu"))
        measured, begins = Measured(), dict.fromkeys((write.tensor for c in job.chunks for write in c.writes), 0)
        for number, chunk in enumerate(job.chunks):
            tensors = {read.operand: _read(read) for read in chunk.all_reads}
            whole = {read.operand: tensors.pop(read.operand) for read in chunk.whole}
            if number == 0:
                session.prepare(whole)
            outputs = {write.tensor: torch.empty(write.shape, dtype=torch_dtype(write.dtype)) for write in chunk.writes}
            session.step(chunk.first_row, tensors, outputs)
            for write in chunk.writes:
                if write.tensor == name:
                    ref = self.stored[write.file_name, name]
                    part = TensorRef(ref.file, TensorSpec(name, write.dtype, write.shape), begins[name])
                    measured.add(_alike(read_tensor(part), outputs[name], write.dtype))
                begins[write.tensor] += write.nbytes
        return measured


def _alike(stored: torch.Tensor, again: torch.Tensor, dtype: str) -> Measured:
    """Another processor or torch may round the last bit otherwise; one place is allowed, and told."""
    same = measure_bits(stored, again)
    if same.same_bits or dtype not in ("F64", "F32", "F16", "BF16"):
        return same
    values = again.double()
    return measure(stored, Exact(values, values.abs(), 0.0, roundings=2), dtype)


def _source_of(job: CopyJob, name: str) -> TensorRef:
    """Where a copied tensor's bytes come from: beside those of its run."""
    source: ExtentFile = job.source
    return TensorRef(source, source.specs[name]) if name in source.specs else _by_place(job, name)


def _by_place(job: CopyJob, name: str) -> TensorRef:
    """A tensor that is called otherwise in the source: the one at its place in the run."""
    located = sorted(
        (extent.begin, spec.name)
        for spec in job.source.specs.values()
        if (extent := job.source.extent(spec.name)) is not None
        and job.source_offset <= extent.begin < job.source_offset + job.nbytes
    )
    return TensorRef(job.source, job.source.specs[located[job.names.index(name)][1]])


def _same_bytes(ref: TensorRef, source: TensorRef) -> Measured:
    nbytes = ref.spec.nbytes
    if source.spec.nbytes != nbytes:
        return Measured(float("inf"), float("inf"), same_bits=False, entries=ref.spec.elements)
    for begin in range(0, nbytes, COPY_BYTES):
        length = min(COPY_BYTES, nbytes - begin)
        if _bytes(ref, begin, length) != _bytes(source, begin, length):
            return Measured(float("inf"), float("inf"), same_bits=False, entries=ref.spec.elements)
    return Measured(entries=ref.spec.elements)


def _bytes(ref: TensorRef, begin: int, nbytes: int) -> bytearray:
    buffer = bytearray(nbytes)
    ref.file.read_into(ref.name, ref.begin + begin, memoryview(buffer))
    return buffer


def _rows_of(ref: TensorRef) -> tuple[TensorRef, tuple[int, int]]:
    """A tensor of any shape as a matrix of its first dimension."""
    shape = (ref.shape[0], prod(ref.shape[1:])) if ref.shape else (1, 1)
    return ref.reshaped(shape), shape


def _folded(ref: TensorRef, transform: FoldTransform) -> Measured:
    measured, matrix = Measured(), ref.reshaped(transform.weight.shape)
    for begin, end, exact in FoldedExactly(transform).blocks():
        measured.add(measure(read_rows(matrix, begin, end), exact, ref.spec.dtype))
    return measured


def _cast(ref: TensorRef, transform: CastTransform) -> Measured:
    """The nearest numbers of the output's dtype."""
    measured, (matrix, shape) = Measured(), _rows_of(ref)
    source = transform.source.reshaped(shape)
    for begin, end in row_blocks(shape):
        expected = read_rows(source, begin, end).to(torch_dtype(ref.spec.dtype))
        measured.add(measure_bits(read_rows(matrix, begin, end), expected))
    return measured


def _read(read: Read) -> torch.Tensor:
    return read_tensor(TensorRef(read.file, TensorSpec(read.tensor, read.dtype, read.shape), read.begin))
