"""Several adapters in one merge: whether they go together, how many times each is taken, and in which order."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

from corda_convert.adapters.dora import lora_factors
from corda_convert.adapters.factors import Adapter, ParameterChange
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.tokens import TokenRows
from corda_convert.checkpoint.names import NameMap
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations.edits import Applied, Fitted
from corda_convert.output.digests import file_sha256


def scaled(adapters: Sequence[Adapter], scales: Sequence[float]) -> list[Applied]:
    """Each adapter with its scale, 1 where none are given. Raises every problem together."""
    if scales and len(scales) != len(adapters):
        raise UnsupportedInput(
            f"There are {len(scales)} scales for {len(adapters)} adapters.",
            next_step="Give as many --scale as --adapter, in the same order, or none.",
        )
    factors = [float(scale) for scale in scales] or [1.0] * len(adapters)
    applied = [Applied(adapter, factor) for adapter, factor in zip(adapters, factors, strict=True)]
    raise_problems([problem for one in applied if (problem := _scale_problem(one)) is not None])
    folders = [one.adapter.source.folder.resolve() for one in applied]
    twice = sorted({folder.name for folder in folders if folders.count(folder) > 1})
    if twice:
        raise UnsupportedInput(
            f"{some(twice)} is given twice.", next_step="Give an adapter once; --scale 2 takes it twice."
        )
    return applied


def _scale_problem(one: Applied) -> CordaConvertError | None:
    name = one.adapter.source.name
    if one.scale == 0 or not math.isfinite(one.scale):
        return UnsupportedInput(
            f"The scale of {name} is {one.scale:g}; a finite number other than 0 was expected.",
            next_step=f"Leave {name} out." if one.scale == 0 else None,
        )
    if one.scale == 1.0:
        return None
    fixed = [change.module_name for change in one.adapter.modules if not change.is_linear]
    whole = [*one.adapter.replacements, *one.adapter.bases]
    if fixed or whole:
        what = f"it replaces {some(whole)}" if whole else f"the change of {some(fixed)} is no multiple of anything"
        return UnsupportedInput(
            f"{name} cannot be taken {one.scale:g} times: {what}.",
            why="A scale multiplies what is added to a weight. DoRA sets norms; modules_to_save, trained biases and tokens "
            "take the place of the model's.",
            next_step="Leave out its --scale, or scale a plain LoRA.",
        )
    return None


def is_additive(change: ParameterChange) -> bool:
    """Whether what it adds is the same whatever was folded before, so that order does not matter."""
    return change.is_linear and not (isinstance(change, BlockFactors) and change.depends_on_weight)


def order_matters(applied: Sequence[Applied], *, rounds_each: bool) -> bool:
    """Whether the adapters must be applied as they were given. `rounds_each`: each result is rounded, as PEFT does."""
    changes = [change for one in applied for change in one.adapter.modules]
    return len(applied) > 1 and (rounds_each or not all(is_additive(change) for change in changes))


def in_fixed_order(applied: Sequence[Applied]) -> list[int]:
    """Places of the adapters in an order by their content, so that the sum's last bits do not depend on the given one."""
    return sorted(range(len(applied)), key=lambda place: _content(applied[place])) if len(applied) > 1 else [0]


def _content(one: Applied) -> str:
    """A digest of the weights, the initial factors, the config and the scale."""
    files = {one.adapter.source.file.path}
    for factors in lora_factors(one.adapter.modules):
        if factors.initial_lora_A is not None:
            files.add(factors.initial_lora_A.file.path)
    parts = sorted(file_sha256(path) for path in files)
    config = json.dumps(one.adapter.source.config, sort_keys=True)
    return hashlib.sha256("\n".join([*parts, config, repr(one.scale)]).encode()).hexdigest()


def check_together(applied: Sequence[Applied], fitted: Sequence[Sequence[Fitted]], names: NameMap) -> None:
    """Refuses adapters of which one would undo a part of another. Raises every problem together."""
    problems: list[CordaConvertError] = []
    changers: dict[str, dict[int, bool]] = {}
    for place, changes in enumerate(fitted):
        for each in changes:
            of_adapter = changers.setdefault(each.target.name, {})
            of_adapter[place] = of_adapter.get(place, False) or isinstance(each.change, TokenRows)
    called = [one.adapter.source.name for one in applied]
    for place, one in enumerate(applied):
        for replaced in one.adapter.replacements:
            target = names.target(replaced)
            found = changers.get(target.name, {}) if target is not None else {}
            if others := [called[other] for other in found if other != place]:
                problems.append(
                    AdapterMismatch(
                        f"{called[place]} replaces {replaced}, which {some(others)} changes: that is for another weight.",
                        next_step="Merge one of them, or one after the other if that is meant.",
                    )
                )
    for parameter, of_adapter in changers.items():
        setting = [called[place] for place, sets_rows in of_adapter.items() if sets_rows]
        if len(setting) > 1:
            problems.append(
                AdapterMismatch(
                    f"{some(setting)} each replace rows of {parameter}: the last one would win.",
                    next_step="Merge one of them, or one after the other if that is meant.",
                )
            )
    raise_problems(problems)
