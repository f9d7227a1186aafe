"""Which rank each module of a converted LoRA gets: as it is computed, and as it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.operations.lora_modules import LoraModule
from corda_convert.operations.lora_reduction import energy_rank_of
from corda_convert.operations.lora_serving import Wishes

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Ranks:
    """Of one module: the rank that is computed, and the one that is stored, with zeros."""

    computed: int
    stored: int


def chosen_rank(
    module: LoraModule, rank: int | None, energy: float | None, weight: TensorRef | None, device: torch.device
) -> int:
    """That of the exact result, or at most `rank`, or what keeps `energy`, for which the module's tensors are read."""
    most = _most(module)
    if rank is not None and rank < most:
        most = min(rank, *module.shape)
    if energy is None:
        return most
    return energy_rank_of(module, energy, weight, min(most, *module.shape), device)


def stored_ranks(
    modules: Sequence[LoraModule], chosen: Mapping[str, int], wishes: Wishes, uniform: int | None
) -> dict[str, Ranks]:
    """The rank of each module, by its key. `uniform` is the one that all get, where that is not the largest of `chosen`."""
    together: dict[str, int] = {}
    for module in modules:  # those of one pattern have one rank in PEFT
        together[module.pattern_name] = max(together.get(module.pattern_name, 0), chosen[module.key])
    if wishes.uniform:
        together = dict.fromkeys(together, max(together.values()) if uniform is None else uniform)
    if wishes.most_rank is not None:
        together = {name: min(rank, wishes.most_rank) for name, rank in together.items()}
    return {module.key: _stored_as(module, together[module.pattern_name]) for module in modules}


def _stored_as(module: LoraModule, rank: int) -> Ranks:
    """What is computed of a module that has that rank in the result."""
    most = _most(module)
    return Ranks(most if rank >= most else min(rank, *module.shape), rank)


def _most(module: LoraModule) -> int:
    """The largest rank that makes sense: that of the exact factors, or of the matrix."""
    return module.rank if module.summands else min(module.shape)
