"""How much of a weight's own content the factors of an adapter repeat, judged from a few modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
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


def repeated_shares(adapter: Adapter, weights: Matrices) -> list[float]:
    """The cosine of a few modules' `B·A` and the weight's own part in B's column space."""
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
            share = projection_share(gram, coupled, A)
        found.append(share if factors.scaling >= 0 else -share)
    return found


def difference_cosines(adapter: Adapter, weights: Matrices, others: Matrices) -> list[float]:
    """The cosine of a few modules' `B·A` and the difference of two models' weights; 0 where they do not differ."""
    from corda_convert.linalg.threads import one_thread

    found = []
    for factors in sample(lora_factors(adapter.modules)):
        if factors.module_name not in weights:
            continue
        weight, layout = weights[factors.module_name]
        other = others[factors.module_name][0]
        with one_thread():
            gram, coupled, A = _products(factors, weight, layout)
            less = _products(factors, other, layout)[1]
            size = _norm_of_difference(weight, other, layout, factors.rank) * sqrt(float((A * (gram @ A)).sum()))
            cosine = float((A * (coupled - less)).sum()) / size if size > 0 else 0.0
        found.append(cosine if factors.scaling >= 0 else -cosine)
    return found


def _norm_of_difference(weight: TensorRef, other: TensorRef, layout: Layout, rank: int) -> float:
    """The norm of `W − W'` at the inputs that `_products` looks at."""
    count, step = _sampled_inputs(weight, layout, rank)
    if layout == "in_out":
        return float((read_rows(weight, 0, count).double() - read_rows(other, 0, count).double()).norm())
    square = 0.0
    for begin, end in row_blocks(weight.shape):
        rows = read_rows(weight, begin, end)[:, ::step].double() - read_rows(other, begin, end)[:, ::step].double()
        square += float(rows.square().sum())
    return sqrt(square)


def _sampled_inputs(weight: TensorRef, layout: Layout, rank: int) -> tuple[int, int]:
    """How many inputs are compared; and, where they are columns, that every so many are."""
    inputs = weight.shape[1] if layout == "out_in" else weight.shape[0]
    count = min(inputs, max(256, SAMPLED_ENTRIES // max(rank, 1)))
    return count, max(1, inputs // count)


def _products(factors: LoraFactors, weight: TensorRef, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """`BᵀB` (r, r), `BᵀW` and A (r, n) at n of the inputs, in float64, reading by blocks of rows."""
    import torch

    count, step = _sampled_inputs(weight, layout, factors.rank)
    gram = torch.zeros(factors.rank, factors.rank, dtype=torch.float64)
    if layout == "in_out":
        B = read_tensor(factors.lora_B).double()
        A = read_rows(transposed(factors.lora_A), 0, count).T.double()
        return B.T @ B, B.T @ read_rows(weight, 0, count).double().T, A
    A = read_tensor(factors.lora_A)[:, ::step].double()
    coupled = torch.zeros(A.shape, dtype=torch.float64)
    for begin, end in row_blocks(weight.shape):
        B = read_rows(factors.lora_B, begin, end).double()
        gram += B.T @ B
        coupled += B.T @ read_rows(weight, begin, end)[:, ::step].double()
    return gram, coupled, A
