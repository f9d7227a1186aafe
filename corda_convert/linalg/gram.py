"""Sums of products XᵀX, of which only blocks on and above the diagonal are computed, and sums of absolute values.

On a CPU each block is computed by one thread, so that the bits do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.threads import Team

PANEL = 512
"""Columns of a block. With d / 512 = p blocks a side, (p + 1) / 2p of the whole product is computed."""


ROWS = 256
"""Rows whose absolute values are summed together."""

ADDED_ELEMENTS = 1 << 18
"""So many float32 numbers are converted together to be added to float64 ones: a block, or 2 MB of these."""


class Spare:
    """Matrices on a CPU that are used again: fresh memory costs more than what is computed in it."""

    def __init__(self) -> None:
        self._free: list[tuple[int, Tensor]] = []
        self._part = 0
        self._rows: Tensor | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix with undefined values."""
        import torch

        for place, (_, tensor) in enumerate(self._free):
            if tuple(tensor.shape) == shape and tensor.dtype == dtype and tensor.device.type == device.type:
                return self._free.pop(place)[1]
        return torch.empty(shape, dtype=dtype, device=device)

    def give(self, *tensors: Tensor) -> None:
        """Takes back what nobody uses any more. What lies on another device is let go: torch keeps such memory itself."""
        self._free += [(self._part, tensor) for tensor in tensors if tensor.device.type == "cpu"]

    def rows(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Room for one input, with undefined values, until the next one asks."""
        import torch

        size = prod(shape)
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        if self._rows is None or self._rows.numel() < size or self._rows.dtype != dtype:
            self._rows = None
            self._rows = torch.empty(size, dtype=dtype)
        return self._rows[:size].view(shape)

    def end_part(self) -> None:
        """Lets go of what was not used in the part of the model that ended."""
        self._free = [(part, tensor) for part, tensor in self._free if part == self._part]
        self._part += 1


def panels(side: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of columns."""
    for begin in range(0, side, PANEL):
        yield begin, min(begin + PANEL, side)


def add_gram(
    team: Team,
    upper: Tensor,
    rows: Tensor,
    factor: float = 1.0,
    *,
    is_first: bool = False,
) -> None:
    """Adds `factor · XᵀX` of `rows` (n, d) to the blocks of `upper` (d, d) on and above its diagonal.

    With `is_first` it takes the place of what is there. On CUDA rows of 16 bits are given as they are: their products are
    exact in float32, in which they are summed.
    """
    import torch

    is_short = rows.dtype != upper.dtype

    def add(place: tuple[slice, slice]) -> None:
        block, left, right = upper[place], rows[:, place[0]].T, rows[:, place[1]]
        if is_short and is_first:
            torch.mul(torch.mm(left, right, out_dtype=torch.float32), factor, out=block)  # type: ignore[call-overload,unused-ignore]
        elif is_short:
            block.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=factor)  # type: ignore[call-overload,unused-ignore]
        else:
            block.addmm_(left, right, alpha=factor, beta=0 if is_first else 1)

    team.all(add, _blocks(upper))


def add_group(team: Team, total: Tensor, group: Tensor, *, is_first: bool) -> None:
    """Adds float32 sums to float64 ones, on and above the diagonal; with `is_first` they take the place of what is there."""
    team.all(lambda place: add_in_float64(total[place], group[place], is_first=is_first), _blocks(total))


def add_in_float64(total: Tensor, block: Tensor, *, is_first: bool) -> None:
    """Adds float32 numbers to float64 ones; with `is_first` they take the place of what is there."""
    from corda_convert.linalg.scratch import scratch

    if is_first:
        total.copy_(block)
        return
    step = max(ADDED_ELEMENTS // block.shape[1], 1) if block.device.type == "cpu" else block.shape[0]
    for begin in range(0, block.shape[0], step):
        part = block[begin : begin + step]
        total[begin : begin + step].add_(scratch("added", tuple(part.shape), total).copy_(part))


def _blocks(upper: Tensor) -> list[tuple[slice, slice]]:
    """Of what stands on and above the diagonal: squares on a CPU, on other devices columns, which are fewer products."""
    cut = [slice(begin, end) for begin, end in panels(upper.shape[0])]
    if upper.device.type != "cpu":
        return [(slice(0, columns.stop), columns) for columns in cut]
    return [(rows, columns) for columns in reversed(cut) for rows in cut if rows.start <= columns.start]


def add_absolute(team: Team, total: Tensor, rows: Tensor, converted: Tensor | None = None) -> None:
    """Adds the absolute values of `rows` (n, d) to `total` (d,) float64. They are summed in the dtype of `rows`, by blocks.

    With `converted` (n, d) the rows are written there on the way, and summed in its dtype.
    """
    import torch

    from corda_convert.linalg.scratch import scratch

    given = rows if converted is None else converted
    cut = [slice(begin, begin + ROWS) for begin in range(0, len(rows), ROWS)]
    sums = torch.empty(len(cut), rows.shape[1], dtype=given.dtype, device=rows.device)

    def add(place: int) -> None:  # a product is several times faster than a sum over rows
        block = given[cut[place]]
        if converted is not None:
            block.copy_(rows[cut[place]])
        absolute = torch.abs(block, out=scratch("absolute", tuple(block.shape), block))
        torch.mv(absolute.T, absolute.new_ones(len(block)), out=sums[place])

    team.all(add, range(len(cut)))
    for each in sums:
        total += each


def is_exact_as_given(rows: Tensor) -> bool:
    """Whether `add_gram` takes these rows of 16 bits as they are: on CUDA, from torch 2.8 on."""
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return rows.is_cuda and rows.dtype in (torch.bfloat16, torch.float16) and (major, minor) >= (2, 8)


def symmetric(team: Team, upper: Tensor, whole: Tensor, divisor: int = 1) -> None:
    """Writes the square matrix that stands on and above the diagonal of `upper`, divided, to `whole`. Both are on a CPU.

    `upper` is divided in its place.
    """

    def write(place: tuple[slice, slice]) -> None:
        block, written = upper[place], whole[place]
        if divisor != 1:
            block /= divisor
        written.copy_(block)
        if place[0] == place[1]:
            corner = written.triu()
            written.copy_(corner + corner.triu(1).T)
        else:
            whole[place[1], place[0]] = written.T

    team.all(write, _blocks(upper))
