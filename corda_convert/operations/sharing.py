"""Running a plan on as many processes as there are: dividing it, and putting together what they did."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert import engine
from corda_convert.checkpoint.remote_file import absent
from corda_convert.errors import OutputRefused, UnsupportedInput
from corda_convert.operations import process_memory
from corda_convert.output.digests import SequentialDigest, WrittenDigest, file_sha256
from corda_convert.output.journal import Journal
from corda_convert.output.staging import journal_folder
from corda_convert.plan.division import Share, divide, outputs

if TYPE_CHECKING:
    import torch

    from corda_convert.distributed import Ranks
    from corda_convert.operations.resuming import Before
    from corda_convert.plan.model import Facts, Plan


@dataclass(frozen=True, slots=True)
class Done:
    """What all processes did together: one record for each, every file and every known digest of an input, and memory.

    `peak_bytes` and `peak_device_bytes` are of the process that needed most.
    """

    records: tuple[engine.RunRecord, ...]
    files: Mapping[str, str]
    inputs: Mapping[Path, str]
    peak_bytes: int
    peak_device_bytes: int | None

    @property
    def facts(self) -> dict[str, Facts]:
        return {name: facts for record in self.records for name, facts in record.facts.items()}

    def busy_seconds(self, stage: str) -> float:
        """Over all processes."""
        return float(sum(getattr(record, f"{stage}_seconds") for record in self.records))


@dataclass(frozen=True, slots=True)
class _Task:
    """What rank 0 tells the others: where to work, who does what, and what is there already."""

    folder: Path
    shares: tuple[Share, ...]
    begun: frozenset[str]
    files: Mapping[str, str]
    inputs: Mapping[Path, str]
    is_taken_over: bool
    journal: str


def check_agreement(ranks: Ranks, plan_digest: str, device: torch.device) -> None:
    """Raises `UnsupportedInput` on all processes unless all have the same plan and the same kind of device."""
    brought = ranks.exchange((plan_digest, device.type, socket.gethostname()))
    for rank, (digest, kind, host) in enumerate(brought):
        if kind != brought[0][1]:
            raise UnsupportedInput(
                f"Rank {rank} on {host} computes on {kind}, rank 0 on {brought[0][1]}.",
                next_step="Choose --device cpu, or give every process a GPU.",
            )
        if digest != brought[0][0]:
            raise UnsupportedInput(
                f"Rank {rank} on {host} sees other inputs than rank 0, or runs another command.",
                next_step="Give all processes the same command and the same files.",
            )


def run_shared(
    plan: Plan,
    ranks: Ranks,
    device: torch.device,
    *,
    show_progress: bool,
    digests: Mapping[Path, SequentialDigest],
    folder: Path | None = None,
    before: Before | None = None,
    watch: engine.Watch | None = None,
) -> Done:
    """Runs this process's share of what is left of the plan. Rank 0 brings the folder, and what was done before.

    Raises what the engine raises, and what the others stopped with.
    """
    rank, size = ranks.place.rank, ranks.place.size
    task = ranks.exchange(_task(plan, folder, before, size) if folder is not None and before is not None else None)[0]
    assert task is not None  # noqa: S101 - rank 0 brings it
    if not task.folder.is_dir():
        raise OutputRefused(
            f"The folder {task.folder}, which rank 0 made, is not on {socket.gethostname()}.",
            next_step="Choose an output with -o on a file system that all machines share.",
        )
    share = task.shares[rank]
    begun = before.begun if before is not None and size == 1 else _begun(plan, task)
    with (
        _progress(plan, share, ranks, enabled=show_progress and rank == 0) as progress,
        Journal(journal_folder(task.folder) / f"{task.journal}-{rank:05}.jsonl") as journal,
    ):
        record = engine.run(
            plan, task.folder, device, progress, digests, share=share, begun=begun, journal=journal, watch=watch
        )
    records = ranks.exchange(record)
    files = dict(task.files) | {file.name: file.sha256 for each in records for file in each.files}
    inputs = dict(task.inputs) | {path: digest for each in records for path, digest in each.input_digests.items()}
    left = sorted((file for file in plan.files if file.name not in files), key=lambda file: -file.nbytes)
    unread = engine.inputs_read_through(plan) - inputs.keys() if size > 1 or task.is_taken_over else set()
    unread = {path for path in unread if absent(path) is None}  # of a streamed one the Hub's digest is known
    rest = ranks.exchange(
        (
            {file.name: engine.finish_file(plan, task.folder, file.name).sha256 for file in left[rank::size]},
            {path: file_sha256(path) for path in sorted(unread)[rank::size]},
            process_memory.peak_resident_bytes(),
            _peak_device_bytes(device),
        )
    )
    for finished, read, _, _ in rest:
        files |= finished
        inputs |= read
    device_bytes = [peak for _, _, _, peak in rest if peak is not None]
    return Done(tuple(records), files, inputs, max(peak for _, _, peak, _ in rest), max(device_bytes, default=None))


def _task(plan: Plan, folder: Path, before: Before, size: int) -> _Task:
    """Divides what is left, and makes the files that several processes will fill."""
    finished = before.files
    if size > 1:
        engine.create_files(plan, folder, {file.name for file in plan.files} - before.begun.keys())
    return _Task(
        folder,
        tuple(Share(share.jobs, share.finishes - finished.keys()) for share in divide(plan, before.rest(), size)),
        frozenset(before.begun),
        {name: record.sha256 for name, record in finished.items()},
        {Path(path): digest for path, digest in before.inputs.items()},
        bool(before.jobs),
        f"{time.time_ns():020}",
    )


def _begun(plan: Plan, task: _Task) -> dict[str, WrittenDigest]:
    """For one of several processes: what it knows of the files that rank 0 has made or found."""
    return {
        file.name: WrittenDigest(file.nbytes, is_broken=True) if file.name in task.begun else engine.header_digest(file)
        for file in plan.files
    }


@contextlib.contextmanager
def _progress(plan: Plan, share: Share, ranks: Ranks, *, enabled: bool) -> Iterator[Callable[[str, int], None]]:
    """A bar by bytes on stderr with the tensor's name, only on a terminal. Where another process fails, it stops this one."""
    from tqdm import tqdm

    with tqdm(
        total=sum(end - begin for number in share.jobs for _, begin, end in outputs(plan.jobs[number])),
        unit="B",
        unit_scale=True,
        disable=None if enabled else True,
        file=sys.stderr,
        leave=False,
        mininterval=0.2,
    ) as bar:

        def advance(name: str, nbytes: int) -> None:
            ranks.check()
            bar.set_postfix_str(name, refresh=False)
            bar.update(nbytes)

        yield advance


def _peak_device_bytes(device: torch.device) -> int | None:
    import torch

    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None
