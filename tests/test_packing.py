"""Arithmetic of plans. Nothing here imports torch: a plan is made of integers and names."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.numpy import save_file

from corda_convert.checkpoint.safetensors_file import SafetensorsFile, read_header
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, TensorSpec
from corda_convert.errors import MemoryBudgetExceeded
from corda_convert.plan.model import COPY_BYTES, ComputeJob, Copied, CopyJob, OutputFileSpec, Plan, Produced
from corda_convert.plan.packing import BLOCK_ELEMENTS, SPARE_SLOTS, encode_header, pack, row_blocks

SLOTS = SPARE_SLOTS + 1


@dataclass(frozen=True)
class Scale:
    """A transform on paper: reads one tensor by rows, needs as much workspace as the rows."""

    source: TensorRef
    row_quantum: int = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    action = "scaled"

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        return 4 * rows * prod(self.source.shape[1:])

    def begin(self, device: object) -> object:
        raise NotImplementedError


@dataclass(frozen=True)
class AtOnce:
    """A transform that needs its operand whole and yields several tensors."""

    source: TensorRef
    workspace: int
    action = "split"
    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        assert rows == 0
        return self.workspace

    def begin(self, device: object) -> object:
        raise NotImplementedError


def write(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> SafetensorsFile:
    """A file of zeros."""
    save_file({name: np.zeros(shape, np.float32) for name, shape in shapes.items()}, path)
    return SafetensorsFile(path)


class Claimed:
    """A file that only claims its tensors: plans of any size without a byte on disk."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.path = Path("claimed.safetensors")
        self.specs = {name: TensorSpec(name, "F32", shape) for name, shape in shapes.items()}
        self.metadata: dict[str, str] = {}

    def ref(self, name: str) -> TensorRef:
        return TensorRef(self, self.specs[name])  # type: ignore[arg-type]


def scaled(**shapes: tuple[int, ...]) -> list[OutputFileSpec]:
    file = Claimed(**shapes)
    tensors = tuple(Produced(spec, Scale(file.ref(name))) for name, spec in file.specs.items())  # type: ignore[arg-type]
    return [OutputFileSpec("model.safetensors", tensors, {})]


def copied(file: SafetensorsFile, *names: str) -> tuple[Copied, ...]:
    return tuple(Copied(file.specs[name], file, name) for name in names)


def compute_jobs(plan: Plan) -> list[ComputeJob]:
    return [job for job in plan.jobs if isinstance(job, ComputeJob)]


# Headers

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
WHOLE_BYTES = sorted(name for name, bits in DTYPE_BITS.items() if bits % 8 == 0)


@given(
    st.dictionaries(NAMES, st.tuples(st.sampled_from(WHOLE_BYTES), SHAPES), max_size=6),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text('aü"\n', max_size=8), max_size=3
    ),
)
def test_the_safetensors_library_reads_the_headers_that_are_written(
    entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in entries.items()]
    header = encode_header(specs, metadata)
    assert len(header) % 8 == 0
    data = bytes(position % 251 for position in range(sum(spec.nbytes for spec in specs)))
    found = dict(deserialize(header + data))
    position = 0
    for spec in specs:
        assert (found[spec.name]["dtype"], tuple(found[spec.name]["shape"])) == (spec.dtype, spec.shape)
        assert bytes(found[spec.name]["data"]) == data[position : position + spec.nbytes]
        position += spec.nbytes
    assert found.keys() == {spec.name for spec in specs}


def test_the_metadata_reaches_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header([TensorSpec("a", "F32", (2,))], {"format": "pt", "ü": '"'}) + bytes(8))
    with safe_open(path, "np") as stream:
        assert stream.metadata() == {"format": "pt", "ü": '"'}
    assert read_header(path).metadata == {"format": "pt", "ü": '"'}


