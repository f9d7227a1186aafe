"""The best product of lower rank for a product of factors, and for a dense matrix; never through a full SVD.

`ΔW = L R` with L (d_out, n) and R (n, d_in) has the singular values of its core `R_L R_Rᵀ` (n, n), from the triangles of
`L = Q_L R_L` and `Rᵀ = Q_R R_R`: nothing of size d_out × d_in is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt

import torch
from torch import Tensor

from corda_convert.linalg.panels import PANEL, times
from corda_convert.linalg.subspace import fix_signs, left_subspace
from corda_convert.linalg.threads import Team
from corda_convert.linalg.weighted_matrix import WeightedMatrix
from corda_convert.linalg.weighting import NoWeighting, RootWeighting, root_weighting


@dataclass(frozen=True, slots=True)
class Core:
    """`ΔW = left_basis · core · right_basisᵀ`, all float64, both bases with orthonormal columns.

    Attributes:
        left_basis: (d_out, p).
        core: (p, q).
        right_basis: (d_in, q).
        gram: `right_basisᵀ C right_basis` (q, q) for the covariance C of the inputs; None where the plain error counts.
        resolution: of the dtype that C is stored in: what its rounding may have put into directions that no sample had.
    """

    left_basis: Tensor
    core: Tensor
    right_basis: Tensor
    gram: Tensor | None = None
    resolution: float = 0.0

    def spectrum(self) -> Tensor:
        """Singular values, falling, of `ΔW`, or of `ΔW C^½`."""
        if self.gram is None:
            values: Tensor = torch.linalg.svdvals(self.core)
            return values
        return _weighted_vectors(self.core, self.gram, self.resolution)[1]


def core_of(team: Team, left: Tensor, right: Tensor, covariance: Tensor | None = None) -> Core:
    """The core of `left @ right`: (d_out, n) and (n, d_in), float64. `covariance` is (d_in, d_in) of any floating dtype."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def factorize(side: str) -> None:
        found[side] = torch.linalg.qr(left if side == "left" else right.T)

    team.all(factorize, ("left", "right"))
    (left_basis, upper), (right_basis, lower) = found["left"], found["right"]
    if covariance is None:
        return Core(left_basis, upper @ lower.T, right_basis)
    gram = right_basis.T @ times(team, covariance, right_basis.contiguous())
    return Core(left_basis, upper @ lower.T, right_basis, (gram + gram.T) / 2, torch.finfo(covariance.dtype).eps)


@dataclass(frozen=True, slots=True)
class Reduced:
    """`lora_B @ lora_A` of the chosen rank, float64, both of the same norms, and what it misses.

    Attributes:
        lora_A: (rank, d_in).
        lora_B: (d_out, rank).
        spectrum: singular values, falling, of what was minimized: of `ΔW`, or of `ΔW C^½`.
    """

    lora_A: Tensor
    lora_B: Tensor
    spectrum: Tensor


def reduced(found: Core, rank: int) -> Reduced:
    """The product of that rank with the least error: of `ΔW`, or of the outputs, `‖(ΔW − BA) C^½‖`.

    In both cases it is `U Uᵀ ΔW`, U the left singular vectors of `ΔW` or `ΔW C^½`, which are eigenvectors of
    `ΔW C ΔWᵀ`: no root and no inverse of C is needed, and C may be singular. Vectors that C does not see are chosen by the
    plain error.
    """
    if found.gram is None:
        U, spectrum, _ = torch.linalg.svd(found.core, full_matrices=False)
    else:
        U, spectrum = _weighted_vectors(found.core, found.gram, found.resolution)
    rank = min(rank, U.shape[1])
    U = U[:, :rank]
    left, values, right = torch.linalg.svd(U.T @ found.core, full_matrices=False)
    root = values.sqrt()
    lora_A = (root[:, None] * right) @ found.right_basis.T
    lora_B = found.left_basis @ (U @ left * root)
    return Reduced(*_signed(lora_A, lora_B), spectrum)


