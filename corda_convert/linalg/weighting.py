"""What a weight is multiplied with before its left singular vectors are taken: the T of `W T`, one for each method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from corda_convert.linalg.panels import Cholesky, damped, in_float64, right_product, times, transposed_times
from corda_convert.linalg.threads import Team


class Weighting(Protocol):
    """A (d_in, d_in) matrix T, applied to float64 columns."""

    def times(self, team: Team, X: Tensor) -> Tensor:
        """`T X`, X (d_in, k)."""
        ...

    def transposed_times(self, team: Team, X: Tensor) -> Tensor:
        """`Tᵀ X`, X (d_in, k)."""
        ...

    def product(self, team: Team, W: Tensor) -> Tensor:
        """`W T` (m, d_in) itself, float64: W (m, d_in) of any floating dtype."""
        ...


@dataclass(frozen=True, slots=True)
class NoWeighting:
    """T = I: the plain SVD of the weight."""

    def times(self, team: Team, X: Tensor) -> Tensor:
        return X.clone()

    def transposed_times(self, team: Team, X: Tensor) -> Tensor:
        return X.clone()

    def product(self, team: Team, W: Tensor) -> Tensor:
        return in_float64(team, W)


@dataclass(frozen=True, slots=True)
class DiagonalWeighting:
    """T = diag(scale), (d_in,) float64: ASVD's (arXiv:2312.05821)."""

    scale: Tensor

    def times(self, team: Team, X: Tensor) -> Tensor:
        return self.scale[:, None] * X

    def transposed_times(self, team: Team, X: Tensor) -> Tensor:
        return self.times(team, X)

    def product(self, team: Team, W: Tensor) -> Tensor:
        return in_float64(team, W).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class CovarianceWeighting:
    """T = C + λI: CorDA's (its eq. 2, with damping). C is (d_in, d_in), symmetric, of any floating dtype."""

    covariance: Tensor
    damping: float

    def times(self, team: Team, X: Tensor) -> Tensor:
        return times(team, self.covariance, X, damping=self.damping)

    def transposed_times(self, team: Team, X: Tensor) -> Tensor:
        return self.times(team, X)

    def product(self, team: Team, W: Tensor) -> Tensor:
        return right_product(team, W, lambda columns: damped(self.covariance, columns, self.damping).T)


@dataclass(frozen=True, slots=True)
class RootWeighting:
    """T = L with `L Lᵀ = C`, which has the left singular vectors of `W C^½`: SVD-LLM's (arXiv:2403.07378)."""

    L: Tensor

    def times(self, team: Team, X: Tensor) -> Tensor:
        return times(team, self.L, X)

    def transposed_times(self, team: Team, X: Tensor) -> Tensor:
        return transposed_times(team, self.L, X)

    def product(self, team: Team, W: Tensor) -> Tensor:
        return right_product(team, W, lambda columns: self.L[:, columns])


MOST_SHIFT = 0.1
"""Of the largest diagonal entry: more than bfloat16's rounding can make a covariance indefinite by."""


def root_weighting(team: Team, covariance: Tensor) -> tuple[RootWeighting, float]:
    """SVD-LLM's weighting, and what had to be added to the diagonal for it: 0 but for a singular covariance.

    The first trial is the float32 resolution of the largest diagonal entry, below what a stored covariance can tell. Raises
    `torch.linalg.LinAlgError` where a `MOST_SHIFT` of it does not suffice: then it is none.
    """
    largest = float(covariance.diagonal().double().max())
    shift = 0.0
    while largest > 0.0 and shift <= MOST_SHIFT * largest:
        G = covariance.to(torch.float64, copy=True)
        G.diagonal().add_(shift)
        factor = Cholesky.of(team, G)
        if factor is not None:
            return RootWeighting(factor.lower()), shift
        shift = 2 * shift if shift else torch.finfo(torch.float32).eps * largest
    raise torch.linalg.LinAlgError("the covariance is not positive semidefinite")  # type: ignore[attr-defined]
