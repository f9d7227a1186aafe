"""The command line as its user meets it: help, exit status, what is printed where, and the same bytes every time."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    FIXTURES,
    MODEL,
    RESIDUAL,
    files_below,
    read_json,
    weight_files,
    write_checkpoint,
    write_lora,
)
from conftest import Ran, assert_no_leftovers

import corda_convert
from corda_convert import engine
from corda_convert.cli import cli
from corda_convert.cli.parameters import Size
from corda_convert.operations.transforms import FoldTransform
from corda_convert.output import journal, staging
from corda_convert.output.side_files import SideFile

Command = Callable[..., Ran]

COMMANDS = sorted(cli.commands)
README = FIXTURES.parent / "README.md"
HEAVY = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tqdm", "peft")


@pytest.fixture
def merging(tmp_path: Path) -> tuple[object, ...]:
    """A merge that works, without its output."""
    return "merge", write_checkpoint(tmp_path / "model", shards=2), "--adapter", write_lora(tmp_path / "lora")


# Help


def test_there_are_these_commands() -> None:
    assert COMMANDS == ["collect", "decompose", "inspect", "merge", "perplexity", "plot", "push", "to-lora", "verify"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_help_of_the_group_lists_every_command(command: Command, flag: str) -> None:
    ran = command(flag)
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("Usage: corda-convert [OPTIONS] COMMAND [ARGS]...")
    assert all(f"\n  {name} " in ran.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_has_an_example_that_parses(command: Command, name: str) -> None:
    ran = command(name, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: corda-convert {name} [OPTIONS]")
    example = " ".join(ran.out.partition("Example:")[2].partition("\n\n")[0].replace("\\\n", " ").split())
    program, first, *arguments = example.split(" ")
    assert (program, first) == ("corda-convert", name)
    with cli.commands[name].make_context(name, arguments):
        pass  # raises click.UsageError for an option that there is not


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_for(name: str) -> None:
    silent = [p.name for p in cli.commands[name].params if isinstance(p, click.Option) and not p.help]
    assert silent == []


@pytest.mark.skipif(not README.is_file(), reason="there is no README yet")
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stands_in_the_readme(name: str) -> None:
    assert f"corda-convert {name} " in README.read_text(encoding="utf-8")


def test_the_version_is_that_of_the_package(command: Command) -> None:
    ran = command("--version")
    assert (ran.status, ran.out) == (0, f"corda-convert, version {corda_convert.__version__}\n")


LOADED = """
import json, sys
from corda_convert.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        *((([name, "--help"]), 0) for name in COMMANDS),
        (["merge", "gone", "--adapter", "gone", "-o", "out"], 1),
        (["decompose", "gone", "--mode", "kpm", "--rank", "2", "-o", "out"], 1),
        (["to-lora", "gone", "--init", "gone", "-o", "out"], 1),
        (["merge", "--rubbish"], 2),
        (["merge", "x", "--adapter", "y", "-o", "out", "--dtype", "int3"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_help_and_wrong_paths_and_wrong_usage_answer_without_loading_anything_heavy(
    tmp_path: Path, arguments: list[str], status: int
) -> None:
    ran = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, cwd=tmp_path)
    found, modules = json.loads(ran.stdout.splitlines()[-1])
    assert found == status, ran.stderr
    assert [name for name in HEAVY if name in modules] == []
    assert len(modules) < 300
    assert list(tmp_path.iterdir()) == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, corda_convert; print([n for n in sys.argv[1:] if n in sys.modules], corda_convert.merge.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert ran.stdout == "[] merge\n"


@pytest.mark.parametrize("name", corda_convert.__all__)
def test_everything_that_the_package_names_is_there(name: str) -> None:
    assert getattr(corda_convert, name) is not None
    assert name in dir(corda_convert)


# Exit status


def test_success_is_0(command: Command, merging: tuple[object, ...], tmp_path: Path) -> None:
    ran = command(*merging, "-o", tmp_path / "out")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"Merged lora into model → {tmp_path / 'out'}\n")


def test_a_refusal_is_1(command: Command, merging: tuple[object, ...], tmp_path: Path) -> None:
    assert command(*merging, "-o", tmp_path / "model").status == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage: corda-convert"),
        (("convert",), "No such command 'convert'."),
        (("merge", "m", "--adapter", "a"), "Missing option '-o' / '--output'"),
        (("merge", "m", "--adapter", "a", "-o", "x", "--dtype", "int3"), "'int3' is not one of"),
        (
            ("merge", "m", "--adapter", "a", "-o", "x", "--max-memory", "much"),
            "'much' is no size; write 700MB or 1.5GiB",
        ),
        (("merge", "m", "--adapter", "a", "-o", "x", "--max-memory", "-1"), "'-1' is no size"),
        (("merge", "m", "--adapter", "a", "-o", "x", "--rounding", "up"), "'up' is not one of"),
        (("decompose", "m", "--mode", "kpm", "--rank", "0", "-o", "x"), "0 is not in the range x>=1."),
        (("decompose", "m", "--mode", "xpm", "--rank", "1", "-o", "x"), "'xpm' is not one of"),
        (
            ("decompose", "m", "--mode", "kpm", "--rank", "1", "-o", "x", "--damp", "a bit"),
            "neither a number nor 'peft'",
        ),
        (("to-lora", "-o", "x"), "Missing argument 'ADAPTER' (or '--from-checkpoints')"),
        (("push", "folder"), "Missing argument 'REPO_ID'"),
    ],
)
def test_wrong_usage_is_2(command: Command, arguments: tuple[str, ...], message: str) -> None:
    ran = command(*arguments)
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("700MB", 700_000_000), ("1.5GiB", 3 << 29), ("1024", 1024), (" 2 kb ", 2000), ("3ki", 3072), ("1T", 10**12)],
)
def test_sizes_have_decimal_and_binary_units(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The third weight that is folded presses Ctrl-C, and goes on when the engine has been told to stop.

    However slow the machine, nothing has been finished by then.
    """
    monkeypatch.setattr(journal, "COMMIT_SECONDS", 1e9)
    begun: list[str] = []
    begin, fail = FoldTransform.begin, engine._Run._fail
    told = threading.Event()

    def press(transform: FoldTransform, device: torch.device) -> Any:
        begun.append(transform.weight.name)
        if len(begun) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            assert told.wait(timeout=120)
        return begin(transform, device)

    def tell(run: engine._Run, failure: BaseException) -> None:
        fail(run, failure)
        told.set()

    monkeypatch.setattr(FoldTransform, "begin", press)
    monkeypatch.setattr(engine._Run, "_fail", tell)
    yield
    assert told.is_set()


@pytest.fixture
def interrupted_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is pressed when all weights are written and the side files' turn has come."""
    monkeypatch.setattr(SideFile, "write", lambda _file, _folder: signal.raise_signal(signal.SIGINT))


@pytest.mark.parametrize("moment", ["interrupted", "interrupted_late"])
def test_an_interrupt_is_130_and_leaves_only_what_is_finished(
    command: Command, merging: tuple[object, ...], tmp_path: Path, request: pytest.FixtureRequest, moment: str
) -> None:
    request.getfixturevalue(moment)
    ran = command(*merging, "-o", tmp_path / "out")
    kept = tmp_path / f".out{staging.STAGING_SUFFIX}"
    said = {
        "interrupted": "Interrupted; nothing was written.",
        "interrupted_late": "Interrupted. Run the same command again to go on, or remove what is finished: "
        f"rm -r {kept}",
    }
    assert (ran.status, ran.out, ran.err.strip()) == (130, "", said[moment])
    assert not (tmp_path / "out").exists()
    assert kept.exists() == (moment == "interrupted_late")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("_")] == []


