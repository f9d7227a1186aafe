"""Singular subspaces of a weighted matrix, and the decomposition of a weight along one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

End = Literal["top", "bottom"]
"""`top`: the largest singular values (CorDA's ipm, PiSSA). `bottom`: the smallest (CorDA's kpm)."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """Left singular vectors at one end of a spectrum, by falling singular value.

    Attributes:
        U: (d_out, rank), orthonormal columns, each with its largest entry positive.
        singular_values: (rank,), the norms of `Uᵀ M`.
        spectrum: (min(d_out, d_in),), all singular values, falling.
        residual: the largest `‖M Mᵀ u − σ² u‖ / σ_max²` over the columns.
        orthonormality: the largest entry of `|UᵀU − I|`.
    """

    U: Tensor
    singular_values: Tensor
    spectrum: Tensor
    residual: float
    orthonormality: float


def load_solvers() -> None:
    """Runs each solver on a tiny problem, so that what LAPACK loads late is in memory before that is planned."""
    for shape in ((2, 3), (3, 2)):
        for end in ("top", "bottom"):
            left_subspace(torch.eye(*shape, dtype=torch.float64), rank=1, end=end)


def left_subspace(M: Tensor, *, rank: int, end: End) -> Subspace:
    """The `rank` left singular vectors of `M` (d_out, d_in) at one end of its spectrum.

    Dense float64 eigenvectors of the Gram matrix of the smaller side (design: "every method here is one projection").
    A tall matrix is first reduced by QR for its bottom end, since its own Gram matrix has a null space of
    d_out − d_in dimensions that swallows the smallest vectors.

    `rank` is at most min(d_out, d_in). The cost is that of one Gram matrix and one `eigh`.
    """
    M = M.to(torch.float64)
    d_out, d_in = M.shape
    if d_out <= d_in:
        U, spectrum = _gram_vectors(M, rank, end)
    elif end == "top":
        V, spectrum = _gram_vectors(M.T, rank, end)
        U = torch.linalg.qr(M @ V).Q
    else:
        reflectors, tau = torch.geqrf(M)
        small, spectrum = _gram_vectors(reflectors[:d_in].triu(), rank, end)
        padded = torch.zeros(d_out, rank, dtype=M.dtype, device=M.device)
        padded[:d_in] = small
        U = torch.ormqr(reflectors, tau, padded)
    U = fix_signs(U)
    return _certify(M, U, spectrum)


def _gram_vectors(M: Tensor, rank: int, end: End) -> tuple[Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(M @ M.T)
    spectrum = eigenvalues.clamp(min=0).sqrt().flip(0)
    chosen = vectors[:, -rank:] if end == "top" else vectors[:, :rank]
    return chosen.flip(1).contiguous(), spectrum


def _certify(M: Tensor, U: Tensor, spectrum: Tensor) -> Subspace:
    projected = M.T @ U
    singular_values = torch.linalg.vector_norm(projected, dim=0)
    scale = float(spectrum[0]) ** 2
    residuals = torch.linalg.vector_norm(M @ projected - U * singular_values.square(), dim=0)
    identity = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return Subspace(
        U=U,
        singular_values=singular_values,
        spectrum=spectrum,
        residual=float(residuals.max()) / scale if scale > 0 else 0.0,
        orthonormality=float((U.T @ U - identity).abs().max()),
    )


def fix_signs(U: Tensor) -> Tensor:
    """Turns each column so that its entry of largest magnitude is positive: the same vectors from every solver."""
    rows = U.abs().argmax(dim=0, keepdim=True)
    signs = torch.sign(U.gather(0, rows))
    return U * torch.where(signs == 0, torch.ones_like(signs), signs)


@dataclass(frozen=True, slots=True)
class Factors:
    """`lora_A` (rank, d_in) and `lora_B` (d_out, rank), float32, with `scaling · lora_B @ lora_A = U Uᵀ W`."""

    lora_A: Tensor
    lora_B: Tensor
    zero_components: int


def balanced_factors(weight: Tensor, subspace: Subspace, *, scaling: float) -> Factors:
    """Splits the projection `U Uᵀ W` evenly: `B = U Σ^½ / √s`, `A = Σ^-½ Uᵀ W / √s` (CorDA, eq. 4; Σ Vᵀ C⁻¹ = Uᵀ W).

    `weight` is (d_out, d_in) float64. A singular value that is zero in float64 does not divide: its component is
    zero, so it stays in the residual.
    """
    sigma = subspace.singular_values
    floor = float(subspace.spectrum[0]) * torch.finfo(torch.float64).eps
    alive = sigma > floor
    root = torch.where(alive, sigma, torch.ones_like(sigma)).sqrt()
    A = (subspace.U.T @ weight) / root[:, None] * alive[:, None]
    B = subspace.U * root * alive
    share = scaling**-0.5
    return Factors((A * share).float(), (B * share).float(), int((~alive).sum()))


def residual(weight: Tensor, factors: Factors, *, scaling: float) -> Tensor:
    """`W − s·B·A` in float64, with the factors as they are stored, so that the sum gives `W` back up to one rounding."""
    return torch.addmm(weight, factors.lora_B.double(), factors.lora_A.double(), alpha=-scaling)


def subspace_distance(U: Tensor, reference: Tensor) -> float:
    """The sine of the largest principal angle between the column spaces of two (d, rank) matrices."""
    Q = torch.linalg.qr(U.double()).Q
    P = torch.linalg.qr(reference.double()).Q
    return float(torch.linalg.matrix_norm(P - Q @ (Q.T @ P), ord=2))
