"""From the tensors of each output file to offsets, headers and jobs. Arithmetic only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm

from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.checkpoint.torch_archive import SUFFIXES, lay_out_archive
from corda_convert.errors import MemoryBudgetExceeded
from corda_convert.plan.model import (
    Chunk,
    ComputeJob,
    Copied,
    CopyJob,
    InAnyOrder,
    InSteps,
    Job,
    NeedsByRows,
    OutputFileSpec,
    PackedFile,
    Plan,
    Produced,
    Read,
    Transform,
    Write,
)

BLOCK_ELEMENTS = 1 << 20
"""Elements of a row block: 4 MB in float32, so that the passes over a block stay in the processor's cache. It does
not depend on the memory budget: the same blocks, so the same bits, for every budget."""

SPARE_SLOTS = 3
"""Chunks in flight beside those that are computed: one being read, one being written, one in reserve where they are small."""


def pack(
    files: Sequence[OutputFileSpec], *, workers: int = 1, max_memory_bytes: int | None = None, held_bytes: int = 0
) -> Plan:
    """Lays out every file and cuts the work into jobs, in the order of the files' bytes.

    `workers` chunks are computed at once; one where the memory allows no more, and where a job does all its work in one
    step, or in steps one after the other, which then have torch's own threads. Raises `MemoryBudgetExceeded`, naming the
    worst job, if even one chunk in flight needs more than `max_memory_bytes` leaves beside the `held_bytes` of the program.
    """
    packed, places = _lay_out(files)
    jobs = tuple(_jobs(files, places))
    compute = [job for job in jobs if isinstance(job, ComputeJob)]
    read_buffer = max((chunk.read_bytes for job in compute for chunk in job.chunks), default=0)
    write_buffer = max((chunk.write_bytes for job in compute for chunk in job.chunks), default=0)
    workspace = max((job.workspace_bytes for job in compute), default=0)
    worst = max(compute, key=_job_bytes, default=None)
    if any(not job.transform.streamed and not isinstance(job.transform, InAnyOrder) for job in compute):
        workers, slots = 1, SPARE_SLOTS
    else:
        slots = SPARE_SLOTS + workers
    plan = Plan(packed, jobs, slots, workers, read_buffer, write_buffer, workspace, worst.name if worst else "")
    while max_memory_bytes is not None and plan.slots > 1 and held_bytes + plan.memory_bytes > max_memory_bytes:
        plan = replace(plan, slots=plan.slots - 1, workers=max(1, min(plan.workers, plan.slots - 2)))
    needed = held_bytes + plan.memory_bytes
    if max_memory_bytes is not None and needed > max_memory_bytes:
        raise MemoryBudgetExceeded(
            f"The run needs {_megabytes(needed)}, of which {_megabytes(held_bytes)} are the program itself; --max-memory "
            f"allows {_megabytes(max_memory_bytes)}. The worst step is {plan.worst_job or 'a copy'}.",
            next_step=f"Allow --max-memory {-(-needed // 10**6) + 10}MB.",
        )
    return plan


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB"


def _job_bytes(job: ComputeJob) -> int:
    return job.workspace_bytes + max(chunk.read_bytes + chunk.write_bytes for chunk in job.chunks)


def encode_header(specs: Iterable[TensorSpec], metadata: dict[str, str], *, least: int = 0) -> bytes:
    """The first bytes of a safetensors file: length and JSON, padded with spaces to a multiple of 8, and to `least` bytes."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    text += b" " * (least - 8 - len(text))
    return len(text).to_bytes(8, "little") + text


def _lay_out(files: Sequence[OutputFileSpec]) -> tuple[tuple[PackedFile, ...], dict[tuple[str, str], int]]:
    packed: list[PackedFile] = []
    places: dict[tuple[str, str], int] = {}
    for file in files:
        specs = tuple(tensor.spec for tensor in file.tensors)
        if file.name.endswith(SUFFIXES):
            archive, begins = lay_out_archive(specs)
            places |= {(file.name, name): begin for name, begin in begins.items()}
            packed.append(PackedFile(file.name, archive.header, specs, archive.nbytes, archive))
            continue
        header = encode_header(specs, dict(file.metadata))
        position = len(header)
        for spec in specs:
            places[file.name, spec.name] = position
            position += spec.nbytes
        packed.append(PackedFile(file.name, header, specs, position))
    return tuple(packed), places


def _jobs(files: Sequence[OutputFileSpec], places: dict[tuple[str, str], int]) -> Iterable[Job]:
    outputs: dict[int, list[tuple[str, Produced]]] = {}
    for file in files:
        for tensor in file.tensors:
            if isinstance(tensor, Produced):
                outputs.setdefault(id(tensor.transform), []).append((file.name, tensor))
    done: set[int] = set()
    for file in files:
        run: CopyJob | None = None
        for tensor in file.tensors:
            if isinstance(tensor, Copied):
                run, finished = _extend(run, tensor, file.name, places[file.name, tensor.spec.name])
                if finished is not None:
                    yield finished
                continue
            if run is not None:
                yield run
                run = None
            if id(tensor.transform) not in done:
                done.add(id(tensor.transform))
                yield _compute_job(tensor.transform, outputs[id(tensor.transform)], places)
        if run is not None:
            yield run


