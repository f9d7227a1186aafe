"""Whether tensors hold the same numbers, read a block of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef, read_rows, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK_ELEMENTS = 1 << 20


def same_values(one: TensorRef, other: TensorRef) -> bool:
    """Whether two tensors hold the same numbers, whatever their dtypes."""
    if one.shape != other.shape:
        return False
    if (one.file, one.spec, one.begin) == (other.file, other.spec, other.begin):
        return True
    return all(_equal(*pair) for pair in _blocks(one, other))


def are_transposed(one: TensorRef, other: TensorRef) -> bool:
    """Whether one matrix is the other's transpose. Reads both whole."""
    return one.shape == other.shape[::-1] and _equal(read_tensor(one), read_tensor(other).T)


def _blocks(one: TensorRef, other: TensorRef) -> Iterator[tuple[Tensor, Tensor]]:
    if not one.shape:
        yield read_tensor(one), read_tensor(other)
        return
    rows = one.shape[0]
    step = max(1, _BLOCK_ELEMENTS * rows // max(one.spec.elements, 1))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield read_rows(one, begin, end), read_rows(other, begin, end)


def _equal(one: Tensor, other: Tensor) -> bool:
    import torch

    return bool(torch.equal(one.double(), other.double()))
