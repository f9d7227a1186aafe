"""A weight times its weighting, `M = W T`, applied to blocks of columns without ever being formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from corda_convert.linalg.panels import PANEL, times, transposed_copy, transposed_times
from corda_convert.linalg.threads import Team
from corda_convert.linalg.weighting import Weighting


@dataclass(frozen=True, slots=True)
class WeightedMatrix:
    """`M = W T`: W (d_out, d_in) of any floating dtype, T (d_in, d_in); `M = (I − O Oᵀ) W T` with outliers O (d_out, k).

    `Wt` may hold Wᵀ once more, row by row.
    """

    W: Tensor
    T: Weighting
    outliers: Tensor | None = None
    Wt: Tensor | None = None

    def by_rows(self, team: Team) -> WeightedMatrix:
        """The same with a copy of Wᵀ, and of W unless its rows are contiguous: rows are read faster than columns."""
        if not team.is_cpu:
            return self
        W = self.W if self.W.is_contiguous() else transposed_copy(team, self.W.T)
        return replace(self, W=W, Wt=self.W.T if self.W.T.is_contiguous() else transposed_copy(team, self.W))

    def projected(self, team: Team, U: Tensor) -> Tensor:
        """`Wᵀ U`, U (d_out, k)."""
        return transposed_times(team, self.W, U) if self.Wt is None else times(team, self.Wt, U)

    def adjoint(self, team: Team, U: Tensor) -> Tensor:
        """`Mᵀ U`, U (d_out, k)."""
        if self.outliers is not None:
            U = U - self.outliers @ (self.outliers.T @ U)
        return self.T.transposed_times(team, self.projected(team, U))

    def forward(self, team: Team, Y: Tensor) -> Tensor:
        """`M Y`, Y (d_in, k)."""
        Z = times(team, self.W, self.T.times(team, Y))
        return Z if self.outliers is None else Z.sub_(self.outliers @ (self.outliers.T @ Z))

    def square(self, team: Team, U: Tensor) -> Tensor:
        """`M Mᵀ U`, U (d_out, k)."""
        return self.forward(team, self.adjoint(team, U))

    def transposed(self, team: Team) -> Tensor:
        """`Mᵀ` itself, (d_in, d_out) float64, column by column in memory."""
        Mt = self.T.product(team, self.W).T
        return Mt if self.outliers is None else Mt.addmm_(Mt @ self.outliers, self.outliers.T, alpha=-1)


@dataclass(frozen=True, slots=True)
class Images:
    """What M makes of columns U (d_out, k): `Wᵀ U` and `Mᵀ U` (d_in, k), `M Mᵀ U` (d_out, k)."""

    projected: Tensor
    adjoint: Tensor
    square: Tensor

    @classmethod
    def of(cls, team: Team, M: WeightedMatrix, U: Tensor) -> Images:
        """By applying M, which has no outliers taken out of it."""
        projected = M.projected(team, U)
        adjoint = M.T.transposed_times(team, projected)
        return cls(projected, adjoint, M.forward(team, adjoint))


@dataclass(slots=True)
class RecordedSquare:
    """`M Mᵀ U`, block after block, with a record: so that nothing that combines the blocks is multiplied with M again."""

    team: Team
    M: WeightedMatrix
    blocks: list[Images] = field(default_factory=list)

    def __call__(self, U: Tensor) -> Tensor:
        self.blocks.append(Images.of(self.team, self.M, U))
        return self.blocks[-1].square.clone()

    def images(self, coefficients: Tensor, others: Tensor) -> Images:
        """Those of `[basis @ coefficients | others]`, the basis being all blocks side by side."""
        more, blocks = Images.of(self.team, self.M, others), self.blocks
        return Images(
            _combined(self.team, [block.projected for block in blocks], coefficients, more.projected),
            _combined(self.team, [block.adjoint for block in blocks], coefficients, more.adjoint),
            _combined(self.team, [block.square for block in blocks], coefficients, more.square),
        )


def _combined(team: Team, blocks: Sequence[Tensor], coefficients: Tensor, others: Tensor) -> Tensor:
    """`[X @ coefficients | others]`, X being the blocks side by side; it is not put together, since fresh memory is slow."""
    (height, width), count = blocks[0].shape, coefficients.shape[1]
    out = torch.empty(height, count + others.shape[1], dtype=others.dtype, device=others.device)
    out[:, count:] = others

    def panel(rows: slice) -> None:
        target = out[rows, :count]
        torch.mm(blocks[0][rows], coefficients[:width], out=target)
        for place, block in enumerate(blocks[1:], start=1):
            target.addmm_(block[rows], coefficients[place * width : (place + 1) * width])

    team.each(panel, height, PANEL)
    return out
