"""Bone and MiSS: block adapters (arXiv:2409.15371), on rows of a weight.

`rows` are rows `first … first + n` of a (d_out, d_in) weight, in float32 or float64; the functions change them in place
and return the squared Frobenius norm of the change.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_balance(rows: Tensor, block: Tensor, first: int) -> float:
    """`W[o, i] += block[i mod r, o]`: `block` (r, d_out); the tail takes the first `d_in mod r` rows of it."""
    tile = block[:, first : first + rows.shape[0]].T.to(rows.dtype)
    return _add_tiles(rows, tile)


def fold_mini(rows: Tensor, block: Tensor, first: int) -> float:
    """`W[o, i] += block[i mod r, o mod mini_r]`: `block` (r, mini_r), repeated along the outputs."""
    columns = torch.arange(first, first + rows.shape[0], device=block.device) % block.shape[1]
    return _add_tiles(rows, block[:, columns].T.to(rows.dtype))


def _add_tiles(rows: Tensor, tile: Tensor) -> float:
    r = tile.shape[1]
    count, tail = divmod(rows.shape[1], r)
    if count:
        rows[:, : count * r].view(rows.shape[0], count, r).add_(tile[:, None, :])
    if tail:
        rows[:, count * r :].add_(tile[:, :tail])
    whole, part = torch.linalg.matrix_norm(tile.double()), torch.linalg.matrix_norm(tile[:, :tail].double())
    return count * float(whole) ** 2 + (float(part) ** 2 if tail else 0.0)


def fold_bat(rows: Tensor, block: Tensor, first: int) -> float:
    """`W_ij += W_ij @ B_i + B_i` in r×r blocks: `block` (d_out / r, r, r); `first` and the row count are multiples of r."""
    r = block.shape[-1]
    blocks = block[first // r : (first + rows.shape[0]) // r].to(rows.dtype)
    own = rows.view(blocks.shape[0], -1, r)
    change = torch.bmm(own, blocks).view(blocks.shape[0], r, -1, r)
    change += blocks[:, :, None, :]
    rows += change.view(rows.shape)
    return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2


def fold_input_bat(rows: Tensor, block: Tensor, first: int) -> float:
    """`W_ij += W_ij @ B_j + B_j` in r×r blocks: `block` (d_in / r, r, r); `first` and the row count are multiples of r."""
    count, r = block.shape[0], block.shape[-1]
    blocks = block.to(rows.dtype)
    change = torch.bmm(rows.view(-1, count, r).transpose(0, 1), blocks)
    change.view(count, -1, r, r).add_(blocks[:, None])
    rows += change.transpose(0, 1).reshape(rows.shape)
    return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
