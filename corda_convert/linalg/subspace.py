"""Left singular vectors of `M = W T` at one end of its spectrum, with a certificate, by the solver that suits the problem.

- `block-lanczos` (top): applies `W T Tᵀ Wᵀ` to small blocks; M is never formed.
- `shift-invert-lanczos` (bottom): a Cholesky factor of the Gram matrix, shifted to just below its smallest eigenvalue, so
  that convergence does not depend on how far the smallest ones stand apart relative to their size.
- `deflated-lanczos` (top), `deflated-shift-invert` (bottom): the same on what is left of M without a few outliers, where
  these are so large that rounding of their squares hides the wanted ones.
- `inverse-lanczos-qr` (bottom): the triangle of a QR factorization of Mᵀ instead, where M is so ill-conditioned that its
  Gram matrix has lost the smallest ones: their squares are below float64's resolution of the largest.
- `dense-eigh`: all eigenvectors of the Gram matrix: for small problems, a large rank, or where Lanczos fails at the top.
- `dense-svd`: the whole SVD: where nothing else has a certificate that holds.

Each ends with a Rayleigh-Ritz step on M itself, not on its square, and with residuals of M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from corda_convert.linalg.lanczos import RitzPairs, block_lanczos, orthogonalize, random_block
from corda_convert.linalg.panels import (
    LARGE_TILE,
    PANEL,
    Cholesky,
    ShiftedFactors,
    cholesky_factor,
    gram,
    in_float64,
    orthonormal,
    times,
)
from corda_convert.linalg.threads import Team
from corda_convert.linalg.weighted_matrix import Images, RecordedSquare, WeightedMatrix
from corda_convert.linalg.weighting import NoWeighting

End = Literal["top", "bottom"]
"""`top`: the largest singular values (CorDA's ipm, PiSSA). `bottom`: the smallest (CorDA's kpm)."""

Solver = Literal["auto", "dense", "krylov"]

DENSE_SIDE = 512
"""Up to this side all eigenvectors take no longer than some."""

DENSE_SHARE = {"top": 7, "bottom": 12}
"""From a rank of side / this on, too (measured on two CPU cores)."""

MOST_PER_RANK = 6
"""An iteration's basis has at most this times the rank of vectors, and some blocks; then it has not converged."""

LEAST_BASIS = 512
"""At the top a basis may have so many vectors beyond that, whatever the block."""

TOLERANCE = 1e-3
"""Bound on the angle at which an iteration ends."""

ACCEPTED_ANGLE = 1e-2
"""A certificate holds up to this bound on the angle, which rounding of the residuals alone may bring to 1e-3."""

ACCEPTED_RELATIVE = 1e-4
"""Or up to this relative residual: then they are singular vectors, and if the angle is open, it is because the neighbour has
nearly the same singular value, so that it matters little which of them was taken."""

ZERO = 64 * torch.finfo(torch.float64).eps
"""Singular values below this times the largest are as good as zero."""


LEAST_SCALE, MOST_SCALE = 1e-70, 1e70
"""Fourth powers of singular values in this range, and sums of them, are float64 numbers."""

WELL_CONDITIONED = 1e-5
"""From this ratio of the triangle's diagonal on, two Cholesky factorizations give Q and R as well as Householder's do."""

MOST_LOST = 1e-9
"""One does up to this product of float64's resolution and the square of W's condition: so much at most, times a small factor,
are singular values off, relative to their size."""

SHIFTS = (0.95, 0.8, 0.5)
"""Shares of the estimate of the smallest eigenvalue, which is never too small, that are tried as shifts."""

ESTIMATE_BLOCK, ESTIMATE_STEPS = 8, 6
"""For that estimate, some percent above."""

PROBES = 16
"""Random vectors for an estimate of what was not seen."""


OUTLIERS = 8
"""So many singular values at most are taken for outliers."""

OUTLYING = 1e2
"""What makes one: more than this times the first that is none."""


