"""LoRA's own bias (`lora_bias`): a change of the module's bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corda_convert.adapters.factors import Additive, Block, Layout, RowFold, UsualChange
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LoraBias(UsualChange):
    """`b + s·lora_B.bias` for the bias of one module, (d_out)."""

    module: str
    bias: TensorRef
    scaling: float

    @property
    def module_name(self) -> str:
        return f"{self.module}.bias"

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        return (self.module_name,)

    def fit(self, target: Target) -> Layout:
        if target.shape != self.bias.shape:
            raise AdapterMismatch(
                f"Adapter does not fit {self.module}: its bias is {target.shape}, that of lora_B {self.bias.shape}."
            )
        return "out_in"

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        return {"bias": self.bias.rows(*block.outputs)}

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        return _BiasFold(whole["bias"] * (self.scaling * scale))

    def describe(self) -> dict[str, object]:
        return {"kind": "lora_bias", "scaling": self.scaling}


@dataclass(frozen=True, slots=True)
class _BiasFold(Additive):
    """Rows are outputs: each is one number."""

    change: Tensor

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        from corda_convert.linalg.lora import square

        change = self.change[first : first + rows.shape[0], None]
        rows += change
        return square(change)
