"""What both benchmarks share: measuring a child process, Markdown tables, the line about the machine.

Imports nothing but the standard library, and neither do the programs that measure with it: Linux counts the memory
of the process that starts a child into the child's `ru_maxrss`, so the measuring process has to stay small.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "safetensors", "corda-convert")


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one command, its own children included."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def measure(command: Sequence[str], *, log: Path) -> Measurement:
    """Runs `command` in a fresh process. Dirty pages are flushed before it, outside the clock.

    Output goes to `log`, which is shown if the command fails; then the benchmark ends.
    """
    os.sync()
    with log.open("wb") as sink:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {child.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measurement(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def run_helper(script: str, *arguments: str | Path) -> dict[str, Any]:
    """Runs a script of this folder in a fresh process and returns the JSON object it prints last, if it prints one."""
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout[-4000:]}")
    lines = done.stdout.strip().splitlines()
    return dict(json.loads(lines[-1])) if lines else {}


def read_once(files: Iterable[Path]) -> None:
    """Brings files into the page cache."""
    buffer = bytearray(16 << 20)
    for file in files:
        with file.open("rb", buffering=0) as source:
            while source.readinto(buffer):
                pass


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median and, of several values, their range."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions, without its name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_model() if device.startswith("cuda") else None,
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {package: version(package) for package in PACKAGES},
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def machine_line(facts: dict[str, Any]) -> str:
    """`machine` in one line."""
    hardware = f"{facts['cpu']}, {facts['cores']} cores, {facts['ram_gib']} GiB RAM"
    if facts["gpu"]:
        hardware += f", {facts['gpu']}"
    packages = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    return f"{hardware}; Python {facts['python']}, {packages}; {facts['date']}."


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown CPU"


def _gpu_model() -> str:
    """Asked in another process, so that this one stays small."""
    question = "import torch; print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", question], stdout=subprocess.PIPE, text=True, check=True)
    return asked.stdout.strip()


def save_json(file: Path | None, content: dict[str, Any]) -> None:
    """Writes the raw numbers, if a file was asked for."""
    if file is not None:
        file.write_text(json.dumps(content, indent=1, default=_as_json) + "\n")


def _as_json(value: object) -> Any:
    if isinstance(value, Measurement):
        return asdict(value)
    raise TypeError(f"{type(value)} in the raw numbers")


def note(text: str) -> None:
    """Progress, on stderr, so that stdout is the tables alone."""
    print(text, file=sys.stderr, flush=True)