def _extend(run: CopyJob | None, tensor: Copied, file_name: str, offset: int) -> tuple[CopyJob, CopyJob | None]:
    extent = tensor.source.extent(tensor.source_name)
    assert extent is not None  # noqa: S101 - `Copied` is for tensors in one piece
    goes_on = run is not None and run.source is tensor.source and run.offset + run.nbytes == offset
    if run is not None and goes_on and run.source_offset + run.nbytes == extent.begin:
        names = (*run.names, tensor.spec.name)
        return CopyJob(names, run.source, run.source_offset, file_name, run.offset, run.nbytes + extent.nbytes), None
    return CopyJob((tensor.spec.name,), tensor.source, extent.begin, file_name, offset, extent.nbytes), run


def _compute_job(
    transform: Transform, outputs: list[tuple[str, Produced]], places: dict[tuple[str, str], int]
) -> ComputeJob:
    name = outputs[0][1].spec.name
    if isinstance(transform, InSteps):
        return ComputeJob(name, transform, _step_chunks(transform, outputs, places), transform.workspace_bytes(0))
    whole = tuple(_read(operand, ref, 0, ref.shape[0] if ref.shape else 1) for operand, ref in transform.whole.items())
    if not transform.streamed:
        writes = tuple(_write(file_name, each.spec, places, 0, _rows(each.spec)) for file_name, each in outputs)
        return ComputeJob(name, transform, (Chunk(0, (), whole, writes),), transform.workspace_bytes(0))
    shape = next(iter(transform.streamed.values())).shape  # the outputs' bytes, by the rows of the first operand
    blocks = row_blocks(shape, transform.row_quantum)
    chunks = []
    for index, (begin, end) in enumerate(blocks):
        reads = tuple(_read(operand, ref, begin, end) for operand, ref in transform.streamed.items())
        needed = transform.needed(begin, end) if isinstance(transform, NeedsByRows) else {}
        reads += tuple(_read(operand, ref, 0, ref.shape[0]) for operand, ref in needed.items())
        writes = tuple(_write_rows(file_name, each, shape, places, begin, end) for file_name, each in outputs)
        chunks.append(Chunk(begin, whole if index == 0 else (), reads, writes))
    rows = max((end - begin for begin, end in blocks), default=0)
    return ComputeJob(name, transform, tuple(chunks), transform.workspace_bytes(rows))


def _step_chunks(
    transform: InSteps, outputs: list[tuple[str, Produced]], places: dict[tuple[str, str], int]
) -> tuple[Chunk, ...]:
    found = {each.spec.name: (file_name, each.spec) for file_name, each in outputs}
    chunks = []
    for number, step in enumerate(transform.steps):
        reads = tuple(_read(operand, ref, 0, _rows(ref.spec)) for operand, ref in step.operands.items())
        writes = []
        for name, part in step.outputs.items():
            file_name, spec = found[name]
            matrix = TensorSpec(name, spec.dtype, (part.rows, spec.elements // max(part.rows, 1)))
            writes.append(_write(file_name, matrix, places, part.begin, part.end))
        chunks.append(Chunk(number, (), reads, tuple(writes)))
    return tuple(chunks)


def row_blocks(shape: tuple[int, ...], quantum: int = 1) -> list[tuple[int, int]]:
    """Half-open row ranges that cover the tensor, of about `BLOCK_ELEMENTS` elements, at multiples of `quantum`."""
    if not shape:
        return [(0, 1)]
    rows = shape[0]
    row_elements = 1
    for size in shape[1:]:
        row_elements *= size
    if rows == 0 or row_elements == 0:
        return [(0, rows)]
    step = lcm(quantum, 16)
    block = max(step, BLOCK_ELEMENTS // row_elements // step * step)
    return [(begin, min(begin + block, rows)) for begin in range(0, rows, block)]


def _rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1


def _read(operand: str, ref: TensorRef, begin: int, end: int) -> Read:
    spec = ref.spec
    row = spec.row_nbytes
    shape = (end - begin, *spec.shape[1:]) if spec.shape else ()
    return Read(operand, ref.file, ref.name, spec.dtype, shape, ref.begin + begin * row, (end - begin) * row)


def _write_rows(
    file_name: str, tensor: Produced, shape: tuple[int, ...], places: dict[tuple[str, str], int], begin: int, end: int
) -> Write:
    """The part of an output that rows `begin … end` of streamed operands of this shape make."""
    spec, each = tensor.spec, tensor.rows_each
    if each > 1:
        rows = -(-shape[0] // each)
        shape, begin, end = (rows, spec.elements // max(rows, 1)), begin // each, -(-end // each)
    return _write(file_name, TensorSpec(spec.name, spec.dtype, shape), places, begin, end)


def _write(file_name: str, spec: TensorSpec, places: dict[tuple[str, str], int], begin: int, end: int) -> Write:
    row = spec.row_nbytes
    shape = (end - begin, *spec.shape[1:]) if spec.shape else ()
    offset = places[file_name, spec.name] + begin * row
    return Write(spec.name, file_name, spec.dtype, shape, offset, (end - begin) * row)
