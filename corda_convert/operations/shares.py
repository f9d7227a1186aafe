"""How much of a weight's own content the factors of an adapter repeat, judged from a few modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from corda_convert.adapters.dora import lora_factors
from corda_convert.adapters.factors import Adapter, Layout
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, read_rows, read_tensor
from corda_convert.checkpoint.transposed_file import transposed
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

Matrices = Mapping[str, tuple[TensorRef, Layout]]
"""The stored matrix of each module, and how it lies."""

SAMPLED_MODULES = 8
"""Modules that are read for a judgement, the smallest ones …"""

SAMPLED_BYTES = 128 << 20
"""… and of those only as many as have so many bytes of factors and weights together, but three at least."""

SAMPLED_ENTRIES = 1 << 16
"""Inputs times rank that are compared in each module: what is random there gives cosines of 0.004."""


def sample(modules: Sequence[LoraFactors]) -> list[LoraFactors]:
    """A few small modules, by a fixed rule."""
    ordered = sorted(modules, key=lambda factors: factors.lora_A.spec.nbytes + factors.lora_B.spec.nbytes)
    chosen: list[LoraFactors] = []
    nbytes = 0
    for factors in ordered[:SAMPLED_MODULES]:
        elements = factors.lora_B.shape[0] * prod(factors.lora_A.shape[1:])
        nbytes += 2 * elements + factors.lora_A.spec.nbytes + factors.lora_B.spec.nbytes
        if nbytes > SAMPLED_BYTES and len(chosen) >= 3:
            break
        chosen.append(factors)
    return chosen


def repeated_shares(adapter: Adapter, weights: Matrices, *, minus: Matrices | None = None) -> list[float]:
    """The cosine of a few modules' `B·A` and the weight's own part in B's column space; of weights less those of `minus`."""
    from corda_convert.linalg.lora import projection_share
    from corda_convert.linalg.threads import one_thread

    found = []
    for factors in sample(lora_factors(adapter.modules)):
        if factors.module_name not in weights:
            continue  # it lies on disk in another form
        weight, layout = weights[factors.module_name]
        if weight.spec.dtype not in COMPUTABLE_DTYPES:
            continue
        with one_thread():
            gram, coupled, A = _products(factors, weight, layout)
            if minus is not None:
                coupled -= _products(factors, *minus[factors.module_name])[1]
            share = projection_share(gram, coupled, A)
        found.append(share if factors.scaling >= 0 else -share)
    return found


def _products(factors: LoraFactors, weight: TensorRef, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """`BᵀB` (r, r), `BᵀW` and A (r, n) at n of the inputs, in float64, reading by blocks of rows."""
    import torch

    inputs = weight.shape[1] if layout == "out_in" else weight.shape[0]
    count = min(inputs, max(256, SAMPLED_ENTRIES // max(factors.rank, 1)))
    gram = torch.zeros(factors.rank, factors.rank, dtype=torch.float64)
    if layout == "in_out":
        B = read_tensor(factors.lora_B).double()
        A = read_rows(transposed(factors.lora_A), 0, count).T.double()
        return B.T @ B, B.T @ read_rows(weight, 0, count).double().T, A
    step = max(1, inputs // count)
    A = read_tensor(factors.lora_A)[:, ::step].double()
    coupled = torch.zeros(A.shape, dtype=torch.float64)
    for begin, end in row_blocks(weight.shape):
        B = read_rows(factors.lora_B, begin, end).double()
        gram += B.T @ B
        coupled += B.T @ read_rows(weight, begin, end)[:, ::step].double()
    return gram, coupled, A
