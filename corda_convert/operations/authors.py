"""`merge` without an adapter: a checkpoint of the CorDA authors' scripts as a dense model.

Facts, from github.com/iboing/CorDA (`build_corda.py`, `cordalib/decomposition.py`, `mapping/`, `merge_adapter_for_corda.py`):
every Linear `M` but the head is a module that computes `ALinear(BLinear(x)) + weight_residual·x`, with `M.ALinear.weight`
(d_out, r), which is PEFT's lora_B, `M.BLinear.weight` (r, d_in), which is lora_A, `M.weight_residual` (d_out, d_in), and
where the layer has a bias `M.ALinear.bias`. Nothing scales. The config is the model's own with `lora_r`, `architectures`
`CovSVD…` and an `auto_map` to two files of code that lie beside it. Their merge adds in the stored dtype and loses biases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters.factors import Block
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, TensorSpec
from corda_convert.errors import AdapterMismatch, CordaConvertError, MalformedFile, UnsupportedInput, raise_problems
from corda_convert.operations.formats import WeightFormat, in_format
from corda_convert.operations.model_side import model_side_files, transformers_card
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.production import (
    Input,
    Production,
    checkpoint_files,
    output_dtype,
    produce,
    read_ahead,
)
from corda_convert.operations.transforms import CastTransform, FoldTransform, PlacedChange
from corda_convert.output.side_files import SideFile
from corda_convert.plan.model import Produced

_PART = re.compile(r"^(?P<module>.+)\.(?P<part>[AB]Linear\.\w+|weight_residual)$")
_A, _B, _RESIDUAL, _BIAS = "BLinear.weight", "ALinear.weight", "weight_residual", "ALinear.bias"
_CLASS_PREFIX = "CovSVD"
_CODE = re.compile(r"(configuration|modeling)_oursvd_\w+\.py$")


@dataclass(frozen=True, slots=True)
class DecomposedLayer:
    """One decomposed Linear: `W = lora_B @ lora_A + residual`."""

    module: str
    lora_A: TensorRef
    lora_B: TensorRef
    residual: TensorRef
    bias: TensorRef | None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]


def is_decomposed(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has any tensor of a decomposed layer."""
    return any(_PART.match(name) for name in checkpoint.tensors)


def merge_decomposed(
    checkpoint: Checkpoint, output: Path, run: RunOptions, weight_format: WeightFormat | None = None
) -> Outcome:
    """Writes the dense model: `ALinear @ BLinear + weight_residual` for each layer, and a config of the plain architecture.

    Computes in float32 (float64 for float64 weights) and rounds once to the residual's dtype. Raises a `CordaConvertError`;
    then nothing was written.
    """
    with read_ahead(checkpoint.shards, run) as ahead:
        layers = read_layers(checkpoint)
        dtype = run.output_dtype
        touched: dict[str, Sequence[Produced]] = {}
        for layer in layers:
            touched |= _productions(layer, dtype)
        files = tuple(file for file in checkpoint_files(checkpoint, touched, dtype) if file.tensors)
        config = None if checkpoint.config is None else plain_config(checkpoint.config)
        side_files, left = model_side_files(checkpoint, run, config=config)
        carried, code = _without_code(side_files, checkpoint.config or {})
        card = transformers_card(
            checkpoint,
            f"`{checkpoint.name}`, a checkpoint of the CorDA authors' scripts, as a dense model: the adapter of each layer is "
            "merged into its residual.",
            relation="finetune",
            tags=("merged", "corda"),
            side_files=carried,
        )
        formatted = in_format(files, checkpoint, card, weight_format)
        return produce(
            Production(
                command="merge",
                options={"model": checkpoint.name, "format": weight_format, "dtype": run.dtype},
                output=output,
                inputs=(Input("model", checkpoint.root, checkpoint.shards),),
                files=formatted.files,
                side_files=carried,
                index_metadata=formatted.index_metadata,
                left_behind=tuple(sorted((*left, *code))),
                facts={"decomposed": {"modules": len(layers), "ranks": sorted({layer.rank for layer in layers})}},
                card=formatted.card,
            ),
            run,
            ahead,
        )


def read_layers(checkpoint: Checkpoint) -> list[DecomposedLayer]:
    """Every decomposed layer of a checkpoint. Raises one of our errors, all problems together."""
    found: dict[str, dict[str, TensorRef]] = {}
    for name, ref in checkpoint.tensors.items():
        match = _PART.match(name)
        if match is not None:
            found.setdefault(match["module"], {})[match["part"]] = ref
    rank = (checkpoint.config or {}).get("lora_r")
    problems = [_problem(checkpoint, module, parts, rank) for module, parts in found.items()]
    raise_problems([problem for problem in problems if problem is not None])
    return [
        DecomposedLayer(module, parts[_A], parts[_B], parts[_RESIDUAL], parts.get(_BIAS))
        for module, parts in found.items()
    ]


