"""Biases of lora_B (`lora_bias`) of several adapters: their sum, for every module, since PEFT has them for all or for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, TensorSpec
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations.lora_blocks import MadeFile
from corda_convert.operations.lora_join import check_finite, out_of_range
from corda_convert.operations.lora_modules import OUT_PROJ, Carried, LoraModule
from corda_convert.plan.model import Facts, Part, Session, Step

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class _Zeros(MadeFile):
    """A vector of zeros."""

    def make(self, first: int, last: int) -> Tensor:
        import torch

        return torch.zeros(last - first)


def summed_biases(
    modules: Sequence[LoraModule], biases: Mapping[str, Sequence[tuple[TensorRef, float]]]
) -> tuple[Carried, ...]:
    """The bias of each module's lora_B, of what the adapters have (by key, each so many times), or zeros; none without any.

    Raises `UnsupportedInput` where PEFT has no bias for a module, `AdapterMismatch` where one has not the module's outputs.
    """
    if not biases:
        return ()
    keys = {module.key for module in modules}
    without = [module.key for module in modules if module.is_embedding or module.is_parameter]
    without += [key.removesuffix(OUT_PROJ) for key in keys if key.endswith(OUT_PROJ)]
    problems: list[CordaConvertError] = []
    if without:
        problems.append(
            UnsupportedInput(
                f"One adapter has biases of LoRA (lora_bias), and {some(without)} cannot have one.",
                why="PEFT has them for all modules of an adapter or for none, and takes none for embeddings, parameters and "
                "MultiheadAttention.",
                next_step="Merge the adapters instead.",
            )
        )
    summed = []
    for module in modules:
        parts, d_out = biases.get(module.key, ()), module.shape[0]
        problems += [
            AdapterMismatch(f"{ref.name} is {ref.shape}; lora_B of {module.key} has {d_out} outputs.")
            for ref, _ in parts
            if ref.shape != (d_out,)
        ]
        name = f"{PEFT_PREFIX}{module.key}.lora_B.bias"
        if parts:
            (first, factor), *others = parts
            summed.append(Carried(name, first, factor, tuple(others)))
        elif not problems:
            summed.append(Carried(name, _zeros(module, name)))
    raise_problems(problems)
    return tuple(summed)


def _zeros(module: LoraModule, name: str) -> TensorRef:
    spec = TensorSpec(name, "F32", module.shape[:1])
    return TensorRef(_Zeros(module.operands[0], spec), spec)


@dataclass(frozen=True, slots=True)
class SumTransform:
    """`Σ factorᵢ · vectorᵢ`, in one step: in float64, rounded once."""

    parts: tuple[tuple[TensorRef, float], ...]
    output: TensorSpec
    action: str = "carried"

    row_quantum = 1
    is_in_any_order = True
    described = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)
    streamed: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def steps(self) -> Sequence[Step]:
        operands = {str(place): ref for place, (ref, _) in enumerate(self.parts)}
        rows = self.output.shape[0]
        return [Step(operands, {self.output.name: Part(0, rows, rows)})]

    def workspace_bytes(self, rows: int) -> int:
        """The sum and one term in float64, and the output."""
        return (16 + DTYPE_BITS[self.output.dtype] // 8) * self.output.elements

    def begin(self, device: torch.device) -> Session:
        return _SumSession(self)


@dataclass(slots=True)
class _SumSession:
    transform: SumTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        from corda_convert.linalg.finite import is_finite

        (output,) = outputs.values()
        total = torch.zeros(output.shape, dtype=torch.float64)
        for place, (ref, factor) in enumerate(self.transform.parts):
            check_finite(ref, inputs[str(place)])
            total.add_(inputs[str(place)].reshape(total.shape).double(), alpha=factor)
        output.copy_(total)
        if not is_finite(output):
            raise out_of_range(self.transform.output)

    def facts(self) -> Facts:
        return {"parts": [ref.name for ref, _ in self.transform.parts]}
