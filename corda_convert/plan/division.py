"""Which process does which jobs of a plan. Arithmetic only, the same on every process."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from corda_convert.plan.model import ComputeJob, Job, Plan

FLOPS_PER_BYTE = 64
"""So many floating-point operations of a decomposition are taken to cost as much as reading or writing one byte."""

SHARD_SLACK = 0.1
"""A cut is moved to the nearest end of a shard if that shifts at most this part of one process's work."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one process does of a plan.

    Attributes:
        jobs: numbers of the plan's jobs, ascending.
        finishes: files that nobody else writes, whose size and digest the process takes at the end.
    """

    jobs: tuple[int, ...]
    finishes: frozenset[str]


def whole_share(plan: Plan) -> Share:
    """All of it."""
    return Share(tuple(range(len(plan.jobs))), frozenset(file.name for file in plan.files))


def outputs(job: Job) -> Iterator[tuple[str, int, int]]:
    """The file, and where in it the bytes begin and end, of everything that a job writes."""
    if isinstance(job, ComputeJob):
        for chunk in job.chunks:
            for write in chunk.writes:
                yield write.file_name, write.offset, write.offset + write.nbytes
    else:
        yield job.file_name, job.offset, job.offset + job.nbytes


def divide(plan: Plan, jobs: Sequence[int], parts: int) -> list[Share]:
    """Cuts the jobs into runs of about equal work, at the ends of shards where that is near.

    A file in which several processes write is finished by none; all files without a job are finished by the first.
    """
    work = [0, *accumulate(_work(plan.jobs[number]) for number in jobs)]
    files = [next(outputs(plan.jobs[number]))[0] for number in jobs]
    ends = [place for place in range(1, len(jobs)) if files[place] != files[place - 1]]
    cuts = [0]
    for part in range(1, parts):
        goal = work[-1] * part / parts
        cut = _nearest(list(range(len(work))), work, goal)
        end = _nearest(ends, work, goal) if ends else cut
        near = abs(work[end] - goal) <= SHARD_SLACK * work[-1] / parts
        cuts.append(max(cuts[-1], end if near else cut))
    pieces = [tuple(jobs[begin:end]) for begin, end in zip(cuts, [*cuts[1:], len(jobs)], strict=True)]
    writers: dict[str, set[int]] = {file.name: set() for file in plan.files}
    for part, piece in enumerate(pieces):
        for number in piece:
            for file_name, _, _ in outputs(plan.jobs[number]):
                writers[file_name].add(part)
    return [
        Share(piece, frozenset(name for name, of in writers.items() if of == {part} or (part == 0 and not of)))
        for part, piece in enumerate(pieces)
    ]


def _nearest(places: list[int], work: list[int], goal: float) -> int:
    """The place, of ascending ones, before which the work comes nearest to the goal."""
    index = bisect_left(places, goal, key=lambda place: work[place])
    return min(places[max(0, index - 1) : index + 1], key=lambda place: abs(work[place] - goal))


def _work(job: Job) -> int:
    """Bytes read and written, and for a job done in one step the operations of a matrix product of its operands."""
    if not isinstance(job, ComputeJob):
        return 2 * job.nbytes
    reads = [read for chunk in job.chunks for read in chunk.all_reads]
    nbytes = sum(read.nbytes for read in reads) + sum(end - begin for _, begin, end in outputs(job))
    if job.transform.streamed:
        return nbytes
    return nbytes + int(sum(prod(read.shape) ** 1.5 for read in reads)) // FLOPS_PER_BYTE
