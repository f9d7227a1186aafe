"""A run that is stopped anywhere leaves the output absent or whole; the same command goes on, to the same bytes."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from building import (
    ADAPTERS,
    COVARIANCES,
    MODEL,
    files_below,
    read_json,
    weight_files,
    write_checkpoint,
    write_lora,
)
from conftest import Ran, assert_no_leftovers
from safetensors.torch import load_file

from corda_convert import engine
from corda_convert.operations.transforms import FoldTransform
from corda_convert.output import journal
from corda_convert.output.digests import WrittenDigest
from corda_convert.output.journal import Journal, take_over
from corda_convert.output.side_files import SideFile
from corda_convert.output.staging import work_folder

Command = Callable[..., Ran]

KILLS = int(os.environ.get("CORDA_CONVERT_KILLS", "12"))
"""For each command; 200 is a test for an evening."""

RECEIPT = "corda_convert.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model in six shards."""
    tensors = {
        name: tensor for shard in sorted(MODEL.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }
    return write_checkpoint(
        tmp_path_factory.mktemp("sharded") / "model", tensors, shards=6, config=read_json(MODEL / "config.json")
    )


def comparable(output: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files but the receipt, and the receipt without what it says of the run."""
    files = files_below(output)
    receipt = json.loads(files.pop(RECEIPT))
    for entry in receipt["tensors"]:
        entry.pop("seconds", None)
    del receipt["run"], receipt["plan"]
    return files, receipt


COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "MODEL", "--adapter", str(ADAPTERS / "lora")],
    "merge to pth": ["merge", "MODEL", "--adapter", str(ADAPTERS / "lora"), "--format", "pth"],
    "decompose": ["decompose", "MODEL", "--cov", str(COVARIANCES), "--mode", "kpm", "--rank", "4"],
    "to-lora": ["to-lora", str(ADAPTERS / "lora"), "--rank", "4"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_killed_anywhere_goes_on_and_ends_with_the_same_bytes(sharded: Path, tmp_path: Path, name: str) -> None:
    arguments = [str(sharded) if argument == "MODEL" else argument for argument in COMMANDS[name]]
    spec = {"arguments": arguments, "folder": str(tmp_path), "kills": KILLS, "seed": name}
    program = Path(__file__).with_name("interrupted_runs.py")
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(spec)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1" if name == "decompose" else "2"},  # its forks cannot share threads
        timeout=600 + 10 * KILLS,
    )
    assert done.returncode == 0, done.stderr
    expected = comparable(tmp_path / "undisturbed1" / "out")
    killed = resumed = 0
    for number, kill in enumerate(json.loads(done.stdout)):
        log = (tmp_path / str(number) / "log").read_text()
        assert kill["killed"] in (-signal.SIGKILL, 0), log  # threads may make fewer changes than they did when counted
        killed += kill["killed"] != 0
        assert kill["again"] in (None, 0), log
        assert comparable(tmp_path / str(number) / "out") == expected
        taken = read_json(tmp_path / str(number) / "out" / RECEIPT)["run"].get("resumed", {"bytes": 0})["bytes"]
        if not kill["was_there"]:
            assert taken <= kill["noted"]
            assert (taken > 0) == (kill["noted"] > 5000), kill  # the header of a shard has some 2,000 bytes
            resumed += taken > 0
    assert killed >= KILLS // 2
    assert resumed >= KILLS // 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=4)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora")


@pytest.fixture
def stopped(
    command: Command, model: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, ...]]:
    """Interrupts a merge at its eighth weight, all before being noted. Returns the command."""
    arguments = ("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    begun: list[str] = []
    begin = FoldTransform.begin

    def press(transform: FoldTransform, device: Any) -> Any:
        begun.append(transform.weight.name)
        if len(begun) == 8:
            shard = "model-00001-of-00004.safetensors"  # of which the hasher may be some steps behind
            names = read_json(model / "model.safetensors.index.json")["weight_map"]
            wait_for_note(tmp_path, shard, {name for name in begun if names[name] == shard})
            raise KeyboardInterrupt
        return begin(transform, device)

    def run(*more: object) -> tuple[object, ...]:
        with monkeypatch.context() as patched:
            patched.setattr(journal, "COMMIT_BYTES", 1)
            patched.setattr(FoldTransform, "begin", press)
            patched.setattr(engine, "COPY_BYTES", 1 << 20)
            assert command(*arguments, *more).status == 130
        return (*arguments, *more)

    return run


def wait_for_note(folder: Path, file_name: str, jobs: set[str]) -> None:
    """Until the journal of the run into `folder / "out"` has noted the whole file and the facts of its jobs; not for ever."""
    for _ in range(1000):
        notes = [
            json.loads(line)
            for path in folder.glob(".out.*/journal/*.jsonl")
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        marks = [mark for note in notes for mark in note["marks"] if mark["file"] == file_name]
        noted = max((end for mark in marks for _, end in mark["ranges"]), default=0)
        written = [path.stat().st_size for path in folder.glob(f".out.*/output/{file_name}")]
        if noted and written == [noted] and jobs <= {name for note in notes for name in note["facts"]}:
            return
        time.sleep(0.01)


def reference(done: Command, model: Path, lora: Path, tmp_path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """What an undisturbed run makes in a folder of the same name."""
    (tmp_path / "elsewhere").mkdir()
    done("merge", model, "--adapter", lora, "-o", tmp_path / "elsewhere" / "out")
    return comparable(tmp_path / "elsewhere" / "out")


def test_the_receipt_says_what_was_taken_over(
    done: Command, model: Path, lora: Path, tmp_path: Path, stopped: Callable[..., tuple[object, ...]]
) -> None:
    command = stopped()
    done(*command)
    resumed = read_json(tmp_path / "out" / RECEIPT)["run"]["resumed"]
    assert "model-00001-of-00004.safetensors" in resumed["files"]
    assert 0 < resumed["tensors"] < 22
    assert comparable(tmp_path / "out") == reference(done, model, lora, tmp_path)
    assert_no_leftovers(tmp_path)


def test_a_finished_shard_that_was_changed_since_is_made_again(
    done: Command, model: Path, lora: Path, tmp_path: Path, stopped: Callable[..., tuple[object, ...]]
) -> None:
    command = stopped()
    shard = work_folder(tmp_path / "out") / "output" / "model-00001-of-00004.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done(*command)
    assert shard.name not in read_json(tmp_path / "out" / RECEIPT)["run"]["resumed"]["files"]
    assert comparable(tmp_path / "out") == reference(done, model, lora, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "no file", "no header", "all zero"])
def test_damaged_leftovers_cost_work_and_nothing_else(
    done: Command, model: Path, lora: Path, tmp_path: Path, stopped: Callable[..., tuple[object, ...]], damage: str
) -> None:
    command = stopped()
    work = work_folder(tmp_path / "out")
    (notes,) = (work / "journal").glob("*.jsonl")
    shard = work / "output" / "model-00001-of-00004.safetensors"
    if damage == "cut":
        notes.write_bytes(notes.read_bytes()[:-20])
    elif damage == "garbage":
        notes.write_text('[1]\n{"marks": 1}\n' + notes.read_text())
    elif damage == "no file":
        shard.unlink()
    elif damage == "no header":
        shard.write_bytes(bytes(8) + shard.read_bytes()[8:])
    else:
        for path in (work / "output").iterdir():
            path.write_bytes(bytes(path.stat().st_size))
    done(*command)
    assert comparable(tmp_path / "out") == reference(done, model, lora, tmp_path)


def test_work_of_other_options_is_refused_and_overwrite_starts_afresh(
    command: Command, done: Command, model: Path, lora: Path, tmp_path: Path, stopped: Callable[..., tuple[object, ...]]
) -> None:
    before = stopped()
    other = (*before, "--scale", 2)
    work = work_folder(tmp_path / "out")
    left = files_below(work)
    ran = command(*other)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == (
        f"Error: An unfinished run left its work in {work}. Since then changed: options, plan.\n"
        "Run the command that was interrupted again to finish it, or start afresh with --overwrite.\n"
    )
    assert files_below(work) == left
    done(*other, "--overwrite")
    assert "resumed" not in read_json(tmp_path / "out" / RECEIPT)["run"]
    assert weight_files(tmp_path / "out") != reference(done, model, lora, tmp_path)[0]
    assert_no_leftovers(tmp_path)


@pytest.mark.parametrize("change", ["model", "lora", "config"])
def test_work_on_inputs_that_were_changed_is_refused(
    command: Command, model: Path, lora: Path, stopped: Callable[..., tuple[object, ...]], change: str
) -> None:
    before = stopped()
    if change == "config":
        config = read_json(model / "config.json")
        (model / "config.json").write_text(json.dumps({**config, "note": 1}))
    else:
        path = lora / "adapter_model.safetensors" if change == "lora" else model / "model-00004-of-00004.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    ran = command(*before)
    assert ran.status == 1
    assert ran.err.startswith("Error: An unfinished run left its work in ")


def test_a_run_that_replaces_an_output_goes_on_with_overwrite(
    done: Command, model: Path, lora: Path, tmp_path: Path, stopped: Callable[..., tuple[object, ...]]
) -> None:
    done("merge", model, "--adapter", lora, "--scale", 3, "-o", tmp_path / "out")
    command = stopped("--overwrite")
    done(*command)
    assert read_json(tmp_path / "out" / RECEIPT)["run"]["resumed"]["tensors"]
    assert comparable(tmp_path / "out") == reference(done, model, lora, tmp_path)


def test_a_refusal_after_going_on_leaves_nothing(
    command: Command, tmp_path: Path, stopped: Callable[..., tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: SideFile, _folder: Path) -> None:
        raise OSError(28, "No space left on device")

    arguments = stopped()
    monkeypatch.setattr(SideFile, "write", full)
    assert command(*arguments).status == 1
    assert_no_leftovers(tmp_path)


def test_two_interrupts_and_then_the_end(
    command: Command,
    done: Command,
    model: Path,
    lora: Path,
    tmp_path: Path,
    stopped: Callable[..., tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = stopped()
    with monkeypatch.context() as patched:
        patched.setattr(SideFile, "write", lambda _file, _folder: signal.raise_signal(signal.SIGTERM))
        ran = command(*arguments)
    assert ran.status == 143
    assert ran.err.strip() == (
        "Terminated. Run the same command again to go on, or remove what is finished: "
        f"rm -r {work_folder(tmp_path / 'out')}"
    )
    done(*arguments)
    assert read_json(tmp_path / "out" / RECEIPT)["run"]["resumed"]["tensors"] == 21
    assert comparable(tmp_path / "out") == reference(done, model, lora, tmp_path)


# Journals


def write(path: Path, digest: WrittenDigest, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)
    digest.update(offset, content)


def test_journals_of_several_writers_of_one_file_are_taken_over_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    journals = tmp_path / "journal"
    first, second = WrittenDigest(100), WrittenDigest(100)
    with Journal(journals / "1-0.jsonl") as one, Journal(journals / "1-1.jsonl") as other:
        write(path, first, 0, b"a" * 10)
        one.commit({"x": first}, {Path("in"): "digest"})
        write(path, second, 50, b"b" * 10)
        other.add(10, {"job": {"norm": 1.5}})
        other.commit({"x": second}, {})
        write(path, second, 70, b"c" * 10)
        other.commit({"x": second}, {})
    kept = take_over(journals, tmp_path, {"x": 100})
    assert kept.ranges == {"x": [(0, 10), (50, 60), (70, 80)]}
    assert (kept.facts, kept.inputs) == ({"job": {"norm": 1.5}}, {"in": "digest"})
    assert [kept.holds("x", *span) for span in [(0, 10), (55, 60), (55, 61), (70, 80), (3, 3)]] == [
        True, True, False, True, True,
    ]  # fmt: skip
    digest = kept.digests["x"]
    with Journal(journals / "2-0.jsonl") as again:
        write(path, digest, 10, b"d" * 40)
        again.commit({"x": digest}, {})
    kept = take_over(journals, tmp_path, {"x": 100})
    assert kept.ranges == {"x": [(0, 60), (70, 80)]}
    assert kept.digests["x"].position == 50
    assert [path.name for path in journals.iterdir()] == ["carried.jsonl"]
    write(path, WrittenDigest(100), 75, b"!")
    assert take_over(journals, tmp_path, {"x": 100}).ranges == {"x": [(0, 50)]}
    assert take_over(journals, tmp_path, {}).ranges == {}


def test_the_digest_of_what_is_written_is_the_file_s_only_front_to_back() -> None:
    content = bytes(range(100))
    digest = WrittenDigest(100)
    digest.update(0, content[:40])
    assert (digest.hexdigest(), digest.is_broken) == (None, False)
    assert digest.mark() == ([(0, 40)], hashlib.sha256(content[:40]).hexdigest())
    digest.update(40, content[40:])
    assert digest.hexdigest() == hashlib.sha256(content).hexdigest()
    assert digest.mark() == ([(40, 100)], hashlib.sha256(content).hexdigest())
    scattered = WrittenDigest(100)
    scattered.update(40, content[40:])
    scattered.update(0, content[:40])
    assert scattered.is_broken
    assert scattered.hexdigest() is None
    assert scattered.ranges == [(40, 100), (0, 40)]