def _problem(
    checkpoint: Checkpoint, module: str, parts: Mapping[str, TensorRef], rank: object
) -> CordaConvertError | None:
    missing = [part for part in (_B, _A, _RESIDUAL) if part not in parts]
    if missing:
        return MalformedFile(
            f"{checkpoint.name}: {module} has {' and '.join(sorted(parts))} but no {' and no '.join(missing)}.",
            why="The checkpoint is incomplete.",
        )
    unknown = sorted(parts.keys() - {_A, _B, _RESIDUAL, _BIAS})
    dense = [name for name in (f"{module}.weight", f"{module}.bias") if name in checkpoint.tensors]
    if unknown or dense:
        extra = ", ".join([*(f"{module}.{part}" for part in unknown), *dense])
        return MalformedFile(
            f"{checkpoint.name}: {module} is decomposed, and has {extra} too.",
            why="No decomposed layer of the CorDA authors has that; nothing is dropped silently.",
        )
    odd = [ref for ref in parts.values() if ref.spec.dtype not in COMPUTABLE_DTYPES]
    if odd:
        return UnsupportedInput(f"{checkpoint.name}: {odd[0].name} has the dtype {odd[0].spec.dtype}.")
    return _shape_problem(checkpoint, module, parts, rank)


def _shape_problem(
    checkpoint: Checkpoint, module: str, parts: Mapping[str, TensorRef], rank: object
) -> CordaConvertError | None:
    A, B, residual = parts[_A].shape, parts[_B].shape, parts[_RESIDUAL].shape
    fits = len(A) == 2 and len(B) == 2 and A[0] == B[1] and residual == (B[0], A[1]) and 0 not in (*A, *B)
    if not fits or (_BIAS in parts and parts[_BIAS].shape != (B[0],)):
        shapes = ", ".join(f"{part} {ref.shape}" for part, ref in sorted(parts.items()))
        return MalformedFile(
            f"{checkpoint.name}: the parts of {module} do not go together: {shapes}.",
            why="ALinear.weight is (d_out, r), BLinear.weight (r, d_in), weight_residual (d_out, d_in).",
        )
    if rank is not None and rank != A[0]:
        return AdapterMismatch(
            f"{checkpoint.name}: {module} has rank {A[0]}; config.json says lora_r {rank!r}.",
            why="The config and the weights are not of one checkpoint.",
        )
    return None


def _productions(layer: DecomposedLayer, dtype: str | None) -> dict[str, Sequence[Produced]]:
    """What takes the place of each of the layer's tensors."""
    residual = layer.residual
    d_out, d_in = residual.shape
    factors = LoraFactors(layer.module, layer.lora_A, layer.lora_B, 1.0, kinds=("linear",))
    change = PlacedChange(factors, Block("out_in", (0, d_out), (0, d_in)), 0, d_out)
    target = output_dtype(residual.spec.dtype, dtype)
    weight = Produced(
        TensorSpec(f"{layer.module}.weight", target, residual.shape), FoldTransform(residual, (change,), target)
    )
    productions: dict[str, Sequence[Produced]] = {
        residual.name: (weight,),
        layer.lora_A.name: (),
        layer.lora_B.name: (),
    }
    if layer.bias is not None:
        kept = output_dtype(layer.bias.spec.dtype, dtype)
        spec = TensorSpec(f"{layer.module}.bias", kept, layer.bias.shape)
        productions[layer.bias.name] = (Produced(spec, CastTransform(layer.bias, kept, action="carried")),)
    return productions


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what the authors' scripts added: the class that transformers has itself, and no code."""
    plain = {key: value for key, value in config.items() if key not in ("lora_r", "truncation_ranks", "_name_or_path")}
    if isinstance(config.get("architectures"), list):
        plain["architectures"] = [str(name).removeprefix(_CLASS_PREFIX) for name in config["architectures"]]
    auto_map = config.get("auto_map")
    if isinstance(auto_map, dict):
        others = {key: value for key, value in auto_map.items() if _CLASS_PREFIX not in str(value)}
        plain["auto_map"] = others
        if not others:
            del plain["auto_map"]
    return plain


def _without_code(files: Sequence[SideFile], config: Mapping[str, Any]) -> tuple[tuple[SideFile, ...], tuple[str, ...]]:
    """The side files that go along, and the names of the files of code that only the decomposed model needs."""
    auto_map = config.get("auto_map")
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    modules = {str(value).rpartition("--")[2].rpartition(".")[0] for value in values if _CLASS_PREFIX in str(value)}
    code = {file.name for file in files if _CODE.match(file.name) or file.name in {f"{name}.py" for name in modules}}
    return tuple(file for file in files if file.name not in code), tuple(code)
