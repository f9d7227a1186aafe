"""Initial factors that follow from a weight alone, in the operations and the float32 of PEFT, for PEFT's bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pissa(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """`A₀` (r, d_in) and `B₀` (d_out, r) of PiSSA (arXiv:2404.02948): `s·B₀A₀` is the best rank-r part of the weight."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    root = torch.diag(torch.sqrt(S[:rank] / scaling))
    return root @ Vh[:rank], U[:, :rank] @ root


def olora(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`A₀` (r, d_in) and `B₀` (d_out, r) of OLoRA (arXiv:2406.01775): the first rows of R and columns of Q in `W = QR`."""
    Q, R = torch.linalg.qr(weight)
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def residual(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`W − s·B₀A₀`, scaled before the product, as PEFT does where it takes initial factors out of a weight."""
    return weight - scaling * lora_B @ lora_A
