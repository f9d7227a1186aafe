"""Draws the record of `merge_traced.py` as an SVG, and says in numbers how far the stages overlap.

Standard library only, since the measuring process has to stay small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from measuring import markdown_table

AHEAD = "read ahead"
STAGES = (AHEAD, "read", "compute", "write", "hash")
COLOURS = {AHEAD: "#8ab0d6", "read": "#3a6ea5", "compute": "#b5532a", "write": "#3d8a5f", "hash": "#7a5aa6"}
WIDTH, LEFT, RIGHT, TOP = 920, 110, 20, 46
LANE, GAP, STRIP = 20, 6, 60
POINTS = 400

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Lane:
    """One thread of one stage, and when it was busy."""

    stage: str
    name: str
    busy: tuple[Interval, ...]


def lanes(trace: dict[str, Any]) -> list[Lane]:
    """A lane for each thread, by stage; threads in the order of their first work."""
    found: dict[tuple[str, int], list[Interval]] = {}
    for stage, thread, begin, end in trace["busy"]:
        found.setdefault((stage, thread), []).append((begin, end))
    ordered = sorted(found, key=lambda key: (STAGES.index(key[0]), min(found[key])))
    threads = {stage: [key for key in ordered if key[0] == stage] for stage in STAGES}
    names = {
        key: stage if len(keys) == 1 else f"{stage} {number}"
        for stage, keys in threads.items()
        for number, key in enumerate(keys, start=1)
    }
    return [Lane(key[0], names[key], tuple(sorted(found[key]))) for key in ordered]


def busy_seconds(intervals: Iterable[Interval]) -> float:
    """The length of the union."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def overlap_seconds(sets: Sequence[Sequence[Interval]], at_least: int) -> float:
    """For how long at least that many of the sets are busy at once."""
    changes: list[tuple[float, int]] = []
    for intervals in sets:
        reached = float("-inf")
        for begin, end in sorted(intervals):
            if begin > reached:
                changes += [(begin, 1), (end, -1)]
            elif end > reached:
                changes += [(reached, 1), (end, -1)]
            reached = max(reached, end)
    total, count, since = 0.0, 0, 0.0
    for moment, change in sorted(changes):
        if count >= at_least:
            total += moment - since
        count, since = count + change, moment
    return total


def text(trace: dict[str, Any], cores: int) -> str:
    """The table and the sentences under it."""
    found = lanes(trace)
    begin, end = trace["engine"]
    length = end - begin
    seconds = {lane.name: busy_seconds(lane.busy) for lane in found}
    rows = [
        [
            lane.name,
            f"{seconds[lane.name]:.2f}",
            "" if lane.stage == AHEAD else f"{100 * seconds[lane.name] / length:.0f} %",
        ]
        for lane in found
    ]
    in_engine = [lane for lane in found if lane.stage != AHEAD]
    by_stage = [[interval for lane in in_engine if lane.stage == stage for interval in lane.busy] for stage in STAGES]
    added = sum(seconds[lane.name] for lane in in_engine)
    cpu = _cpu_at(trace, end) - _cpu_at(trace, begin)
    return "\n".join(
        (
            markdown_table(["Thread", "Busy s", "Of the engine's run"], rows),
            "",
            f"The whole program took {trace['end']:.2f} s: {begin:.2f} s until the engine ran (imports, planning), "
            f"{length:.2f} s for its run, {trace['end'] - end:.2f} s after it (receipt, card). The busy seconds in "
            f"it add up to {added:.2f} s. Two or more stages were busy during "
            f"{100 * overlap_seconds(by_stage, 2) / length:.0f} % of the run, three or more during "
            f"{100 * overlap_seconds(by_stage, 3) / length:.0f} %. {cpu / length:.2f} of {cores} cores were in use.",
        )
    )


def _cpu_at(trace: dict[str, Any], moment: float) -> float:
    """CPU seconds used by then, to the nearest sample."""
    _, seconds, _ = min(trace["samples"], key=lambda sample: abs(sample[0] - moment))
    return float(seconds)


