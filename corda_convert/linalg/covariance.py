"""Damping of a covariance, and the matrix that a weight is multiplied with before its singular vectors are taken."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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


def weighted(weight: Tensor, covariance: Tensor, damping: Damping) -> Tensor:
    """`W (C + λI)` in float64: (d_out, d_in). CorDA takes the singular vectors of this (its eq. 2, with damping)."""
    return torch.addmm(weight, weight, covariance.double(), beta=damping.amount)
