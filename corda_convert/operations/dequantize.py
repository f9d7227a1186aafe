"""Quantized weights that nothing changes, written as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from corda_convert.checkpoint.dequantized import stored_as
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import NotFinite
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DequantizeTransform:
    """One dequantized weight, rounded to `dtype`; a stack of experts goes through by the rows of each."""

    source: TensorRef
    dtype: str

    action = "dequantized"
    row_quantum = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        *rows, columns = self.source.shape
        return {"source": self.source.reshaped((prod(rows), columns))}

    def workspace_bytes(self, rows: int) -> int:
        """None: rounding goes from buffer to buffer."""
        return 0

    def begin(self, device: torch.device) -> Session:
        return _DequantizeSession(self)


@dataclass(slots=True)
class _DequantizeSession:
    transform: DequantizeTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        from corda_convert.linalg.finite import is_finite

        (output,) = outputs.values()
        output.copy_(inputs["source"])
        if not is_finite(output):
            raise NotFinite(
                f"{self.transform.source.name} holds values outside the range of {self.transform.dtype}.",
                next_step="Choose --dtype bfloat16 or float32.",
            )

    def facts(self) -> Facts:
        return {"from": stored_as(self.transform.source)}
