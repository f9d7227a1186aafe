"""Which initial factors belong to which adapter, where several of both are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.initial import read_initial, with_initial
from corda_convert.errors import AdapterMismatch, CordaConvertError, PlanRefused, raise_problems
from corda_convert.operations.evidence import check_same_training


def assign(adapters: Sequence[Adapter], paths: Sequence[Path], *, as_is: bool) -> list[Adapter | None]:
    """The initial adapter of each adapter, or None for one that has none among `paths`.

    One of each belong together. Otherwise an initial adapter belongs to those adapters that were trained from it, by
    `check_same_training`: it may be several, but never two for one adapter. With `as_is` they are not compared, and must
    be as many as the adapters, in the same order. Raises `AdapterMismatch`, all problems together.
    """
    if not paths:
        return [None] * len(adapters)
    if len(adapters) == len(paths) == 1:
        return [_of_one(adapters[0], paths[0], as_is=as_is)]
    if as_is:
        if len(paths) != len(adapters):
            raise AdapterMismatch(
                f"There are {len(paths)} initial adapters for {len(adapters)} adapters, and --as-is says not to compare them.",
                next_step="Give as many --init as --adapter, in the same order, or leave out --as-is.",
            )
        return [read_initial(path, adapter) for adapter, path in zip(adapters, paths, strict=True)]
    return _matched(adapters, paths)


def _of_one(adapter: Adapter, path: Path, *, as_is: bool) -> Adapter:
    initial = read_initial(path, adapter)
    with_initial(adapter, initial, takes_parameters=True)
    if not as_is:
        check_same_training(adapter, initial)
    return initial


def _matched(adapters: Sequence[Adapter], paths: Sequence[Path]) -> list[Adapter | None]:
    problems: list[CordaConvertError] = []
    found: list[dict[Path, Adapter]] = [{} for _ in adapters]
    for path in dict.fromkeys(path.resolve() for path in paths):
        refused: list[str] = []
        for place, adapter in enumerate(adapters):
            try:
                found[place][path] = _of_one(adapter, path, as_is=False)
            except AdapterMismatch as mismatch:
                refused.append(mismatch.what)
            except PlanRefused as several:
                refused.append(several.problems[0].what)
        if len(refused) == len(adapters):
            problems.append(
                AdapterMismatch(f"None of the adapters was trained from {path.name}.", why="\n".join(refused))
            )
    for adapter, initials in zip(adapters, found, strict=True):
        if len(initials) > 1:
            names = " and ".join(path.name for path in initials)
            problems.append(
                AdapterMismatch(
                    f"{adapter.source.name} may have been trained from {names}.",
                    next_step="Give only the one that its training started from.",
                )
            )
    raise_problems(problems)
    return [next(iter(initials.values()), None) for initials in found]
