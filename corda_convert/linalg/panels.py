"""Products and factorizations in float64, panel by panel, on matrices that may be stored in a shorter dtype.

On a CPU each panel is converted, and stays in the cache, where it is used; on another device the matrix is taken as one
panel. Panels do not depend on the number of threads, so neither do the bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from corda_convert.linalg.finite import is_finite
from corda_convert.linalg.scratch import scratch
from corda_convert.linalg.threads import Team

PANEL = 256
"""Rows (or columns) of a panel: 8 MB in float64 at 4096."""

TILE = 512
"""Side of a tile of a triangular factor, and of a small symmetric product."""

LARGE_TILE = 1024
"""Columns of a panel of a large product, in which packing the operands counts less."""

LARGE_SIDE = 4096

STRIP = 128
"""Columns that are transposed together."""


def times(team: Team, A: Tensor, X: Tensor, *, damping: float = 0.0) -> Tensor:
    """`(A + damping · I) X` in float64: A (m, n) of any floating dtype, X (n, k) float64."""
    Y = torch.empty(A.shape[0], X.shape[1], dtype=X.dtype, device=X.device)
    team.each(lambda rows: _product(damped(A, rows, damping), X, Y[rows]), A.shape[0], PANEL)
    return Y


def damped(A: Tensor, rows: slice, damping: float) -> Tensor:
    """These rows of `A + damping · I`, (k, n) float64, in a buffer that the thread uses again where they are not A's own."""
    if damping == 0.0 and A.dtype == torch.float64:
        return A[rows]
    shape = (rows.stop - rows.start, A.shape[1])
    panel = scratch("panel", shape, torch.empty(0, dtype=torch.float64, device=A.device)).copy_(A[rows])
    panel.diagonal(offset=rows.start).add_(damping)
    return panel


def in_float64(team: Team, A: Tensor) -> Tensor:
    """A copy in float64 with contiguous rows."""
    copy = torch.empty(A.shape, dtype=torch.float64, device=A.device)
    team.each(lambda rows: copy[rows].copy_(A[rows]), A.shape[0], PANEL)
    return copy


def right_product(team: Team, A: Tensor, columns_of: Callable[[slice], Tensor]) -> Tensor:
    """`A T` (m, n) in float64: A (m, n) of any floating dtype, T (n, n) by its columns, float64."""
    A = in_float64(team, A)
    product = torch.empty_like(A)
    step = LARGE_TILE if min(A.shape) >= LARGE_SIDE else PANEL
    team.each(lambda columns: _product(A, columns_of(columns), product[:, columns]), A.shape[1], step)
    return product


def transposed_times(team: Team, A: Tensor, X: Tensor) -> Tensor:
    """`Aᵀ X` in float64: A (n, m) of any floating dtype, X (n, k) float64."""
    Y = torch.empty(A.shape[1], X.shape[1], dtype=X.dtype, device=X.device)
    team.each(lambda columns: _product(converted(A[:, columns], X).T, X, Y[columns]), A.shape[1], PANEL)
    return Y


def converted(panel: Tensor, like: Tensor) -> Tensor:
    """The panel in the dtype of `like`: itself, or a copy in a buffer that the thread uses again for the next one."""
    if panel.dtype == like.dtype:
        return panel
    return scratch("panel", tuple(panel.shape), like).copy_(panel)


def subtract_product(team: Team, Z: Tensor, A: Tensor, X: Tensor) -> None:
    """`Z -= A X`, all float64."""
    team.each(lambda rows: _add_product(Z[rows], A[rows], X), Z.shape[0], PANEL)


def _product(A: Tensor, X: Tensor, out: Tensor) -> None:
    torch.mm(A, X, out=out)


def _add_product(Z: Tensor, A: Tensor, X: Tensor) -> None:
    Z.addmm_(A, X, alpha=-1)


def orthonormal(team: Team, Z: Tensor) -> tuple[Tensor, Tensor]:
    """`Z = Q R` of a tall float64 Z (n, k), by LAPACK; on another device by two Cholesky factorizations, where they do.

    A GPU takes far longer for a QR factorization than for the products that these consist of.
    """
    if not team.is_cpu and (found := cholesky_qr2(Z)) is not None:
        return found
    Q, R = torch.linalg.qr(Z)
    return Q.contiguous(), R


