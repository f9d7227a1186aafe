"""`merge`: a trained adapter folded into dense weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.factors import Adapter, Layout
from corda_convert.adapters.initial import with_initial
from corda_convert.checkpoint.dense_families import dense_structure
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import ModelStructure, read_structure
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch
from corda_convert.operations import evidence
from corda_convert.operations.edits import Applied, Fitted, collect_edits, fit_changes, produced
from corda_convert.operations.model_side import model_side_files, transformers_card
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.production import Input, Production, checkpoint_files, produce, read_ahead
from corda_convert.operations.transforms import Rounding
from corda_convert.output.read_ahead import ReadAhead
from corda_convert.output.side_files import tokenizer_files


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What `merge` alone takes.

    Attributes:
        init: the initial adapter (`corda_init`), to merge a residual adapter into the base.
        rounding: `nearest`, or `peft` for PEFT's bits.
        as_is: trust the user that the adapter's delta, with `init` or without, belongs on this very model.
    """

    init: Path | str | None = None
    rounding: Rounding = "nearest"
    as_is: bool = False


def merge(
    model: Path | str,
    *,
    adapter: Path | str,
    output: Path | str,
    options: MergeOptions = MergeOptions(),
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Folds an adapter into a model: `W + s·B·A`, `W + s·(BA − B₀A₀)` with `options.init`, or a Bone/MiSS block.

    Computes in float32 (float64 for float64 weights) and rounds once to each tensor's dtype. Everything the adapter
    does not touch is copied byte for byte. Raises a `CordaConvertError`; then nothing was written.
    """
    checkpoint = read_checkpoint(Path(model))
    trained = read_adapter(Path(adapter))
    with read_ahead((trained.source.file, *checkpoint.shards), run) as ahead:
        return _merge(checkpoint, trained, Path(output), options, run, ahead)


def _merge(
    checkpoint: Checkpoint,
    trained: Adapter,
    output: Path,
    options: MergeOptions,
    run: RunOptions,
    ahead: ReadAhead | None,
) -> Outcome:
    folded, initial = (trained, None) if options.init is None else _with_init(trained, Path(options.init))
    names = NameMap(checkpoint, _structure(checkpoint, folded))
    fitted = fit_changes(folded, names)
    weights = matrices(fitted, checkpoint)
    if initial is not None and not options.as_is:
        evidence.check_same_training(trained, initial)
        evidence.check_base_of_initial(initial, weights, checkpoint)
    elif not options.as_is:
        evidence.check_plain(trained, weights, checkpoint)
    dtype = run.output_dtype
    edits = collect_edits([Applied(folded)], [fitted], names)
    touched = produced(edits, names, dtype, options.rounding)
    side_files, left = model_side_files(checkpoint, run, (tokenizer_files(trained.source.folder),), edits.config)
    production = Production(
        command="merge",
        options={
            "model": checkpoint.name,
            "adapter": trained.source.name,
            "init": None if initial is None else initial.source.name,
            "rounding": options.rounding,
            "as_is": options.as_is,
            "dtype": run.dtype,
        },
        output=output,
        inputs=_inputs(checkpoint, trained, initial),
        files=checkpoint_files(checkpoint, touched, dtype),
        side_files=side_files,
        index_metadata=checkpoint.index_metadata,
        left_behind=left,
        facts={"adapter": _describe(folded), **edits.facts()},
        warnings=(*_warnings(trained, checkpoint, options), *edits.warnings),
        card=transformers_card(
            checkpoint,
            f"`{checkpoint.name}` with the {folded.kind} adapter `{trained.source.name}` merged into its weights.",
            relation="finetune",
            tags=("merged", folded.kind),
        ),
    )
    return produce(production, run, ahead)


def _with_init(trained: Adapter, init: Path) -> tuple[Adapter, Adapter]:
    initial = read_adapter(init)
    for adapter in (trained, initial):
        if adapter.kind != "lora":
            raise AdapterMismatch(
                f"--init is for LoRA adapters trained beside a residual; {adapter.source.name} is {adapter.kind}.",
                next_step="Leave out --init.",
            )
    return with_initial(trained, initial), initial


def _structure(checkpoint: Checkpoint, adapter: Adapter) -> ModelStructure | None:
    """What the model's class says of the checkpoint; without importing it, where that is not needed."""
    wanted = [name for change in adapter.modules for name in change.parameters(())[:1]]
    wanted += [*adapter.replacements, *(f"{module}.weight" for module in adapter.bases)]
    dense = dense_structure(checkpoint.config or {}, checkpoint.tensors, wanted)
    return dense or read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors, wanted)


def matrices(fitted: Sequence[Fitted], checkpoint: Checkpoint) -> dict[str, tuple[TensorRef, Layout]]:
    """The stored matrix of each adapted module that lies on disk as it is, and how."""
    return {
        each.change.module_name: (checkpoint.tensors[each.target.tensor_name], each.layout)
        for each in fitted
        if each.target.is_plain
        and len(each.target.shape) == 2
        and each.target.shape == checkpoint.spec(each.target.tensor_name).shape
    }


def _describe(adapter: Adapter) -> dict[str, Any]:
    described = [change.describe() for change in adapter.modules]
    return {
        "kind": adapter.kind,
        "modules": len(adapter.modules),
        "replaced_parameters": len(adapter.replacements),
        "ranks": sorted({int(str(facts["rank"])) for facts in described if "rank" in facts}),
        "scalings": sorted({float(str(facts["scaling"])) for facts in described if "scaling" in facts}),
        "alpha": adapter.source.config.get("lora_alpha"),
        "base_model_name_or_path": Path(adapter.source.base_name).name if adapter.source.base_name else None,
    }


def _inputs(checkpoint: Checkpoint, trained: Adapter, initial: Adapter | None) -> tuple[Input, ...]:
    inputs = [
        Input("model", checkpoint.root, checkpoint.shards),
        Input("adapter", trained.source.folder, (trained.source.file,), digest_always=True),
    ]
    if initial is not None:
        inputs.append(Input("init", initial.source.folder, (initial.source.file,), digest_always=True))
    return tuple(inputs)


def _warnings(adapter: Adapter, checkpoint: Checkpoint, options: MergeOptions) -> tuple[str, ...]:
    named = adapter.source.base_name
    if named and options.init is None and checkpoint.name not in (named, Path(named).name):
        shown = Path(named).name if Path(named).is_absolute() else named  # the receipt holds no absolute path
        return (
            f'{adapter.source.name} names "{shown}" as its base; it is merged into {checkpoint.name}, where every module '
            "fits.",
        )
    return ()
