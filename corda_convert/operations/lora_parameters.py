"""LoRA on parameters (`target_parameters`), mostly stacks of experts, as modules of a converted LoRA.

Factors of each expert are put together, or reduced, on their own; PEFT's layout of A and B stays. Which parameter of a
module a wrapper is for only the model tells, and it counts only where parameters of different adapters or ranks meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.checkpoint.names import NameMap
from corda_convert.errors import AdapterMismatch, UnsupportedInput, some
from corda_convert.operations.edits import Fitted
from corda_convert.operations.lora_modules import LoraModule, Summand

_WRAPPER = ".base_layer"


def parameter_module(change: ParameterFactors, fitted: Fitted | None, scale: float) -> LoraModule:
    """The module of one parameter, of which `fitted` has the name and the experts where the base was read.

    Raises `AdapterMismatch` for factors that do not go with the config's ranks, or with the initial ones; `UnsupportedInput`
    where only the model could tell rank and scaling.
    """
    known = fitted.change if fitted is not None and isinstance(fitted.change, ParameterFactors) else change
    is_named = known.module_name != known.module
    names = [known.module_name] if is_named else [f"{known.module}.{name}" for name in known.candidates]
    rank, scaling = _of_all(change, names)
    if change.initial is not None and not _agree((rank, scaling), _of_all(change.initial, names)):
        raise AdapterMismatch(
            f"{names[0]}: the adapter has rank {rank} and scales by {scaling:g}, the initial adapter "
            "has another rank or scaling; they must agree.",
            next_step="Compare r, lora_alpha, use_rslora and the patterns of both configs.",
        )
    experts, odd = divmod(change.lora_A.shape[0], rank)
    if odd or change.lora_B.shape[1] != change.lora_A.shape[0]:
        raise AdapterMismatch(
            f"{names[0]} has lora_A {change.lora_A.shape} and lora_B {change.lora_B.shape}; {CONFIG_FILE} says rank {rank} for "
            "each expert.",
            why="The config and the weights are not of one adapter.",
        )
    summands = [Summand(change.lora_A, change.lora_B, 1.0, experts)]
    if change.initial is not None:
        summands.append(Summand(change.initial.lora_A, change.initial.lora_B, -1.0, experts))
    return LoraModule(
        key=change.key,
        pattern_name=names[0],
        summands=tuple(summands),
        scaling=scaling * scale,
        is_parameter=True,
        is_named=is_named,
    )


def _of_all(factors: ParameterFactors, names: Sequence[str]) -> tuple[int, float]:
    """Rank and scaling, the same for all the parameters that may be meant."""
    ranks = {factors.scalings.rank_of(name) for name in names}
    scalings = {factors.scalings.scaling_of(name) for name in names}
    if len(ranks) > 1 or len(scalings) > 1:
        raise UnsupportedInput(
            f"{some(names)} have ranks or scalings of their own, and only the model tells which factors are whose.",
            next_step="Give the base model's folder with --base; only its config and headers are read.",
        )
    return ranks.pop(), scalings.pop()


def _agree(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return one[0] == other[0] and math.isclose(one[1], other[1], rel_tol=1e-9)


def place_of(module: LoraModule) -> str:
    """What tells a module from the others of all adapters: a parameter's path, where that is known, else the key."""
    return module.pattern_name if module.is_parameter and module.is_named else module.key


def check_alike(adapters: Sequence[Adapter], modules: Iterable[LoraModule]) -> None:
    """Refuses several adapters whose wrappers may be for different parameters. Raises `UnsupportedInput`."""
    unnamed = [module.key for module in modules if module.is_parameter and not module.is_named]
    targets = [sorted(one.source.config.get("target_parameters") or ()) for one in adapters]
    given = [each for each in targets if each]
    if unnamed and any(each != given[0] for each in given):
        raise _needs_order(unnamed)


def rewrapped(modules: Mapping[str, LoraModule], names: NameMap | None) -> tuple[LoraModule, ...]:
    """The modules with the keys that PEFT gives to the wrappers of all parameters together: the last registered outermost.

    Raises `UnsupportedInput` where only the model tells that order, and it was not read.
    """
    of_module: dict[str, list[str]] = {}
    for place, module in modules.items():
        if module.is_parameter:
            of_module.setdefault(_unwrapped(module.key), []).append(place)
    found = dict(modules)
    for path, places in of_module.items():
        if len({modules[place].key for place in places}) == len(places):
            continue
        order = [] if names is None else [name for name in names.known if name in places]
        if len(order) != len(places):
            raise _needs_order(places)
        for depth, place in enumerate(reversed(order)):
            found[place] = replace(modules[place], key=path + depth * _WRAPPER)
    return tuple(found.values())


def _needs_order(names: Sequence[str]) -> UnsupportedInput:
    return UnsupportedInput(
        f"The adapters target different parameters of one module, among them {some(names)}, and PEFT names their factors by "
        "the order in the model.",
        next_step="Give the base model's folder with --base, of an architecture that transformers knows.",
    )


def _unwrapped(key: str) -> str:
    while key.endswith(_WRAPPER):
        key = key.removesuffix(_WRAPPER)
    return key
