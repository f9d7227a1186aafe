"""`merge --subtract`: the initial factors of a training taken out of a model, which leaves its residual."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.source import CONFIG_FILE, PEFT_PREFIX
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.errors import UnsupportedInput, some
from corda_convert.operations import evidence
from corda_convert.operations.belonging import Part, fit_all, matrices, structure_for
from corda_convert.operations.decompose_output import INITIAL_ADAPTER_WEIGHTS, RESIDUAL_SNIPPET
from corda_convert.operations.edits import Applied, collect_edits, produced
from corda_convert.operations.model_side import model_side_files, transformers_card, with_snippet
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.production import Input, Production, checkpoint_files, produce, read_ahead
from corda_convert.operations.remote_inputs import unread_weights
from corda_convert.operations.shares import Matrices
from corda_convert.operations.transforms import CastTransform, FoldTransform
from corda_convert.output.side_files import json_file, override
from corda_convert.plan.model import OutputFileSpec, Produced


@dataclass(frozen=True, slots=True)
class Taking:
    """Initial factors that are taken out of a model, and on whose behalf.

    Attributes:
        initial: the adapter, of plain LoRA factors.
        command: the command that is run.
        options: what the user chose, for the receipt.
        role: what the adapter's file is among the inputs.
        origin: where the adapter comes from, for the model card.
        check: refuses factors that are no part of the model.
    """

    initial: Adapter
    command: str
    options: Mapping[str, Any]
    role: str
    origin: str
    check: Callable[[Adapter, Matrices, Checkpoint], None] | None


def subtract(checkpoint: Checkpoint, init: Path, output: Path, run: RunOptions, *, as_is: bool) -> Outcome:
    """Writes `W − s·B₀A₀` for every module of the initial adapter, and the adapter itself in `output/corda_init`.

    In float64, rounded once, as `decompose` computes a residual. Raises one of our errors; then nothing was written.
    """
    initial = read_adapter(init)
    _check_kind(initial)
    options = {"model": checkpoint.name, "subtract": initial.source.name, "as_is": as_is, "dtype": run.dtype}
    origin = f"the adapter `{initial.source.name}` that was taken out of it"
    check = None if as_is else evidence.check_subtracted
    return take_out(checkpoint, Taking(initial, "merge", options, "init", origin, check), output, run)


def take_out(
    checkpoint: Checkpoint, taking: Taking, output: Path, run: RunOptions, names: NameMap | None = None
) -> Outcome:
    """Writes the residual that the factors leave, and the factors in `output/corda_init`.

    Raises one of our errors; then nothing was written.
    """
    initial = taking.initial
    factors = replace(initial, replacements={}, bases={})
    with read_ahead((initial.source.file, *checkpoint.shards), run) as ahead:
        names = names or NameMap(checkpoint, structure_for(checkpoint, [factors]))
        applied = [Applied(factors, -1.0)]
        fitted = fit_all(applied, names)
        unread = unread_weights(run, checkpoint.shards)
        if taking.check is not None and not unread:
            taking.check(initial, matrices(fitted[0], checkpoint), checkpoint)
        edits = collect_edits(applied, fitted, names)
        touched = _precise(produced(edits, names, run.output_dtype, "nearest"))
        config = dict(initial.source.config) | {
            "base_model_name_or_path": run.push_to or str(output),
            "init_lora_weights": True,
        }
        side_files, left = model_side_files(checkpoint, run, config=edits.config)
        adapter_config = json_file(f"{INITIAL_ADAPTER_FOLDER}/{CONFIG_FILE}", config)
        production = Production(
            command=taking.command,
            options=taking.options,
            output=output,
            inputs=(
                Input("model", checkpoint.root, checkpoint.shards),
                Input(taking.role, initial.source.folder, (initial.source.file,), digest_always=True),
            ),
            files=(*checkpoint_files(checkpoint, touched, run.output_dtype), _adapter_file(initial)),
            side_files=override(side_files, (adapter_config,)),
            index_metadata=checkpoint.index_metadata,
            left_behind=left,
            facts={"adapters": [Part(initial, None, -1.0).describe()]} | edits.facts(),
            warnings=(*edits.warnings, *unread),
            card=with_snippet(
                transformers_card(
                    checkpoint,
                    f"The residual of `{checkpoint.name}` and, in `{INITIAL_ADAPTER_FOLDER}/`, {taking.origin}, to train "
                    "beside it. The two together equal the base model; the residual alone does not, so train and load them "
                    "together.",
                    relation="finetune",
                    tags=("residual",),
                ),
                RESIDUAL_SNIPPET,
            ),
        )
        return produce(production, run, ahead)


def _check_kind(initial: Adapter) -> None:
    kinds = (LoraFactors, ParameterFactors)
    other = [change.module_name for change in initial.modules if not isinstance(change, kinds)]
    if initial.kind != "lora" or other:
        what = f"changes {some(other)} otherwise too" if initial.kind == "lora" else f"is a {initial.kind} adapter"
        raise UnsupportedInput(
            f"{initial.source.name} {what}; --subtract takes plain LoRA factors out of a model.",
            next_step="Give the initial adapter (corda_init) of a CorDA, PiSSA or OLoRA training.",
        )


def _precise(touched: Mapping[str, Sequence[Produced]]) -> dict[str, tuple[Produced, ...]]:
    """The same productions, folded in float64."""
    return {
        name: tuple(
            replace(each, transform=replace(each.transform, precision="F64"))
            if isinstance(each.transform, FoldTransform)
            else each
            for each in productions
        )
        for name, productions in touched.items()
    }


def _adapter_file(initial: Adapter) -> OutputFileSpec:
    """The initial adapter's tensors as they are, by PEFT's names."""
    tensors = tuple(
        Produced(
            TensorSpec(f"{PEFT_PREFIX}{key}", ref.spec.dtype, ref.shape),
            CastTransform(ref, ref.spec.dtype, action="carried"),
        )
        for key, ref in initial.source.tensors.items()
    )
    return OutputFileSpec(INITIAL_ADAPTER_WEIGHTS, tensors, {"format": "pt"})
