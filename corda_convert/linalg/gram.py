"""Sums of products XᵀX, of which only blocks on and above the diagonal are computed, and sums of absolute values.

On a CPU each block is computed by one thread, so that the bits do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_T = TypeVar("_T")

PANEL = 512
"""Columns of a block. With d / 512 = p blocks a side, (p + 1) / 2p of the whole product is computed."""


ROWS = 256
"""Rows whose absolute values are summed together."""


class Workers:
    """As many CPU threads as torch takes, each of which works alone; none on another device. Used in a with statement."""

    def __init__(self, device: torch.device) -> None:
        import torch

        size = torch.get_num_threads() if device.type == "cpu" else 1
        is_any = size > 1
        self._pool = ThreadPoolExecutor(size, "sums", torch.set_num_threads, (1,)) if is_any else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, function: Callable[[_T], object], items: Sequence[_T]) -> None:
        """Calls it with each of the items, several at once."""
        if self._pool is None:
            for item in items:
                function(item)
            return
        for future in [self._pool.submit(function, item) for item in items]:
            future.result()


def panels(side: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of columns."""
    for begin in range(0, side, PANEL):
        yield begin, min(begin + PANEL, side)


def add_gram(workers: Workers, upper: Tensor, rows: Tensor, factor: float = 1.0, *, are_bfloat16: bool = False) -> None:
    """Adds `factor · XᵀX` of `rows` (n, d) to the blocks of `upper` (d, d) on and above its diagonal.

    Products of two bfloat16 numbers are exact in float32, in which they are summed. On CUDA such rows are given as they are
    (float16 ones, too), on the CPU as float32 with `are_bfloat16`.
    """
    import torch

    is_short = rows.dtype != upper.dtype

    def add(place: tuple[slice, slice]) -> None:
        block, left, right = upper[place], rows[:, place[0]].T, rows[:, place[1]]
        if is_short:
            block.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=factor)  # type: ignore[call-overload,unused-ignore]
        else:
            block.addmm_(left, right, alpha=factor)

    with _bfloat16_products() if are_bfloat16 else nullcontext():
        workers.each(add, _blocks(upper))


def _blocks(upper: Tensor) -> list[tuple[slice, slice]]:
    """Of what stands on and above the diagonal: squares on a CPU, on other devices columns, which are fewer products."""
    cut = [slice(begin, end) for begin, end in panels(upper.shape[0])]
    if upper.device.type != "cpu":
        return [(slice(0, columns.stop), columns) for columns in cut]
    return [(rows, columns) for columns in reversed(cut) for rows in cut if rows.start <= columns.start]


def add_absolute(workers: Workers, total: Tensor, rows: Tensor) -> None:
    """Adds the absolute values of `rows` (n, d) to `total` (d,) float64. They are summed in the dtype of `rows`, by blocks."""
    import torch

    cut = [slice(begin, begin + ROWS) for begin in range(0, len(rows), ROWS)]
    sums = torch.empty(len(cut), rows.shape[1], dtype=rows.dtype, device=rows.device)

    def add(place: int) -> None:  # a product is several times faster than a sum over rows
        block = rows[cut[place]].abs()
        torch.mv(block.T, block.new_ones(len(block)), out=sums[place])

    workers.each(add, range(len(cut)))
    for each in sums:
        total += each


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
