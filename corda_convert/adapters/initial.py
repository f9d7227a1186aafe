"""An adapter together with the factors that its training began with, for `s·(BA − B₀A₀)`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from corda_convert.adapters import read_adapter
from corda_convert.adapters.cache import read_cache
from corda_convert.adapters.dora import DoraFactors, lora_factors
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter, ParameterChange
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.rwkv import read_rwkv_initial
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some

_Factors = LoraFactors | ParameterFactors


def read_initial(path: Path, adapter: Adapter) -> Adapter:
    """The initial adapter in a folder, or in a file: PEFT's CorDA cache, or for a file of RWKV-PEFT its PiSSA's.

    Raises one of our errors.
    """
    if path.is_file() and adapter.source.is_file:
        return read_rwkv_initial(path)
    if path.is_file():
        return read_cache(path, adapter)
    return read_adapter(path)


def with_initial(adapter: Adapter, initial: Adapter, *, takes_parameters: bool = False) -> Adapter:
    """The adapter with the initial factors of each module, for `s·(BA − B₀A₀)`.

    A module whose weight the adapter brings along goes without: its factors were trained beside that weight. Raises
    `AdapterMismatch` unless both have the same modules, shapes and scaling; `UnsupportedInput` for factors of parameters,
    unless they are taken.
    """
    for one in (adapter, initial):
        if one.kind != "lora":
            raise AdapterMismatch(
                f"--init is for LoRA adapters trained beside a residual; {one.source.name} is {one.kind}.",
                next_step="Leave out --init.",
            )
        parameters = [change.module_name for change in one.modules if isinstance(change, ParameterFactors)]
        if parameters and not takes_parameters:
            raise UnsupportedInput(
                f"{one.source.name} adapts {some(parameters)} by target_parameters; initial factors are taken out of modules "
                "only.",
                next_step="Merge it into the residual that it was trained beside.",
            )
    before, after = ({_key(each): each for each in _factors(one)} for one in (initial, adapter))
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise AdapterMismatch(
            f"{adapter.source.name} and the initial adapter {initial.source.name} do not have the same modules: "
            f"{some(odd)} stand in only one of them.",
            why="The initial adapter is of another training run.",
            next_step="Give the corda_init folder that the training started from as --init.",
        )
    raise_problems(_problems(before, after))
    joined = (each if each.module_name in adapter.bases else _joined(each, before) for each in adapter.modules)
    return replace(adapter, initialization="plain", modules=tuple(joined))


def _factors(adapter: Adapter) -> list[_Factors]:
    return [*lora_factors(adapter.modules), *(each for each in adapter.modules if isinstance(each, ParameterFactors))]


def _key(factors: _Factors) -> str:
    return factors.key if isinstance(factors, ParameterFactors) else factors.module_name


def _problems(before: Mapping[str, _Factors], after: Mapping[str, _Factors]) -> Iterator[CordaConvertError]:
    """Shapes and scalings that differ, one problem for all modules that differ alike.

    The scaling of a parameter depends on which of its module it is, which only the model tells.
    """
    shapes: dict[tuple[object, ...], list[str]] = {}
    scalings: dict[tuple[float, float], list[str]] = {}
    for name, factors in after.items():
        initial = before[name]
        found = (factors.lora_A.shape, factors.lora_B.shape, initial.lora_A.shape, initial.lora_B.shape)
        if found[:2] != found[2:]:
            shapes.setdefault(found, []).append(name)
        elif (
            isinstance(factors, LoraFactors)
            and isinstance(initial, LoraFactors)
            and not math.isclose(factors.scaling, initial.scaling, rel_tol=1e-9)
        ):
            scalings.setdefault((factors.scaling, initial.scaling), []).append(name)
    for (A, B, initial_A, initial_B), names in shapes.items():
        yield AdapterMismatch(
            f"{some(names)}: the adapter has lora_A {A}, lora_B {B}, the initial adapter {initial_A}, {initial_B}."
        )
    for (own, first), names in scalings.items():
        yield AdapterMismatch(
            f"{some(names)}: the adapter scales by {own:g}, the initial adapter by {first:g}; they must agree.",
            next_step="Compare r, lora_alpha, use_rslora and the patterns of both configs.",
        )


def _joined(change: ParameterChange, initial: dict[str, _Factors]) -> ParameterChange:
    if isinstance(change, ParameterFactors):
        first = initial[change.key]
        return replace(change, initial=first) if isinstance(first, ParameterFactors) else change
    if isinstance(change, DoraFactors):
        return replace(change, lora=_with_factors(change.lora, initial))
    return _with_factors(change, initial) if isinstance(change, LoraFactors) else change


def _with_factors(factors: LoraFactors, initial: dict[str, _Factors]) -> LoraFactors:
    first = initial[factors.module_name]
    return replace(factors, initial_lora_A=first.lora_A, initial_lora_B=first.lora_B)
