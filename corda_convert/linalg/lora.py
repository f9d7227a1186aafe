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
    """The squared Frobenius norm; not finite if an entry is not."""
    if not tensor.is_contiguous():
        return float(torch.linalg.vector_norm(tensor)) ** 2
    flat = tensor.view(-1)
    return float(torch.dot(flat, flat))


def difference(lora_A: Tensor, lora_B: Tensor, initial_lora_A: Tensor, initial_lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (2r, d_in) and (d_out, 2r) of `BA − B₀A₀`, written as `(B − B₀)A + B₀(A − A₀)`.

    Unlike `[A; A₀]`, `[B | −B₀]` this does not subtract two large products: it loses no digits after little training,
    and is exactly zero after none.
    """
    left = torch.cat([lora_B - initial_lora_B, initial_lora_B], dim=1)
    right = torch.cat([lora_A, lora_A - initial_lora_A], dim=0)
    return right, left


def column_space(lora_B: Tensor) -> Tensor:
    """Orthonormal columns Q (d_out, r) that span those of `lora_B`, in float64."""
    Q: Tensor = torch.linalg.qr(lora_B.double()).Q
    return Q


def projection_share(projected: Tensor, lora_A: Tensor, lora_B: Tensor) -> float:
    """How much of the weight's own content `B·A` repeats: the cosine between `Qᵀ B·A` and `projected`, `Qᵀ W` (r, d_in).

    Q is `column_space(lora_B)`. Near 1 for the initial factors of a projection method (CorDA, PiSSA, OLoRA) against the
    weight they were taken from (there `s·B·A = Q Qᵀ W`); near 0 against its residual, and for ordinary LoRA factors.
    """
    mine = column_space(lora_B).T @ lora_B.double() @ lora_A.double()
    own = float(torch.linalg.matrix_norm(projected))
    repeated = float(torch.linalg.matrix_norm(mine))
    if own <= 1e-3 * repeated or repeated == 0.0:
        return 0.0
    return float((mine * projected).sum()) / (repeated * own)
