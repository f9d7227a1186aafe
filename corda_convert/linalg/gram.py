"""Sums of products XᵀX, of which only blocks on and above the diagonal are computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 512
"""Columns of a block. With d / 512 = p blocks a side, (p + 1) / 2p of the whole product is computed."""


def panels(side: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of columns."""
    for begin in range(0, side, PANEL):
        yield begin, min(begin + PANEL, side)


def add_gram(upper: Tensor, rows: Tensor, factor: float = 1.0) -> None:
    """Adds `factor · XᵀX` of `rows` (n, d) to the blocks of `upper` (d, d) on and above its diagonal.

    Rows of 16 bits on CUDA are multiplied as they are: such products are exact in float32, in which they are summed. Else
    the rows' dtype is that of `upper`.
    """
    import torch

    is_short = rows.dtype != upper.dtype
    for begin, end in panels(upper.shape[0]):
        block, left, right = upper[:end, begin:end], rows[:, :end].T, rows[:, begin:end]
        if is_short:
            block.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=factor)  # type: ignore[call-overload,unused-ignore]
        else:
            block.addmm_(left, right, alpha=factor)


def is_exact_in(rows: Tensor) -> bool:
    """Whether `add_gram` takes these 16-bit rows as they are: on CUDA, from torch 2.8 on."""
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and (major, minor) >= (2, 8)


def mirror(upper: Tensor) -> None:
    """Makes a square matrix symmetric, from what stands on and above its diagonal."""
    for begin, end in panels(upper.shape[0]):
        upper[begin:end, :begin] = upper[:begin, begin:end].T
        corner = upper[begin:end, begin:end].triu()
        upper[begin:end, begin:end] = corner + corner.triu(1).T
