"""Each expert's columns of a lora_B that PEFT has written for all of them, in memory that does not grow with their number."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorRef, TensorSpec, read_rows, torch_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_MOST_HELD = 2
_HELD_BYTES = 8 << 20
_READ_BYTES = 1 << 20


class ExpertColumns:
    """A lora_B (d_out, r·E) seen as (E, d_out, r): each expert's columns one beside the other. Implements `TensorFile`."""

    def __init__(self, ref: TensorRef, experts: int, held: HeldColumns) -> None:
        self._ref = ref
        self._held = held
        self.spec = TensorSpec(ref.name, ref.spec.dtype, (experts, ref.shape[0], ref.shape[1] // experts))
        self.specs = {ref.name: self.spec}

    @property
    def path(self) -> Path:
        return self._ref.file.path

    @property
    def metadata(self) -> dict[str, str]:
        return self._ref.file.metadata

    @property
    def reading_bytes(self) -> int:
        """Memory that reading takes beside the buffer that is filled: what is held, and rows on their way there."""
        return _MOST_HELD * max(_HELD_BYTES, self.spec.row_nbytes) + 2 * max(_READ_BYTES, self._ref.spec.row_nbytes)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """As `TensorFile` says; of one expert at a time."""
        import torch

        if len(view):
            expert, first = divmod(begin, self.spec.row_nbytes)
            stored = self._held.columns(self._ref, self.spec, expert)
            torch.frombuffer(view, dtype=torch.uint8).copy_(stored[first : first + len(view)])

    def close(self) -> None:
        self._ref.file.close()


@dataclass(frozen=True, slots=True)
class _Group:
    """The columns of some experts, from `first` on: (experts, d_out, r)."""

    first: int
    columns: Tensor


@dataclass(slots=True, eq=False)
class HeldColumns:
    """Columns of the experts that were read last, and of some after them: they are asked for one after the other.

    A layer has two such tensors. Each would be read as often as it has experts, otherwise.
    """

    files: dict[str, ExpertColumns] = field(default_factory=dict)
    held: dict[str, _Group] = field(default_factory=dict)

    def of(self, ref: TensorRef, experts: int) -> TensorRef:
        """A lora_B as (experts, d_out, r)."""
        file = self.files.setdefault(ref.name, ExpertColumns(ref, experts, self))
        return TensorRef(file, file.spec)

    def columns(self, ref: TensorRef, spec: TensorSpec, expert: int) -> Tensor:
        """The bytes of one expert's columns (d_out, r)."""
        import torch

        group = self.held.get(ref.name)
        if group is None or not group.first <= expert < group.first + group.columns.shape[0]:
            self.held.pop(ref.name, None)
            while len(self.held) >= _MOST_HELD:
                del self.held[next(iter(self.held))]
            count = max(1, _HELD_BYTES // spec.row_nbytes)
            group = self.held[ref.name] = _Group(expert, _read_columns(ref, spec, expert, count))
        return group.columns[expert - group.first].view(-1).view(torch.uint8)


def _read_columns(ref: TensorRef, spec: TensorSpec, first: int, count: int) -> Tensor:
    """The columns of experts `first … first + count`, by blocks of rows of the whole tensor."""
    import torch

    experts, rows, rank = spec.shape
    last = min(first + count, experts)
    columns = torch.empty((last - first, rows, rank), dtype=torch_dtype(spec.dtype))
    step = max(1, _READ_BYTES // ref.spec.row_nbytes)
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        stored = read_rows(ref, begin, end).view(end - begin, rank, experts)
        columns[:, begin:end] = stored[:, :, first:last].permute(2, 0, 1)
    return columns