@dataclass(frozen=True, slots=True)
class Subspace:
    """Left singular vectors at one end of a spectrum, by falling singular value.

    Attributes:
        U: (d_out, rank), orthonormal columns, each with its largest entry positive.
        projected: (d_in, rank), `Wᵀ U`.
        singular_values: (rank,), the norms of `Mᵀ U`.
        neighbour: the singular value next to them, which was not taken; None if all were.
        largest: the largest singular value.
        smallest: the smallest one; None where the solver does not see it.
        energy: `‖M‖_F²`; beyond what the solver saw an estimate, where `energy_is_estimated`.
        solver: its name.
        fallback_from: solvers that were tried before and did not get there.
        steps: how often an operator was applied to a block; None for a dense solver.
        residual: the largest `‖(I − U Uᵀ) M Mᵀ u‖ / σ_max²` over the columns, without what lies along deflated outliers.
        relative: the largest `‖(I − U Uᵀ) M Mᵀ u‖ / σ²` over the columns whose σ is not as good as zero.
        angle: a bound on the sine of the largest angle to the true subspace: the norm of `‖residual‖ / |σ² − neighbour²|`
            over the columns; None without a neighbour. Since such residuals are at best `eps · σ_max²`, the solvers that
            are there for far smaller σ have their own: the same with `(M Mᵀ)⁻¹`, or Wedin's bound of a backward stable SVD.
        orthonormality: the largest entry of `|UᵀU − I|`.
    """

    U: Tensor
    projected: Tensor
    singular_values: Tensor
    neighbour: float | None
    largest: float
    smallest: float | None
    energy: float
    energy_is_estimated: bool
    solver: str
    fallback_from: tuple[str, ...]
    steps: int | None
    residual: float
    relative: float
    angle: float | None
    orthonormality: float

    @property
    def is_certified(self) -> bool:
        """Whether the residuals say that these are singular vectors, and the wanted ones."""
        return self.orthonormality < 1e-9 and (
            self.angle is None or self.angle <= ACCEPTED_ANGLE or self.relative <= ACCEPTED_RELATIVE
        )


@dataclass(frozen=True, slots=True)
class _Candidates:
    """What a solver found: orthonormal columns that hold the wanted vectors, and some of their neighbours.

    `angle` is a bound that the solver knows of its own, up to the rounding of M, where it is better than what residuals of
    `M Mᵀ` can tell. `outliers` are singular vectors at the other end that V is orthogonal to. `images` are those of V, where
    the solver knows them already.
    """

    V: Tensor
    solver: str
    energy: float
    energy_is_estimated: bool = False
    largest: float | None = None
    steps: int | None = None
    spectrum: Tensor | None = None
    angle: float | None = None
    outliers: Tensor | None = None
    images: Images | None = None


def load_solvers() -> None:
    """Runs each solver on a tiny problem, so that what LAPACK loads late is in memory before that is planned."""
    with Team(torch.device("cpu")) as team:
        for shape in ((9, 12), (12, 9)):
            W = random_block(*shape, torch.empty(0))
            ends: tuple[End, ...] = ("top", "bottom")
            for end in ends:
                left_subspace(team, WeightedMatrix(W, NoWeighting()), rank=1, end=end, solver="krylov")
                left_subspace(team, WeightedMatrix(W, NoWeighting()), rank=1, end=end, solver="dense")


def left_subspace(team: Team, M: WeightedMatrix, *, rank: int, end: End, solver: Solver = "auto") -> Subspace:
    """The `rank` left singular vectors of `M` (d_out, d_in) at one end of its min(d_out, d_in) singular values.

    `rank` is at most that. `solver` chooses what is tried first: the dense one, or Lanczos whatever the size. What is not
    certified is done again by the next one. Raises `torch.linalg.LinAlgError` where float64 does not hold the numbers.
    """
    d_out, d_in = M.W.shape
    if end == "bottom" and d_out > d_in:
        return _reduced(team, M, rank, solver)
    if end == "top":
        M = M.by_rows(team)  # which the bottom needs too seldom
    tried: list[Subspace] = []
    for candidates in _tries(team, M, rank, end, solver):
        tried.append(_finish(team, M, candidates, rank, end))
        if tried[-1].is_certified:
            break
    best = min(tried, key=_badness)
    return replace(best, fallback_from=tuple(each.solver for each in tried if each is not best))


