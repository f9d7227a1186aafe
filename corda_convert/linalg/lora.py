"""LoRA algebra: the delta of a pair of factors, and pairs of pairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from corda_convert.linalg.scratch import scratch


def delta(lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """`s·B·A`: (d_out, d_in) from (r, d_in) and (d_out, r), scaled after the product as PEFT does it.

    The result is valid until the thread's next call.
    """
    product = scratch("delta", (lora_B.shape[0], lora_A.shape[1]), lora_B)
    if math.frexp(scaling)[0] == 0.5:  # a power of two: exact wherever it is applied, and cheaper on B
        return torch.mm(lora_B if scaling == 1.0 else lora_B * scaling, lora_A, out=product)
    return torch.mm(lora_B, lora_A, out=product).mul_(scaling)


def square(tensor: Tensor) -> float:
    """The squared Frobenius norm; not finite if an entry is not. The same for any number of threads, unlike `torch.dot`."""
    return float(torch.linalg.vector_norm(tensor)) ** 2


def difference(lora_A: Tensor, lora_B: Tensor, initial_lora_A: Tensor, initial_lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (2r, d_in) and (d_out, 2r) of `BA − B₀A₀`, written as `(B − B₀)A + B₀(A − A₀)`.

    Unlike `[A; A₀]`, `[B | −B₀]` this does not subtract two large products: it loses no digits after little training,
    and is exactly zero after none.
    """
    left = torch.cat([lora_B - initial_lora_B, initial_lora_B], dim=1)
    right = torch.cat([lora_A, lora_A - initial_lora_A], dim=0)
    return right, left


def projection_share(gram: Tensor, coupled: Tensor, lora_A: Tensor) -> float:
    """How much of the weight's own content `B·A` repeats: the cosine between `Qᵀ B·A` and `Qᵀ W`, Q spanning B's columns.

    Takes `BᵀB` (r, r), and `BᵀW` and A (r, n) at the same n inputs, in float64. Near 1 for the initial factors of a
    projection method (CorDA, PiSSA, OLoRA) against the weight they were taken from (there `s·B·A = Q Qᵀ W`); near 0
    against its residual, and for ordinary LoRA factors.
    """
    if not bool(torch.isfinite(gram).all()):
        return 0.0  # the folding refuses what is not finite
    squares, V = torch.linalg.eigh(gram)
    alive = squares > 1e-14 * squares[-1].clamp(min=1e-300)
    singular_values, V = squares[alive].sqrt(), V[:, alive]
    mine = singular_values[:, None] * (V.T @ lora_A)
    own = (V.T @ coupled) / singular_values[:, None]
    repeated, present = float(torch.linalg.matrix_norm(mine)), float(torch.linalg.matrix_norm(own))
    if present <= 1e-3 * repeated or repeated == 0.0:
        return 0.0
    return float((mine * own).sum()) / (repeated * present)
