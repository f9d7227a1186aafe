"""Going on with a run that was stopped: whether it was the same one, and what of its work stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.byte_file import ByteFile
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.engine import FileRecord
from corda_convert.errors import MalformedFile
from corda_convert.operations.remote_inputs import identity, stamp
from corda_convert.output import journal
from corda_convert.output.digests import WrittenDigest
from corda_convert.output.receipt import tool
from corda_convert.output.staging import journal_folder
from corda_convert.plan.division import outputs
from corda_convert.plan.model import ComputeJob, CopyJob, Facts, Plan

if TYPE_CHECKING:
    import torch

    from corda_convert.operations.production import Production
    from corda_convert.output.side_files import SideFile


@dataclass(frozen=True, slots=True)
class Before:
    """What an earlier run of the same command has finished.

    Attributes:
        plan: the plan of both.
        jobs: numbers of the jobs whose outputs and facts are all there.
        begun: files that are there, with the digests of what was written of them.
        facts: of finished jobs.
        inputs: digests of inputs that were read whole.
        uploaded: files that are finished, and that only the Hub keeps.
    """

    plan: Plan
    jobs: frozenset[int]
    begun: Mapping[str, WrittenDigest]
    facts: Mapping[str, Facts]
    inputs: Mapping[str, str]
    uploaded: Mapping[str, FileRecord] = field(default_factory=dict)

    def rest(self) -> tuple[int, ...]:
        """The jobs that are left."""
        return tuple(number for number in range(len(self.plan.jobs)) if number not in self.jobs)

    @property
    def files(self) -> dict[str, FileRecord]:
        """The files that are finished, all of whose bytes were written front to back."""
        return {
            file.name: FileRecord(file.name, file.nbytes, sha256)
            for file in self.plan.files
            if file.name in self.begun and (sha256 := self.begun[file.name].hexdigest()) is not None
        } | dict(self.uploaded)

    def receipt(self) -> Facts:
        """What was taken over, for the receipt; nothing where there was nothing."""
        if not self.jobs:
            return {}
        done = [self.plan.jobs[number] for number in sorted(self.jobs)]
        missing = {name for number in self.rest() for name, _, _ in outputs(self.plan.jobs[number])}
        return {
            "resumed": {
                "files": sorted((self.begun.keys() | self.uploaded.keys()) - missing),
                "tensors": sum(
                    len(job.names)
                    if isinstance(job, CopyJob)
                    else len({write.tensor for chunk in job.chunks for write in chunk.writes})
                    for job in done
                ),
                "bytes": sum(end - begin for job in done for _, begin, end in outputs(job)),
            }
        }


def take_over(plan: Plan, folder: Path, uploaded: Mapping[str, FileRecord] | None = None) -> Before:
    """What an earlier run has left in the folder and is as it was written; everything else in it is removed.

    `uploaded` are files of that run that are no longer there, but on the Hub. They count if nothing is left to write to them.
    """
    files = {file.name: file for file in plan.files}
    kept = journal.take_over(journal_folder(folder), folder, {name: file.nbytes for name, file in files.items()})
    names = {name for name in kept.ranges if kept.holds(name, 0, len(files[name].header))}
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in names:
            path.unlink()
    elsewhere = {name: record for name, record in (uploaded or {}).items() if name not in names}
    while True:
        jobs = frozenset(
            number
            for number, job in enumerate(plan.jobs)
            if (names or elsewhere)
            and (not isinstance(job, ComputeJob) or job.name in kept.facts)
            and all(
                name in elsewhere or (name in names and kept.holds(name, begin, end))
                for name, begin, end in outputs(job)
            )
        )
        left = {name for number, job in enumerate(plan.jobs) if number not in jobs for name, _, _ in outputs(job)}
        if left.isdisjoint(elsewhere):
            break
        elsewhere = {name: record for name, record in elsewhere.items() if name not in left}
    begun = {name: kept.digests.get(name) or WrittenDigest(files[name].nbytes, is_broken=True) for name in names}
    return Before(plan, jobs, begun, kept.facts, kept.inputs, elsewhere)


def identify(production: Production, plan: Plan, device: torch.device) -> dict[str, str]:
    """Digests of all that the output's bytes depend on, by what they are of: a run goes on only with its own."""
    files = [(source.role, file.path) for source in production.inputs for file in source.files]
    parts = {
        "program": {name: value for name, value in tool().items() if name != "threads"},
        "command": production.command,
        "device": device.type,
        "options": dict(production.options),
        "plan": plan_digest(production, plan),
        "inputs": [(role, identity(path), *stamp(path)) for role, path in files],
        "side files": _side_files(production),
    }
    return {name: _digest(value) for name, value in parts.items()}


def check_unchanged(production: Production, side_files: str) -> None:
    """Raises `MalformedFile` where an input was changed since its header was read; `side_files` is their identity."""
    for file in [file for source in production.inputs for file in source.files]:
        if isinstance(file, ByteFile):
            file.check_unchanged()
    if side_files != _digest(_side_files(production)):
        raise MalformedFile(
            "A file beside the weights was changed while it was copied.", next_step="Run the same command again."
        )


def _side_files(production: Production) -> list[tuple[object, ...]]:
    return [(file.name, *stamp(file.source)) for file in production.side_files if file.source is not None]


def plan_digest(production: Production, plan: Plan) -> str:
    """A digest of what is to be written where, and of what the headers and configs of the inputs say."""
    jobs = [
        (job.names, job.offset, job.nbytes)
        if isinstance(job, CopyJob)
        else (job.name, job.transform.action, len(job.chunks))
        for job in plan.jobs
    ]
    inputs = [file for source in production.inputs for file in source.files]
    return _digest(
        {
            "files": [(file.name, file.nbytes, hashlib.sha256(file.header).hexdigest()) for file in plan.files],
            "jobs": jobs,
            "headers": [file.header_sha256() for file in inputs if isinstance(file, SafetensorsFile)],
            "side files": [_content(file) for file in production.side_files],
            "facts": production.facts,
        }
    )


def _content(file: SideFile) -> tuple[str, int, str]:
    return file.name, file.nbytes, hashlib.sha256(file.content or b"").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
