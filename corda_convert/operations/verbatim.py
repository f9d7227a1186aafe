"""A tensor that goes through untouched, but not by the kernel: its bytes do not lie in one piece."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.plan.model import Facts, Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class VerbatimTransform:
    """The tensor as it is, of any dtype, whatever its values."""

    source: TensorRef

    action = "copied"
    row_quantum = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        return 0

    def begin(self, device: torch.device) -> Session:
        return _VerbatimSession()


class _VerbatimSession:
    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        (output,) = outputs.values()
        output.copy_(inputs["source"])

    def facts(self) -> Facts:
        return {}
