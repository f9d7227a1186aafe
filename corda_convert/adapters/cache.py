"""PEFT's CorDA `cache_file`: singular vectors by module, from which PEFT makes the initial factors of a training."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.source import AdapterSource
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, TensorSpec, read_rows, read_tensor
from corda_convert.errors import AdapterMismatch, CordaConvertError, MalformedFile, raise_problems, some

if TYPE_CHECKING:
    from torch import Tensor

_ENTRY = re.compile(r"^(?P<module>.+)\.eigens\.(?P<part>[SUV])_WC$")


@dataclass(frozen=True, slots=True)
class Eigens:
    """What the cache holds for a module: `S` (r,), `U` (d_out, r), `V` (d_in, r) with `U diag(S) Vᵀ` to be taken out."""

    S: TensorRef
    U: TensorRef
    V: TensorRef


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A module's entry with the scaling that its factors share."""

    eigens: Eigens
    scaling: float

    def roots(self) -> Tensor:
        return (read_tensor(self.eigens.S) / self.scaling).sqrt()

    def lora_A(self) -> Tensor:  # noqa: N802 - PEFT's name
        return read_tensor(self.eigens.V).t().mul(self.roots().view(-1, 1)).contiguous().float()

    def lora_B(self, begin: int, end: int) -> Tensor:  # noqa: N802 - PEFT's name
        return read_rows(self.eigens.U, begin, end).mul(self.roots()).contiguous().float()


class CacheFile:
    """The initial factors behind a cache file, made from its vectors as they are read. Implements `TensorFile`."""

    def __init__(self, file: PickleFile, modules: Mapping[str, _Scaled]) -> None:
        self.path = file.path
        self.metadata: dict[str, str] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._file = file
        self._modules: dict[str, tuple[str, _Scaled]] = {}
        for module, scaled in modules.items():
            rank, d_in, d_out = scaled.eigens.S.shape[0], scaled.eigens.V.shape[0], scaled.eigens.U.shape[0]
            for side, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                name = f"{module}.lora_{side}.weight"
                self.specs[name] = TensorSpec(name, "F32", shape)
                self._modules[name] = (side, scaled)

    @property
    def reading_bytes(self) -> int:
        """Memory for making a factor: the vectors as they are read, times the roots, and laid out anew."""
        return 3 * max((spec.nbytes for spec in self.specs.values()), default=0)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        import torch

        side, scaled = self._modules[name]
        row, end = self.specs[name].row_nbytes, begin + len(view)
        if not len(view):
            return
        first = 0 if side == "A" else begin // row
        rows = scaled.lora_A() if side == "A" else scaled.lora_B(first, -(-end // row))
        stored = rows.reshape(-1).view(torch.uint8)[begin - first * row : end - first * row]
        torch.frombuffer(view, dtype=torch.uint8).copy_(stored)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache file: what it holds for each module, by the names that the model had."""

    file: PickleFile
    modules: Mapping[str, Eigens]

    @property
    def path(self) -> Path:
        return self.file.path

    def adapter(self, scalings: Mapping[str, float], config: Mapping[str, Any]) -> Adapter:
        """The initial adapter of these modules: `A₀ = √(S/s)·Vᵀ` and `B₀ = U·√(S/s)` in float32, as PEFT computes them.

        `config` is what its `adapter_config.json` says.
        """
        made = CacheFile(self.file, {name: _Scaled(self.modules[name], scaling) for name, scaling in scalings.items()})
        tensors = {name: TensorRef(made, spec) for name, spec in made.specs.items()}
        factors = tuple(
            LoraFactors(name, tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"], scaling)
            for name, scaling in scalings.items()
        )
        return Adapter(AdapterSource(self.path, dict(config), made, tensors), "lora", "plain", factors)


def open_cache(path: Path) -> Cache:
    """Reads the header of a cache file. Raises `InputNotFound`, or `MalformedFile` for a file of another kind."""
    file = PickleFile(path)
    return Cache(file, _entries(path, file))


def is_cache(path: Path) -> bool:
    """Whether the file is such a cache."""
    try:
        open_cache(path).file.close()
    except CordaConvertError:
        return False
    return True


def read_cache(path: Path, adapter: Adapter) -> Adapter:
    """The initial adapter that PEFT makes of a cache file for the ranks and scalings of `adapter`.

    Raises `MalformedFile` for a file of another kind, `AdapterMismatch` where it is not of this training; all problems
    together.
    """
    cache = open_cache(path)
    found = cache.modules
    problems: list[CordaConvertError] = []
    scalings: dict[str, float] = {}
    trained = {change.module_name: change for change in adapter.modules if isinstance(change, LoraFactors)}
    if missing := [name for name in trained if name not in found]:
        problems.append(
            AdapterMismatch(
                f"{path.name} has nothing for {len(missing)} of {len(trained)} modules that {adapter.source.name} adapts: "
                f"{some(missing)}.",
                why="The cache is of another model, or was made for other targets.",
            )
        )
    for name, eigens in found.items():
        factors = trained.get(name)
        if factors is None:
            problems.append(
                AdapterMismatch(
                    f"{path.name} has vectors for {name}, which {adapter.source.name} does not adapt.",
                    why="The cache is of another training run.",
                )
            )
            continue
        expected = {"S": (factors.rank,), "U": factors.lora_B.shape, "V": factors.lora_A.shape[::-1]}
        shapes = {"S": eigens.S.shape, "U": eigens.U.shape, "V": eigens.V.shape}
        if shapes != expected:
            problems.append(
                AdapterMismatch(
                    f"{path.name}: S, U, V of {name} are {_shown(shapes)}; {_shown(expected)} were expected."
                )
            )
            continue
        scalings[name] = factors.scaling
    raise_problems(problems)
    return cache.adapter(scalings, adapter.source.config)


def _shown(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(str(shape) for shape in shapes.values())


def _entries(path: Path, file: PickleFile) -> dict[str, Eigens]:
    """The vectors of each module. Raises `MalformedFile` for any other tensor."""
    parts: dict[str, dict[str, TensorRef]] = {}
    strange = []
    for name, spec in file.specs.items():
        match = _ENTRY.match(name)
        if match is None or spec.dtype not in COMPUTABLE_DTYPES:
            strange.append(name)
        else:
            parts.setdefault(match["module"], {})[match["part"]] = TensorRef(file, spec)
    incomplete = [module for module, refs in parts.items() if set(refs) != set("SUV")]
    if strange or incomplete or not parts:
        raise MalformedFile(
            f"{path} is no CorDA cache of PEFT: {some([*strange, *incomplete]) or 'it is empty'}.",
            why="Such a file holds MODULE.eigens.S_WC, U_WC and V_WC for each module. A covariance file is another one.",
            next_step="Give the file that PEFT wrote as corda_config.cache_file, or the folder of the initial adapter.",
        )
    return {module: Eigens(**refs) for module, refs in parts.items()}
