"""The tensors of a converted LoRA and what makes each: factors side by side, the best of a lower rank, or carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import frexp

from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.operations.lora_biases import SumTransform
from corda_convert.operations.lora_join import JoinTransform, Part
from corda_convert.operations.lora_modules import Carried, LoraModule, LoraSource
from corda_convert.operations.lora_ranks import Ranks
from corda_convert.operations.lora_reduction import ReduceTransform
from corda_convert.operations.production import output_dtype
from corda_convert.operations.transforms import CastTransform
from corda_convert.plan.model import Produced


def planned_tensors(
    source: LoraSource,
    ranks: Mapping[str, Ranks],
    weights: Mapping[str, TensorRef],
    dtype: str | None,
    *,
    is_baked: bool,
) -> tuple[Produced, ...]:
    """Every tensor of the result in its order, each with the transform that makes it."""
    tensors: list[Produced] = []
    for module in source.modules:
        rank = ranks[module.key]
        names = [f"{PEFT_PREFIX}{name}" for name in module.names]
        shapes = module.shapes(rank.stored)
        if module.dense is None and rank.computed >= module.rank:
            tensors += _joined(module, names, shapes, dtype, is_baked=is_baked)
            continue
        stored = output_dtype("F64" if "F64" in operand_dtypes(module) else "F32", dtype)
        specs = [TensorSpec(name, stored, shape) for name, shape in zip(names, shapes, strict=True)]
        transform = ReduceTransform(module, rank.computed, specs[0], specs[1], weights.get(module.key))
        tensors += [Produced(spec, transform) for spec in specs]
    return (*tensors, *(_carry(carried, dtype, is_baked=is_baked) for carried in source.carried))


def _joined(
    module: LoraModule,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    dtype: str | None,
    *,
    is_baked: bool,
) -> list[Produced]:
    """The factors as they are, side by side."""
    scaling = module.scaling if is_baked else 1.0
    stored = output_dtype(_exact_dtype(module, scaling), dtype)
    experts = module.experts
    rights = tuple(Part(_by_expert(summand.lora_A, experts), 1.0) for summand in module.summands)
    lefts = tuple(Part(summand.lora_B, summand.factor * scaling) for summand in module.summands)
    specs = [TensorSpec(name, stored, shape) for name, shape in zip(names, shapes, strict=True)]
    if experts > 1:  # each expert's rows of every lora_A come together
        first, second = JoinTransform(rights, 1, specs[0], rows=experts), JoinTransform(lefts, 1, specs[1])
    else:
        first, second = JoinTransform(rights, 0, specs[0]), JoinTransform(lefts, 1, specs[1])
    return [Produced(specs[0], first), Produced(specs[1], second)]


def _by_expert(factor: TensorRef, experts: int) -> TensorRef:
    """A lora_A with the rows of each expert as one row."""
    return factor if experts == 1 else factor.reshaped((experts, factor.spec.elements // experts))


def operand_dtypes(module: LoraModule) -> set[str]:
    """The dtypes of all that a module is computed from."""
    return {ref.spec.dtype for ref in module.operands}


def _exact_dtype(module: LoraModule, scaling: float) -> str:
    """The dtype that holds all the factors as they are: rounding A₀ or B₀ would leave a part of `s·B₀A₀` in the result.

    A scaling that is no power of two is not exact in 16 bits.
    """
    is_exact = all(abs(frexp(summand.factor * scaling)[0]) == 0.5 for summand in module.summands)
    dtypes = operand_dtypes(module) | (set() if is_exact else {"F32"})
    if "F64" in dtypes:
        return "F64"
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _carry(carried: Carried, dtype: str | None, *, is_baked: bool) -> Produced:
    """A tensor that goes along: cast, or times the scaling that the config does not have any more, or added up."""
    ref = carried.ref
    if carried.others:
        wide = "F64" if any(part.spec.dtype == "F64" for part, _ in carried.parts) else "F32"
        total = TensorSpec(carried.name, output_dtype(wide, dtype), ref.shape)
        return Produced(total, SumTransform(carried.parts, total))
    if is_baked and carried.factor != 1.0:
        spec = TensorSpec(carried.name, output_dtype("F64" if ref.spec.dtype == "F64" else "F32", dtype), ref.shape)
        column = ref.reshaped((ref.spec.elements, 1))
        return Produced(spec, JoinTransform((Part(column, carried.factor),), 0, spec, action="carried"))
    target = output_dtype(ref.spec.dtype, dtype)
    return Produced(TensorSpec(carried.name, target, ref.shape), CastTransform(ref, target, action="carried"))
