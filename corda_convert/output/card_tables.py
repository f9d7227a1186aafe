"""The tables of a model card: what was done to each kind of module, and how much each layer changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import fsum, sqrt
from typing import Any

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
_FACTOR = re.compile(r"\.lora_[AB]$")
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")

Entry = Mapping[str, Any]


def module_table(tensors: Iterable[Entry]) -> str:
    """A row for each kind of changed module, the same name in all layers; nothing where nothing was changed."""
    kinds: dict[str, list[Entry]] = {}
    for entry in _changed(tensors):
        kinds.setdefault(_INDEX.sub("*", _module(entry)), []).append(entry)
    columns = [(title, cell) for title, cell in _COLUMNS if any(cell(entries) for entries in kinds.values())]
    if not kinds:
        return ""
    rows = [
        [f"`{kind}`", str(len({_module(entry) for entry in entries})), *(cell(entries) for _, cell in columns)]
        for kind, entries in kinds.items()
    ]
    return _table(["modules", "number", *(title for title, _ in columns)], rows)


def layer_table(tensors: Iterable[Entry]) -> str:
    """A row for each decoder layer with the change of all its weights together; nothing for a single layer."""
    layers: dict[int, list[Entry]] = {}
    for entry in _changed(tensors):
        if entry.get("weight_norm") and (found := _LAYER.search(_module(entry))):
            layers.setdefault(int(found[1]), []).append(entry)
    if len(layers) < 2:
        return ""
    rows = []
    for layer, entries in sorted(layers.items()):
        weight, delta, rounding = (_norm(entries, key) for key in ("weight_norm", "delta_norm", "rounding_norm"))
        rows.append([str(layer), str(len(entries)), f"{delta / weight:.2e}", f"{rounding / weight:.1e}"])
    return _table(["layer", "weights", "‖ΔW‖/‖W‖", "rounding/‖W‖"], rows)


def _changed(tensors: Iterable[Entry]) -> Iterable[Entry]:
    return (entry for entry in tensors if entry.get("action") != "copied" and "with" not in entry)


def _module(entry: Entry) -> str:
    name = str(entry.get("module") or entry["name"])
    return _FACTOR.sub("", name.removesuffix(".weight")).removeprefix("base_model.model.")


def _norm(entries: Iterable[Entry], key: str) -> float:
    return sqrt(fsum(float(entry.get(key) or 0.0) ** 2 for entry in entries))


def _ranks(entries: Sequence[Entry]) -> str:
    ranks = {entry["rank"] for entry in entries if entry.get("rank") is not None}
    ranks |= {change["rank"] for entry in entries for change in entry.get("changes", ()) if change.get("rank")}
    return _range(ranks, "d")


def _range(values: Iterable[float], form: str) -> str:
    found = sorted(values)
    if not found:
        return ""
    low, high = format(found[0], form), format(found[-1], form)
    return low if low == high else f"{low} – {high}"


def _column(key: str, form: str) -> Callable[[Sequence[Entry]], str]:
    return lambda entries: _range((float(entry[key]) for entry in entries if entry.get(key) is not None), form)


def _relative(entries: Sequence[Entry]) -> str:
    return _range((entry["delta_norm"] / entry["weight_norm"] for entry in entries if entry.get("weight_norm")), ".2e")


def _residual(entries: Sequence[Entry]) -> str:
    residuals = [entry["certificate"]["residual"] for entry in entries if entry.get("certificate")]
    return format(max(residuals), ".1e") if residuals else ""


_COLUMNS: tuple[tuple[str, Callable[[Sequence[Entry]], str]], ...] = (
    ("rank", _ranks),
    ("‖ΔW‖/‖W‖", _relative),
    ("share of the spectrum", _column("taken_share", ".2e")),
    ("worst residual", _residual),
    ("‖ΔW − BA‖/‖ΔW‖", _column("relative_error", ".2e")),
)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
