"""Sums of products XᵀX, of which only blocks on and above the diagonal are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PANEL = 512
"""Columns of a block. With d / 512 = p blocks a side, (p + 1) / 2p of the whole product is computed."""


def panels(side: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of columns."""
    for begin in range(0, side, PANEL):
        yield begin, min(begin + PANEL, side)


def add_gram(upper: Tensor, rows: Tensor, factor: float = 1.0, *, are_bfloat16: bool = False) -> None:
    """Adds `factor · XᵀX` of `rows` (n, d) to the blocks of `upper` (d, d) on and above its diagonal.

    Products of two bfloat16 numbers are exact in float32, in which they are summed. On CUDA such rows are given as they are
    (float16 ones, too), on the CPU as float32 with `are_bfloat16`.
    """
    import torch

    is_short = rows.dtype != upper.dtype
    with _bfloat16_products() if are_bfloat16 else nullcontext():
        for begin, end in panels(upper.shape[0]):
            block, left, right = upper[:end, begin:end], rows[:, :end].T, rows[:, begin:end]
            if is_short:
                block.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=factor)  # type: ignore[call-overload,unused-ignore]
            else:
                block.addmm_(left, right, alpha=factor)


def is_exact_as_given(rows: Tensor) -> bool:
    """Whether `add_gram` takes these rows of 16 bits as they are: on CUDA, from torch 2.8 on."""
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and (major, minor) >= (2, 8)


def is_exact_in_bfloat16(rows: Tensor) -> bool:
    """Whether the CPU can multiply these rows as bfloat16 with float32 sums: where torch lets oneDNN do so."""
    import torch

    is_known = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    return rows.device.type == "cpu" and rows.dtype == torch.bfloat16 and is_known


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


def mirror(upper: Tensor) -> None:
    """Makes a square matrix symmetric, from what stands on and above its diagonal."""
    for begin, end in panels(upper.shape[0]):
        upper[begin:end, :begin] = upper[:begin, begin:end].T
        corner = upper[begin:end, begin:end].triu()
        upper[begin:end, begin:end] = corner + corner.triu(1).T
