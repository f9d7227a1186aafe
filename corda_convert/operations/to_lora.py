"""`to-lora`: an adapter trained beside a residual → an ordinary LoRA for the base, of twice the rank."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.initial import read_initial, with_initial
from corda_convert.adapters.lora import LoraFactors, LoraScaling, read_scaling
from corda_convert.adapters.source import CONFIG_FILE, PEFT_PREFIX, WEIGHTS_FILE
from corda_convert.checkpoint.tensors import TensorRef, TensorSpec
from corda_convert.errors import AdapterMismatch, UnsupportedInput, some
from corda_convert.operations import evidence
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.production import Input, Production, output_dtype, produce
from corda_convert.operations.transforms import CastTransform, JoinTransform, Part
from corda_convert.output.model_card import Card
from corda_convert.output.side_files import json_file, override, tokenizer_files
from corda_convert.plan.model import OutputFileSpec, Produced


@dataclass(frozen=True, slots=True)
class ToLoraOptions:
    """What `to-lora` alone takes.

    Attributes:
        base: name of the base model for the new config; None keeps it empty where the old name is the residual's.
    """

    base: str | None = None


def to_lora(
    adapter: Path | str,
    *,
    init: Path | str,
    output: Path | str,
    options: ToLoraOptions = ToLoraOptions(),
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Writes `[A; A₀]` and `[B | −B₀]`: `s·(BA − B₀A₀)` as one LoRA of rank 2r, exact but for the dtype.

    Plain scaling keeps r and alpha in proportion (both doubled, alpha times √2 under rsLoRA). rsLoRA together with
    patterns has its scaling baked into B. Raises a `CordaConvertError`; then nothing was written.
    """
    trained = read_adapter(Path(adapter))
    initial = read_initial(Path(init), trained)
    for source in (trained, initial):
        if source.kind != "lora":
            raise UnsupportedInput(
                f"{source.source.name} is a {source.kind} adapter; this version converts LoRA adapters trained beside a "
                "residual.",
                next_step="Merge it instead.",
            )
    if trained.source.folder.resolve() == initial.source.folder.resolve():
        raise AdapterMismatch("The adapter and --init are the same folder: the result would be zero.")
    for source in (trained, initial):
        _check_carried(source)
    pairs = with_initial(trained, initial)
    evidence.check_same_training(trained, initial)
    scaling = read_scaling(trained.source.config)
    is_baked = scaling.use_rslora and bool(scaling.rank_pattern or scaling.alpha_pattern)
    config = converted_config(trained.source.config, scaling, is_baked=is_baked)
    config["base_model_name_or_path"] = options.base
    production = Production(
        command="to-lora",
        options={
            "adapter": trained.source.name,
            "init": initial.source.name,
            "base": options.base,
            "dtype": run.dtype,
        },
        output=Path(output),
        inputs=(
            Input("adapter", trained.source.folder, (trained.source.file,), digest_always=True),
            Input("init", initial.source.folder, (initial.source.file,), digest_always=True),
        ),
        files=(OutputFileSpec(WEIGHTS_FILE, _tensors(pairs, run.output_dtype, is_baked=is_baked), {"format": "pt"}),),
        side_files=override((json_file(CONFIG_FILE, config),), tokenizer_files(trained.source.folder)),
        facts={"scaling_baked_in": is_baked, "rank": config["r"], "alpha": config["lora_alpha"]},
        card=_card(trained, initial, options),
        warnings=_warnings(pairs, options, run),
    )
    return produce(production, run)


def _check_carried(adapter: Adapter) -> None:
    """Raises `UnsupportedInput` for what the result could not hold."""
    other = [
        change.module_name for change in adapter.modules if not isinstance(change, LoraFactors) or bool(change.kernel)
    ]
    if other:
        raise UnsupportedInput(
            f"{adapter.source.name} changes {some(other)} by DoRA, a convolution's factors, a bias of LoRA or trainable tokens,"
            " which this version does not convert.",
            next_step="Merge it into the base with --init instead.",
        )


