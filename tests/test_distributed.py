"""Several processes, as torchrun starts them, make the bytes that one makes, fail as one, and go on as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from building import COVARIANCES, MODEL, UP, files_below, llama_tensors, read_json, write_checkpoint, write_lora
from conftest import Ran, assert_no_leftovers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.distributed import Place, place_in, threads_of_this_process
from corda_convert.errors import UnsupportedInput
from corda_convert.output.staging import work_folder
from corda_convert.plan.division import Share, divide, outputs, whole_share
from corda_convert.plan.model import Copied, OutputFileSpec, Plan
from corda_convert.plan.packing import pack

Command = Callable[..., Ran]

RECEIPT = "corda_convert.json"
TIMEOUT = 600

ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")} | {
    "OMP_NUM_THREADS": "1"
}


def start(ranks: int, *arguments: object, program: tuple[str, ...] = ("-m", "corda_convert")) -> subprocess.Popen[str]:
    """The command on so many processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    command = [sys.executable, *launcher, *program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)


def run(ranks: int, *arguments: object, **options: Any) -> tuple[int, str, str]:
    """Exit status, what was printed, and the errors, those of torchrun among them."""
    with start(ranks, *arguments, **options) as process:
        out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def comparable(output: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """All files but the receipt, and the receipt without what it says of run and memory."""
    files = files_below(output)
    receipt = json.loads(files.pop(RECEIPT))
    for entry in receipt["tensors"]:
        entry.pop("seconds", None)
    del receipt["run"], receipt["plan"], receipt["tool"]["threads"]
    return files, receipt


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As torchrun does it: norms in the receipt depend on the number of threads in their last digits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture model in five shards."""
    tensors = {
        name: tensor for shard in sorted(MODEL.glob("*.safetensors")) for name, tensor in load_file(shard).items()
    }
    return write_checkpoint(
        tmp_path_factory.mktemp("sharded") / "model", tensors, shards=5, config=read_json(MODEL / "config.json")
    )


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[object, ...]:
    """A merge into one shard."""
    return "merge", write_checkpoint(tmp_path / "model"), "--adapter", write_lora(tmp_path / "lora")


def test_a_decomposition_on_three_processes_has_the_bytes_of_one(
    done: Command, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("decompose", sharded, "--cov", COVARIANCES, "--mode", "kpm", "--rank", 4)
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    monkeypatch.chdir(tmp_path / "one")  # the path given stands in the output
    done(*arguments, "-o", "out")
    monkeypatch.chdir(tmp_path / "three")
    status, out, err = run(3, *arguments, "-o", "out")
    assert status == 0, err
    assert out.count("Decomposed") == 1
    assert comparable(tmp_path / "three" / "out") == comparable(tmp_path / "one" / "out")
    receipt = read_json(tmp_path / "three" / "out" / RECEIPT)
    assert receipt["run"]["ranks"] == 3
    assert_no_leftovers(tmp_path / "three")


@pytest.mark.parametrize(("form", "ranks"), [("safetensors", 4), ("pth", 2)])
def test_a_merge_into_one_file_on_several_processes_has_the_bytes_of_one(
    done: Command, tiny: tuple[object, ...], tmp_path: Path, form: str, ranks: int
) -> None:
    status, out, err = run(ranks, *tiny, "--format", form, "-o", tmp_path / "several" / "out", "--json")
    assert status == 0, err
    assert json.loads(out) == read_json(tmp_path / "several" / "out" / RECEIPT)
    done(*tiny, "--format", form, "-o", tmp_path / "one" / "out")
    assert comparable(tmp_path / "several" / "out") == comparable(tmp_path / "one" / "out")


def test_a_refusal_on_one_process_is_told_once_and_ends_all(tiny: tuple[object, ...], tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["lm_head.weight"][0, 0] = float("nan")
    tensors[UP + ".weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    status, out, err = run(2, *tiny, "-o", tmp_path / "out")
    assert (status, out) == (1, "")
    ours = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(ours) == 1, err
    assert UP in ours[0]
    assert "Traceback" not in err.partition("torch/distributed")[0]
    assert not (tmp_path / "out").exists()
    assert_no_leftovers(tmp_path)


def test_a_refusal_of_the_plan_is_told_once(tiny: tuple[object, ...], tmp_path: Path) -> None:
    status, out, err = run(2, *tiny, "--scale", "nan", "-o", tmp_path / "out")
    assert (status, out) == (1, "")
    assert [line for line in err.splitlines() if line.startswith("Error: ")] == [
        "Error: The scale of lora is nan; a finite number other than 0 was expected."
    ]


ONE_DIES = """
import os, signal, sys, time
from corda_convert import cli
from corda_convert.operations.decomposition import DecomposeTransform
from corda_convert.output import journal
journal.COMMIT_BYTES = 1
begun = []
begin = DecomposeTransform.begin
def dies(transform, device):
    begun.append(transform)
    if len(begun) == 6 and os.environ["RANK"] == "1":
        time.sleep(2)  # the others have noted something by then
        os.kill(os.getpid(), signal.SIGKILL)
    if len(begun) > 6:
        time.sleep(0.2)
    return begin(transform, device)
DecomposeTransform.begin = dies
cli.run()
"""


def test_a_run_of_which_one_process_was_killed_goes_on(done: Command, sharded: Path, tmp_path: Path) -> None:
    program = tmp_path / "one_dies.py"
    program.write_text(ONE_DIES)
    arguments = ("decompose", sharded, "--method", "svd", "--mode", "ipm", "--rank", 2, "-o")
    output = tmp_path / "two" / "out"
    status, out, err = run(2, *arguments, output, program=(str(program),))
    assert (status, out) == (1, "")
    assert f"Run the same command again to go on, or remove what is finished: rm -r {work_folder(output)}" in err
    assert not output.exists()
    status, _, err = run(2, *arguments, output)
    assert status == 0, err
    resumed = read_json(output / RECEIPT)["run"]["resumed"]
    assert resumed["tensors"] >= 10
    config = "corda_init/adapter_config.json"  # it has the path that was given
    done(*arguments, tmp_path / "one" / "out")
    ours, theirs = comparable(output), comparable(tmp_path / "one" / "out")
    assert read_json(output / config)["base_model_name_or_path"] == str(output)
    for found in (ours, theirs):
        del found[0][config]
        found[1]["files"] = [entry for entry in found[1]["files"] if entry["name"] != config]
    assert ours == theirs


def test_what_several_processes_left_is_gone_on_with_by_one(
    done: Command, tiny: tuple[object, ...], tmp_path: Path
) -> None:
    program = tmp_path / "stops.py"
    program.write_text(
        "import os, signal\n"
        "from corda_convert import cli\n"
        "from corda_convert.output.side_files import SideFile\n"
        "SideFile.write = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.run()\n"
    )
    status, _, err = run(2, *tiny, "-o", tmp_path / "out", program=(str(program),))
    assert status == 1
    assert "Terminated. Run the same command again to go on" in err
    done(*tiny, "-o", tmp_path / "out")
    assert read_json(tmp_path / "out" / RECEIPT)["run"]["resumed"]["files"] == ["model.safetensors"]
    done(*tiny, "-o", tmp_path / "one" / "out")
    assert comparable(tmp_path / "out") == comparable(tmp_path / "one" / "out")


def test_a_process_that_stays_alone_says_what_is_missing(tiny: tuple[object, ...], tmp_path: Path) -> None:
    lone = ALONE | {"RANK": "0", "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "corda_convert", *map(str, tiny), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=lone, timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: The 2 processes of this run did not come together: ")
    assert done.stderr.endswith("unset RANK and WORLD_SIZE to run alone.\n")


@pytest.mark.parametrize("killed", [0, 1])
def test_without_a_launcher_a_process_that_is_gone_is_missed_in_time(
    sharded: Path, tmp_path: Path, killed: int
) -> None:
    program = tmp_path / "one_dies.py"
    program.write_text(
        "from corda_convert import distributed\ndistributed.SILENT_SECONDS = 3\n"
        + ONE_DIES.replace('== "1"', f'== "{killed}"').replace("sleep(0.2)", "sleep(1)")
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(program), "decompose", sharded, "--method", "svd", "--mode", "ipm", "--rank", "2"]
    place = ALONE | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [*map(str, command), "-o", str(tmp_path / "out")],
            stderr=subprocess.PIPE,
            text=True,
            env=place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [-9 if rank == killed else 1 for rank in range(2)], errors
    assert errors[1] == ""
    if killed == 1:
        assert errors[0] == (
            "Error: Nothing was heard of rank 1 for 3 seconds.\nA process was killed, or its machine is gone.\n"
            f"Run the same command again to go on, or remove what is finished: rm -r {work_folder(tmp_path / 'out')}\n"
        )
    assert not (tmp_path / "out").exists()


def test_a_signal_to_the_launcher_keeps_what_is_finished(sharded: Path, tmp_path: Path) -> None:
    program = tmp_path / "slow.py"
    program.write_text(ONE_DIES.replace('== "1"', '== "none"').replace("> 6", "> 4").replace("sleep(0.2)", "sleep(2)"))
    arguments = ("decompose", sharded, "--method", "svd", "--mode", "ipm", "--rank", 2, "-o", tmp_path / "out")
    with start(2, *arguments, program=(str(program),)) as process:
        until = time.monotonic() + 60
        journals = work_folder(tmp_path / "out") / "journal"
        while not any(path.stat().st_size for path in journals.glob("*.jsonl")) and time.monotonic() < until:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert err.count("Run the same command again to go on") == 1, err
    assert not (tmp_path / "out").exists()


# Places


def test_places_are_read_from_the_environment() -> None:
    assert place_in({}) is None
    assert place_in({"RANK": "0", "WORLD_SIZE": "1"}) is None
    given = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place_in(given) == Place(5, 8, 1, 4)
    for wrong in ({"RANK": "8"}, {"WORLD_SIZE": "x"}, {"LOCAL_RANK": "4"}, {"RANK": "-1"}):
        with pytest.raises(UnsupportedInput, match="The environment names no place"):
            place_in(given | wrong)


def test_threads_are_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_of_this_process(Place(0, 8, 0, size), 16) for size in (1, 4, 32)] == [16, 4, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_of_this_process(Place(0, 8, 0, 4), 3) == 3


# Division


def copies(folder: Path, sizes: list[list[int]]) -> Plan:
    """A plan that copies tensors of so many rows, one job each, into one file for each list."""
    tensors = {f"{shard}.{number}": llama_tensors()["lm_head.weight"][:rows] for shard, numbers in enumerate(sizes)
               for number, rows in enumerate(numbers)}  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "source.safetensors")
    source = SafetensorsFile(folder / "source.safetensors")
    return pack(
        [
            OutputFileSpec(
                f"{shard}.pth",  # its tensors lie apart, so each is a job
                tuple(
                    Copied(source.specs[f"{shard}.{number}"], source, f"{shard}.{number}") for number in range(len(of))
                ),
                {},
            )
            for shard, of in enumerate(sizes)
        ]
    )


@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=5),
    st.integers(1, 6),
    st.randoms(use_true_random=False),
)
def test_every_job_is_done_once_and_every_file_finished_at_most_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[list[int]], parts: int, chosen: Any
) -> None:
    plan = copies(tmp_path_factory.getbasetemp() / "division", sizes)
    jobs = [number for number in range(len(plan.jobs)) if chosen.random() < 0.7]
    shares = divide(plan, jobs, parts)
    assert len(shares) == parts
    assert [number for share in shares for number in share.jobs] == jobs
    finished = [name for share in shares for name in share.finishes]
    assert len(set(finished)) == len(finished)
    for file in plan.files:
        writers = {
            place
            for place, share in enumerate(shares)
            for number in share.jobs
            for name, _, _ in outputs(plan.jobs[number])
            if name == file.name
        }
        assert (file.name in finished) == (len(writers) <= 1)


def test_shards_are_kept_together_where_the_work_is_even(tmp_path: Path) -> None:
    plan = copies(tmp_path, [[10, 10], [9, 10], [10, 11], [10, 10]])
    assert [share.jobs for share in divide(plan, range(8), 4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert [sorted(share.finishes) for share in divide(plan, range(8), 2)] == [["0.pth", "1.pth"], ["2.pth", "3.pth"]]
    assert divide(plan, range(8), 1) == [whole_share(plan)]
    assert divide(plan, [], 2) == [Share((), frozenset(f"{n}.pth" for n in range(4))), Share((), frozenset())]
    assert [len(share.jobs) for share in divide(plan, range(8), 3)] == [3, 2, 3]
