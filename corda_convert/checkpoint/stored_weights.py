"""Quantized weights as they lie on disk, dequantized a few rows at a time: fp8 with scales for blocks, and mxfp4.

The numbers are exact but for one rounding to float32 in fp8, where a weight is `q · s`; mxfp4's are exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, TensorSpec, read_rows, torch_dtype
from corda_convert.errors import NotFinite

if TYPE_CHECKING:
    from torch import Tensor

REGION_ELEMENTS = 1 << 18
"""About so many elements are dequantized at a time."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of mxfp4; the fourth bit is the sign."""

MXFP4_GROUP = 32
"""Numbers of mxfp4 that share one scale."""


@dataclass(frozen=True, slots=True)
class Region:
    """Adjacent elements of one matrix of a stack: some whole rows, or a part of one row."""

    matrix: int
    row: int
    rows: int
    column: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


class StoredWeight(Protocol):
    """A weight that is dequantized as it is read."""

    @property
    def method(self) -> str: ...

    @property
    def spec(self) -> TensorSpec:
        """The weight as it is presented."""
        ...

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        """The tensors on disk that it is made of; it stands in the place of the first."""
        ...

    @property
    def block_rows(self) -> int:
        """No region that is asked for has rows on both sides of a multiple of this."""
        ...

    @property
    def reading_bytes(self) -> int:
        """Memory that reading takes beside the buffer that is filled."""
        ...

    def read(self, region: Region) -> Tensor:
        """The region's values, (rows, columns). Raises `NotFinite`."""
        ...


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """A matrix (R, C), or a stack of them, in F8_E4M3, with scales (⌈R / block rows⌉, ⌈C / block columns⌉) for each."""

    weight: TensorRef
    scale: TensorRef
    block: tuple[int, int]
    dtype: str

    method = "fp8"

    @property
    def spec(self) -> TensorSpec:
        return self.weight.spec.with_dtype(self.dtype)

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.weight, self.scale

    @property
    def block_rows(self) -> int:
        return self.block[0]

    @property
    def reading_bytes(self) -> int:
        """Bytes, indices, values and scales of one region."""
        return 13 * max(REGION_ELEMENTS, self.weight.shape[-1])

    def read(self, region: Region) -> Tensor:
        import torch

        rows, columns = self.weight.shape[-2:]
        begin = (region.matrix * rows + region.row) * columns + region.column
        stored = bytearray(region.elements)
        self.weight.file.read_into(self.weight.name, begin, memoryview(stored))
        codes = torch.frombuffer(stored, dtype=torch.uint8)
        values = _e4m3_values().index_select(0, codes.int()).view(region.rows, region.columns)
        values *= self._scales(region)
        _check_finite(values, self.weight)
        return values

    def _scales(self, region: Region) -> Tensor:
        """The scale of each of the region's columns: its rows share them."""
        block_rows, block_columns = self.block
        rows, columns = self.weight.shape[-2:]
        grid_rows, grid_columns = -(-rows // block_rows), -(-columns // block_columns)
        place = (region.matrix * grid_rows + region.row // block_rows) * grid_columns
        size = DTYPE_BITS[self.scale.spec.dtype] // 8
        stored = bytearray(grid_columns * size)
        self.scale.file.read_into(self.scale.name, place * size, memoryview(stored))
        scales = _decode_scales(stored, self.scale.spec.dtype)
        return scales.repeat_interleave(block_columns)[region.column : region.column + region.columns]


@dataclass(slots=True)
class LastExpert:
    """The expert that was read last, packed: rows of one expert are asked for one after the other.

    Weight, expert and tensors change in one assignment, so that threads cannot mix them up.
    """

    held: tuple[str, int, Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Mxfp4Weight:
    """Experts in mxfp4: blocks (E, R, G, 16) of two numbers a byte, the low half first, and scales (E, R, G).

    The weight is presented as the model has it: (E, 32·G, R), each expert transposed.
    """

    name: str
    blocks: TensorRef
    scales: TensorRef
    last: LastExpert

    method = "mxfp4"

    @property
    def spec(self) -> TensorSpec:
        experts, rows, groups = self.scales.shape
        return TensorSpec(self.name, "BF16", (experts, groups * MXFP4_GROUP, rows))

    @property
    def stored(self) -> tuple[TensorRef, ...]:
        return self.blocks, self.scales

    @property
    def block_rows(self) -> int:
        return MXFP4_GROUP

    @property
    def reading_bytes(self) -> int:
        """One expert as stored and transposed, and one region."""
        experts = max(self.scales.shape[0], 1)
        return (
            2 * (self.blocks.spec.nbytes + self.scales.spec.nbytes) // experts + 8 * MXFP4_GROUP * self.scales.shape[1]
        )

    def read(self, region: Region) -> Tensor:
        import torch

        packed, scales = self._expert(region.matrix)
        columns = slice(region.column, region.column + region.columns)
        first, last = region.row // 2, -(-(region.row + region.rows) // 2)
        pairs = packed[first:last, columns].reshape(-1).int()
        both = torch.stack([table.index_select(0, pairs).view(last - first, -1) for table in _e2m1_halves()], dim=1)
        begin = region.row - 2 * first
        values = both.view(-1, region.columns)[begin : begin + region.rows] * scales[region.row // MXFP4_GROUP, columns]
        _check_finite(values, self.scales)
        return values

    def _expert(self, index: int) -> tuple[Tensor, Tensor]:
        """One expert's bytes (16·G, R) and the values of its scales (G, R)."""
        held = self.last.held
        if held is None or held[:2] != (self.name, index):
            self.last.held = None  # two at a time are too many
            blocks, scales = (read_rows(ref, index, index + 1).squeeze(0) for ref in self.stored)
            powers = _e8m0_values("BF16").take(scales.T.contiguous().long())
            held = self.name, index, blocks.flatten(1).T.contiguous(), powers
            self.last.held = held
        return held[2:]


def read_into(weight: StoredWeight, begin: int, view: memoryview) -> None:
    """Fills `view` with the bytes from `begin` on of the weight as it is presented.

    Raises `NotFinite`, and `ValueError` for a part of an element.
    """
    import torch

    size = DTYPE_BITS[weight.spec.dtype] // 8
    if begin % size or len(view) % size or begin + len(view) > weight.spec.nbytes:
        raise ValueError(f"{weight.spec.name}: {len(view)} bytes from {begin} on are not whole elements of it")
    output = torch.frombuffer(view, dtype=torch_dtype(weight.spec.dtype))
    done = 0
    for region in regions(weight.spec.shape, begin // size, (begin + len(view)) // size, weight.block_rows):
        output[done : done + region.elements].view(region.rows, region.columns).copy_(weight.read(region))
        done += region.elements


def regions(shape: tuple[int, ...], begin: int, end: int, block_rows: int) -> Iterator[Region]:
    """Cuts elements `begin … end` of a matrix, or of a stack of matrices, into regions that cross no block of rows."""
    rows, columns = shape[-2:]
    most = max(1, REGION_ELEMENTS // max(columns, 1))
    while begin < end:
        line, column = divmod(begin, columns)
        matrix, row = divmod(line, rows)
        if column or end - begin < columns:
            region = Region(matrix, row, 1, column, min(columns - column, end - begin))
        else:
            block_end = (row // block_rows + 1) * block_rows
            region = Region(matrix, row, min(rows - row, block_end - row, most, (end - begin) // columns), 0, columns)
        yield region
        begin += region.elements


def _decode_scales(stored: bytearray, dtype: str) -> Tensor:
    import torch

    if dtype == "F8_E8M0":
        return _e8m0_values("F32").take(torch.frombuffer(stored, dtype=torch.uint8).long())
    return torch.frombuffer(stored, dtype=torch_dtype(dtype)).float()


@cache
def _e4m3_values() -> Tensor:
    """The value of each byte in F8_E4M3."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def _e8m0_values(dtype: str) -> Tensor:
    """The value of each byte in F8_E8M0: powers of two, and NaN for 255."""
    import torch

    return torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch_dtype(dtype))


@cache
def _e2m1_halves() -> tuple[Tensor, Tensor]:
    """For each byte the number in its low half, and the one in its high half."""
    import torch

    numbers = torch.tensor([*_E2M1, *(-number for number in _E2M1)], dtype=torch.bfloat16)
    codes = torch.arange(256)
    return numbers[codes & 15], numbers[codes >> 4]


def _check_finite(values: Tensor, ref: TensorRef) -> None:
    import torch

    low, high = torch.aminmax(values)  # a NaN shows in both
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise NotFinite(
            f"{ref.name} in {ref.file.path} dequantizes to NaN or Inf.",
            why="The model is damaged.",
            next_step="Get it again.",
        )
