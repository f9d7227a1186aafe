"""Changes of a weight that factors are taken out of: the difference of two models, and sums with such changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from corda_convert.adapters.factors import Layout
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.operations.lora_modules import DenseChange, LoraModule, Summand
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.threads import Team


@dataclass(frozen=True, slots=True)
class Difference:
    """`after − before` of a weight that lies in the same way in two models."""

    after: TensorRef
    before: TensorRef
    layout: Layout

    @property
    def operands(self) -> Mapping[str, TensorRef]:
        return {"after": self.after, "before": self.before}

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.after.shape
        return (first, second) if self.layout == "out_in" else (second, first)

    def matrix(self, team: Team, operands: Mapping[str, Tensor], device: torch.device) -> Tensor:
        import torch

        after, before = operands["after"].to(device), operands["before"].to(device)
        is_double = torch.float64 in (after.dtype, before.dtype)
        change = torch.empty(after.shape, dtype=torch.float64 if is_double else torch.float32, device=device)

        def part(rows: tuple[int, int]) -> None:
            own = slice(*rows)
            change[own] = after[own].double() - before[own].double()

        team.all(part, row_blocks(self.after.shape))
        return change if self.layout == "out_in" else change.T


@dataclass(frozen=True, slots=True)
class DenseSum:
    """`Σ cᵢ·ΔWᵢ + Σ fⱼ·BⱼAⱼ`: changes without factors, each so many times, and factors, which together have none."""

    changes: tuple[tuple[DenseChange, float], ...]
    summands: tuple[Summand, ...] = ()

    @property
    def operands(self) -> Mapping[str, TensorRef]:
        operands = {
            f"{place} {name}": ref
            for place, (change, _) in enumerate(self.changes)
            for name, ref in change.operands.items()
        }
        for place, summand in enumerate(self.summands):
            operands |= {f"lora_A {place}": summand.lora_A, f"lora_B {place}": summand.lora_B}
        return operands

    @property
    def shape(self) -> tuple[int, int]:
        return self.changes[0][0].shape

    def matrix(self, team: Team, operands: Mapping[str, Tensor], device: torch.device) -> Tensor:
        import torch

        total = torch.zeros(self.shape, dtype=torch.float64, device=device)
        for place, (change, times) in enumerate(self.changes):
            total.add_(change.matrix(team, _named(operands, f"{place} "), device), alpha=times)
        for place, summand in enumerate(self.summands):
            right = operands[f"lora_A {place}"].to(device).double()
            left = operands[f"lora_B {place}"].to(device).double() * summand.factor

            def part(rows: tuple[int, int], left: Tensor = left, right: Tensor = right) -> None:
                own = slice(*rows)
                total[own] += left[own] @ right

            team.all(part, row_blocks(self.shape))
        return total


def _named(operands: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in operands.items() if name.startswith(prefix)}


def scaled(change: DenseChange, times: float) -> DenseChange:
    """So many times a change; once it is itself."""
    return change if times == 1.0 else DenseSum(((change, times),))


def added(one: LoraModule, other: LoraModule) -> LoraModule:
    """The sum of two modules whose scaling is 1, without factors where one of them has none."""
    summands = (*one.summands, *other.summands)
    changes = [module.dense for module in (one, other) if module.dense is not None]
    if not changes:
        return replace(one, summands=summands)
    return replace(one, summands=(), dense=DenseSum(tuple((change, 1.0) for change in changes), summands))
