"""How a tensor on disk is made of the parameters that the model has at run time.

Most tensors are one parameter, whole. Since transformers 5 some models stack, join or transpose tensors on loading
(experts, gate and up). Everything is seen as matrices, so that a change to a parameter finds the rows of the disk's
tensors that it changes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of rows of a disk tensor's matrix, and the part of a run-time parameter that it is.

    A parameter that stacks experts, (E, d1, d2), has one matrix (d1, d2) for each; every other parameter is one matrix:
    its first dimension by all the others (a vector is a column).

    Attributes:
        row: first row of the block in the disk tensor's matrix.
        rows: how many rows the block has.
        parameter: run-time name of the parameter.
        expert: which of the parameter's matrices; None for a parameter that is one.
        first: first row of the parameter's matrix that the block holds.
        count: how many of its rows; the same as `rows` unless transposed.
        transposed: the block is those rows of the parameter's matrix, transposed.
    """

    row: int
    rows: int
    parameter: str
    expert: int | None
    first: int
    count: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class DiskLayout:
    """A tensor on disk as a matrix (rows, columns), and the pieces that cover its rows from first to last.

    `is_part` says that it is some rows of one parameter, which is joined from several tensors.
    """

    matrix: tuple[int, int]
    pieces: tuple[Piece, ...]
    is_part: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the tensor is one parameter, whole and as it is."""
        if len(self.pieces) != 1 or self.is_part:
            return False
        return self.pieces[0].expert is None and not self.pieces[0].transposed


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor that is no stack as a matrix: its first dimension by all the others; a vector is a column."""
    columns = 1
    for size in shape[1:]:
        columns *= size
    return (shape[0] if shape else 1), columns


def whole(parameter: str, shape: tuple[int, ...]) -> DiskLayout:
    """The layout of a tensor that is this parameter as it is."""
    rows, columns = matrix_shape(shape)
    return DiskLayout((rows, columns), (Piece(0, rows, parameter, None, 0, rows),))
