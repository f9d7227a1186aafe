"""The loop that reads, computes and writes: with transforms made up here, and in memory measured from outside."""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from building import random, weight_files, write_checkpoint, write_lora
from safetensors.torch import load_file, save_file

from corda_convert import engine
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorFile, TensorRef, TensorSpec
from corda_convert.errors import MalformedFile, OutputRefused
from corda_convert.plan import packing
from corda_convert.plan.model import Copied, OutputFileSpec, Plan, Produced, Session, Transform
from corda_convert.plan.packing import pack

CPU = torch.device("cpu")
MAIN = "model.safetensors"
TIMEOUT = 600


@dataclass(frozen=True)
class Scale:
    """Multiplies by the first entry of `factor`, block by block, and counts its steps and rows."""

    source: TensorRef
    factor: TensorRef
    fail_at_step: int = -1

    action = "scaled"
    row_quantum = 1

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {"factor": self.factor}

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        return 0

    def begin(self, device: torch.device) -> Session:
        return ScaleSession(self)


@dataclass
class ScaleSession:
    transform: Scale
    factor: float = 0.0
    rows: list[int] = field(default_factory=list)

    def prepare(self, operands: Mapping[str, torch.Tensor]) -> None:
        assert not self.rows
        assert set(operands) == {"factor"}
        self.factor = float(operands["factor"][0])

    def step(self, first_row: int, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        if len(self.rows) == self.transform.fail_at_step:
            raise ArithmeticError("as asked")
        assert set(inputs) == {"source"}
        assert first_row == 0 or first_row % 16 == 0
        (output,) = outputs.values()
        output.copy_(inputs["source"] * self.factor)
        self.rows.append(output.shape[0] if output.shape else 1)

    def facts(self) -> dict[str, Any]:
        return {"rows": self.rows, "factor": self.factor}


@dataclass(frozen=True)
class Halves:
    """Yields the two halves of a tensor, which may go to two files."""

    source: TensorRef
    names: tuple[str, str]

    action = "halved"
    row_quantum = 1
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        return 0

    def begin(self, device: torch.device) -> Session:
        return HalvesSession(self)


@dataclass
class HalvesSession:
    transform: Halves

    def prepare(self, operands: Mapping[str, torch.Tensor]) -> None:
        assert not operands

    def step(self, first_row: int, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        for name, half in zip(self.transform.names, inputs["source"].chunk(2), strict=True):
            outputs[name].copy_(half)

    def facts(self) -> dict[str, Any]:
        return {}


class MemoryFile:
    """A file that is none: a `TensorFile` over bytes, which may fail."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], fail_on: str = "") -> None:
        self.path = Path("nowhere")
        self.metadata: dict[str, str] = {}
        self.specs = {name: TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
        self._content = {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}
        self._fail_on = fail_on

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        if name == self._fail_on:
            raise MalformedFile(f"{name} cannot be read.")
        view[:] = self._content[name][begin : begin + len(view)]

    def close(self) -> None:
        pass


def ref(file: TensorFile, name: str) -> TensorRef:
    return TensorRef(file, file.specs[name])


def scaling(file: TensorFile, *, fail_at_step: int = -1) -> tuple[Produced, ...]:
    """Every tensor of the file but `factor`, times the factor."""
    return tuple(
        Produced(spec, Scale(ref(file, name), ref(file, "factor"), fail_at_step))
        for name, spec in file.specs.items()
        if name != "factor"
    )


def make_plan(*tensors: Produced | Copied, slots: int = 4, workers: int = 1) -> Plan:
    files = [OutputFileSpec(MAIN, tuple(tensors), {"format": "pt"})]
    plan = pack(files, workers=workers)
    if slots == 4 or workers > 1:
        return plan
    slot = plan.read_buffer_bytes + plan.write_buffer_bytes
    fewer = pack(files, max_memory_bytes=plan.memory_bytes - (4 - slots) * slot)
    assert fewer.slots == slots
    return fewer


def run(plan: Plan, folder: Path) -> engine.RunRecord:
    """Runs the plan and makes sure that no thread outlives it."""
    folder.mkdir(exist_ok=True)
    before = set(threading.enumerate())
    try:
        return engine.run(plan, folder, CPU)
    finally:
        assert set(threading.enumerate()) == before


def sources(count: int = 5, rows: int = 7) -> dict[str, torch.Tensor]:
    tensors = {f"t{number}": random(rows, 3, seed=number) for number in range(count)}
    return {"factor": torch.tensor([3.0]), **tensors}


# Outputs


def test_outputs_are_what_the_transforms_say_and_facts_are_recorded(tmp_path: Path) -> None:
    tensors = sources()
    record = run(make_plan(*scaling(MemoryFile(tensors))), tmp_path / "out")
    found = load_file(tmp_path / "out" / MAIN)
    assert found.keys() == tensors.keys() - {"factor"}
    for name, tensor in found.items():
        assert tensor.equal(tensors[name] * 3.0)
        assert record.facts[name] == {"action": "scaled", "rows": [7], "factor": 3.0}


def test_copies_and_computed_tensors_stand_in_one_file(tmp_path: Path) -> None:
    save_file(sources(), tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    tensors = [
        Produced(spec, Scale(ref(file, name), ref(file, "factor")))
        if name in ("t1", "t3")
        else Copied(spec, file, name)
        for name, spec in file.specs.items()
    ]
    run(make_plan(*tensors), tmp_path / "out")
    found = load_file(tmp_path / "out" / MAIN)
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert found[name].equal(tensor * 3.0 if name in ("t1", "t3") else tensor)


def test_a_transform_fills_tensors_of_two_files(tmp_path: Path) -> None:
    file = MemoryFile({"w": random(6, 4)})
    transform = Halves(ref(file, "w"), ("upper", "lower"))
    specs = [TensorSpec(name, "F32", (3, 4)) for name in transform.names]
    files = [
        OutputFileSpec(MAIN, (Produced(specs[0], transform),), {}),
        OutputFileSpec("deep/er/a.safetensors", (Produced(specs[1], transform),), {}),
    ]
    record = run(pack(files), tmp_path / "out")
    assert load_file(tmp_path / "out" / MAIN)["upper"].equal(random(6, 4)[:3])
    assert load_file(tmp_path / "out" / "deep/er/a.safetensors")["lower"].equal(random(6, 4)[3:])
    assert [(entry.name, entry.nbytes) for entry in record.files] == [
        (name, (tmp_path / "out" / name).stat().st_size) for name in (MAIN, "deep/er/a.safetensors")
    ]


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0)])
def test_tensors_without_elements_or_dimensions_go_through(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"factor": torch.tensor([2.0]), "a": random(4), "x": random(*shape), "z": random(4)}
    for name, file in (("memory", MemoryFile(tensors)), ("pickle", as_pickle(tensors, tmp_path / "x.pt"))):
        record = run(make_plan(*scaling(file)), tmp_path / name)
        found = load_file(tmp_path / name / MAIN)
        assert found["x"].shape == shape
        assert all(found[other].equal(tensors[other] * 2.0) for other in ("a", "x", "z"))
        assert record.facts["x"]["action"] == "scaled"


def as_pickle(tensors: Mapping[str, torch.Tensor], path: Path) -> PickleFile:
    torch.save(dict(tensors), path)
    return PickleFile(path)


@pytest.mark.parametrize("shape", ["many tiny", "one large", "mixed"])
def test_the_bytes_do_not_depend_on_the_number_of_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 256)
    tiny = {f"t{number:03}": random(2, 3, seed=number) for number in range(200)}
    large = {"large": random(2000, 16)}
    tensors = {"many tiny": tiny, "one large": large, "mixed": {**large, **tiny}}[shape]
    file = MemoryFile({"factor": torch.tensor([1.5]), **tensors})
    records = [run(make_plan(*scaling(file), slots=slots), tmp_path / str(slots)) for slots in (1, 2, 4)]
    first = (tmp_path / "1" / MAIN).read_bytes()
    assert first == (tmp_path / "2" / MAIN).read_bytes() == (tmp_path / "4" / MAIN).read_bytes()
    assert records[0].files == records[1].files == records[2].files
    found = load_file(tmp_path / "1" / MAIN)
    assert all(found[name].equal(tensor * 1.5) for name, tensor in tensors.items())
    if "large" in tensors:
        assert records[0].facts["large"]["rows"] == [16] * 125


@pytest.mark.parametrize("workers", [2, 5])
def test_several_workers_write_the_same_bytes_and_record_the_facts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 256)
    tensors = {"large": random(2000, 16), **{f"t{number:03}": random(2, 3, seed=number) for number in range(100)}}
    file = MemoryFile({"factor": torch.tensor([1.5]), **tensors})
    alone = run(make_plan(*scaling(file)), tmp_path / "alone")
    threads = torch.get_num_threads()
    several = run(make_plan(*scaling(file), workers=workers), tmp_path / "several")
    assert torch.get_num_threads() == threads
    assert several.files == alone.files
    assert several.facts.keys() == tensors.keys()
    assert sorted(several.facts["large"]["rows"]) == alone.facts["large"]["rows"] == [16] * 125


def test_the_steps_of_one_tensor_overlap_on_several_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps wait for each other: with one worker, or with steps one after the other, this would time out."""
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 64)
    meeting = threading.Barrier(2, timeout=120)

    class Meeting(ScaleSession):
        def step(self, first_row: int, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
            meeting.wait()
            (output,) = outputs.values()
            output.copy_(inputs["source"] * self.factor)

    class Met(Scale):
        def begin(self, device: torch.device) -> Session:
            return Meeting(self)

    file = MemoryFile({"factor": torch.tensor([2.0]), "x": random(64, 16)})
    run(make_plan(Produced(file.specs["x"], Met(ref(file, "x"), ref(file, "factor"))), workers=2), tmp_path / "out")
    assert load_file(tmp_path / "out" / MAIN)["x"].equal(random(64, 16) * 2)


def test_progress_tells_every_byte_that_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 64)
    save_file(sources(rows=100), tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    plan = make_plan(*scaling(file), Copied(file.specs["factor"], file, "factor"))
    seen: list[tuple[str, int]] = []
    (tmp_path / "out").mkdir()
    engine.run(plan, tmp_path / "out", CPU, lambda name, nbytes: seen.append((name, nbytes)))
    assert sum(nbytes for _, nbytes in seen) == plan.work_bytes == 5 * 100 * 3 * 4 + 4
    assert {name for name, _ in seen} == {"factor", *(f"t{number}" for number in range(5))}


# Digests


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_digests_of_the_files_are_those_of_hashlib(tmp_path: Path) -> None:
    save_file(sources(), tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    transform = Halves(ref(file, "t4"), ("upper", "lower"))  # writes into the first file again, after others
    (t4,) = (spec for name, spec in file.specs.items() if name == "t4")
    copies = [Copied(spec, file, name) for name, spec in file.specs.items() if name != "factor"]
    specs = [TensorSpec(name, "F32", (4 if name == "upper" else 3, *t4.shape[1:])) for name in transform.names]
    files = [
        OutputFileSpec("a.safetensors", (*copies[:2], Produced(specs[0], transform)), {}),
        OutputFileSpec("b.safetensors", (*copies[2:], Produced(specs[1], transform)), {"format": "pt"}),
        OutputFileSpec("c.safetensors", (), {}),
    ]
    record = run(pack(files), tmp_path / "out")
    for entry in record.files:
        path = tmp_path / "out" / entry.name
        assert (entry.nbytes, entry.sha256) == (path.stat().st_size, sha256(path))
    assert [entry.name for entry in record.files] == ["a.safetensors", "b.safetensors", "c.safetensors"]


def test_an_input_that_is_read_front_to_back_has_its_digest(tmp_path: Path) -> None:
    save_file({"a": random(3, 3), "b": random(5), "c": random(2, 2)}, tmp_path / "x.safetensors")
    save_file({"factor": random(1)}, tmp_path / "factor.safetensors")
    file, factor = SafetensorsFile(tmp_path / "x.safetensors"), SafetensorsFile(tmp_path / "factor.safetensors")
    tensors: list[Produced | Copied] = [Copied(spec, file, name) for name, spec in file.specs.items()]
    middle = file.specs[list(file.specs)[1]]
    tensors[1] = Produced(middle, Scale(TensorRef(file, middle), ref(factor, "factor")))
    record = run(make_plan(*tensors), tmp_path / "out")
    assert record.input_digests == {path: sha256(path) for path in (file.path, factor.path)}


@pytest.mark.parametrize("how", ["backwards", "twice"])
def test_an_input_that_is_read_otherwise_has_no_digest_rather_than_a_wrong_one(tmp_path: Path, how: str) -> None:
    save_file({"a": random(3), "b": random(5), "c": random(2)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    copies = [Copied(spec, file, name) for name, spec in file.specs.items()]
    again = Copied(copies[0].spec.with_dtype("F32"), file, copies[0].source_name)
    again = Copied(TensorSpec("again", "F32", again.spec.shape), file, again.source_name)
    order = {"backwards": copies[::-1], "twice": [*copies, again]}[how]
    record = run(make_plan(*order), tmp_path / "out")
    assert record.input_digests == {}


@pytest.mark.parametrize("left_out", range(3))
@pytest.mark.parametrize("most", [1 << 20, 1000])
def test_a_little_that_is_not_asked_for_is_read_for_the_digest_and_much_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: int, most: int
) -> None:
    monkeypatch.setattr(engine, "MOST_SEAM_BYTES", most)
    monkeypatch.setattr(engine, "COPY_BYTES", 700)
    save_file({"a": random(300), "b": random(500), "c": random(400)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    names = [name for place, name in enumerate(file.specs) if place != left_out]
    record = run(make_plan(*(Copied(file.specs[name], file, name) for name in names)), tmp_path / "out")
    assert record.input_digests == ({file.path: sha256(file.path)} if most > 1000 else {})


# Failures


def failing_plan(stage: str, tmp_path: Path) -> Plan:
    tensors = sources(40, 50)
    if stage == "reader":
        return make_plan(*scaling(MemoryFile(tensors, fail_on="t30")))
    return make_plan(*scaling(MemoryFile(tensors), fail_at_step=0 if stage == "transform" else -1))


@pytest.mark.parametrize("stage", ["reader", "transform", "writer"])
def test_a_failure_in_any_thread_stops_all_and_is_raised_as_it_is(tmp_path: Path, stage: str) -> None:
    class WriterFailed(Exception):
        pass

    def progress(name: str, nbytes: int) -> None:
        if stage == "writer" and name == "t3":
            raise WriterFailed("as asked")

    plan = failing_plan(stage, tmp_path)
    before = set(threading.enumerate())
    expected = {"reader": MalformedFile, "transform": ArithmeticError, "writer": WriterFailed}[stage]
    with pytest.raises(expected) as failed:
        engine.run(plan, tmp_path, CPU, progress)
    assert str(failed.value) in ("t30 cannot be read.", "as asked")
    assert set(threading.enumerate()) == before
    assert threading.active_count() == len(before)


def test_an_interrupt_stops_all_threads(tmp_path: Path) -> None:
    class Interrupting(Scale):
        def begin(self, device: torch.device) -> Session:
            raise KeyboardInterrupt

    file = MemoryFile(sources(40, 50))
    tensors = [Produced(file.specs[f"t{n}"], Interrupting(ref(file, f"t{n}"), ref(file, "factor"))) for n in range(40)]
    with pytest.raises(KeyboardInterrupt):
        run(make_plan(*tensors), tmp_path / "out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_refused_in_words(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / MAIN).symlink_to("/dev/full")
    with pytest.raises(OutputRefused) as refused:
        run(make_plan(*scaling(MemoryFile(sources()))), out)
    assert str(refused.value) == (
        f"Writing {MAIN} failed: No space left on device.\nFree disk space or choose another --output."
    )


def test_a_file_that_cannot_be_created_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "out" / MAIN).mkdir(parents=True)
    with pytest.raises(OutputRefused, match=rf"Writing {MAIN} failed: Is a directory\."):
        run(make_plan(*scaling(MemoryFile(sources()))), tmp_path / "out")


@pytest.mark.parametrize("how", ["copied", "computed"])
def test_an_input_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file(sources(), path)
    file = SafetensorsFile(path)
    tensors = scaling(file) if how == "computed" else [Copied(spec, file, name) for name, spec in file.specs.items()]
    plan = make_plan(*tensors)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MalformedFile) as refused:
        run(plan, tmp_path / "out")
    assert str(refused.value) == (
        f"{path} was changed while it was read.\nAnother program writes it, replaced it or removed it.\n"
        "Run the same command again once the file is whole."
    )


def test_the_fakes_of_these_tests_are_what_the_engine_asks_for(tmp_path: Path) -> None:
    file: TensorFile = MemoryFile(sources())
    transforms: list[Transform] = [Scale(ref(file, "t1"), ref(file, "factor")), Halves(ref(file, "t1"), ("a", "b"))]
    assert [transform.action for transform in transforms] == ["scaled", "halved"]


# Memory, of a process of its own

MEASURE = """
import json, re, sys
from corda_convert.cli import main
try:
    main(sys.argv[1:])
finally:
    status = open("/proc/self/status").read()
    print("PEAK", int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024, file=sys.stderr)
"""

MEASURE_TIGHT = """
import contextlib, io, json, re, sys
from corda_convert.cli import main
# What the program itself holds differs from process to process, by pages of libraries that are in the page cache or not,
# and falls after modules were compiled: the limit is set by the second dry run in the same process.
for _ in range(2):
    said = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(said):
        main([*sys.argv[1:], "--dry-run"])
free = json.loads(said.getvalue())["plan"]
limit = free["memory_bytes"] - free["buffer_bytes"] // 3
try:
    main([*sys.argv[1:], "--max-memory", str(limit)])
finally:
    status = open("/proc/self/status").read()
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
    print(json.dumps({"free": free, "limit": limit, "peak": peak}), file=sys.stderr)
"""

SLACK = 64_000_000
"""What the plan does not count: stacks of threads, the workspaces that the BLAS allocates on first use, pages that the
allocator keeps, and pages of libraries, of which the kernel maps more where they
are in its cache. It is a constant, not a share of the checkpoint: see the test with two sizes."""


COUNTED_LATE = 4_000_000
"""The kernel sums a process's pages up from counters of each core, so that a later look may show a little less."""


def measure(*arguments: object) -> tuple[dict[str, Any], int]:
    """The receipt of a run in a new process, and the peak of its resident memory as the kernel counts it.

    Not `ru_maxrss`, which a child inherits from the process that forked it.
    """
    command = [sys.executable, "-c", MEASURE, *(str(argument) for argument in arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return json.loads(done.stdout), int(done.stderr.split("PEAK ")[1])


def large_checkpoint(folder: Path, layers: int) -> tuple[Path, Path]:
    """`layers` folded matrices of 17 MB, half as many copied ones, and the adapter."""
    matrix = random(4096, 1024)
    folded = {f"layers.{layer:02}.fc.weight": matrix + layer for layer in range(layers)}
    copied = {f"layers.{layer:02}.emb.weight": matrix - layer for layer in range(layers // 2)}
    shapes = {name.removesuffix(".weight"): (4096, 1024) for name in folded}
    model = write_checkpoint(folder / "model", {**folded, **copied}, shards=2, config=None)
    return model, write_lora(folder / "lora", shapes, rank=8)


@dataclass(frozen=True)
class Large:
    """A checkpoint of 150 MB with its adapter, and a run on it without a bound on memory."""

    model: Path
    adapter: Path
    output: Path
    receipt: dict[str, Any]
    peak: int


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    folder = tmp_path_factory.mktemp("large")
    model, adapter = large_checkpoint(folder, 6)
    return Large(model, adapter, folder / "out", *measure("merge", model, "--adapter", adapter, "-o", folder / "out"))


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")


@needs_proc
def test_memory_stays_below_the_plan_and_does_not_grow_with_the_checkpoint(tmp_path: Path, large: Large) -> None:
    model, adapter = large_checkpoint(tmp_path, 12)
    receipt, peak = measure("merge", model, "--adapter", adapter, "-o", tmp_path / "out")
    for found, highest, least in ((large.receipt, large.peak, 150_000_000), (receipt, peak, 300_000_000)):
        plan = found["plan"]
        assert plan["write_bytes"] > least
        assert highest <= plan["memory_bytes"] + SLACK
        assert found["run"]["peak_memory_bytes"] <= highest + COUNTED_LATE
    assert receipt["plan"]["buffer_bytes"] == large.receipt["plan"]["buffer_bytes"]


@needs_proc
def test_max_memory_is_honoured_and_changes_no_byte(tmp_path: Path, large: Large) -> None:
    arguments = ["merge", large.model, "--adapter", large.adapter, "-o", tmp_path / "tight", "--json"]
    command = [sys.executable, "-c", MEASURE_TIGHT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    tight, told = json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])
    free, limit, peak = told["free"], told["limit"], told["peak"]
    assert free["slots"] == packing.SPARE_SLOTS + free["workers"]
    assert tight["plan"]["slots"] < free["slots"]
    assert tight["plan"]["memory_bytes"] <= limit
    assert peak <= limit + SLACK
    assert weight_files(tmp_path / "tight") == weight_files(large.output)
    assert tight["tensors"] == large.receipt["tensors"]