def _weighted_vectors(core: Tensor, gram: Tensor, resolution: float) -> tuple[Tensor, Tensor]:
    """Left singular vectors (p, m) and singular values of `core · gram^½`, falling; then those that it does not see.

    Squares of singular values that the rounding of C alone may give are taken for zero, and those vectors follow by the plain
    core.
    """
    squares, vectors = torch.linalg.eigh(core @ gram @ core.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    most = min(core.shape)
    largest = torch.linalg.eigvalsh(gram)[-1] * torch.linalg.matrix_norm(core, ord=2).square()
    floor = max(resolution, len(squares) * torch.finfo(squares.dtype).eps) * largest
    alive = min(int((squares > floor).sum()), most)
    seen = vectors[:, :alive]
    values = torch.zeros(most, dtype=core.dtype, device=core.device)
    values[:alive] = squares[:alive].sqrt()
    if alive == most:
        return seen, values
    rest = core - seen @ (seen.T @ core)
    unseen = torch.linalg.svd(rest, full_matrices=False)[0][:, : most - alive]
    basis = torch.linalg.qr(torch.cat([seen, unseen], dim=1)).Q
    return basis, values


def _signed(lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the largest entry of each of B's columns positive: the same factors from every library."""
    lora_B, signs = fix_signs(lora_B)
    return lora_A * signs.T, lora_B


def product_norm(team: Team, left: Tensor, right: Tensor, covariance: Tensor | None = None) -> float:
    """`‖L R‖_F`, or `‖L R C^½‖_F`, of L (d_out, n) and R (n, d_in) in float64, without forming it.

    Of nearly cancelling parts in L and R it keeps what is left, to 1e-15 of the parts; 1e-8 of them with C.
    """
    if covariance is not None:
        gram = right @ times(team, covariance, right.T.contiguous())
        return sqrt(max(float((left.T @ left * gram).sum()), 0.0))
    triangles: dict[str, Tensor] = {}

    def triangle(side: str) -> None:
        triangles[side] = torch.linalg.qr(left if side == "left" else right.T, mode="r").R

    team.all(triangle, ("left", "right"))
    return float(torch.linalg.matrix_norm(triangles["left"] @ triangles["right"].T))


def rank_for_energy(spectrum: Tensor, energy: float, total: float | None = None) -> int | None:
    """The smallest rank whose singular values hold `energy` of the sum of all squares; 0 for a zero matrix.

    `total` is that sum where the spectrum is not whole; None where it does not suffice then.
    """
    squares = spectrum.double().square()
    whole = float(squares.sum()) if total is None else total
    if whole == 0.0:
        return 0
    kept = squares.cumsum(0) >= energy * whole * (1 - 1e-12)
    return int(kept.to(torch.uint8).argmax()) + 1 if bool(kept.any()) else None


@dataclass(frozen=True, slots=True)
class Extracted:
    """The best factors of a dense matrix, and how its own solver judges them.

    Attributes:
        lora_A: (rank, d_in), float64.
        lora_B: (d_out, rank), float64, of the same norms.
        error: `‖ΔW − BA‖_F`, exact.
        norm: `‖ΔW‖_F`.
        weighted_error: `‖(ΔW − BA) C^½‖_F`; None without C.
        weighted_norm: `‖ΔW C^½‖_F`; None without C.
        solver: its name.
        certificate: what `left_subspace` knows of the singular vectors.
    """

    lora_A: Tensor
    lora_B: Tensor
    error: float
    norm: float
    weighted_error: float | None
    weighted_norm: float | None
    solver: str
    certificate: dict[str, float | bool | None]


def extracted(team: Team, matrix: Tensor, rank: int, covariance: Tensor | None = None) -> Extracted:
    """The factors of that rank with the least error of a dense (d_out, d_in) matrix of any floating dtype.

    By block Lanczos or all eigenvectors, as `left_subspace` chooses, with its certificate.
    """
    weighting: NoWeighting | RootWeighting = NoWeighting()
    if covariance is not None:
        weighting, _ = root_weighting(team, covariance)
    if not bool(matrix.any()):
        zero_A = torch.zeros(rank, matrix.shape[1], dtype=torch.float64, device=matrix.device)
        zero_B = torch.zeros(matrix.shape[0], rank, dtype=torch.float64, device=matrix.device)
        weighted = None if covariance is None else 0.0
        return Extracted(zero_A, zero_B, 0.0, 0.0, weighted, weighted, "none", {"holds": True})
    found = left_subspace(team, WeightedMatrix(matrix, weighting), rank=rank, end="top")
    left, values, right = torch.linalg.svd(found.projected.T, full_matrices=False)
    root = values.sqrt()
    lora_A, lora_B = _signed(root[:, None] * right, found.U @ left * root)
    error, norm = difference_norms(team, matrix, lora_B, lora_A)
    weighted_error, weighted_norm = None, None
    if isinstance(weighting, RootWeighting):
        total = _square(team, matrix, weighting)
        missed = total - float(found.singular_values.square().sum())  # what is kept is UUᵀ of the whole
        weighted_error, weighted_norm = sqrt(max(missed, 0.0)), sqrt(total)
    return Extracted(
        lora_A,
        lora_B,
        error,
        norm,
        weighted_error,
        weighted_norm,
        solver=found.solver,
        certificate={
            "residual": found.residual,
            "angle": found.angle,
            "orthonormality": found.orthonormality,
            "holds": found.is_certified,
        },
    )


def difference_norms(team: Team, matrix: Tensor, lora_B: Tensor, lora_A: Tensor) -> tuple[float, float]:
    """`‖M − BA‖_F` and `‖M‖_F` of M (d_out, d_in), by panels of rows, in float64."""
    sums: dict[int, tuple[float, float]] = {}

    def panel(rows: slice) -> None:
        own = matrix[rows].double()
        sums[rows.start] = _norm(own - lora_B[rows] @ lora_A) ** 2, _norm(own) ** 2

    team.each(panel, matrix.shape[0], PANEL)
    missed, whole = (sqrt(fsum(sums[row][place] for row in sorted(sums))) for place in (0, 1))
    return missed, whole


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def _square(team: Team, matrix: Tensor, weighting: NoWeighting | RootWeighting) -> float:
    """`‖M T‖_F²`, by panels of rows, in float64."""
    sums: dict[int, float] = {}

    def panel(rows: slice) -> None:
        own = matrix[rows].double()
        sums[rows.start] = _norm(own @ weighting.L if isinstance(weighting, RootWeighting) else own) ** 2

    team.each(panel, matrix.shape[0], PANEL)
    return fsum(sums.values())


def energy_rank(team: Team, matrix: Tensor, energy: float, covariance: Tensor | None, most: int) -> int:
    """The smallest rank of a dense matrix that holds `energy` of its square, or of that of `ΔW C^½`; `most` at most."""
    weighting: NoWeighting | RootWeighting = NoWeighting()
    if covariance is not None:
        weighting, _ = root_weighting(team, covariance)
    total = _square(team, matrix, weighting)
    if total == 0.0:
        return 0
    most = min(most, *matrix.shape)
    for rank in _growing(most):
        found = left_subspace(team, WeightedMatrix(matrix, weighting), rank=rank, end="top")
        chosen = rank_for_energy(found.singular_values, energy, total)
        if chosen is not None:
            return chosen
    return most


def _growing(most: int) -> Sequence[int]:
    """Ranks to try: 64, then four times as many, and at last the most."""
    ranks = []
    rank = 64
    while rank < most:
        ranks.append(rank)
        rank *= 4
    return [*ranks, most]