def _tries(team: Team, M: WeightedMatrix, rank: int, end: End, solver: Solver) -> Iterator[_Candidates]:
    """Candidates by one solver after the other; the next is asked only where the last one's certificate does not hold."""
    side = min(M.W.shape)
    is_small = side <= DENSE_SIDE or DENSE_SHARE[end] * rank >= side
    is_tiny = side < max(2 * rank, 6 * _block(rank))
    if solver == "dense" or (solver == "auto" and is_small) or is_tiny:
        yield _dense(team, M, rank, end)
    elif end == "top":
        yield _top(team, M, rank)
        outliers, _ = _outliers(team, M)
        if 0 < (count := outliers.shape[1]) < rank:
            found = _top(team, replace(M, outliers=outliers), rank - count)
            V = _joined(team, outliers, found.V)
            energy = found.energy + float(M.adjoint(team, outliers).square().sum())
            yield replace(found, V=V, energy=energy, solver="deflated-lanczos", images=None)
        yield _dense(team, M, rank, end)
    else:
        yield from _bottom_tries(team, M, rank)
    yield _whole(team, M, rank, end)


def workspace_elements(shape: tuple[int, int], rank: int, end: End, solver: Solver) -> int:
    """Float64 numbers that `left_subspace` and what follows it hold at once, at most, for a W of this shape.

    M and W in float64, and W by rows in both directions, with a Gram matrix, its factor or eigenvectors and LAPACK's own
    workspace, and the basis; the dense solver may follow on any other.
    """
    d_out, d_in = shape
    side = min(shape)
    steps = 0 if solver == "dense" else MOST_PER_RANK * rank + 16 * 64
    recorded = 2 * (d_in + d_out) if end == "top" else 0
    basis = min(steps, side) * (d_out + recorded + 2 * min(steps, side))
    reduced = 2 * d_out * d_in if end == "bottom" and d_out > d_in else 0
    return (
        3 * d_out * d_in + reduced + 6 * side * side + basis + 8 * rank * (d_out + d_in) + 4 * LARGE_TILE * max(shape)
    )


def _reduced(team: Team, M: WeightedMatrix, rank: int, solver: Solver) -> Subspace:
    """The bottom of a tall M, whose own Gram matrix has a null space that swallows it: that of `R T`, for `W = Q R`.

    With R of one Cholesky factorization where W is well-conditioned: what little Q then lacks of being orthonormal is mended
    in the vectors. Else W is taken apart with more care.
    """
    if (R := _triangle(team, M.W)) is not None:
        small = left_subspace(team, WeightedMatrix(R, M.T), rank=rank, end="bottom", solver=solver)
        U = times(team, M.W, torch.linalg.solve_triangular(R, small.U, upper=True))
        overlap = U.T @ U
        overlap.diagonal().sub_(1.0)
        if float(overlap.abs().max()) <= 10 * MOST_LOST:
            return _of_tall(team, M, small, U - U @ (overlap / 2))
        del R, small, U
    basis, R = _orthonormal_basis(team, M.W)
    small = left_subspace(team, WeightedMatrix(R, M.T), rank=rank, end="bottom", solver=solver)
    return _of_tall(team, M, small, basis(small.U))


def _of_tall(team: Team, M: WeightedMatrix, small: Subspace, U: Tensor) -> Subspace:
    U, _ = fix_signs(U)
    return replace(small, U=U, projected=M.projected(team, U), orthonormality=_orthonormality(U))


def _triangle(team: Team, W: Tensor) -> Tensor | None:
    """The R of a tall `W = Q R`, from its Gram matrix; None where W is too ill-conditioned for that.

    Its diagonal would not tell (Kahan's matrices hide it): the smallest eigenvalue is estimated with the factor itself.
    """
    G = gram(team, in_float64(team, W))
    largest = _largest_eigenvalue(team, G)
    factor = Cholesky.of(team, G)
    if factor is None or largest <= 0.0:
        return None
    rough = _largest_of_inverse(team, factor)
    lost = torch.finfo(G.dtype).eps * largest * float(rough.values[0])
    return factor.lower().T if lost <= MOST_LOST else None


