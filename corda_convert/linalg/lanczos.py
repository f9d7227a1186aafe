"""Block Lanczos with full reorthogonalization for the largest eigenvalues of a symmetric operator, in float64.

A small block with many steps: the polynomial degree, which convergence depends on, grows with the steps, the work with
their product (Golub and Van Loan, Matrix Computations, 10.3.6; Musco and Musco, arXiv:1504.05477).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, log

import torch
from torch import Tensor

from corda_convert.linalg.panels import orthonormal, subtract_product, transposed_times
from corda_convert.linalg.threads import Team

SEED = 20231
TRIALS_APART = 3
"""Steps from one trial for convergence to the next, until two tell how fast it goes."""


@dataclass(frozen=True, slots=True)
class RitzPairs:
    """The largest eigenvalues found, falling, and their vectors.

    Attributes:
        basis: (n, k), orthonormal, of which the vectors are combinations.
        values: (k,).
        coefficients: (k, k): vector i is `basis @ coefficients[:, i]`.
        angle: bound on the sine between the wanted ones' subspace and the true one, from residuals, rounding and gaps.
        converged: whether that is below the tolerance, or at what float64 allows.
        steps: how often the operator was applied to a block.
    """

    basis: Tensor
    values: Tensor
    coefficients: Tensor
    angle: float
    converged: bool
    steps: int

    def vectors(self, count: int) -> Tensor:
        return self.basis @ self.coefficients[:, :count]


def random_block(n: int, columns: int, like: Tensor, seed: int = SEED) -> Tensor:
    """The same normal numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, columns, generator=generator, dtype=torch.float64).to(like.device)


def block_lanczos(
    team: Team,
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    wanted: int,
    most: int,
    tolerance: float,
) -> RitzPairs:
    """Ritz pairs of `apply` (n, b) → (n, b) from the block `start` (n, b), until `wanted` of them have converged.

    `most` is the largest basis; it is not exceeded, converged or not.
    """
    n, block = start.shape
    most = max(most // block, 1) * block
    Q = torch.empty(n, most, dtype=start.dtype, device=start.device)
    H = torch.zeros(most, most, dtype=start.dtype, device=start.device)
    newest, _ = orthonormal(team, start)
    Q[:, :block] = newest
    size, step = block, 0
    trial = -(-(3 if team.is_cpu else 6) * wanted // (2 * block)) + 1  # on a GPU steps are cheaper than trials
    angles: list[tuple[int, float]] = []
    while True:
        step += 1
        Z = apply(newest)
        H[:size, size - block : size] = orthogonalize(team, Q[:, :size], Z)
        Q_next, B = orthonormal(team, Z)
        pivots = B.diagonal().abs()
        is_last = size + block > most
        if is_last or (size > wanted and step >= trial):
            found = _ritz(Q[:, :size], H[:size, :size], B, wanted, tolerance, step)
            if is_last or found.converged:
                return found
            angles.append((step, found.angle))
            trial = step + _steps_to_go(angles, tolerance)
        if float(pivots.min()) <= 1e-6 * float(
            pivots.max()
        ):  # what little was left of Z there is much rounding, or all
            is_rounding = pivots <= torch.finfo(H.dtype).eps * H.diagonal().max()
            Q_next = torch.where(is_rounding, random_block(n, block, Q, SEED + step), Q_next)
            orthogonalize(team, Q[:, :size], Q_next)
            Q_next, _ = orthonormal(team, Q_next)
        newest = Q_next
        Q[:, size : size + block] = newest
        size += block


def _steps_to_go(angles: list[tuple[int, float]], tolerance: float) -> int:
    """When to try again, by how fast the bound on the angle has fallen between the last two trials."""
    if len(angles) < 2 or not angles[-1][1] < angles[-2][1]:
        return TRIALS_APART
    (before, wide), (now, narrow) = angles[-2:]
    per_step = log(wide / narrow) / (now - before)
    return min(max(ceil(log(narrow / tolerance) / per_step), 1), 2 * TRIALS_APART)


def orthogonalize(team: Team, Q: Tensor, Z: Tensor) -> Tensor:
    """Takes what lies in the span of Q out of Z, twice, and returns the coefficients."""
    coefficients = torch.zeros(Q.shape[1], Z.shape[1], dtype=Z.dtype, device=Z.device)
    for _ in range(2):
        part = transposed_times(team, Q, Z)
        subtract_product(team, Z, Q, part)
        coefficients += part
    return coefficients


def _ritz(Q: Tensor, H: Tensor, B: Tensor, wanted: int, tolerance: float, steps: int) -> RitzPairs:
    values, coefficients = torch.linalg.eigh((H.triu() + H.triu(1).T).cpu())  # too small for a GPU
    values, coefficients = values.flip(0).to(Q.device), coefficients.flip(1).to(Q.device)
    residuals = torch.linalg.vector_norm(B @ coefficients[-B.shape[1] :, :wanted], dim=0)
    neighbour = values[wanted] if wanted < len(values) else values[-1]
    gaps = (values[:wanted] - neighbour).clamp(min=torch.finfo(values.dtype).tiny)
    rounding = torch.finfo(values.dtype).eps * float(values[0])
    return RitzPairs(
        basis=Q,
        values=values,
        coefficients=coefficients,
        angle=(angle := float(torch.linalg.vector_norm((residuals + rounding) / gaps))),
        converged=angle <= tolerance or float(residuals.max()) <= 8 * rounding,
        steps=steps,
    )
