"""How many components of each layer to take, so that all of them together cost no more than a number of parameters."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from corda_convert.linalg.subspace import End


@dataclass(frozen=True, slots=True)
class Components:
    """The components of one layer that may be taken, in the order in which they are.

    Attributes:
        shares: of `‖W T‖_F²`: falling from the top, rising from the bottom.
        cost: the parameters of each, d_out + d_in.
        least: so many are taken in any case.
    """

    shares: Sequence[float]
    cost: int
    least: int = 0


def allocate(layers: Sequence[Components], budget: int, *, end: End) -> list[int]:
    """How many components of each layer to take for at most `budget` parameters.

    One after the other over all layers: at the top those with the largest share for each parameter, at the bottom those
    with the smallest. Components of a layer cost the same, and their shares are in order, so up to the first one that is
    too dear for what is left no other choice of as many parameters takes a larger (at the bottom smaller) sum of shares
    (the greedy solution of the knapsack problem, Dantzig 1957, doi:10.1287/opre.5.2.266). Then the rest of the budget goes
    to the next ones that it pays. The earlier layer comes first where two are equal.
    """
    counts = [layer.least for layer in layers]
    left = budget - sum(layer.least * layer.cost for layer in layers)

    def next_of(number: int) -> tuple[float, int]:
        layer = layers[number]
        merit = layer.shares[counts[number]] / layer.cost
        return (-merit if end == "top" else merit), number

    waiting = [next_of(number) for number, layer in enumerate(layers) if layer.least < len(layer.shares)]
    heapify(waiting)
    while waiting:
        _, number = heappop(waiting)
        if layers[number].cost > left:
            continue  # it stays too dear
        counts[number] += 1
        left -= layers[number].cost
        if counts[number] < len(layers[number].shares):
            heappush(waiting, next_of(number))
    return counts


def uniform_rank(shapes: Sequence[tuple[int, int]], budget: int) -> int:
    """The largest rank that `budget` parameters pay in every layer; layers (d_out, d_in) of fewer components have all."""
    most = max(min(shape) for shape in shapes)

    def cost(rank: int) -> int:
        return sum(min(rank, *shape) * sum(shape) for shape in shapes)

    return bisect_right(range(most + 1), budget, key=cost) - 1