def _orthonormal_basis(team: Team, W: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """`W = Q R` of a tall W (d_out, d_in): what multiplies (d_in, k) with Q, and R.

    By two Cholesky factorizations (CholeskyQR2, doi:10.1137/1.9781611974690), products alone, where W is well-conditioned
    enough for that; else by Householder's.
    """
    Q = in_float64(team, W)
    first = _divide_by_triangle(team, Q)
    if first is not None and float(first.diagonal().min()) >= WELL_CONDITIONED * float(first.diagonal().max()):
        second = _divide_by_triangle(team, Q)
        if second is not None:
            return lambda X: times(team, Q, X), second @ first
    reflectors, tau = torch.geqrf(W.double())

    def apply(X: Tensor) -> Tensor:
        padded = torch.zeros(W.shape[0], X.shape[1], dtype=X.dtype, device=X.device)
        padded[: W.shape[1]] = X
        product: Tensor = torch.ormqr(reflectors, tau, padded)
        return product

    return apply, reflectors[: W.shape[1]].triu()


def _divide_by_triangle(team: Team, Q: Tensor) -> Tensor | None:
    """`Q ← Q R⁻¹` with the triangle R of `QᵀQ = RᵀR`, which it returns; None where that is not positive definite."""
    factor = cholesky_factor(team, gram(team, Q))
    if factor is None:
        return None
    R = factor.tril_().T

    def divide(rows: slice) -> None:
        Q[rows] = torch.linalg.solve_triangular(R, Q[rows], upper=True, left=False)

    team.each(divide, Q.shape[0], PANEL)
    return R


def _top(team: Team, M: WeightedMatrix, rank: int) -> _Candidates:
    d_out, d_in = M.W.shape
    side = min(d_out, d_in)
    block = _block(rank)
    start = M.forward(team, random_block(d_in, block, M.W))
    recorded = RecordedSquare(team, M) if M.outliers is None else None
    found = block_lanczos(
        team,
        recorded or (lambda U: M.square(team, U)),
        start,
        wanted=rank,
        most=min(side, MOST_PER_RANK * rank + max(8 * block, LEAST_BASIS)),
        tolerance=TOLERANCE,
    )
    adjoint = M.adjoint(team, _probes(team, found.basis))
    outside = float(adjoint.square().sum()) / PROBES  # Hutchinson's estimate, as in Hutch++, arXiv:2010.09649
    coefficients = found.coefficients[:, : _candidates(rank, len(found.values))]
    V = _joined(team, times(team, found.basis, coefficients), M.forward(team, adjoint))
    images = None
    if recorded is not None:
        images = recorded.images(coefficients, V[:, coefficients.shape[1] :].contiguous())
    return _Candidates(
        V=V,
        solver="block-lanczos",
        images=images,
        energy=float(found.values.sum()) + outside,
        energy_is_estimated=True,
        steps=found.steps,
    )


def _outliers(team: Team, M: WeightedMatrix) -> tuple[Tensor, float]:
    """Left singular vectors (d_out, k) of those singular values of M that stand far above all others, k ≤ `OUTLIERS`.

    And the square of the next singular value, roughly.
    """
    side = min(M.W.shape)
    found = block_lanczos(
        team,
        lambda U: M.square(team, U),
        M.forward(team, random_block(M.W.shape[1], OUTLIERS, M.W)),
        wanted=OUTLIERS,
        most=min(side, 16 * OUTLIERS),
        tolerance=TOLERANCE,
    )
    count = int((found.values[:OUTLIERS] > OUTLYING**2 * found.values[OUTLIERS]).sum())
    vectors = found.vectors(count)
    return orthonormal(team, vectors)[0] if count else vectors, float(found.values[count])


def _probes(team: Team, basis: Tensor) -> Tensor:
    """Random vectors without what lies in the span of an orthonormal basis.

    Of equal singular values Lanczos sees no more than its block has columns. What the operator makes of these vectors goes
    along with the candidates, where such a one that was missed shows among the wanted ones: as one with a large residual.
    """
    probes = random_block(basis.shape[0], 2 * PROBES, basis)[:, PROBES:].contiguous()
    orthogonalize(team, basis, probes)
    return probes


def _joined(team: Team, V: Tensor, others: Tensor) -> Tensor:
    """Orthonormal V (n, k) with orthonormal columns for what `others` (n, p) add to its span, n columns at most."""
    others = others[:, : V.shape[0] - V.shape[1]]
    for _ in range(2):  # the second time for those of which only rounding is left
        orthogonalize(team, V, others)
        others, _ = orthonormal(team, others)
    return torch.cat([V, others], dim=1)


def _bottom_tries(team: Team, M: WeightedMatrix, rank: int) -> Iterator[_Candidates]:
    """Candidates for the bottom of an M that is not tall, by one solver after the other."""
    G = gram(team, M.transposed(team))
    energy = float(G.diagonal().sum())
    if energy == 0.0:
        return
    largest = _largest_eigenvalue(team, G)
    factors = ShiftedFactors(team, G)
    if (factor := factors.factor(0.0)) is not None:
        yield from _shift_inverted(team, factors, factor, rank, energy, largest)
    del factor, factors, G
    outliers, beside = _outliers(team, M)
    if outliers.shape[1] > 0:
        G = gram(team, replace(M, outliers=outliers).transposed(team)).addmm_(outliers, outliers.T, alpha=beside)
        factors = ShiftedFactors(team, G)
        if (factor := factors.factor(0.0)) is not None:
            for found in _shift_inverted(team, factors, factor, rank, energy, largest):
                orthogonalize(team, outliers, found.V)
                yield replace(found, V=orthonormal(team, found.V)[0], outliers=outliers, solver="deflated-shift-invert")
        del factor, factors, G
    R = torch.linalg.qr(M.transposed(team), mode="r").R
    least = float(R.diagonal().abs().max()) * torch.finfo(R.dtype).eps
    diagonal = R.diagonal()
    diagonal[diagonal.abs() < least] = least
    V, steps, angle = _inverted(team, Cholesky(team, R.T.contiguous()), rank)
    yield _Candidates(V, "inverse-lanczos-qr", energy, largest=largest, steps=steps, angle=angle)


def _largest_eigenvalue(team: Team, G: Tensor) -> float:
    start = random_block(G.shape[0], min(8, G.shape[0]), G)
    found = block_lanczos(team, lambda X: times(team, G, X), start, wanted=1, most=min(G.shape[0], 64), tolerance=1e-2)
    return float(found.values[0])


def _largest_of_inverse(team: Team, factor: Cholesky) -> RitzPairs:
    """The largest eigenvalue of `G⁻¹`, roughly; it is never larger than the true one."""
    start = random_block(factor.side, min(ESTIMATE_BLOCK, factor.side), factor.like)
    most = min(factor.side, ESTIMATE_STEPS * ESTIMATE_BLOCK)
    return block_lanczos(team, factor.solve, start, wanted=1, most=most, tolerance=TOLERANCE)


def _shift_inverted(
    team: Team, factors: ShiftedFactors, factor: Cholesky, rank: int, energy: float, largest: float
) -> Iterator[_Candidates]:
    """Lanczos with `(G − μI)⁻¹`, μ just below the smallest eigenvalue of G; with `G⁻¹`, if G has none above rounding.

    `factor` is that of G. Gives nothing where no shifted G has a factor, not even that of 0, which rounding may take away.
    """
    rough = _largest_of_inverse(team, factor)
    smallest = 1.0 / float(rough.values[0])
    for shift in (*(share * smallest for share in SHIFTS), 0.0):
        if (closer := factors.factor(shift)) is not None:
            closer.take_upper()
            V, steps, _ = _inverted(team, closer, rank)
            yield _Candidates(V, "shift-invert-lanczos", energy, largest=largest, steps=rough.steps + steps)
            return


def _inverted(team: Team, factor: Cholesky, rank: int) -> tuple[Tensor, int, float]:
    """Candidates for the bottom, orthonormal, the number of steps that they took, and the bound on their angle.

    One more solve at the end: it takes out what little the vectors hold of the largest ones, which M would amplify.
    """
    block = _inverse_block(rank)
    start = random_block(factor.side, block, factor.like)
    most = min(factor.side, MOST_PER_RANK * rank + 16 * block)
    found = block_lanczos(team, factor.solve, start, wanted=rank, most=most, tolerance=TOLERANCE)
    V, _ = orthonormal(team, factor.solve(found.vectors(_candidates(rank, len(found.values)))))
    others = factor.solve(factor.solve(_probes(team, found.basis)))
    return _joined(team, V, others), found.steps + 1, found.angle


def _block(rank: int) -> int:
    """Columns of a block: the more the faster each product, the fewer the sooner it converges."""
    return min(max(-(-3 * rank // 8) // 8 * 8, 8), 64)


def _inverse_block(rank: int) -> int:
    """The same with an inverse, where more steps are needed."""
    return min(max(-(-rank // 4) // 8 * 8, 8), 64)


def _candidates(rank: int, available: int) -> int:
    """So many vectors go into the last Rayleigh-Ritz step: those beyond the rank take up what errors they hold."""
    return min(available, rank + max(rank // 2, 8))


def _dense(team: Team, M: WeightedMatrix, rank: int, end: End) -> _Candidates:
    d_out, d_in = M.W.shape
    Mt = M.transposed(team)
    G = gram(team, Mt.T if d_out > d_in else Mt)
    energy = float(G.diagonal().sum())
    eigenvalues, vectors = torch.linalg.eigh(G)
    del G
    spectrum = eigenvalues.clamp(min=0).sqrt().flip(0)
    count = _candidates(rank, len(spectrum))
    chosen = vectors[:, -count:] if end == "top" else vectors[:, :count]
    if d_out > d_in:
        chosen, _ = orthonormal(team, M.forward(team, chosen))
    return _Candidates(chosen, "dense-eigh", energy, spectrum=spectrum)


def _whole(team: Team, M: WeightedMatrix, rank: int, end: End) -> _Candidates:
    """By the SVD of Mᵀ, which keeps singular values whose squares a Gram matrix loses."""
    _, spectrum, Uh = torch.linalg.svd(M.transposed(team), full_matrices=False)
    count = _candidates(rank, len(spectrum))
    chosen = Uh.T[:, :count] if end == "top" else Uh.T[:, -count:]
    return _Candidates(chosen, "dense-svd", float(spectrum.square().sum()), spectrum=spectrum, angle=0.0)


def _finish(team: Team, M: WeightedMatrix, found: _Candidates, rank: int, end: End) -> Subspace:
    """The wanted ones of the candidates, by the singular values of M on them."""
    Y = M.projected(team, found.V) if found.images is None else found.images.projected
    P = M.T.transposed_times(team, Y) if found.images is None else found.images.adjoint
    values, coefficients = _right_singular(team, P)
    wanted, neighbour = (slice(0, rank), rank) if end == "top" else (slice(-rank, None), len(values) - rank - 1)
    coefficients = coefficients[:, wanted]
    U, signs = fix_signs(times(team, found.V, coefficients))
    coefficients = coefficients * signs
    largest = float(values[0]) if end == "top" else (found.largest or 0.0) ** 0.5
    smallest = float(values[-1]) if end == "bottom" else None
    if found.spectrum is not None:
        largest, smallest = float(found.spectrum[0]), float(found.spectrum[-1])
    scale = max(largest, float(values[0]))
    if scale > 0.0 and not LEAST_SCALE < scale < MOST_SCALE:
        raise torch.linalg.LinAlgError("fourth powers of singular values are outside float64's range")  # type: ignore[attr-defined]
    beside = float(values[neighbour]) if 0 <= neighbour < len(values) else None
    projected, adjoint = times(team, Y, coefficients), times(team, P, coefficients)
    known = found.images
    square = M.forward(team, adjoint) if known is None else times(team, known.square, coefficients)
    certified = _certified(team, M, U, Images(projected, adjoint, square), largest, beside, found.outliers)
    if found.angle is not None and beside is not None:
        taken = certified["singular_values"]
        gap = min(abs(float(end_value) - beside) for end_value in (taken[0], taken[-1]))
        noise = 4 * len(P) ** 0.5 * torch.finfo(P.dtype).eps * largest
        certified["angle"] = min(certified["angle"], found.angle + (noise / gap if gap > noise else 1.0))
    return Subspace(
        **certified,
        neighbour=beside,
        largest=largest,
        smallest=smallest,
        energy=found.energy,
        energy_is_estimated=found.energy_is_estimated,
        solver=found.solver,
        fallback_from=(),
        steps=found.steps,
    )


def _right_singular(team: Team, P: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of P (n, k), falling, and its right singular vectors. The small SVD is a CPU's work everywhere."""
    _, R = orthonormal(team, P)
    _, values, Vh = torch.linalg.svd(R.cpu())
    return values.to(P.device), Vh.T.to(P.device)


def _certified(
    team: Team,
    M: WeightedMatrix,
    U: Tensor,
    images: Images,
    largest: float,
    neighbour: float | None,
    outliers: Tensor | None,
) -> dict[str, Any]:
    """What is known of the vectors by what M makes of them.

    A residual along outliers turns the vectors by next to nothing: its gap is theirs to the wanted ones.
    """
    values = torch.linalg.vector_norm(images.adjoint, dim=0)
    beyond = images.square
    orthogonalize(team, U, beyond)
    towards = 0.0
    if outliers is not None:
        along = orthogonalize(team, outliers, beyond)
        gaps = torch.linalg.vector_norm(M.adjoint(team, outliers), dim=0).square() - values[0].square()
        towards = float(torch.linalg.matrix_norm(along / gaps[:, None]))
    residuals = torch.linalg.vector_norm(beyond, dim=0)
    alive = values > ZERO * largest
    relative = float((residuals[alive] / values[alive].square()).max()) if bool(alive.any()) else 0.0
    angle = None
    if neighbour is not None:
        gaps = (values.square() - neighbour**2).abs().clamp(min=torch.finfo(values.dtype).tiny)
        angle = min(float(torch.linalg.vector_norm(residuals / gaps)) + towards, 1.0)
    return {
        "U": U,
        "projected": images.projected,
        "singular_values": values,
        "residual": float(residuals.max()) / largest**2 if largest > 0 else 0.0,
        "relative": relative,
        "angle": angle,
        "orthonormality": _orthonormality(U),
    }


def _orthonormality(U: Tensor) -> float:
    """The largest entry of `|UᵀU − I|`."""
    return float((U.T @ U - torch.eye(U.shape[1], dtype=U.dtype, device=U.device)).abs().max())


def _badness(found: Subspace) -> tuple[bool, float]:
    return not found.is_certified, 0.0 if found.angle is None else found.angle


def fix_signs(U: Tensor) -> tuple[Tensor, Tensor]:
    """Turns each column so that its entry of largest magnitude is positive: the same vectors from every solver.

    Returns the turned columns, and the signs (1, k) that they were multiplied with.
    """
    rows = U.abs().argmax(dim=0, keepdim=True)
    signs = torch.sign(U.gather(0, rows))
    signs = torch.where(signs == 0, torch.ones_like(signs), signs)
    return U * signs, signs


def subspace_distance(U: Tensor, reference: Tensor) -> float:
    """The sine of the largest principal angle between the column spaces of two (d, rank) matrices."""
    Q = torch.linalg.qr(U.double()).Q
    P = torch.linalg.qr(reference.double()).Q
    return float(torch.linalg.matrix_norm(P - Q @ (Q.T @ P), ord=2))
