"""The initial factors that `decompose --from-cache` took from PEFT's CorDA cache, made of its vectors again, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from corda_convert.adapters.cache import Eigens, open_cache
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.errors import AdapterMismatch, raise_problems, some
from corda_convert.operations.from_cache import eigens_at_run_time
from corda_convert.operations.verify_ulps import UNIT, Checked, Exact, measure

ROUNDINGS = 4
"""Of float32 in `V·√(S/s)`: the quotient, its root, the product, and what torch's root may lose."""


def cached_factors(cache: Path, written: Adapter, names: NameMap) -> Mapping[str, Callable[[], Checked]]:
    """The checks of each module that was written. Raises `AdapterMismatch` where the cache is not of these modules."""
    found = eigens_at_run_time(open_cache(cache), names)
    factors = {change.module_name: change for change in written.modules if isinstance(change, LoraFactors)}
    differing = sorted(found.keys() ^ factors.keys())
    problem = AdapterMismatch(
        f"{cache.name} and {written.source.name} are not of the same modules: only one has {some(differing)}.",
    )
    raise_problems([problem] if differing else [])
    return {module: _bound(factors[module], eigens) for module, eigens in found.items()}


def _bound(factors: LoraFactors, eigens: Eigens) -> Callable[[], Checked]:
    return lambda: check_cached(factors, eigens)


def check_cached(factors: LoraFactors, eigens: Eigens) -> Checked:
    """Compares `lora_A` with `√(S/s)·Vᵀ` and `lora_B` with `U·√(S/s)`."""
    roots = (read_tensor(eigens.S).double() / factors.scaling).sqrt()
    expected = {
        "lora_A": (factors.lora_A, read_tensor(eigens.V).double().T * roots[:, None]),
        "lora_B": (factors.lora_B, read_tensor(eigens.U).double() * roots),
    }
    shapes = [f"{name} is {ref.shape}" for name, (ref, exact) in expected.items() if ref.shape != tuple(exact.shape)]
    if shapes:
        raise AdapterMismatch(f"The cache has other shapes for {factors.module_name}: {', '.join(shapes)}.")
    parts = [
        measure(
            read_tensor(ref), Exact(exact, exact.abs(), ROUNDINGS * UNIT[ref.spec.dtype], roundings=0), ref.spec.dtype
        )
        for ref, exact in expected.values()
    ]
    measured = parts[0]
    measured.add(parts[1])
    return Checked(factors.module_name, "factors", "exact", measured)
