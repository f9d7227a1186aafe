"""What a subspace takes out of a weight: the factors of `U Uᵀ W`, and the residual."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum, isfinite

import torch
from torch import Tensor

from corda_convert.linalg.panels import PANEL
from corda_convert.linalg.scratch import scratch
from corda_convert.linalg.subspace import Subspace
from corda_convert.linalg.threads import Team


@dataclass(frozen=True, slots=True)
class Factors:
    """`lora_A` (rank, d_in) and `lora_B` (d_out, rank), float32, with `scaling · lora_B @ lora_A = U Uᵀ W`."""

    lora_A: Tensor
    lora_B: Tensor
    zero_components: int


def balanced_factors(found: Subspace, *, scaling: float) -> Factors:
    """Splits the projection `U Uᵀ W` evenly: `B = U Σ^½ / √s`, `A = Σ^-½ Uᵀ W / √s` (CorDA, eq. 4; Σ Vᵀ C⁻¹ = Uᵀ W).

    A singular value that is zero in float64 does not divide: its component is zero, so it stays in the residual.
    """
    sigma = found.singular_values
    alive = sigma > found.largest * torch.finfo(torch.float64).eps
    root = torch.where(alive, sigma, torch.ones_like(sigma)).sqrt()
    A = found.projected.T / root[:, None] * alive[:, None]
    B = found.U * root * alive
    share = scaling**-0.5
    return Factors((A * share).float(), (B * share).float(), int((~alive).sum()))


@dataclass(frozen=True, slots=True)
class Norms:
    """Squared Frobenius norms: of the weight, of what was taken out of it, and of what rounding the rest cost."""

    weight: float
    delta: float
    rounding: float

    @property
    def is_finite(self) -> bool:
        """Whether the rest was inside the range of the dtype that it was rounded to."""
        return isfinite(self.weight + self.delta + self.rounding)


def write_residual(team: Team, W: Tensor, factors: Factors, *, scaling: float, out: Tensor) -> Norms:
    """`W − s·B·A` in float64, with the factors as they are stored, rounded once into `out` (d_out, d_in)."""
    B, A = factors.lora_B.double(), factors.lora_A.double()
    sums: dict[int, tuple[float, float, float]] = {}

    def panel(rows: slice) -> None:
        shape = (rows.stop - rows.start, W.shape[1])
        exact = scratch("weight", shape, A).copy_(W[rows])
        delta = torch.mm(B[rows], A, out=scratch("delta", shape, A)).mul_(scaling)
        squares = _square(exact), _square(delta)
        exact.sub_(delta)
        out[rows] = exact
        sums[rows.start] = (*squares, _square(exact.sub_(delta.copy_(out[rows]))))

    team.each(panel, W.shape[0], PANEL)
    return Norms(*(fsum(sums[row][place] for row in sorted(sums)) for place in range(3)))


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