def svg(trace: dict[str, Any], cores: int, title: str) -> str:
    """The picture: a lane for each thread, cores in use, resident memory."""
    found = lanes(trace)
    scale = (WIDTH - LEFT - RIGHT) / trace["end"]
    cpu_top = TOP + (len(found) + 1) * (LANE + GAP) + GAP
    memory_top = cpu_top + STRIP + 2 * GAP
    height = memory_top + STRIP + 30
    begin, end = trace["engine"]
    phases = Lane("", "main thread", ((0.0, begin), (end, trace["end"])))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" role="img" aria-label="{escape(title)}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" fill="#1b1b1b" font-size="14">{escape(title)}</text>',
        *_lane(phases, 0, scale, "#9a9a9a"),
        *(part for row, lane in enumerate(found, start=1) for part in _lane(lane, row, scale, COLOURS[lane.stage])),
        *_strip("cores in use", f"{cores}", _cores_in_use(trace), cores, cpu_top, scale),
        *_memory(trace, memory_top, scale),
        *_axis(trace["end"], memory_top + STRIP, scale),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lane(lane: Lane, row: int, scale: float, colour: str) -> list[str]:
    y = TOP + row * (LANE + GAP)
    path = "".join(
        f"M{LEFT + begin * scale:.1f} {y}h{max(0.1, (end - begin) * scale):.1f}v{LANE}H{LEFT + begin * scale:.1f}z"
        for begin, end in _joined(lane.busy, 0.25 / scale)
    )
    return [
        f'<text x="{LEFT - 10}" y="{y + 14}" fill="#1b1b1b" text-anchor="end">{lane.name}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{LANE}" fill="#f2f2f2"/>',
        f'<path d="{path}" fill="{colour}"/>',
    ]


def _joined(intervals: Sequence[Interval], gap: float) -> list[Interval]:
    """Joins those with less than `gap` between them, which nobody could see."""
    found: list[Interval] = []
    for begin, end in intervals:
        if found and begin - found[-1][1] < gap:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def _cores_in_use(trace: dict[str, Any]) -> list[tuple[float, float]]:
    """Over time, each value from samples about a hundredth of the run apart."""
    samples = trace["samples"]
    step = max(1, len(samples) // 100)
    chosen = samples[::step]
    return [
        ((before[0] + after[0]) / 2, (after[1] - before[1]) / (after[0] - before[0]))
        for before, after in itertools.pairwise(chosen)
    ]


def _memory(trace: dict[str, Any], top: float, scale: float) -> list[str]:
    step = max(1, len(trace["samples"]) // POINTS)
    values = [(moment, resident / 1e6) for moment, _, resident in trace["samples"]]
    peak = max(value for _, value in values)
    return _strip("resident", f"{peak:,.0f} MB", values[::step], peak, top, scale)


def _strip(
    name: str, most_text: str, values: Sequence[tuple[float, float]], most: float, top: float, scale: float
) -> list[str]:
    """A filled curve from 0 to `most`."""
    bottom = top + STRIP
    line = "".join(
        f"L{LEFT + moment * scale:.1f} {bottom - min(1.0, max(0.0, value / most)) * STRIP:.1f}"
        for moment, value in values
    )
    first, last = (LEFT + moment * scale for moment in (values[0][0], values[-1][0]))
    return [
        f'<text x="{LEFT - 10}" y="{top + STRIP / 2 + 4}" fill="#1b1b1b" text-anchor="end">{name}</text>',
        f'<text x="{LEFT - 10}" y="{top + 10}" fill="#555" font-size="10" text-anchor="end">{most_text}</text>',
        f'<text x="{LEFT - 10}" y="{bottom}" fill="#555" font-size="10" text-anchor="end">0</text>',
        f'<rect x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{STRIP}" fill="#f2f2f2"/>',
        f'<path d="M{first:.1f} {bottom}{line}L{last:.1f} {bottom}z" fill="#8fa3b8"/>',
    ]


def _axis(length: float, top: float, scale: float) -> list[str]:
    """Seconds under it all, five to ten of them."""
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
    step = next((step for step in steps if length / step <= 10), 1000)
    marks = [number * step for number in range(int(length / step) + 1)]
    return [
        f'<text x="{LEFT + mark * scale:.1f}" y="{top + 18}" fill="#555" text-anchor="middle">{mark:g} s</text>'
        for mark in marks
    ]
