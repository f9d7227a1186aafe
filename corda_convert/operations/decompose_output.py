"""What `decompose` writes: a residual with its initial adapter, the adapter alone, or a truncated model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corda_convert.adapters.source import CONFIG_FILE, WEIGHTS_FILE
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.operations.contexts import Method
from corda_convert.operations.decompose_options import DecomposeOptions, Split
from corda_convert.operations.decomposition import DecomposeTransform
from corda_convert.operations.experts_decomposition import ExpertsTransform
from corda_convert.operations.initial_config import initial_config
from corda_convert.operations.model_side import model_side_files, transformers_card, with_snippet
from corda_convert.operations.options import RunOptions
from corda_convert.operations.production import checkpoint_files, output_dtype
from corda_convert.operations.targets import Target
from corda_convert.output.model_card import Card
from corda_convert.output.side_files import SideFile, json_file, override
from corda_convert.plan.model import OutputFileSpec, Produced

INITIAL_ADAPTER_WEIGHTS = f"{INITIAL_ADAPTER_FOLDER}/{WEIGHTS_FILE}"


@dataclass(frozen=True, slots=True)
class Writing:
    """The part of a production that depends on what is written."""

    files: tuple[OutputFileSpec, ...]
    side_files: tuple[SideFile, ...]
    left_behind: tuple[str, ...]
    index_metadata: Mapping[str, Any] | None
    card: Card


def plan_writing(
    names: NameMap,
    targets: Sequence[Target],
    transforms: Mapping[str, DecomposeTransform],
    options: DecomposeOptions,
    split: Split,
    run: RunOptions,
    output: Path | str,
    experts: Sequence[ExpertsTransform] = (),
) -> Writing:
    """Files, side files and card of the output. `transforms` are by the weights' names on disk."""
    checkpoint = names.checkpoint
    if names.structure is None:
        raise TypeError(f"{checkpoint.name} has no structure")
    place = run.push_to or str(output)
    residual_name = place if options.residual else f"{place}-residual"
    config = initial_config(
        checkpoint,
        names.structure,
        targets,
        split.ranks,
        mode=split.mode,
        residual_name=residual_name,
        parameters=[stack.name for transform in experts for stack in transform.stacks],
    )
    adapter = _adapter_tensors(checkpoint, targets, transforms, experts)
    if not options.residual:
        return Writing(
            files=(OutputFileSpec(WEIGHTS_FILE, adapter, {"format": "pt"}),),
            side_files=(json_file(CONFIG_FILE, config),),
            left_behind=(),
            index_metadata=None,
            card=_adapter_card(checkpoint, options, residual_name),
        )
    side_files, left = model_side_files(checkpoint, run)
    residuals = _residuals(checkpoint, transforms, experts, run.output_dtype)
    files = checkpoint_files(checkpoint, residuals, run.output_dtype)
    if split.is_dropped:
        card = _truncated_card(checkpoint, options, side_files)
        return Writing(files, side_files, left, checkpoint.index_metadata, card)
    return Writing(
        files=(*files, OutputFileSpec(INITIAL_ADAPTER_WEIGHTS, adapter, {"format": "pt"})),
        side_files=override(side_files, (json_file(f"{INITIAL_ADAPTER_FOLDER}/{CONFIG_FILE}", config),)),
        left_behind=left,
        index_metadata=checkpoint.index_metadata,
        card=_residual_card(checkpoint, options),
    )


def _residuals(
    checkpoint: Checkpoint,
    transforms: Mapping[str, DecomposeTransform],
    experts: Sequence[ExpertsTransform],
    dtype: str | None,
) -> dict[str, tuple[Produced, ...]]:
    """Each weight's residual in its place."""
    makers: dict[str, DecomposeTransform | ExpertsTransform] = dict(transforms)
    for transform in experts:
        makers |= {rows.tensor: transform for expert in transform.experts for rows in expert.rows}
    specs = {name: checkpoint.spec(name) for name in makers}
    return {
        name: (Produced(spec.with_dtype(output_dtype(spec.dtype, dtype)), makers[name]),)
        for name, spec in specs.items()
    }


