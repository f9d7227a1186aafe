"""A program for the tests: runs one command again and again, killing it each time at another change of a file.

Its argument is JSON: `arguments` of the command without `-o`, the `folder` for the outputs, how many `kills`, and a `seed`.
It prints a JSON list with what each kill left. All runs are forks of one process, so that torch is imported once.
"""

import contextlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch  # noqa: F401 - for all forks at once

from corda_convert.cli import main
from corda_convert.linalg import subspace  # noqa: F401
from corda_convert.operations import decompose, merge  # noqa: F401
from corda_convert.output import journal
from corda_convert.output.side_files import SideFile

CHANGES = ("pwrite", "copy_file_range", "rename", "replace", "unlink", "mkdir", "rmdir")


def watch(moment: int, told: Path) -> None:
    """Kills this process before its change number `moment`, or after it; or tells how many there were, if fewer."""
    count = 0

    def wrapped(change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == moment and moment % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            result = change(*arguments, **options)
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            if told.exists():
                told.write_text(str(count))
            return result

        return run

    for name in CHANGES:
        setattr(os, name, wrapped(getattr(os, name)))
    journal.Journal.commit = wrapped(journal.Journal.commit)  # type: ignore[method-assign]
    SideFile.write = wrapped(SideFile.write)  # type: ignore[method-assign]


def run(arguments: list[str], folder: Path, *, moment: int | None = None, commit_bytes: int | None = None) -> int:
    """The command in a fork, its output `out` in the folder. Returns its exit status, negative for a signal that killed it."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        os.chdir(folder)  # the path given stands in the output
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if commit_bytes is not None:
            journal.COMMIT_BYTES = commit_bytes
        if moment is not None:
            watch(moment, folder / "count")
        try:
            main([*arguments, "-o", "out"])
        except SystemExit as exit_:
            os._exit(int(exit_.code or 0))
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def noted(work: Path) -> int:
    """How many bytes the journals say are written, the headers included."""
    lines = [line for path in (work / "journal").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sum(end - begin for line in lines for mark in json.loads(line)["marks"] for begin, end in mark["ranges"])


def count_changes(arguments: list[str], folder: Path, commit_bytes: int) -> int:
    """How often an undisturbed run changes a file."""
    folder.mkdir()
    (folder / "count").write_text("0")
    if run(arguments, folder, moment=-1, commit_bytes=commit_bytes) != 0:
        sys.exit((folder / "log").read_text())
    return int((folder / "count").read_text())


def main_loop(spec: dict[str, Any]) -> None:
    arguments, folder = spec["arguments"], Path(spec["folder"])
    chosen = random.Random(spec["seed"])
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        main([*arguments, "-o", str(folder / "out"), "--dry-run"])  # imports what all forks need
    changes = {size: count_changes(arguments, folder / f"undisturbed{size}", size) for size in (1, 100_000, 10**9)}
    results = []
    for number in range(spec["kills"]):
        place = folder / str(number)
        size = chosen.choice(sorted(changes))
        killed = run(arguments, place, moment=chosen.randint(1, changes[size]), commit_bytes=size)
        was_there = (place / "out").exists()
        before = noted(place / ".out.corda-convert-partial")
        again = None if was_there else run(arguments, place)
        results.append({"killed": killed, "was_there": was_there, "noted": before, "again": again})
    print(json.dumps(results))


if __name__ == "__main__":
    main_loop(json.loads(sys.argv[1]))
