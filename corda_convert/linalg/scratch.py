"""Buffers that a thread uses again and again: fresh memory for every pass over a block costs more than the pass."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor

_own = threading.local()


def scratch(name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of this shape, of the dtype and on the device of `like`, with undefined values.

    On a CPU it is a part of a buffer of the calling thread, valid until it asks for the same `name` again.
    """
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device)  # torch keeps such memory itself
    buffers: dict[tuple[str, torch.dtype], Tensor] = _own.__dict__.setdefault("buffers", {})
    size = prod(shape)
    buffer = buffers.get((name, like.dtype))
    if buffer is None or buffer.numel() < size:
        buffer = buffers[name, like.dtype] = torch.empty(size, dtype=like.dtype)
    return buffer[:size].view(shape)