def _adapter_tensors(
    checkpoint: Checkpoint,
    targets: Sequence[Target],
    transforms: Mapping[str, DecomposeTransform],
    experts: Sequence[ExpertsTransform],
) -> tuple[Produced, ...]:
    """The factors in the order in which they are computed."""
    order = {name: place for place, name in enumerate(checkpoint.tensors)}
    tensors: list[tuple[int, Produced]] = []
    for target in targets:
        transform = transforms[target.weight.name]
        shapes = {
            transform.names.lora_A: (transform.rank, target.d_in),
            transform.names.lora_B: (target.d_out, transform.rank),
        }
        tensors += [
            (order[target.weight.name], Produced(TensorSpec(tensor, "F32", shape), transform))
            for tensor, shape in shapes.items()
            if tensor is not None
        ]
    for stacks in experts:
        place = min(rows.place for expert in stacks.experts for rows in expert.rows)
        tensors += [(place, Produced(TensorSpec(name, "F32", shape), stacks)) for name, shape in stacks.factors]
    return tuple(produced for _, produced in sorted(tensors, key=lambda each: each[0]))


RESIDUAL_SNIPPET = """from peft import PeftModel
from transformers import AutoModelForCausalLM

residual = AutoModelForCausalLM.from_pretrained("{repo}")
model = PeftModel.from_pretrained(residual, "{repo}", subfolder="corda_init", is_trainable=True)"""

ADAPTER_SNIPPET = """from peft import PeftModel
from transformers import AutoModelForCausalLM

residual = AutoModelForCausalLM.from_pretrained(RESIDUAL)
model = PeftModel.from_pretrained(residual, "{repo}", is_trainable=True)"""

_TAGS: Mapping[Method, str] = {"corda": "corda", "svd": "pissa", "asvd": "asvd", "svd-llm": "svd-llm"}


def _residual_card(checkpoint: Checkpoint, options: DecomposeOptions) -> Card:
    card = transformers_card(
        checkpoint,
        f"The residual of `{checkpoint.name}` and, in `{INITIAL_ADAPTER_FOLDER}/`, the adapter to train beside it "
        f"({options.method}, {options.mode}, {options.size}). The two together equal the base model; the "
        "residual alone does not, so train and load them together.",
        relation="finetune",
        tags=(_TAGS[options.method], "residual"),
    )
    return with_snippet(card, RESIDUAL_SNIPPET)


def _adapter_card(checkpoint: Checkpoint, options: DecomposeOptions, residual_name: str) -> Card:
    card = transformers_card(
        checkpoint,
        f"The initial adapter of `{checkpoint.name}` ({options.method}, {options.mode}, {options.size}), to train "
        f"beside its residual, not beside `{checkpoint.name}` itself. `corda-convert merge {checkpoint.name} --subtract` "
        "makes the residual from this folder.",
        relation="adapter",
        tags=(_TAGS[options.method],),
    )
    # A card holds no absolute path.
    shown = Path(residual_name).name if Path(residual_name).is_absolute() else residual_name
    residual = json.dumps(shown, ensure_ascii=False)
    return replace(card, library_name="peft", snippet=ADAPTER_SNIPPET.replace("RESIDUAL", residual))


def _truncated_card(checkpoint: Checkpoint, options: DecomposeOptions, side_files: Sequence[SideFile]) -> Card:
    context = "" if options.method == "svd" else " in the context of its covariances"
    return transformers_card(
        checkpoint,
        f"`{checkpoint.name}` without the {options.truncate} smallest components{context} of each decomposed layer "
        f"({options.method}).",
        relation="finetune",
        tags=(_TAGS[options.method], "truncated"),
        side_files=side_files,
    )
