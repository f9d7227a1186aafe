"""Whether a checkpoint's weights are quantized, by which method, and whether this program can read them.

Configs are silent or wrong often enough that the headers are looked at too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorSpec
from corda_convert.errors import UnsupportedInput

SCALE_SUFFIX = "_scale_inv"
"""Behind the name of an fp8 weight: its scales, one for each block, which multiply it."""

BLOCKS_SUFFIX, SCALES_SUFFIX = "_blocks", "_scales"
"""Behind the name of an mxfp4 weight: its packed numbers, and their scales."""

MODELOPT_FILE = "hf_quant_config.json"

READABLE_METHODS = ("fp8", "mxfp4")

_CONFIG_KEYS = ("quantization_config", "compression_config")

_MARKS = (
    (".weight_packed", "compressed-tensors"),
    (".weight_scale_2", "nvfp4"),
    (".absmax", "bitsandbytes 4-bit"),
    (".SCB", "bitsandbytes 8-bit"),
    (".weight_scales", "eetq"),
    (".W_q", "hqq"),
    ("_qdata", "torchao"),
    ("._data", "quanto"),
)
"""Ends of names that only a quantizer writes."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint is quantized.

    Attributes:
        method: `quant_method` of the config, or what the tensors' names and dtypes tell.
        tensor: the first quantized tensor; None where only the config says so.
        block: rows and columns that share one scale, where the config says.
    """

    method: str
    tensor: TensorSpec | None
    block: tuple[int, int] | None

    @property
    def is_readable(self) -> bool:
        return self.method in READABLE_METHODS


def quantization_of(
    config: Mapping[str, Any] | None, specs: Mapping[str, TensorSpec], folder: Path
) -> Quantization | None:
    """How the checkpoint is quantized by its config, by `hf_quant_config.json` in its folder, or by its tensors.

    Where these differ, a method that cannot be read wins. None for a checkpoint that is not quantized.
    """
    entries = [*_entries(config or {}), *_modelopt_entries(folder)]
    marked = _first_marked(specs)
    if not entries and marked is None:
        return None
    named = [name for entry in entries if (name := _method(entry))] + ([marked[0]] if marked else [])
    unreadable = (name for name in named if name not in READABLE_METHODS)
    method = next(unreadable, named[0] if named else "a method that its config does not name")
    tensor = marked[1] if marked else _first_uncomputable(specs)
    return Quantization(method, tensor, next((block for entry in entries if (block := _block(entry))), None))


def check_readable(quantization: Quantization, name: str) -> None:
    """Raises `UnsupportedInput` for a method that is not read; `name` is the checkpoint's."""
    if quantization.is_readable:
        return
    tensor = quantization.tensor
    found = f"{tensor.name} is {tensor.dtype} {tensor.shape}" if tensor else "its config says so"
    raise UnsupportedInput(
        f"{name} is quantized with {quantization.method}: {found}.",
        why="Of quantized weights this version reads fp8 and mxfp4.",
        next_step="Merge into the unquantized base model.",
    )


def check_no_gguf(path: Path) -> None:
    """Raises `UnsupportedInput` for a GGUF file, or a folder of GGUF files and no other weights."""
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or any(entry.suffix in (".safetensors", ".bin") for entry in path.glob("*")):
        return
    raise UnsupportedInput(
        f"{path} is quantized with gguf: {files[0].name}.",
        why="Of quantized weights this version reads fp8 and mxfp4, in safetensors.",
        next_step="Merge into the unquantized base model, and convert the result to GGUF.",
    )


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the dequantized model: what tells of a quantization is gone at every level."""
    return {
        key: without_quantization(value) if isinstance(value, Mapping) else copy.deepcopy(value)
        for key, value in config.items()
        if key not in _CONFIG_KEYS
    }


def with_quantization(config: Mapping[str, Any], quantized: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what `quantized`, the config that it was made from, tells of a quantization, at the same levels."""
    result = {key: copy.deepcopy(value) for key, value in config.items()}
    for key, value in quantized.items():
        if key in _CONFIG_KEYS:
            result[key] = copy.deepcopy(value)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = with_quantization(result[key], value)
    return result


def _entries(level: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What the config says of quantization, at every level."""
    for key, value in level.items():
        if not isinstance(value, Mapping):
            continue
        if key not in _CONFIG_KEYS:
            yield from _entries(value)
        elif value:
            yield {"quant_method": "compressed-tensors", **value} if key == "compression_config" else value


def _modelopt_entries(folder: Path) -> Iterator[Mapping[str, Any]]:
    """What NVIDIA's modelopt says, in a file of its own. A file that cannot be read says only that it is there."""
    path = folder / MODELOPT_FILE
    if not path.is_file():
        return
    algorithm: object = None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        algorithm = content["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    yield {"quant_method": " ".join(["modelopt", *([str(algorithm)] if algorithm else [])])}


def _method(entry: Mapping[str, Any]) -> str | None:
    named = entry.get("quant_method")
    bits = next((bits for bits in ("4", "8") if entry.get(f"load_in_{bits}bit")), None)
    if bits is not None and named in (None, "bitsandbytes"):
        return f"bitsandbytes {bits}-bit"
    return str(named).lower().replace("compressed_tensors", "compressed-tensors") if named else None


def _block(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    block = entry.get("weight_block_size")
    if isinstance(block, list | tuple) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    return None


def _first_marked(specs: Mapping[str, TensorSpec]) -> tuple[str, TensorSpec] | None:
    """The method that the first quantized tensor tells, and this tensor."""
    for spec in specs.values():
        method = _mark(spec, specs)
        if method is not None:
            return method, spec
    return None


def _mark(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> str | None:
    for suffix, method in _MARKS:
        if spec.name.endswith(suffix):
            return method
    stem = spec.name.rpartition(".")[0]
    if spec.name.endswith(".qweight"):
        return "gptq" if f"{stem}.g_idx" in specs else "awq"
    if spec.name.endswith(".codes") and f"{stem}.codebooks" in specs:
        return "aqlm"
    if (
        spec.name.endswith(BLOCKS_SUFFIX)
        and spec.dtype == "U8"
        and spec.name.removesuffix(BLOCKS_SUFFIX) + SCALES_SUFFIX in specs
    ):
        return "mxfp4"
    return _mark_by_dtype(spec, stem, specs)


def _mark_by_dtype(spec: TensorSpec, stem: str, specs: Mapping[str, TensorSpec]) -> str | None:
    """The method of a weight whose own dtype shows that it needs scales."""
    if spec.dtype in COMPUTABLE_DTYPES:
        return None
    inverse = specs.get(spec.name + SCALE_SUFFIX)
    if inverse is not None:
        return "mxfp8" if inverse.dtype == "U8" else "fp8"
    if f"{spec.name}_scale_2" in specs:
        return "nvfp4"
    if f"{spec.name}_scales" in specs:
        return "eetq"
    if f"{spec.name}.absmax" in specs:
        return "bitsandbytes 4-bit"
    if f"{stem}.SCB" in specs:
        return "bitsandbytes 8-bit"
    if f"{stem}.scales" in specs and spec.dtype == "U32":
        return "mlx"
    if f"{spec.name}_scale" in specs:
        kind = "fp8" if spec.dtype.startswith("F") else "integer"
        return f"{kind} weights with weight_scale (fbgemm_fp8, compressed-tensors, modelopt or bitnet)"
    return None


def _first_uncomputable(specs: Mapping[str, TensorSpec]) -> TensorSpec | None:
    return next((spec for spec in specs.values() if spec.dtype not in COMPUTABLE_DTYPES and len(spec.shape) > 1), None)