def _tensors(pairs: Adapter, dtype: str | None, *, is_baked: bool) -> tuple[Produced, ...]:
    tensors: list[Produced] = []
    for factors in pairs.modules:
        if not isinstance(factors, LoraFactors) or factors.initial_lora_A is None or factors.initial_lora_B is None:
            raise TypeError(f"{factors.module_name} has no initial factors")
        scale = factors.scaling if is_baked else 1.0
        ends = ("lora_embedding_A", "lora_embedding_B") if factors.is_embedding else ("lora_A.weight", "lora_B.weight")
        r, d_in = factors.lora_A.shape
        d_out = factors.lora_B.shape[0]
        stored = output_dtype(_exact_dtype(factors, is_baked=is_baked), dtype)
        joins = (
            ((2 * r, d_in), 0, (Part(factors.lora_A, 1.0), Part(factors.initial_lora_A, 1.0))),
            ((d_out, 2 * r), 1, (Part(factors.lora_B, scale), Part(factors.initial_lora_B, -scale))),
        )
        for end, (shape, dim, parts) in zip(ends, joins, strict=True):
            spec = TensorSpec(f"{PEFT_PREFIX}{factors.module_name}.{end}", stored, shape)
            tensors.append(Produced(spec, JoinTransform(parts, dim, spec)))
    for name, ref in _replacement_keys(pairs).items():
        target = output_dtype(ref.spec.dtype, dtype)
        spec = TensorSpec(name, target, ref.shape)
        tensors.append(Produced(spec, CastTransform(ref, target, action="carried")))
    return tuple(tensors)


def _exact_dtype(factors: LoraFactors, *, is_baked: bool) -> str:
    """The dtype that holds all four factors as they are: rounding A₀ or B₀ would leave a part of `s·B₀A₀` in the result.

    A baked-in scaling is not exact in 16 bits.
    """
    dtypes = {ref.spec.dtype for ref in factors.tensors().values()} | ({"F32"} if is_baked else set())
    if "F64" in dtypes:
        return "F64"
    return dtypes.pop() if len(dtypes) == 1 else "F32"


def _warnings(pairs: Adapter, options: ToLoraOptions, run: RunOptions) -> tuple[str, ...]:
    warnings = []
    if not options.base:
        warnings.append("The new adapter names no base model. Give its name with --base, for tools that look it up.")
    wanted = run.output_dtype
    factors = [factors for factors in pairs.modules if isinstance(factors, LoraFactors)]
    wide = {ref.spec.dtype for each in factors for ref in each.tensors().values()} & {"F32", "F64"}
    if wanted in ("BF16", "F16") and wide:
        warnings.append(
            f"The factors are rounded to {run.dtype}. B·A and B₀·A₀ nearly cancel, so their difference, all that was "
            "learned, loses more than that dtype's own precision. Without --dtype nothing is lost."
        )
    return tuple(warnings)


def _replacement_keys(adapter: Adapter) -> dict[str, TensorRef]:
    """modules_to_save, saved embeddings and trained biases, under the names that the adapter's file gives them."""
    return {ref.name: ref for ref in (*adapter.replacements.values(), *adapter.bases.values())}


def converted_config(config: Mapping[str, Any], scaling: LoraScaling, *, is_baked: bool) -> dict[str, Any]:
    """The adapter's config for the converted factors, so that PEFT computes the same scaling from twice the rank."""
    rank_pattern = {key: 2 * rank for key, rank in scaling.rank_pattern.items()}
    changed = dict(config) | {
        "r": 2 * scaling.rank,
        "rank_pattern": rank_pattern,
        "init_lora_weights": True,
        "corda_config": None,
        "inference_mode": True,
    }
    if is_baked:
        patterned = {key: _plain(rank) for key, rank in rank_pattern.items()}
        return changed | {"use_rslora": False, "lora_alpha": 2 * scaling.rank, "alpha_pattern": patterned}
    factor = math.sqrt(2) if scaling.use_rslora else 2
    return changed | {
        "lora_alpha": _plain(factor * scaling.alpha),
        "alpha_pattern": {key: _plain(factor * alpha) for key, alpha in scaling.alpha_pattern.items()},
    }


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _card(trained: Adapter, initial: Adapter, options: ToLoraOptions) -> Card:
    base = json.dumps(options.base or "BASE_MODEL", ensure_ascii=False)
    return Card(
        what=(
            f"An ordinary LoRA for the unmodified base model, converted from `{trained.source.name}`, which was trained "
            f"beside a residual, and its initial factors `{initial.source.name}`."
        ),
        base_model=options.base or "",
        relation="adapter",
        library_name="peft",
        tags=("lora",),
        snippet=(
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, "{{repo}}")'
        ),
    )
