"""A matrix read by its columns, for one that is too large to be read whole: lora_A of a large vocabulary's embedding."""

from __future__ import annotations

from pathlib import Path

from corda_convert.checkpoint.tensors import TensorFile, TensorRef, TensorSpec, torch_dtype

LARGE_BYTES = 16 << 20
"""Matrices of fewer bytes are better read whole."""


class TransposedFile:
    """One matrix of another file, as a tensor of its transpose. Implements `TensorFile`."""

    def __init__(self, ref: TensorRef) -> None:
        rows, columns = ref.shape
        self._ref = ref
        self._file: TensorFile = ref.file
        self.path: Path = ref.file.path
        self.specs = {ref.name: TensorSpec(ref.name, ref.spec.dtype, (columns, rows))}
        self.metadata: dict[str, str] = {}

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """Fills `view` with whole rows of the transpose: each is one column of the matrix."""
        import torch

        spec = self.specs[name]
        first, count = begin // spec.row_nbytes, len(view) // spec.row_nbytes
        if begin % spec.row_nbytes or len(view) % spec.row_nbytes:
            raise ValueError(f"{name}: bytes {begin} + {len(view)} are no whole columns")
        if not count:
            return
        rows, row_nbytes = self._ref.shape[0], self._ref.spec.row_nbytes
        item = row_nbytes // self._ref.shape[1]
        buffer = memoryview(bytearray(len(view)))
        for row in range(rows):
            start = self._ref.begin + row * row_nbytes + first * item
            self._file.read_into(name, start, buffer[row * count * item : (row + 1) * count * item])
        dtype = torch_dtype(spec.dtype)
        columns = torch.frombuffer(buffer, dtype=dtype).view(rows, count)
        torch.frombuffer(view, dtype=dtype).view(count, rows).copy_(columns.T)

    def close(self) -> None:
        self._file.close()


def transposed(ref: TensorRef) -> TensorRef:
    """The transpose of a matrix, read by its columns."""
    file = TransposedFile(ref)
    return TensorRef(file, file.specs[ref.name])
