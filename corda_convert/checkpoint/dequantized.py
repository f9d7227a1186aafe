"""A quantized checkpoint as if it held plain floating-point weights, which are dequantized while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.byte_file import Extent, ExtentFile
from corda_convert.checkpoint.quantized import (
    BLOCKS_SUFFIX,
    SCALE_SUFFIX,
    SCALES_SUFFIX,
    Quantization,
    check_readable,
    without_quantization,
)
from corda_convert.checkpoint.stored_weights import (
    MXFP4_GROUP,
    Fp8Weight,
    LastExpert,
    Mxfp4Weight,
    StoredWeight,
    read_into,
)
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import CordaConvertError, MalformedFile, UnsupportedInput, raise_problems

if TYPE_CHECKING:
    from pathlib import Path

    from corda_convert.checkpoint.folder import Checkpoint

DEQUANTIZED_DTYPE = "BF16"
"""What dequantized weights are written in, unless another dtype is asked for."""

DEFAULT_BLOCK = (128, 128)

_ACTIVATION_SCALES = ("activation_scale", "input_scale")


class DequantizedFile:
    """A shard that presents quantized weights as plain ones, in the places of those, and no scales. Implements `ExtentFile`.

    `stored` is the shard itself, `weights` what is dequantized, by name.
    """

    def __init__(self, stored: ExtentFile, weights: Mapping[str, StoredWeight]) -> None:
        self.stored = stored
        self.weights = {weight.spec.name: weight for weight in weights.values() if weight.stored[0].file is stored}
        first = {weight.stored[0].name: weight.spec for weight in self.weights.values()}
        parts = {ref.name for weight in weights.values() for ref in weight.stored}
        presented = [
            first.get(spec.name, spec)
            for spec in stored.specs.values()
            if spec.name in first or not (spec.name in parts or _is_activation_scale(spec.name, weights))
        ]
        self.specs = {spec.name: spec for spec in presented}

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def metadata(self) -> dict[str, str]:
        return self.stored.metadata

    @property
    def reading_bytes(self) -> int:
        """Memory that reading takes beside the buffer that is filled."""
        return max((weight.reading_bytes for weight in self.weights.values()), default=0)

    @property
    def descriptor(self) -> int:
        return self.stored.descriptor

    def extent(self, name: str) -> Extent | None:
        return None if name in self.weights else self.stored.extent(name)

    def read_bytes_into(self, offset: int, view: memoryview) -> None:
        self.stored.read_bytes_into(offset, view)

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        """As `TensorFile` says; of a dequantized weight only whole elements."""
        weight = self.weights.get(name)
        if weight is None:
            self.stored.read_into(name, begin, view)
        elif len(view):
            read_into(weight, begin, view)

    def close(self) -> None:
        self.stored.close()
        for weight in self.weights.values():
            for ref in weight.stored:
                ref.file.close()


def dequantized(checkpoint: Checkpoint, quantization: Quantization, fp8_dtype: str = "F32") -> Checkpoint:
    """The same checkpoint with plain weights, its config without the quantization. A shard of scales only is left empty.

    `fp8_dtype` is what fp8 weights are presented in: BF16 rounds them as transformers does when it dequantizes. Raises
    `UnsupportedInput` or `MalformedFile`, several problems together.
    """
    check_readable(quantization, checkpoint.name)
    if checkpoint.is_pickled:
        raise UnsupportedInput(
            f"{checkpoint.name} holds {quantization.method} weights in pickled files; this version reads them in safetensors.",
            next_step="Merge into the unquantized base model.",
        )
    weights = _weights(checkpoint, quantization, fp8_dtype)
    shards = tuple(DequantizedFile(stored, weights) for stored in checkpoint.shards)
    tensors = {spec.name: TensorRef(shard, spec) for shard in shards for spec in shard.specs.values()}
    config = None if checkpoint.config is None else without_quantization(checkpoint.config)
    return replace(checkpoint, shards=shards, tensors=tensors, config=config)


def describe(quantization: Quantization, before: Checkpoint, after: Checkpoint) -> dict[str, Any]:
    """For the receipt: what `dequantized` made of a checkpoint."""
    files = [shard for shard in after.shards if isinstance(shard, DequantizedFile)]
    parts = {ref.name for file in files for weight in file.weights.values() for ref in weight.stored}
    return {
        "method": quantization.method,
        "weights": sum(len(file.weights) for file in files),
        "activation_scales_left_out": [name for name in before.tensors if name not in parts | set(after.tensors)],
    }


def stored_as(ref: TensorRef) -> str | None:
    """How a dequantized weight lies on disk, `fp8` or `mxfp4`; None for every other tensor."""
    weight = ref.file.weights.get(ref.name) if isinstance(ref.file, DequantizedFile) else None
    return None if weight is None else weight.method


def written_dtype(ref: TensorRef) -> str:
    """The dtype in which a tensor is written where none is asked for: its own, and bfloat16 for a dequantized one."""
    return ref.spec.dtype if stored_as(ref) is None else DEQUANTIZED_DTYPE


def _weights(checkpoint: Checkpoint, quantization: Quantization, fp8_dtype: str) -> dict[str, StoredWeight]:
    """Every quantized weight by the name it is presented under. Raises all problems together."""
    problems: list[CordaConvertError] = []
    weights: dict[str, StoredWeight] = {}
    last = LastExpert()
    tensors = checkpoint.tensors
    for name, ref in tensors.items():
        weight: StoredWeight | CordaConvertError | None = None
        if name + SCALE_SUFFIX in tensors:
            weight = _fp8_weight(ref, tensors[name + SCALE_SUFFIX], quantization.block, fp8_dtype)
        elif name.endswith(BLOCKS_SUFFIX) and (stem := name.removesuffix(BLOCKS_SUFFIX)) + SCALES_SUFFIX in tensors:
            weight = _mxfp4_weight(stem, ref, tensors[stem + SCALES_SUFFIX], last, tensors)
        elif not _belongs_to_weight(name, tensors):
            weight = _loose(ref)
        if isinstance(weight, CordaConvertError):
            problems.append(weight)
        elif weight is not None:
            weights[weight.spec.name] = weight
    if not weights and not problems:
        problems.append(
            MalformedFile(
                f"{checkpoint.name} is said to be quantized with {quantization.method}, but none of its tensors is.",
                why="Its weights were dequantized, and its config was left as it was.",
                next_step="If so, take quantization_config out of config.json.",
            )
        )
    raise_problems(problems)
    return weights


def _fp8_weight(
    weight: TensorRef, scale: TensorRef, block: tuple[int, int] | None, dtype: str
) -> Fp8Weight | CordaConvertError:
    if weight.spec.dtype != "F8_E4M3" or len(weight.shape) not in (2, 3):
        return UnsupportedInput(
            f"{weight.name} is {weight.spec.dtype} {weight.shape} with scales: of fp8 this version reads matrices in "
            "F8_E4M3.",
            next_step="Merge into the unquantized base model.",
        )
    if scale.spec.dtype not in (*COMPUTABLE_DTYPES, "F8_E8M0"):
        return UnsupportedInput(
            f"{scale.name} is {scale.spec.dtype}: scales must be floating-point numbers.",
            next_step="Merge into the unquantized base model.",
        )
    *stack, rows, columns = weight.shape
    if scale.spec.elements == prod(stack):
        return Fp8Weight(weight, scale, (max(rows, 1), max(columns, 1)), dtype)  # one scale for each whole matrix
    block_rows, block_columns = block or DEFAULT_BLOCK
    grid = (*stack, -(-rows // block_rows), -(-columns // block_columns))
    if scale.shape != grid:
        return MalformedFile(
            f"{scale.name} is {scale.shape}; {weight.name} {weight.shape} in blocks of {block_rows}×{block_columns} has "
            f"scales {grid}.",
            why=None if block else "The config names no weight_block_size, so 128×128 was taken.",
        )
    return Fp8Weight(weight, scale, (block_rows, block_columns), dtype)


def _mxfp4_weight(
    name: str, blocks: TensorRef, scales: TensorRef, last: LastExpert, tensors: Mapping[str, TensorRef]
) -> Mxfp4Weight | CordaConvertError:
    is_packed = len(blocks.shape) == 4 and blocks.shape[-1] * 2 == MXFP4_GROUP and blocks.shape[:-1] == scales.shape
    if not is_packed or blocks.spec.dtype != "U8" or scales.spec.dtype != "U8":
        return UnsupportedInput(
            f"{blocks.name} is {blocks.spec.dtype} {blocks.shape} and {scales.name} {scales.spec.dtype} {scales.shape}: of "
            "mxfp4 this version reads U8 (experts, rows, groups, 16) with U8 (experts, rows, groups).",
            next_step="Merge into the unquantized base model.",
        )
    if name in tensors:
        return MalformedFile(f"{name} stands beside {blocks.name}: the same weight twice.")
    return Mxfp4Weight(name, blocks, scales, last)


def _belongs_to_weight(name: str, tensors: Mapping[str, TensorRef]) -> bool:
    """Whether the tensor is the scales of another one."""
    if name.endswith(SCALE_SUFFIX):
        return name.removesuffix(SCALE_SUFFIX) in tensors
    return name.endswith(SCALES_SUFFIX) and name.removesuffix(SCALES_SUFFIX) + BLOCKS_SUFFIX in tensors


def _loose(ref: TensorRef) -> CordaConvertError | None:
    """What is wrong with a tensor that is no part of a quantized weight."""
    if ref.name.endswith(SCALE_SUFFIX):
        return MalformedFile(f"{ref.name} has no {ref.name.removesuffix(SCALE_SUFFIX)} that it could scale.")
    if ref.spec.dtype.startswith(("F8_", "F6_", "F4")):
        return UnsupportedInput(
            f"{ref.name} is {ref.spec.dtype} {ref.shape} without {ref.name}{SCALE_SUFFIX}.",
            next_step="Merge into the unquantized base model.",
        )
    return None


def _is_activation_scale(name: str, weights: Mapping[str, StoredWeight]) -> bool:
    """Whether this scales the inputs of a dequantized weight, which then needs it no more."""
    for suffix in _ACTIVATION_SCALES:
        if name.endswith(f".{suffix}") and name.removesuffix(suffix) + "weight" in weights:
            return True
        if name.endswith(f"_{suffix}") and name.removesuffix(f"_{suffix}") in weights:
            return True
    return False
