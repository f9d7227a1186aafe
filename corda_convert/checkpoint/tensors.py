"""What a tensor is on disk: its name, dtype and shape, and the file that can read its bytes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import torch

# Bits of one element, by the dtype names of the safetensors format.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

COMPUTABLE_DTYPES = ("F32", "F16", "BF16", "F64")
"""The dtypes whose values are plain floating-point numbers: what a weight must have to be changed."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as a header describes it: `dtype` by its safetensors name, `shape` outermost dimension first."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.elements * DTYPE_BITS[self.dtype] + 7) // 8

    @property
    def row_nbytes(self) -> int:
        """Bytes of one index of the first dimension."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes

    def with_dtype(self, dtype: str) -> TensorSpec:
        return TensorSpec(self.name, dtype, self.shape)


class TensorFile(Protocol):
    """A file of named tensors, whose bytes are read in place and in any order."""

    @property
    def path(self) -> Path: ...

    @property
    def specs(self) -> dict[str, TensorSpec]: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """Fills `view` with the tensor's bytes from `begin` on, row-major and little-endian."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor in one file, or a contiguous part of it.

    Attributes:
        file: what reads the bytes.
        spec: the tensor's name in the file, its dtype, and the shape of the part.
        begin: where the part begins, in bytes from the tensor's first.
    """

    file: TensorFile
    spec: TensorSpec
    begin: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def rows(self, begin: int, end: int) -> TensorRef:
        """The part from row `begin` up to row `end`."""
        spec = TensorSpec(self.spec.name, self.spec.dtype, (end - begin, *self.shape[1:]))
        return TensorRef(self.file, spec, self.begin + begin * self.spec.row_nbytes)

    def reshaped(self, shape: tuple[int, ...]) -> TensorRef:
        """The same bytes seen in another shape of as many elements."""
        return TensorRef(self.file, TensorSpec(self.spec.name, self.spec.dtype, shape), self.begin)


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name. Raises `KeyError` for one that torch lacks."""
    import torch

    return {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
        "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16,
        "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
        "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "C64": torch.complex64,
    }[name]  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises `KeyError` for one that the format lacks."""
    for name in DTYPE_BITS:
        with contextlib.suppress(KeyError):
            if torch_dtype(name) == dtype:
                return name
    raise KeyError(dtype)


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """The whole tensor, in memory of its own."""
    return _read(ref, ref.shape, 0, ref.spec.nbytes)


def read_rows(ref: TensorRef, begin: int, end: int) -> torch.Tensor:
    """Rows `begin … end` of the tensor, in memory of their own."""
    row = ref.spec.row_nbytes
    return _read(ref, (end - begin, *ref.shape[1:]), begin * row, (end - begin) * row)


def _read(ref: TensorRef, shape: tuple[int, ...], begin: int, nbytes: int) -> torch.Tensor:
    import torch

    buffer = bytearray(nbytes)
    if not buffer:
        return torch.empty(shape, dtype=torch_dtype(ref.spec.dtype))
    ref.file.read_into(ref.name, ref.begin + begin, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=torch_dtype(ref.spec.dtype)).reshape(shape)
