"""Sums of products XᵀX of bfloat16 matrices on a CPU with bfloat16 units: exact products, summed in float32.

oneDNN is fastest where both operands have the summed index last, so X is transposed on the way to float32, which its
products are taken from; there the entries' sums and bounds are found, too, while they are in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.linalg.gram import add_in_float64
from corda_convert.linalg.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

    from corda_convert.linalg.threads import Team

COLUMNS, ROWS = 512, 256
"""What is transposed at once."""

SUMMED = 64
"""Columns whose absolute values are summed at once."""

STRIP = 256
"""Rows of the product that are computed together, from the diagonal on."""


def is_exact_in_bfloat16(rows: Tensor) -> bool:
    """Whether the CPU can multiply these rows as bfloat16 with float32 sums: where torch lets oneDNN do so."""
    import torch

    is_known = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and is_known


@dataclass(frozen=True, slots=True)
class Columns:
    """A matrix X (n, d), column by column.

    Attributes:
        values: Xᵀ (d, n), float32.
        least, most: the bounds of its entries; NaN, if one is.
        absolute: (d,) float64, the sums of the columns' absolute values.
    """

    values: Tensor
    least: float
    most: float
    absolute: Tensor


def columns_of(team: Team, rows: Tensor, out: Tensor) -> Columns:
    """Writes `rows` (n, d) bfloat16, transposed, to `out` (d, n) float32. Absolute values are summed in float32."""
    import torch

    n, d = rows.shape
    bounds: list[Tensor] = []
    absolute = torch.empty(d, dtype=torch.float64)

    def transpose(columns: slice) -> None:
        for begin in range(0, n, ROWS):
            out[columns, begin : begin + ROWS].copy_(rows[begin : begin + ROWS, columns].T)
        for begin in range(columns.start, columns.stop, SUMMED):
            part = out[begin : min(begin + SUMMED, columns.stop)]
            positive = torch.abs(part, out=scratch("absolute", tuple(part.shape), part))
            absolute[begin : begin + len(part)] = positive.sum(dim=1)

    team.each(lambda part: bounds.append(torch.stack(torch.aminmax(rows[part]))), n, ROWS)
    team.each(transpose, d, COLUMNS)
    least, most = torch.stack(bounds).aminmax(dim=0)
    return Columns(out, float(least[0]), float(most[1]), absolute)


def add_gram_of_columns(
    team: Team,
    columns: Columns,
    factor: float,
    *,
    group: Tensor | None,
    is_first: bool,
    total: Tensor | None = None,
    is_total_first: bool = False,
) -> None:
    """Adds `factor · XᵀX` to `group` (d, d) float32, on and above the diagonal, and below it in places.

    With `is_first` it takes the place of what is there; then `group` may be None. With `total` (d, d) float64 the group's
    sum is added to that right away; with `is_total_first` it takes its place.
    """
    import torch

    X = columns.values

    def add(rows: slice) -> None:
        left, right = X[rows], X[rows.start :].T
        block = scratch("strip", (left.shape[0], right.shape[1]), X) if group is None else group[rows, rows.start :]
        torch.addmm(block, left, right, alpha=factor, beta=0 if is_first else 1, out=block)
        if total is not None:
            add_in_float64(total[rows, rows.start :], block, is_first=is_total_first)

    with _bfloat16_products():
        team.each(add, X.shape[0], STRIP)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Products of float32 matrices inside are taken of their entries as bfloat16, which they are; sums stay float32."""
    import torch

    switch: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined,unused-ignore]
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = before
