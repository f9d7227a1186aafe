"""`plot truncation`: perplexity against discarded components, from results that were measured before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import read_json
from corda_convert.errors import CordaConvertError, MalformedFile, raise_problems
from corda_convert.operations import perplexity, truncation
from corda_convert.plotting.pictures import save
from corda_convert.plotting.truncations import TruncationCurves, truncation_figure


def read_results(paths: Sequence[Path]) -> list[Mapping[str, Any]]:
    """What `plot truncation --json` or `perplexity --json` printed, one object in each file.

    Raises `MalformedFile` or `InputNotFound`, several together.
    """
    found: list[Mapping[str, Any]] = []
    problems: list[CordaConvertError] = []
    for path in paths:
        try:
            found.append(_checked(path, read_json(path)))
        except CordaConvertError as problem:
            problems.append(problem)
    raise_problems(problems)
    return found


def plot_truncation(results: Sequence[Mapping[str, Any]], *, outputs: Sequence[Path]) -> None:
    """Draws the results, a panel for each text. Raises `MalformedFile` where there is no truncated model among them."""
    panels: dict[str, _Panel] = {}
    for facts in results:
        panel = panels.setdefault(str(facts["text"]), _Panel())
        for method, discarded, value in _points(facts):
            if method is None:
                panel.whole = value
            else:
                panel.curves.setdefault(method, {})[discarded] = value
    if not any(panel.curves for panel in panels.values()):
        raise MalformedFile(
            "None of the results is of a truncated model.",
            next_step="Measure outputs of decompose --truncate, or give plot truncation a model.",
        )
    save(truncation_figure([panel.drawn(text) for text, panel in panels.items()]), outputs)


@dataclass(slots=True)
class _Panel:
    whole: float | None = None
    curves: dict[str, dict[int, float]] = field(default_factory=dict)

    def drawn(self, text: str) -> TruncationCurves:
        return TruncationCurves(
            text, self.whole, {name: sorted(points.items()) for name, points in self.curves.items()}
        )


def _points(facts: Mapping[str, Any]) -> list[tuple[str | None, int, float]]:
    """Method, discarded components and perplexity; no method for the whole model."""
    if facts["format"] == truncation.FORMAT:
        points = [(str(each["method"]), int(each["discarded"]), _value(each)) for each in facts["points"]]
        return [(None, 0, _value(facts["whole"])), *points]
    lost = facts["truncation"]
    return [(None, 0, _value(facts)) if lost is None else (str(lost["method"]), int(lost["discarded"]), _value(facts))]


def _value(facts: Mapping[str, Any]) -> float:
    return math.inf if facts["perplexity"] is None else float(facts["perplexity"])


def _checked(path: Path, facts: dict[str, Any]) -> dict[str, Any]:
    known = {truncation.FORMAT: truncation.FORMAT_VERSION, perplexity.FORMAT: perplexity.FORMAT_VERSION}
    if known.get(str(facts.get("format"))) != facts.get("format_version", 0):
        raise MalformedFile(
            f"{path} holds no result of perplexity or plot truncation that this version reads.",
            next_step="Write it with: corda-convert plot truncation MODEL … --json > results.json",
        )
    try:
        _points(facts)
        str(facts["text"])
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedFile(f"{path} is incomplete: {type(error).__name__} {error}.") from None
    return facts
