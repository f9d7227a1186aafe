"""The initial factors that `decompose --from-cache` took from PEFT's CorDA cache, made of its vectors again, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.adapters.cache import Eigens, open_cache
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.tensors import TensorRef, read_tensor, torch_dtype
from corda_convert.errors import AdapterMismatch, raise_problems, some
from corda_convert.operations.from_cache import eigens_at_run_time
from corda_convert.operations.verify_ulps import UNIT, Checked, Exact, Measured, measure

if TYPE_CHECKING:
    from torch import Tensor

ROUNDINGS = 4
"""Of the shortest dtype in `V·√(S/s)`: the quotient, its root, the product, and what torch's root may lose."""


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
        "lora_A": (factors.lora_A, eigens.V, read_tensor(eigens.V).double().T * roots[:, None]),
        "lora_B": (factors.lora_B, eigens.U, read_tensor(eigens.U).double() * roots),
    }
    shapes = [f"{name} is {ref.shape}" for name, (ref, _, exact) in expected.items() if ref.shape != tuple(exact.shape)]
    if shapes:
        raise AdapterMismatch(f"The cache has other shapes for {factors.module_name}: {', '.join(shapes)}.")
    measured, more = (_measured(ref, exact, (eigens.S, vectors)) for ref, vectors, exact in expected.values())
    measured.add(more)
    return Checked(factors.module_name, "factors", "exact", measured)


def _measured(ref: TensorRef, exact: Tensor, cached: tuple[TensorRef, ...]) -> Measured:
    """PEFT computes in the dtypes of the cache, the least normal number of which rounds as those below it do."""
    import torch

    shortest = max((each.spec.dtype for each in (ref, *cached)), key=lambda dtype: UNIT[dtype])
    sizes = exact.abs() + torch.finfo(torch_dtype(shortest)).tiny
    stored = Exact(exact, sizes, ROUNDINGS * UNIT[shortest], roundings=0)
    return measure(read_tensor(ref), stored, ref.spec.dtype)
