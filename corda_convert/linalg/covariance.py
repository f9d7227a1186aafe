"""Damping of a covariance, and how well-conditioned it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from corda_convert.linalg.panels import TILE, lower_tiles
from corda_convert.linalg.threads import Team

MAX_DOUBLINGS = 30
"""The reference doubles its damping until a test passes, without bound; 0.01·2³⁰ is far past any use."""


@dataclass(frozen=True, slots=True)
class Damping:
    """`amount` is added to the diagonal; `factor` is it relative to the mean of the diagonal."""

    factor: float
    amount: float


def relative_damping(covariance: Tensor, factor: float) -> Damping:
    """`factor · mean(diag C)`, in float64. `covariance` is (d_in, d_in)."""
    return Damping(factor, factor * float(covariance.diagonal().double().mean()))


def reference_damping(covariance: Tensor) -> Damping | None:
    """The damping that PEFT's `collect_eigens_for_layer` ends with: 0.01, doubled until the float32 inverse is good.

    Good is `‖(C + λI)(C + λI)⁻¹ − I‖_F < 0.05` in float32, as there. Returns None if `MAX_DOUBLINGS` do not suffice.
    """
    matrix = covariance.float()
    mean = float(matrix.diagonal().mean())
    identity = torch.eye(matrix.shape[0], device=matrix.device)
    factor = 0.01
    for _ in range(MAX_DOUBLINGS):
        damped = matrix + identity * (mean * factor)
        inverse, info = torch.linalg.inv_ex(damped)
        if int(info) == 0 and float(torch.dist(damped @ inverse, identity)) < 0.05:
            return Damping(factor, factor * mean)
        factor *= 2
    return None


def is_symmetric(team: Team, covariance: Tensor) -> bool:
    """Whether `|C − Cᵀ|` is below a thousandth of the largest entry, as rounding and bf16 leave it but no mistake does."""
    largest: list[float] = []

    def tile(place: tuple[slice, slice]) -> None:
        rows, columns = place
        largest.append(float((covariance[rows, columns] - covariance[columns, rows].T).abs().max()))

    team.all(tile, lower_tiles(covariance.shape[0], TILE))
    return max(largest) <= 1e-3 * float(covariance.diagonal().max())


def rank_and_condition(covariance: Tensor) -> tuple[int, float | None]:
    """How many eigenvalues stand above float32's resolution of the largest, and the largest by the smallest.

    The latter is None where the smallest is not above it.
    """
    eigenvalues = torch.linalg.eigvalsh(covariance.double())
    largest, smallest = float(eigenvalues[-1]), float(eigenvalues[0])
    floor = covariance.shape[0] * torch.finfo(torch.float32).eps * largest
    rank = int((eigenvalues > floor).sum())
    return rank, largest / smallest if smallest > 0 and rank == covariance.shape[0] else None
