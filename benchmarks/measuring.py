"""What both benchmarks share: measuring a child process, Markdown tables, the line about the machine.

Imports nothing but the standard library, and neither do the programs that measure with it: Linux counts the memory
of the process that starts a child into the child's `ru_maxrss`, so the measuring process has to stay small.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "safetensors", "corda-convert")
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one command, its own children included in all but the anonymous memory, which is sampled."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def measure(command: Sequence[str], *, log: Path) -> Measurement:
    """Runs `command` in a fresh process. Dirty pages are flushed before it, outside the clock.

    Our package is compiled before, as pip does it on installing, and the process may keep what it compiles itself.
    Output goes to `log`, which is shown if the command fails; then the benchmark ends.
    """
    _compile_package()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    os.sync()
    with log.open("wb") as sink:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment)
        with _AnonymousMemory(child.pid) as anonymous:
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)}\nended with {child.returncode}:\n{log.read_text(errors='replace')[-4000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Measurement(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, anonymous.peak_bytes)


@functools.cache
def _compile_package() -> None:
    """Once, in another process, so that this one stays small. Modules that are compiled already are passed over."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(HERE.parent / "corda_convert")], check=True)


class _AnonymousMemory:
    """Samples the anonymous memory of a process, which is its resident memory without the pages of mapped files."""

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> _AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            kilobytes = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
            self.peak_bytes = max([self.peak_bytes, *(1024 * number for number in kilobytes)])


def installed_version(python: str, package: str) -> str | None:
    """The version of a package in the environment of an interpreter, or None."""
    question = f"from importlib.metadata import version; print(version({package!r}))"
    asked = subprocess.run(
        [python, "-c", question], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
    )
    return asked.stdout.strip() if asked.returncode == 0 else None


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


def machine(device: str, peers: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The machine and the versions, those of further packages included, without its name."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": _gpu_model() if device.startswith("cuda") else None,
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": {package: version(package) for package in PACKAGES} | dict(peers or {}),
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
