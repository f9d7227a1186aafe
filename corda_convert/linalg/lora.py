"""LoRA algebra: the delta of a pair of factors, and pairs of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`s·B·A`: (d_out, d_in) from (r, d_in) and (d_out, r), scaled after the product as PEFT does it."""
    if math.frexp(scaling)[0] == 0.5:  # a power of two: exact wherever it is applied, and cheaper on B
        return (lora_B if scaling == 1.0 else lora_B * scaling) @ lora_A
    return (lora_B @ lora_A).mul_(scaling)


def difference(lora_A: Tensor, lora_B: Tensor, initial_lora_A: Tensor, initial_lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (2r, d_in) and (d_out, 2r) of `BA − B₀A₀`, written as `(B − B₀)A + B₀(A − A₀)`.

    Unlike `[A; A₀]`, `[B | −B₀]` this does not subtract two large products: it loses no digits after little training,
    and is exactly zero after none.
    """
    left = torch.cat([lora_B - initial_lora_B, initial_lora_B], dim=1)
    right = torch.cat([lora_A, lora_A - initial_lora_A], dim=0)
    return right, left


def projection_share(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> float:
    """How much of the weight's own content `s·B·A` repeats: cosine between `s·B·A` and `Q Qᵀ W`, Q spanning B.

    Near 1 for the initial factors of a projection method (CorDA, PiSSA, OLoRA) against the weight they were taken from
    (there `s·B·A = Q Qᵀ W`); near 0 against its residual, and for ordinary LoRA factors.
    """
    B = lora_B.double()
    Q, R = torch.linalg.qr(B)
    mine = scaling * (R @ lora_A.double())
    theirs = Q.T @ weight.double()
    norms = float(torch.linalg.matrix_norm(mine)) * float(torch.linalg.matrix_norm(weight.double()))
    if norms == 0.0:
        return 0.0
    own = float(torch.linalg.matrix_norm(theirs))
    if own <= 1e-3 * float(torch.linalg.matrix_norm(mine)):
        return 0.0
    return float((mine * theirs).sum()) / (float(torch.linalg.matrix_norm(mine)) * own)
