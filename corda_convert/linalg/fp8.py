"""Block-fp8: F8_E4M3 numbers, and one scale for each block of rows and columns, by which they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0


def quantize_blocks(weight: Tensor, block: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 matrix (R, C) as numbers (R, C) in F8_E4M3 and scales (⌈R / block rows⌉, ⌈C / block columns⌉).

    A block's scale brings its largest magnitude to the largest number there is, 448; it is rounded to `scale_dtype`, up to a
    power of two for F8_E8M0. A block of zeros has the scale 1.
    """
    blocks = as_blocks(weight, block)
    scales = _scales(blocks.abs().amax(dim=(1, 3)), scale_dtype)
    scaled = (blocks / scales.float()[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(2).flatten(0, 1)
    return codes[: weight.shape[0], : weight.shape[1]].view(torch.float8_e4m3fn), scales


def dequantize_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The float32 matrix of numbers (R, C) and their scales."""
    values = codes.float()
    expanded = scales.float().repeat_interleave(block[0], 0)[: codes.shape[0]].repeat_interleave(block[1], 1)
    return values.mul_(expanded[:, : codes.shape[1]])


def as_blocks(matrix: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix as (block row, row in it, block column, column in it), with zeros where the last blocks are not full."""
    down, right = (-(-size // step) for size, step in zip(matrix.shape, block, strict=True))
    margins = (0, right * block[1] - matrix.shape[1], 0, down * block[0] - matrix.shape[0])
    full = torch.nn.functional.pad(matrix, margins) if any(margins) else matrix
    return full.reshape(down, block[0], right, block[1])


def _scales(largest: Tensor, dtype: torch.dtype) -> Tensor:
    scales = largest / E4M3_MAX
    if dtype == torch.float8_e8m0fnu:
        mantissa, exponent = torch.frexp(scales.clamp_min(2.0**-127))
        scales = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
    rounded = scales.to(dtype)
    return torch.where((largest == 0) | (rounded.float() == 0), 1.0, rounded.float()).to(dtype)
