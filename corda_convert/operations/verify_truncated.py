"""`decompose --truncate`: what was taken out of a weight must be a projection of the rank that was asked for."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef, read_rows, torch_dtype
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.verify_ulps import UNIT, Checked, Measured, measure_bits
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

OVERSAMPLED = 8
"""So many more random vectors than the rank find its column space."""


def check_cast(stored: TensorRef, source: TensorRef, kind: str) -> Checked:
    """A tensor that only changes its dtype, or nothing."""
    measured = Measured()
    elements = (stored.spec.elements, 1)
    ours, theirs = stored.reshaped(elements), source.reshaped(elements)
    for begin, end in row_blocks(elements):
        expected = read_rows(theirs, begin, end).to(torch_dtype(stored.spec.dtype))
        measured.add(measure_bits(read_rows(ours, begin, end), expected))
    return Checked(stored.name, kind, "bits", measured)


def check_truncated(stored: TensorRef, source: TensorRef, rank: int) -> Checked:
    """Whether `W − W'` has the rank, and is `U Uᵀ W`, up to the rounding of W'.

    U comes from products with random vectors (Halko, Martinsson, Tropp 2011, doi:10.1137/090771806).
    """
    import torch

    if len(stored.shape) != 2 or stored.spec.dtype not in UNIT:
        raise UnsupportedInput(
            f"{stored.name} holds several matrices; what truncation leaves of these has no check here."
        )
    columns = stored.shape[1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(columns, rank + OVERSAMPLED, dtype=torch.float64, generator=generator)
    left = torch.linalg.svd(torch.cat([taken @ noise for _, taken in _taken(stored, source)]), full_matrices=False).U[
        :, :rank
    ]
    inner = torch.zeros(rank, columns, dtype=torch.float64)
    size = left_over = overlap = 0.0
    for rows, taken in _taken(stored, source):
        kept = read_rows(stored, rows.start, rows.stop).double()
        inner += left[rows].T @ taken
        overlap += float((kept * taken).sum())
        size, left_over = size + float(taken.square().sum()), left_over + float(kept.square().sum())
    rest = sum(float((taken - left[rows] @ inner).square().sum()) for rows, taken in _taken(stored, source))
    rounding = UNIT[stored.spec.dtype] * sqrt(left_over)
    wrong = None
    if sqrt(rest) > 2 * rounding:
        wrong = f"what was taken out has no rank of {rank}: {sqrt(rest / size) if size else 0.0:.1e} of it lies beyond"
    elif abs(overlap) > 2 * rounding * (sqrt(left_over) + sqrt(size)):
        wrong = "what was taken out is no projection of the weight"
    figures = {"beyond_rank": sqrt(rest) / rounding if rounding else 0.0}
    return Checked(stored.name, "truncated", "exact", Measured(), figures, wrong)


def _taken(stored: TensorRef, source: TensorRef) -> Iterator[tuple[slice, Tensor]]:
    """`W − W'` in blocks of rows."""
    for begin, end in row_blocks(stored.shape):
        yield slice(begin, end), read_rows(source, begin, end).double() - read_rows(stored, begin, end).double()