def test_a_header_without_metadata_says_nothing_of_it() -> None:
    header = encode_header([TensorSpec("a", "F32", (2,))], {})
    assert json.loads(header[8:]) == {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


# Row blocks


@given(st.integers(0, 10**7), st.lists(st.integers(0, 10**5), max_size=2), st.integers(1, 100))
def test_row_blocks_tile_the_tensor_at_multiples_of_the_quantum(rows: int, rest: list[int], quantum: int) -> None:
    if rows and prod(rest) and rows * prod(rest) > 10**10:
        rows = 10**10 // prod(rest) + 1
    blocks = row_blocks((rows, *rest), quantum)
    assert blocks[0][0] == 0
    assert blocks[-1][1] == rows
    for (_, end), (begin, _) in pairwise(blocks):
        assert end == begin
    assert all(begin % quantum == 0 for begin, _ in blocks)
    assert all(end > begin for begin, end in blocks) or blocks == [(0, rows)]
    elements = max((end - begin) * prod(rest) for begin, end in blocks)
    smallest = 16 * quantum * prod(rest)
    assert elements <= max(BLOCK_ELEMENTS, smallest) or rows * prod(rest) == 0


def test_row_blocks_of_a_large_matrix_have_about_the_wanted_size() -> None:
    blocks = row_blocks((8192, 4096))
    sizes = {(end - begin) * 4096 for begin, end in blocks}
    assert sizes == {BLOCK_ELEMENTS}


@pytest.mark.parametrize(
    ("shape", "blocks"), [((), [(0, 1)]), ((0,), [(0, 0)]), ((0, 4), [(0, 0)]), ((4, 0), [(0, 4)])]
)
def test_tensors_without_elements_or_dimensions_are_one_block(
    shape: tuple[int, ...], blocks: list[tuple[int, int]]
) -> None:
    assert row_blocks(shape) == blocks


@given(st.integers(1, 300), st.integers(1, 40_000), st.sampled_from([1, 3, 8, 64]))
def test_the_chunks_of_a_job_read_and_write_each_byte_once_and_in_order(rows: int, columns: int, quantum: int) -> None:
    file = Claimed(a=(3,), w=(rows, columns))
    transform = Scale(file.ref("w"), quantum, whole={"factor": file.ref("a")})
    spec = TensorSpec("w", "BF16", (rows, columns))
    plan = pack([OutputFileSpec("x.safetensors", (Produced(spec, transform),), {})])  # type: ignore[arg-type]
    (job,) = compute_jobs(plan)
    reads = [read for chunk in job.chunks for read in chunk.reads if read.operand == "source"]
    writes = [write for chunk in job.chunks for write in chunk.writes]
    position, offset = 0, len(plan.files[0].header)
    for read, written in zip(reads, writes, strict=True):
        assert (read.begin, written.offset) == (position, offset)
        assert read.shape == written.shape
        assert (read.nbytes, written.nbytes) == (4 * prod(read.shape), 2 * prod(read.shape))
        position, offset = position + read.nbytes, offset + written.nbytes
    assert position == 4 * rows * columns
    assert offset == plan.files[0].nbytes == plan.write_bytes
    assert [read.operand for read in job.chunks[0].all_reads] == ["factor", "source"]
    assert all(read.operand == "source" for chunk in job.chunks[1:] for read in chunk.reads)


# Copies


def test_adjacent_copies_become_one_job(tmp_path: Path) -> None:
    shapes = dict.fromkeys("abcd", (3, 5))
    file = write(tmp_path / "x.safetensors", shapes)
    plan = pack([OutputFileSpec("x.safetensors", copied(file, *file.specs), {})])
    (job,) = plan.jobs
    assert isinstance(job, CopyJob)
    assert job.names == tuple(file.specs)
    assert (job.source_offset, job.offset) == (file.header.data_begin, len(plan.files[0].header))
    assert job.nbytes == plan.read_bytes == plan.work_bytes == 4 * 60
    assert plan.memory_bytes == 2 * job.nbytes  # once for the digest of the input, once for that of the output


def test_a_computed_tensor_parts_the_copies_around_it(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", dict.fromkeys("abcde", (4, 4)))
    a, b, c, d, e = file.specs
    middle = Produced(file.specs[c], Scale(TensorRef(file, file.specs[c])))  # type: ignore[arg-type]
    plan = pack([OutputFileSpec("x.safetensors", (*copied(file, a, b), middle, *copied(file, d, e)), {})])
    first, job, last = plan.jobs
    assert isinstance(first, CopyJob)
    assert isinstance(last, CopyJob)
    assert (first.names, job.name, last.names) == ((a, b), c, (d, e))  # type: ignore[union-attr]
    assert first.offset + first.nbytes + 64 == last.offset
    assert plan.read_bytes == plan.work_bytes == 5 * 64


def test_copies_out_of_order_or_from_two_files_or_across_files_stay_apart(tmp_path: Path) -> None:
    first = write(tmp_path / "x.safetensors", dict.fromkeys("abc", (4,)))
    second = write(tmp_path / "y.safetensors", dict.fromkeys("de", (4,)))
    a, b, c = first.specs
    d, e = second.specs

    def jobs(*files: tuple[Copied, ...]) -> list[tuple[str, ...]]:
        specs = [OutputFileSpec(f"{place}.safetensors", tensors, {}) for place, tensors in enumerate(files)]
        return [job.names for job in pack(specs).jobs if isinstance(job, CopyJob)]

    assert jobs(copied(first, b, a)) == [(b,), (a,)]
    assert jobs(copied(first, a, c)) == [(a,), (c,)]
    assert jobs((*copied(first, b, c), *copied(second, d, e))) == [(b, c), (d, e)]
    assert jobs(copied(first, a), copied(first, b)) == [(a,), (b,)]


def test_the_memory_of_a_copy_is_bounded(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"a": (4 * COPY_BYTES // 4,)})
    plan = pack([OutputFileSpec("x.safetensors", copied(file, "a"), {})])
    assert plan.memory_bytes == 2 * COPY_BYTES
    assert pack([OutputFileSpec("x.safetensors", copied(file, "a"), {})], max_memory_bytes=2 * COPY_BYTES) == replace(
        plan, slots=SLOTS
    )


# One transform, several tensors


def test_a_transform_with_outputs_in_two_files_runs_once(tmp_path: Path) -> None:
    file = Claimed(w=(6, 4))
    transform = AtOnce(file.ref("w"), workspace=1000)
    outputs = [TensorSpec("w", "F32", (6, 4)), TensorSpec("A", "F32", (2, 4)), TensorSpec("B", "F32", (6, 2))]
    main, *others = (Produced(spec, transform) for spec in outputs)  # type: ignore[arg-type]
    plan = pack([OutputFileSpec("m.safetensors", (main,), {}), OutputFileSpec("sub/a.safetensors", tuple(others), {})])
    (job,) = compute_jobs(plan)
    (chunk,) = job.chunks
    assert [(write.file_name, write.tensor) for write in chunk.writes] == [
        ("m.safetensors", "w"), ("sub/a.safetensors", "A"), ("sub/a.safetensors", "B")
    ]  # fmt: skip
    assert job.name == "w"
    assert job.workspace_bytes == 1000
    assert plan.memory_bytes >= 1000 + sum(spec.nbytes for spec in outputs) + 6 * 4 * 4


# Memory


def test_slots_fall_with_the_budget_and_the_plan_stays_within_it() -> None:
    files = scaled(w=(4096, 1024))
    plan = pack(files)
    assert plan.slots == SLOTS
    slot = plan.read_buffer_bytes + plan.write_buffer_bytes
    assert plan.memory_bytes == SLOTS * slot + plan.workspace_bytes
    for slots in range(SLOTS, 0, -1):
        budget = slots * slot + plan.workspace_bytes
        assert pack(files, max_memory_bytes=budget).slots == slots
        assert pack(files, max_memory_bytes=budget).memory_bytes <= budget
        assert pack(files, max_memory_bytes=budget + 10**9, held_bytes=10**9).slots == slots
        if slots > 1:
            assert pack(files, max_memory_bytes=budget - 1).slots == slots - 1


def test_workers_have_a_slot_and_a_workspace_each_and_fall_with_the_budget() -> None:
    files = scaled(w=(4096, 1024))
    plan = pack(files, workers=4)
    slot = plan.read_buffer_bytes + plan.write_buffer_bytes
    assert (plan.workers, plan.slots) == (4, SPARE_SLOTS + 4)
    assert plan.memory_bytes == plan.slots * slot + 4 * plan.workspace_bytes
    for budget in range(slot + plan.workspace_bytes, plan.memory_bytes, slot // 2):
        fewer = pack(files, workers=4, max_memory_bytes=budget)
        assert fewer.memory_bytes <= budget
        assert 1 <= fewer.workers <= fewer.slots
        assert fewer.jobs == plan.jobs


def test_a_job_that_does_all_its_work_in_one_step_has_torchs_threads_to_itself() -> None:
    file = Claimed(w=(6, 4))
    spec = TensorSpec("w", "F32", (6, 4))
    transform = AtOnce(file.ref("w"), workspace=1000)
    assert pack([OutputFileSpec("m", (Produced(spec, transform),), {})], workers=4).workers == 1  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_every_worker_has_a_slot_and_a_workspace_of_its_own(workers: int) -> None:
    files = scaled(w=(8192, 1024))
    plan = pack(files, workers=workers)
    slot = plan.read_buffer_bytes + plan.write_buffer_bytes
    assert (plan.workers, plan.slots) == (workers, SPARE_SLOTS + workers)
    assert plan.memory_bytes == plan.slots * slot + workers * plan.workspace_bytes


@given(st.integers(1, 16), st.integers(0, 400_000_000))
def test_workers_fall_with_the_budget_and_the_plan_stays_within_it(workers: int, budget: int) -> None:
    files = scaled(w=(8192, 1024))
    try:
        plan = pack(files, workers=workers, max_memory_bytes=budget)
    except MemoryBudgetExceeded:
        assert budget < pack(files, max_memory_bytes=10**9).memory_bytes
        return
    assert plan.memory_bytes <= budget
    assert 1 <= plan.workers <= workers
    assert plan.workers <= plan.slots
    assert [job.chunks for job in compute_jobs(plan)] == [job.chunks for job in compute_jobs(pack(files))]


def test_a_job_that_does_all_its_work_in_one_step_has_the_only_worker() -> None:
    file = Claimed(w=(6, 4))
    produced = Produced(file.specs["w"], AtOnce(file.ref("w"), workspace=10**6))  # type: ignore[arg-type]
    plan = pack([*scaled(v=(64, 64)), OutputFileSpec("y.safetensors", (produced,), {})], workers=8)
    assert (plan.workers, plan.slots) == (1, SPARE_SLOTS)


def test_a_budget_below_one_slot_is_refused_and_the_worst_step_named() -> None:
    files = scaled(small=(16, 8), large=(4096, 1024), other=(64, 64))
    plan = pack(files)
    assert plan.worst_job == "large"
    least = plan.read_buffer_bytes + plan.write_buffer_bytes + plan.workspace_bytes
    assert pack(files, max_memory_bytes=least).slots == 1
    with pytest.raises(MemoryBudgetExceeded) as refused:
        pack(files, max_memory_bytes=least - 1)
    assert str(refused.value) == (
        f"The run needs {least / 1e6:.1f} MB, of which 0.0 MB are the program itself; --max-memory allows "
        f"{(least - 1) / 1e6:.1f} MB. The worst step is large.\n"
        f"Allow --max-memory {-(-least // 10**6) + 10}MB."
    )


def test_the_worst_step_may_be_one_of_little_data_and_much_work() -> None:
    file = Claimed(w=(6, 4))
    produced = Produced(file.specs["w"], AtOnce(file.ref("w"), workspace=10**9))  # type: ignore[arg-type]
    files = [*scaled(large=(4096, 1024)), OutputFileSpec("y.safetensors", (produced,), {})]
    assert pack(files).worst_job == "w"


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 200_000_000))
def test_blocks_do_not_depend_on_the_budget(rows: int, columns: int, budget: int) -> None:
    files = scaled(w=(rows, columns), v=(columns, rows))
    free = pack(files)
    try:
        tight = pack(files, max_memory_bytes=budget)
    except MemoryBudgetExceeded:
        return
    assert [job.chunks for job in compute_jobs(tight)] == [job.chunks for job in compute_jobs(free)]
    assert tight.files == free.files
    assert tight.memory_bytes <= budget


@given(st.integers(1, 1 << 13))
def test_the_memory_of_a_streamed_tensor_does_not_grow_with_its_rows(rows: int) -> None:
    large = pack(scaled(w=(1 << 13, 4096)))
    assert pack(scaled(w=(rows, 4096))).memory_bytes <= large.memory_bytes
    assert large.memory_bytes < 100_000_000


def test_the_plan_of_an_empty_file_has_no_jobs() -> None:
    plan = pack([OutputFileSpec("x.safetensors", (), {"format": "pt"})])
    assert plan.jobs == ()
    assert plan.write_bytes == len(plan.files[0].header)


def test_planning_does_not_import_torch() -> None:
    code = (
        "import sys; from corda_convert.plan import packing; from corda_convert.checkpoint import folder; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
