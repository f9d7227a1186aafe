"""Our merge with a record of what each thread did when: BEGUN TRACE ARGUMENTS... (of `corda-convert`).

BEGUN is `time.perf_counter()` of the process that started this one, where the clock of the record begins; Linux has one
such clock for all processes. TRACE is a JSON file with

- `busy`: [stage, thread, begin, end], the stages as in the receipt's `busy_seconds`, and `read ahead`, which hashes
  inputs while libraries load;
- `engine`: [begin, end] of the engine's run; before it imports and planning, after it receipt and card;
- `samples`: [time, CPU seconds used so far, resident bytes], every 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from corda_convert import engine
from corda_convert.cli import main
from corda_convert.output.read_ahead import ReadAhead

SAMPLE_SECONDS = 0.02


class Trace:
    """What is recorded, in seconds since `begun`."""

    def __init__(self, begun: float) -> None:
        self.begun = begun
        self.busy: list[tuple[str, int, float, float]] = []
        self.engine: tuple[float, float] | None = None
        self.samples: list[tuple[float, float, int]] = []

    def now(self) -> float:
        return time.perf_counter() - self.begun

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Records that this thread was busy."""
        begin = self.now()
        yield
        self.busy.append((name, threading.get_ident(), begin, self.now()))

    def sample(self) -> None:
        """Samples until the process ends."""
        page = os.sysconf("SC_PAGE_SIZE")
        while True:
            usage = resource.getrusage(resource.RUSAGE_SELF)
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            self.samples.append((self.now(), usage.ru_utime + usage.ru_stime, resident))
            time.sleep(SAMPLE_SECONDS)

    def save(self, file: Path) -> None:
        content = {"busy": self.busy, "engine": self.engine, "samples": self.samples, "end": self.now()}
        file.write_text(json.dumps(content))


def follow(trace: Trace) -> None:
    """Has the engine tell the trace about its stages."""
    run, busy, read_ahead = engine._Run.run, engine._Run._busy, ReadAhead._run

    def traced_run(self: engine._Run) -> engine.RunRecord:
        begin = trace.now()
        try:
            return run(self)
        finally:
            trace.engine = (begin, trace.now())

    @contextlib.contextmanager
    def traced_busy(self: engine._Run, stage: str) -> Iterator[None]:
        with busy(self, stage), trace.stage(stage):
            yield

    def traced_read_ahead(self: ReadAhead) -> None:
        with trace.stage("read ahead"):
            read_ahead(self)

    engine._Run.run = traced_run  # type: ignore[method-assign]
    engine._Run._busy = traced_busy  # type: ignore[method-assign]
    ReadAhead._run = traced_read_ahead  # type: ignore[method-assign]


def traced(begun: str, file: str, *arguments: str) -> Any:
    """Runs the command, and saves the trace whatever comes of it."""
    trace = Trace(float(begun))
    follow(trace)
    threading.Thread(target=trace.sample, daemon=True).start()
    try:
        return main(list(arguments))
    finally:
        trace.save(Path(file))


if __name__ == "__main__":
    traced(*sys.argv[1:])
