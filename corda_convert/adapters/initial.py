"""An adapter together with the factors that its training began with, for `s·(BA − B₀A₀)`."""

from __future__ import annotations

import math

from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.errors import AdapterMismatch, CordaConvertError, raise_problems, some


def with_initial(adapter: Adapter, initial: Adapter) -> Adapter:
    """The adapter with the initial factors of each module, for `s·(BA − B₀A₀)`.

    Raises `AdapterMismatch` unless both have the same modules, shapes and scaling.
    """
    before = {factors.module_name: factors for factors in initial.modules if isinstance(factors, LoraFactors)}
    after = {factors.module_name: factors for factors in adapter.modules if isinstance(factors, LoraFactors)}
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise AdapterMismatch(
            f"{adapter.source.name} and the initial adapter {initial.source.name} do not have the same modules: "
            f"{some(odd)} stand in only one of them.",
            why="The initial adapter is of another training run.",
            next_step="Give the corda_init folder that the training started from as --init.",
        )
    problems: list[CordaConvertError] = []
    modules = []
    for name, factors in after.items():
        initial_factors = before[name]
        if (factors.lora_A.shape, factors.lora_B.shape) != (initial_factors.lora_A.shape, initial_factors.lora_B.shape):
            problems.append(
                AdapterMismatch(
                    f"{name}: the adapter has lora_A {factors.lora_A.shape}, lora_B {factors.lora_B.shape}, the "
                    f"initial adapter {initial_factors.lora_A.shape}, {initial_factors.lora_B.shape}."
                )
            )
        elif not math.isclose(factors.scaling, initial_factors.scaling, rel_tol=1e-9):
            problems.append(
                AdapterMismatch(
                    f"{name}: the adapter scales by {factors.scaling:g}, the initial adapter by "
                    f"{initial_factors.scaling:g}; they must agree.",
                    next_step="Compare r, lora_alpha, use_rslora and the patterns of both configs.",
                )
            )
        modules.append(
            LoraFactors(
                name,
                factors.lora_A,
                factors.lora_B,
                factors.scaling,
                factors.is_embedding,
                initial_factors.lora_A,
                initial_factors.lora_B,
            )
        )
    raise_problems(problems)
    return Adapter(adapter.source, "lora", "plain", tuple(modules), adapter.replacements, adapter.bases)
