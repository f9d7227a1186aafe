"""The difference of one weight in two models, as a change that factors are taken out of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corda_convert.adapters.factors import Layout
from corda_convert.checkpoint.tensors import TensorRef
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