def cholesky_qr2(Z: Tensor) -> tuple[Tensor, Tensor] | None:
    """`Z = Q R` (Yamamoto and others, ETNA 44, 2015); None where Z is too ill-conditioned for it."""
    Q, R = Z, torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
    for _ in range(2):
        L, info = torch.linalg.cholesky_ex(Q.T @ Q)
        if int(info) != 0 or float(L.diagonal().min()) < 1e-6 * float(L.diagonal().max()):
            return None
        Q = torch.linalg.solve_triangular(L.T, Q, upper=True, left=False)
        R = L.T @ R
    return Q, R


def all_finite(team: Team, A: Tensor) -> bool:
    """Whether A holds neither NaN nor Inf."""
    found: list[bool] = []
    team.each(lambda rows: found.append(is_finite(A[rows])), A.shape[0], PANEL)
    return all(found)


def transposed_copy(team: Team, A: Tensor) -> Tensor:
    """Aᵀ with contiguous rows."""
    At = torch.empty(A.shape[1], A.shape[0], dtype=A.dtype, device=A.device)

    def panel(rows: slice) -> None:
        for begin in range(0, A.shape[0], STRIP):  # short columns: their lines stay in the cache until all is taken
            At[rows, begin : begin + STRIP] = A[begin : begin + STRIP, rows].T

    team.each(panel, A.shape[1], TILE)
    return At


def lower_tiles(n: int, side: int) -> list[tuple[slice, slice]]:
    """Tiles on and below the diagonal of a square."""
    cuts = [slice(begin, min(begin + side, n)) for begin in range(0, n, side)]
    return [(rows, columns) for rows in cuts for columns in cuts if columns.start <= rows.start]


def gram(team: Team, A: Tensor) -> Tensor:
    """`AᵀA` (n, n), both triangles: A (m, n) float64."""
    n = A.shape[1]
    G = torch.empty(n, n, dtype=A.dtype, device=A.device)
    if not team.is_cpu:
        return torch.mm(A.T, A, out=G)

    def tile(place: tuple[slice, slice]) -> None:
        i, j = place
        torch.mm(A[:, i].T, A[:, j], out=G[i, j])
        if i != j:
            G[j, i] = G[i, j].T

    team.all(tile, lower_tiles(n, TILE))
    return G


def _copy_triangle(team: Team, A: Tensor) -> None:
    """Makes the blocks below those on the diagonal of a square matrix the transposed ones above it."""

    def copy(place: tuple[slice, slice]) -> None:
        rows, columns = place
        A[rows, columns] = A[columns, rows].T

    team.all(copy, [(i, j) for i, j in lower_tiles(A.shape[0], TILE) if i != j])


class Cholesky:
    """`G = L Lᵀ` of a symmetric float64 matrix, which is overwritten, for solving with it again and again."""

    def __init__(self, team: Team, L: Tensor, *, keeps_upper: bool = False) -> None:
        """`keeps_upper`: what stands above the diagonal is somebody else's."""
        self._team = team
        self._L = L
        self._keeps_upper = keeps_upper
        self.side = L.shape[0]
        if not team.is_cpu:  # one product with the inverse takes far less time than two triangular solves
            self._inverse: Tensor = torch.cholesky_inverse(L)
            return
        self._blocks = [slice(i, min(i + TILE, self.side)) for i in range(0, self.side, TILE)]
        self._inverses: list[tuple[Tensor, Tensor]] = []

    def _prepare(self) -> None:
        """Before the first solve: inverses of the diagonal blocks, and Lᵀ above the diagonal if that is free.

        Products with a transposed matrix that has more rows than columns take twice as long.
        """
        L = self._L
        inverses = {}

        def invert(place: int) -> None:
            block = self._blocks[place]
            inverse = _inverse_of_lower(L[block, block])
            inverses[place] = (inverse.contiguous(), inverse.T.contiguous())

        self._team.all(invert, range(len(self._blocks)))
        if not self._keeps_upper:
            _copy_triangle(self._team, L.T)
        self._inverses = [inverses[place] for place in range(len(self._blocks))]

    @classmethod
    def of(cls, team: Team, G: Tensor) -> Cholesky | None:
        """None where the matrix is not positive definite in float64."""
        L = cholesky_factor(team, G)
        return cls(team, L) if L is not None else None

    @property
    def like(self) -> Tensor:
        """A tensor of its dtype and device."""
        return self._L

    def take_upper(self) -> None:
        """What stands above the diagonal is nobody's any more: solving is faster then."""
        self._keeps_upper, self._inverses = False, []

    def lower(self) -> Tensor:
        """L, with zeros above the diagonal."""
        return self._L.tril()

    def solve(self, X: Tensor) -> Tensor:
        """`G⁻¹ X`, X (n, k)."""
        if not self._team.is_cpu:
            return self._inverse @ X
        if not self._inverses:
            self._prepare()
        X = X.clone()
        L = self._L
        for block, (inverse, _) in zip(self._blocks, self._inverses, strict=True):
            X[block] = inverse @ X[block]
            below = slice(block.stop, None)
            subtract_product(self._team, X[below], L[below, block], X[block])
        for block, (_, transposed) in zip(reversed(self._blocks), reversed(self._inverses), strict=True):
            X[block] = transposed @ X[block]
            above = slice(0, block.start)
            beside = L[block, above].T if self._keeps_upper else L[above, block]
            subtract_product(self._team, X[above], beside, X[block])
        return X


