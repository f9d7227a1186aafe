"""Whether a tensor holds neither NaN nor Inf."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """In one pass over a float tensor: a NaN shows in its least and its greatest entry, an Inf in one of them."""
    if tensor.numel() == 0:
        return True
    if not tensor.is_floating_point():
        return bool(torch.isfinite(tensor).all())
    least, greatest = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(greatest))
