"""Weights that an adapter brings along for modules that it adapts, as PEFT saves them of embeddings and heads.

Beside a residual that is the residual's own weight, which the converted LoRA must not put into the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from corda_convert.adapters.dora import lora_factors
from corda_convert.adapters.factors import Adapter, Layout
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.tensors import TensorRef, read_rows, read_tensor, torch_dtype
from corda_convert.errors import some
from corda_convert.operations.belonging import Part
from corda_convert.operations.residual import Residual
from corda_convert.operations.shares import Matrices
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from torch import Tensor


def without_known_weights(part: Part, weights: Matrices, residual: Residual | None) -> Adapter:
    """The trained adapter without the weights that follow from the base, which is in `weights`, and what else is given.

    These are the base's own, beside a residual that one's. Others are kept: then the module is what was brought, and its
    factors as they are, without the initial ones.
    """
    initial = (
        {each.module_name: each for each in lora_factors(part.initial.modules)} if part.initial is not None else {}
    )
    kept = dict(part.trained.bases)
    for module, ref in part.trained.bases.items():
        if module not in weights or ref.shape != weights[module][0].shape:
            continue
        weight, layout = weights[module]
        if residual is not None:
            follows = same_values(ref, residual.tensor(weight.name))
        elif module in initial:
            follows = _is_residual(ref, weight, layout, initial[module])
        else:
            follows = part.initial is None and same_values(ref, weight)
        if follows:
            del kept[module]
    return replace(part.trained, bases=kept)


def _is_residual(ref: TensorRef, weight: TensorRef, layout: Layout, initial: LoraFactors) -> bool:
    """Whether a stored matrix is `W − s·B₀A₀` up to the rounding of what is stored, by blocks of rows."""
    import torch

    A, B = read_tensor(initial.lora_A).double(), read_tensor(initial.lora_B).double() * initial.scaling
    left, right = (B, A) if layout == "out_in" else (A.T, B.T)
    missed, whole = 0.0, 0.0
    for begin, end in row_blocks(weight.shape):
        before, after = _rows(weight, begin, end), _rows(ref, begin, end)
        missed += float((after - (before - left[begin:end] @ right)).square().sum())
        whole += float(before.square().sum())
    resolution = max(torch.finfo(torch_dtype(one.spec.dtype)).eps for one in (ref, weight, initial.lora_A))
    return missed <= (4 * resolution) ** 2 * whole


def _rows(ref: TensorRef, begin: int, end: int) -> Tensor:
    return read_rows(ref, begin, end).double()


def brought_warnings(parts: Sequence[Part], *, has_base: bool) -> list[str]:
    """Of adapters beside a residual whose own weights cannot be told from the base's, which was not read."""
    if has_base:
        return []
    found = []
    for part in parts:
        modules = [each.module_name for each in lora_factors(part.trained.modules)]
        brought = [module for module in part.trained.bases if module in modules]
        if part.initial is not None and brought:
            found.append(
                f"{part.name} brings along the weight of {some(brought)}, perhaps the residual's, and so does the result, in "
                "which it takes the base's place. With the base model's folder as --base it is left out where it can be."
            )
    return found
