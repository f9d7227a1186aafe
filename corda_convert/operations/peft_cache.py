"""PEFT's CorDA `cache_file`, made from an initial adapter, for trainings that let PEFT make factors and residual itself."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.adapters import read_adapter
from corda_convert.adapters.cache import is_cache
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.tensors import TensorSpec, read_tensor
from corda_convert.checkpoint.torch_archive import lay_out_archive
from corda_convert.errors import NotFinite, OutputRefused, UnsupportedInput, some
from corda_convert.output.archive_writer import ArchiveWriter

if TYPE_CHECKING:
    from torch import Tensor

_PARTIAL_SUFFIX = ".corda-convert-partial"


@dataclass(frozen=True, slots=True)
class WrittenCache:
    """A cache file as it was written, its SHA-256 in hex."""

    path: Path
    modules: int
    nbytes: int
    sha256: str


def check_cache_path(path: Path, output: Path, *, overwrite: bool) -> None:
    """Refuses a place for a cache file, before any work. `output` is the folder that the run writes.

    Raises `OutputRefused` for what exists (unless `overwrite`, and it is such a cache), for a place inside `output`, whose
    receipt would not know the file, and for a folder that cannot be written.
    """
    if output.resolve() in path.resolve().parents:
        raise OutputRefused(
            f"The cache file {path} would lie inside the output {output}.", next_step="Choose a place beside it."
        )
    if path.is_dir() or (path.exists() and not (overwrite and is_cache(path))):
        raise OutputRefused(
            f"{path} exists{'' if path.is_dir() or not overwrite else ' and is no CorDA cache of PEFT'}.",
            next_step="Choose another file"
            + ("." if path.is_dir() or overwrite else ", or replace a cache file with --overwrite."),
        )
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputRefused(f"The folder {parent} cannot be written.", next_step="Choose another file.")


def write_cache(path: Path, folder: Path) -> WrittenCache:
    """Writes the cache from which PEFT's `corda_init` makes the very factors of the adapter in `folder`.

    PEFT computes `A₀ = √(S/s)·Vᵀ` and `B₀ = U·√(S/s)`. With `S = s` the root is 1, so `U = B₀` and `V = A₀ᵀ` give the same
    bits; for another scaling than the adapter's own, `s·B₀A₀` and the residual are still the same. One tensor is in memory
    at a time; what was at `path` is replaced once all is written. Raises one of our errors; then nothing was written.
    """
    adapter = read_adapter(folder)
    modules = _check(adapter)
    tensors = {spec.name: make for factors in modules for spec, make in _tensors(factors)}
    specs = [spec for factors in modules for spec, _ in _tensors(factors)]
    archive, places = lay_out_archive(specs)
    partial = path.with_name(path.name + _PARTIAL_SUFFIX)
    try:
        with ArchiveWriter(partial, archive) as writer:
            for name, make in tensors.items():
                view = _bytes(name, make())
                writer.write(places[name], view)
                writer.digest(places[name], view)
            nbytes, sha256 = writer.finish()
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    finally:
        adapter.source.close()
    return WrittenCache(path, len(modules), nbytes, sha256)


def _check(adapter: Adapter) -> list[LoraFactors]:
    """The factors of each module. Raises `UnsupportedInput` for an adapter that PEFT's CorDA could not begin with."""
    modules = [change for change in adapter.modules if isinstance(change, LoraFactors) and _is_linear(change)]
    others = [change.module_name for change in adapter.modules if change not in modules]
    others += [*adapter.replacements, *adapter.bases]
    if others:
        raise UnsupportedInput(
            f"{adapter.source.name} changes {some(others)} otherwise than PEFT's CorDA begins: with plain LoRA factors of "
            "Linear layers.",
            next_step="Give the initial adapter (corda_init) of a decomposition.",
        )
    odd = [factors.module_name for factors in modules if not 0 < factors.scaling < math.inf]
    if odd:
        raise UnsupportedInput(f"{adapter.source.name} has no positive scaling for {some(odd)}; PEFT divides by it.")
    return modules


def _is_linear(factors: LoraFactors) -> bool:
    return "linear" in factors.kinds and not (factors.is_embedding or factors.kernel) and factors.parameter == "weight"


def _tensors(factors: LoraFactors) -> Iterator[tuple[TensorSpec, Callable[[], Tensor]]]:
    """S, U and V of a module, in PEFT's order, and what makes each."""
    import torch

    rank, prefix = factors.rank, f"{factors.module_name}.eigens."
    d_out, d_in = factors.lora_B.shape[0], factors.lora_A.shape[1]
    yield TensorSpec(f"{prefix}S_WC", "F32", (rank,)), lambda: torch.full((rank,), factors.scaling)
    yield TensorSpec(f"{prefix}U_WC", "F32", (d_out, rank)), lambda: read_tensor(factors.lora_B)
    yield TensorSpec(f"{prefix}V_WC", "F32", (d_in, rank)), lambda: read_tensor(factors.lora_A).t()


def _bytes(name: str, tensor: Tensor) -> memoryview:
    """The float32 bytes of a tensor. Raises `NotFinite`."""
    import torch

    from corda_convert.linalg.finite import is_finite

    if not is_finite(tensor):
        raise NotFinite(f"{name} would hold NaN or Inf: the initial adapter does.")
    buffer = bytearray(4 * tensor.numel())
    torch.frombuffer(buffer, dtype=torch.float32).view(tensor.shape).copy_(tensor)
    return memoryview(buffer)