class ShiftedFactors:
    """Cholesky factors of `G − μI` for one μ after the other, all in the memory of the symmetric float64 matrix G.

    Each takes what is on and below the diagonal; above it G stays, from which the next one begins. Only the last one can be
    solved with.
    """

    def __init__(self, team: Team, G: Tensor) -> None:
        self._team = team
        self._G = G
        self._is_whole = True
        n = G.shape[0]
        self._blocks = [slice(i, min(i + TILE, n)) for i in range(0, n, TILE)]
        self._corners = [G[block, block].clone() for block in self._blocks] if team.is_cpu else []

    def factor(self, shift: float) -> Cholesky | None:
        """None where `G − shift · I` is not positive definite in float64."""
        G = self._G
        if not self._team.is_cpu:
            shifted = G.clone()
            shifted.diagonal().sub_(shift)
            return Cholesky.of(self._team, shifted)
        if not self._is_whole:
            _copy_triangle(self._team, G)
        self._is_whole = False
        for block, corner in zip(self._blocks, self._corners, strict=True):
            G[block, block] = corner
        G.diagonal().sub_(shift)
        return Cholesky(self._team, G, keeps_upper=True) if cholesky_factor(self._team, G) is not None else None


def is_positive_definite(team: Team, A: Tensor) -> bool:
    """Whether a symmetric matrix of any floating dtype has a Cholesky factor in float64."""
    return cholesky_factor(team, A.to(torch.float64, copy=True)) is not None


def cholesky_factor(team: Team, G: Tensor) -> Tensor | None:
    """The factor of a symmetric float64 matrix, which is overwritten; above the diagonal it may hold anything.

    None where the matrix is not positive definite in float64.
    """
    if not team.is_cpu:
        L, info = torch.linalg.cholesky_ex(G)
        return L if int(info) == 0 else None
    n = G.shape[0]
    for begin in range(0, n, TILE):
        here = slice(begin, min(begin + TILE, n))
        L, info = torch.linalg.cholesky_ex(G[here, here])
        if int(info) != 0:
            return None
        G[here, here] = L
        _eliminate(team, G, here, L)
    return G


def _eliminate(team: Team, G: Tensor, here: slice, L: Tensor) -> None:
    """What the blocks below `here` become once its own factor is known."""
    below, rows = G[here.stop :, here], G.shape[0] - here.stop

    def divide(part: slice) -> None:
        below[part] = torch.linalg.solve_triangular(L, below[part].T, upper=False).T

    def update(place: tuple[slice, slice]) -> None:
        i, j = place
        G[here.stop :, here.stop :][i, j].addmm_(below[i], below[j].T, alpha=-1)

    team.each(divide, rows, PANEL)
    team.all(update, lower_tiles(rows, TILE))


def _inverse_of_lower(L: Tensor) -> Tensor:
    identity = torch.eye(L.shape[0], dtype=L.dtype, device=L.device)
    inverse: Tensor = torch.linalg.solve_triangular(L.tril(), identity, upper=False)
    return inverse