@pytest.mark.parametrize("moment", ["interrupted", "interrupted_late"])
def test_an_interrupted_overwrite_leaves_the_old_output(
    command: Command,
    done: Command,
    merging: tuple[object, ...],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    moment: str,
) -> None:
    done(*merging, "-o", tmp_path / "out")
    before = files_below(tmp_path / "out")
    request.getfixturevalue(moment)
    assert command(*merging, "-o", tmp_path / "out", "--overwrite").status == 130
    assert files_below(tmp_path / "out") == before
    if moment == "interrupted":
        assert_no_leftovers(tmp_path)


# What is printed


OPERATIONS: dict[str, tuple[object, ...]] = {
    "merge": ("merge", MODEL, "--adapter", ADAPTERS / "lora"),
    "decompose": ("decompose", MODEL, "--method", "svd", "--mode", "ipm", "--rank", 2),
    "to-lora": ("to-lora", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init"),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dry", [False, True])
def test_json_is_one_object_on_stdout_and_nothing_else(done: Command, tmp_path: Path, name: str, dry: bool) -> None:
    ran = done(*OPERATIONS[name], "-o", tmp_path / "out", "--json", *(["--dry-run"] if dry else []))
    printed = json.loads(ran.out)
    assert printed["command"] == name
    assert printed.get("dry_run", False) == dry
    if not dry:
        assert printed == read_json(tmp_path / "out" / "corda_convert.json")


def test_json_stays_one_object_when_there_is_a_note(done: Command, tmp_path: Path) -> None:
    ran = done(*OPERATIONS["to-lora"], "-o", tmp_path / "out", "--json")
    assert json.loads(ran.out)["warnings"] == [
        "The new adapter names no base model. Give its name with --base, for tools that look it up."
    ]
    assert ran.err == f"Note: {json.loads(ran.out)['warnings'][0]}\n"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_dry_run_tells_bytes_and_memory_and_writes_nothing(done: Command, tmp_path: Path, name: str) -> None:
    ran = done(*OPERATIONS[name], "-o", tmp_path / "deep" / "out", "--dry-run")
    assert list(tmp_path.iterdir()) == []
    assert ran.out.startswith("Would ")
    assert "(dry run: all checks passed, nothing was written)" in ran.out
    for what in ("tensors", "read", "write", "memory"):
        assert f"\n  {what:<9}" in ran.out
    planned = json.loads(done(*OPERATIONS[name], "-o", tmp_path / "out", "--dry-run", "--json").out)["plan"]
    done(*OPERATIONS[name], "-o", tmp_path / "out", "-q")
    assert planned["write_bytes"] == sum(len(content) for content in weight_files(tmp_path / "out").values())
    assert planned["memory_bytes"] > planned["buffer_bytes"] > 0
    assert planned["tensors"] == read_json(tmp_path / "out" / "corda_convert.json")["summary"]["tensors"]


def test_a_dry_run_refuses_what_a_run_refuses_before_it_writes(
    command: Command, merging: tuple[object, ...], tmp_path: Path
) -> None:
    assert command(*merging, "-o", tmp_path / "model", "--dry-run").status == 1
    assert "worst step" in command(*merging, "-o", tmp_path / "out", "--dry-run", "--max-memory", "1MB").err


def test_quiet_is_silent(done: Command, merging: tuple[object, ...], tmp_path: Path) -> None:
    assert done(*merging, "-o", tmp_path / "out", "-q") == Ran(0, "", "")
    assert (tmp_path / "out" / "corda_convert.json").is_file()


def test_nothing_but_the_summary_is_printed_where_there_is_no_terminal(tmp_path: Path) -> None:
    arguments = [str(argument) for argument in OPERATIONS["merge"]]
    ran = subprocess.run(
        [sys.executable, "-m", "corda_convert", *arguments, "-o", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    lines = ran.stdout.splitlines()
    assert lines[0] == f"Merged lora into model → {tmp_path / 'out'}"
    assert lines[1] == "  tensors  15 copied, 42 folded"
    assert lines[2] == "  adapter  lora, 42 modules, rank 8, alpha 16, scaling 2"
    assert [line.split()[0] for line in lines[3:]] == ["change", "wrote", "memory", "receipt"]


def test_verbose_lists_every_changed_tensor(done: Command, merging: tuple[object, ...], tmp_path: Path) -> None:
    ran = done(*merging, "-o", tmp_path / "out", "-v")
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    changed = [entry["name"] for entry in receipt["tensors"] if entry["action"] == "folded"]
    assert len(changed) == 14
    assert [line.split()[1] for line in ran.out.splitlines() if line.startswith("folded ")] == changed


# The same bytes every time

REPEATED: dict[str, tuple[object, ...]] = {
    "merge": ("merge", MODEL, "--adapter", ADAPTERS / "lora_patterns"),
    "merge with init": ("merge", MODEL, "--adapter", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init"),
    "merge bat": ("merge", MODEL, "--adapter", ADAPTERS / "miss_bat", "--dtype", "float32"),
    "decompose": ("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank", 4),
    "to-lora": OPERATIONS["to-lora"],
}


@pytest.mark.parametrize("name", REPEATED)
def test_two_runs_give_the_same_bytes(done: Command, tmp_path: Path, name: str) -> None:
    for place in ("first", "second"):
        done(*REPEATED[name], "-o", tmp_path / place)
    first, second = weight_files(tmp_path / "first"), weight_files(tmp_path / "second")
    assert first == second
    assert first


@pytest.mark.parametrize("name", REPEATED)
def test_the_number_of_threads_does_not_change_a_byte(done: Command, tmp_path: Path, name: str) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            done(*REPEATED[name], "-o", tmp_path / str(threads))
    finally:
        torch.set_num_threads(before)
    assert weight_files(tmp_path / "1") == weight_files(tmp_path / "2")


@pytest.mark.parametrize(
    ("arguments", "status"), [(("--version",), 0), (("merge", "nowhere", "-o", "out"), 1), (("x",), 2)]
)
def test_the_program_ends_with_its_status_and_all_that_it_said(arguments: tuple[str, ...], status: int) -> None:
    """It ends without taking the interpreter apart; what it printed must be out before."""
    command = [sys.executable, "-m", "corda_convert", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == status
    assert (ran.stdout if status == 0 else ran.stderr).endswith("\n")
