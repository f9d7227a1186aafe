"""Long lists of module paths told in short: the same names in every layer are one group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
_USUAL_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LEVELS = ("layers", "experts")


@dataclass(frozen=True, slots=True)
class ModuleGroup:
    """Modules that stand in the same places.

    Attributes:
        names: paths with `*` for each index.
        indices: what each `*` goes through, if the group has every combination; nothing else.
        count: how many modules it has.
    """

    names: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    count: int

    def facts(self) -> dict[str, Any]:
        return {"names": list(self.names), "indices": [list(each) for each in self.indices], "count": self.count}


def group_modules(modules: Iterable[str]) -> list[ModuleGroup]:
    """The groups of these module paths, in the order of their first modules."""
    places: dict[str, list[tuple[int, ...]]] = {}
    for module in modules:
        places.setdefault(_INDEX.sub("*", module), []).append(tuple(map(int, _INDEX.findall(module))))
    alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for name, found in places.items():
        alike.setdefault(tuple(sorted(found)), []).append(name)
    return [_group(names, found) for found, names in alike.items()]


def _group(names: Sequence[str], found: Sequence[tuple[int, ...]]) -> ModuleGroup:
    axes = tuple(tuple(sorted(set(axis))) for axis in zip(*found, strict=True))
    is_whole = prod(map(len, axes)) == len(set(found))
    return ModuleGroup(tuple(sorted(names, key=_order)), axes if is_whole else (), len(names) * len(found))


def _order(name: str) -> int:
    end = name.rpartition(".")[2]
    return _USUAL_ORDER.index(end) if end in _USUAL_ORDER else len(_USUAL_ORDER)


def describe_groups(groups: Sequence[dict[str, Any]], most: int = 4) -> str:
    """The groups, from their facts, as a line: `q,k,v,o × 32 layers`."""
    shown = [_describe(group) for group in groups[:most]]
    return "; ".join(shown) + (f"; and {len(groups) - most} more kinds" if len(groups) > most else "")


def _describe(group: dict[str, Any]) -> str:
    if group["count"] == 1:
        name = str(group["names"][0])
        for numbers in group["indices"]:
            name = name.replace("*", str(numbers[0]), 1)
        return name
    ends = [name.rpartition(".")[2] if "*" in name else name for name in group["names"]]
    if all(end.endswith("_proj") for end in ends):
        ends = [end.removesuffix("_proj") for end in ends]
    text = ",".join(ends)
    if not group["indices"]:
        return f"{text} ({group['count']} modules)" if any("*" in name for name in group["names"]) else text
    for place, numbers in enumerate(group["indices"]):
        level = _LEVELS[place] if place < len(_LEVELS) else "places"
        if numbers == list(range(len(numbers))):
            text += f" × {len(numbers)} {level if len(numbers) != 1 else level.removesuffix('s')}"
        else:
            text += f" in {level} {_ranges(numbers)}"
    return text


def _ranges(numbers: Sequence[int]) -> str:
    """`4–7, 9`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)
