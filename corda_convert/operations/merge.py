"""`merge`: trained adapters folded into dense weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from corda_convert.adapters import read_adapter
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.rwkv import RwkvTraining
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.errors import UnsupportedInput
from corda_convert.hub_reading import located
from corda_convert.operations.authors import is_decomposed, merge_decomposed
from corda_convert.operations.bases import Base, read_base
from corda_convert.operations.belonging import Part
from corda_convert.operations.fold_plan import plan_fold
from corda_convert.operations.formats import WeightFormat, in_format
from corda_convert.operations.initials import assign
from corda_convert.operations.model_side import model_side_files, transformers_card
from corda_convert.operations.options import Outcome, Paths, RunOptions, paths_of
from corda_convert.operations.production import Input, Production, checkpoint_files, produce, read_ahead
from corda_convert.operations.remote_inputs import unread_weights
from corda_convert.operations.reproduction import Reproduction
from corda_convert.operations.residual import Residual, fold_into_residual, read_residual
from corda_convert.operations.several import scaled
from corda_convert.operations.subtraction import subtract
from corda_convert.operations.transforms import Rounding
from corda_convert.output.model_card import Card
from corda_convert.output.read_ahead import ReadAhead
from corda_convert.output.side_files import SideFile, tokenizer_files


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """What `merge` alone takes.

    Attributes:
        init: initial adapters (`corda_init`, or PEFT's CorDA cache file), to merge residual adapters into the base. Each
            belongs to the adapters that were trained from it, which the numbers tell.
        scales: how many times each adapter is taken, negative ones included; once, where none are given.
        residual: the model that the one adapter was trained beside, to merge into the base where `init` is lost.
        subtract: an initial adapter to take out of the model, instead of adding adapters: the result is its residual.
        alpha: lora_alpha of the adapters that are LoRA files of RWKV-PEFT, which do not hold it.
        format: `safetensors`, or `pth` for one file of torch's own; by default that of a model that is one `.pth`.
        rounding: `nearest`, or `peft` for PEFT's bits.
        requantize: keep a block-fp8 model fp8: what changes is quantized again. Else its weights become plain ones.
        as_is: trust the user that every delta, with `init` or without, belongs on this very model.
    """

    init: Paths | None = None
    scales: Sequence[float] = ()
    residual: Path | str | None = None
    subtract: Path | str | None = None
    alpha: float | None = None
    format: WeightFormat | None = None
    rounding: Rounding = "nearest"
    requantize: bool = False
    as_is: bool = False


def merge(
    model: Path | str,
    *,
    adapter: Paths = (),
    output: Path | str,
    options: MergeOptions = MergeOptions(),
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Folds adapters into a model: `W + Σ cᵢ·sᵢ·BᵢAᵢ`, `W + Σ cᵢ·sᵢ·(BᵢAᵢ − B₀A₀)` with `options.init`, or Bone/MiSS blocks.

    Computes in float32 (float64 for float64 weights) and rounds once to each tensor's dtype. Everything that no adapter
    touches is copied byte for byte. The order of the adapters does not matter, unless one depends on the weight (DoRA, bat
    blocks). Raises a `CordaConvertError`; then nothing was written.
    """
    adapters = tuple(located(path, "adapter") for path in paths_of(adapter))
    options = _here(options)
    base = read_base(located(model, "model"), run, rounding=options.rounding, requantize=options.requantize)
    checkpoint = base.stored
    if options.requantize and (options.subtract is not None or not adapters):
        raise UnsupportedInput("--requantize goes with --adapter.", next_step="Leave it out.")
    if options.subtract is not None:
        others = (options.init, options.residual, options.scales, options.format)
        if adapters or any(others) or options.alpha is not None:
            raise UnsupportedInput(
                "--subtract makes a residual, and goes with no --adapter, --scale, --init, --residual, --alpha or --format.",
                next_step="To merge an adapter trained beside that residual into the base, give --adapter and --init.",
            )
        return subtract(checkpoint, Path(options.subtract), Path(output), run, as_is=options.as_is)
    if not adapters:
        _check_alone(checkpoint, options)
        return merge_decomposed(checkpoint, Path(output), run, options.format)
    training = RwkvTraining(options.alpha, has_initial=bool(options.init or options.residual))
    trained = [read_adapter(path, training) for path in adapters]
    if options.alpha is not None and not any(
        "lora_alpha" in one.source.config for one in trained if one.source.is_file
    ):
        raise UnsupportedInput(
            "--alpha is for LoRA files of RWKV-PEFT alone; there is none.", next_step="Leave it out."
        )
    with read_ahead((*(each.source.file for each in trained), *checkpoint.shards), run) as ahead:
        return _merge(base, trained, Path(output), options, run, ahead)


def _here(options: MergeOptions) -> MergeOptions:
    """The options with paths in the place of names on the Hub."""
    return replace(
        options,
        init=tuple(located(path, "initial adapter") for path in paths_of(options.init)),
        residual=None if options.residual is None else located(options.residual, "residual"),
        subtract=None if options.subtract is None else located(options.subtract, "initial adapter"),
    )


def _check_alone(checkpoint: Checkpoint, options: MergeOptions) -> None:
    """Refuses a merge without adapters, unless the checkpoint holds its own."""
    if not is_decomposed(checkpoint):
        raise UnsupportedInput(
            "There is nothing to merge.",
            why=f"No adapter is given, and {checkpoint.name} is no checkpoint of the CorDA authors, which holds its own.",
            next_step="Give one --adapter or several, or --subtract.",
        )
    if options.init or options.residual or options.scales or options.alpha is not None:
        raise UnsupportedInput(
            f"--init, --residual, --scale and --alpha go with an adapter; {checkpoint.name} holds its own.",
            next_step="Leave them out.",
        )


def _merge(
    base: Base,
    trained: Sequence[Adapter],
    output: Path,
    options: MergeOptions,
    run: RunOptions,
    ahead: ReadAhead | None,
) -> Outcome:
    checkpoint = base.readable
    given, residual = _parts(checkpoint, trained, options)
    unread = unread_weights(run, checkpoint.shards, () if residual is None else residual.checkpoint.shards)
    plan = plan_fold(
        given, checkpoint, residual=residual, rounding=options.rounding, judges=not (options.as_is or unread)
    )
    edits = plan.edits
    warnings = [
        *(_base_warnings(given, checkpoint) if residual is None else ()),
        *_made_again_warnings(plan.parts, plan.made_again, checkpoint),
        *plan.warnings,
        *edits.warnings,
        *base.warnings(),
        *unread,
    ]
    if residual is not None:
        warnings.append(fold_into_residual(edits, residual, checkpoint))
    touched = base.touched(plan.touched(run.output_dtype, options.rounding))
    tokenizers = [tokenizer_files(part.trained.source.folder) for part in given]
    side_files, left = model_side_files(base.written, run, tokenizers, base.config(edits.config))
    facts = {"adapters": [part.describe() for part in given], **base.facts()}
    files = checkpoint_files(base.written, touched, run.output_dtype)
    formatted = in_format(files, checkpoint, _card(checkpoint, given, side_files), options.format)
    return produce(
        Production(
            command="merge",
            options=_options(checkpoint, given, residual, options, run),
            output=output,
            inputs=_inputs(base.stored, given, residual),
            files=formatted.files,
            side_files=side_files,
            index_metadata=formatted.index_metadata,
            left_behind=left,
            facts=facts | ({"order_matters": plan.keeps_order} if len(given) > 1 else {}) | edits.facts(),
            warnings=tuple(warnings),
            card=formatted.card,
        ),
        run,
        ahead,
    )


def _parts(
    checkpoint: Checkpoint, trained: Sequence[Adapter], options: MergeOptions
) -> tuple[list[Part], Residual | None]:
    """Each adapter with its initial factors and its scale; and the residual, where it must stand for them."""
    applied = scaled(trained, options.scales)
    paths, residual = paths_of(options.init), None
    if options.residual is not None:
        found = read_residual(Path(options.residual), checkpoint)
        if paths:
            raise UnsupportedInput("--init and --residual tell the same.", next_step="Give --init alone.")
        if isinstance(found, Residual):
            residual = found
            _check_residual_alone(trained, options)
        else:
            paths = (found,)
    initials = assign(trained, paths, as_is=options.as_is)
    return [Part(one.adapter, initial, one.scale) for one, initial in zip(applied, initials, strict=True)], residual


def _check_residual_alone(trained: Sequence[Adapter], options: MergeOptions) -> None:
    if len(trained) > 1 or any(scale != 1 for scale in options.scales) or trained[0].kind != "lora":
        raise UnsupportedInput(
            "--residual without its initial adapter is for one LoRA adapter, taken once.",
            why="The result is the residual with the adapter: what the residual lacks is in it once.",
            next_step="Give the initial adapter of the training with --init.",
        )


def _options(
    checkpoint: Checkpoint, parts: Sequence[Part], residual: Residual | None, options: MergeOptions, run: RunOptions
) -> dict[str, object]:
    initials = dict.fromkeys(part.initial.source.name for part in parts if part.initial is not None)
    return {
        "model": checkpoint.name,
        "adapters": [part.name for part in parts],
        "scales": list(options.scales),
        "init": list(initials),
        "residual": None if residual is None else residual.name,
        "alpha": options.alpha,
        "format": options.format,
        "rounding": options.rounding,
        "requantize": options.requantize,
        "as_is": options.as_is,
        "dtype": run.dtype,
    }


def _inputs(checkpoint: Checkpoint, parts: Sequence[Part], residual: Residual | None) -> tuple[Input, ...]:
    inputs = {checkpoint.root: Input("model", checkpoint.root, checkpoint.shards)}
    if residual is not None:
        inputs[residual.checkpoint.root] = Input("residual", residual.checkpoint.root, residual.checkpoint.shards)
    sources = [("adapter", part.trained) for part in parts]
    sources += [("init", part.initial) for part in parts if part.initial is not None]
    for role, adapter in sources:
        source = adapter.source
        inputs.setdefault(source.folder, Input(role, source.folder, (source.file,), digest_always=True))
    return tuple(inputs.values())


def _card(checkpoint: Checkpoint, parts: Sequence[Part], side_files: Sequence[SideFile]) -> Card:
    named = [
        f"the {part.trained.kind} adapter `{part.name}`" + (f" (× {part.scale:g})" if part.scale != 1 else "")
        for part in parts
    ]
    listed = ", ".join(named[:-1]) + (" and " if len(named) > 1 else "") + named[-1]
    kinds = dict.fromkeys(part.trained.kind for part in parts)
    return transformers_card(
        checkpoint,
        f"`{checkpoint.name}` with {listed} merged into its weights.",
        relation="finetune",
        tags=("merged", *kinds),
        side_files=side_files,
    )


def _base_warnings(parts: Iterable[Part], checkpoint: Checkpoint) -> Iterable[str]:
    for part in parts:
        named = part.trained.source.base_name
        if named and part.initial is None and checkpoint.name not in (named, Path(named).name):
            shown = Path(named).name if Path(named).is_absolute() else named  # the receipt holds no absolute path
            yield f'{part.name} names "{shown}" as its base; it is merged into {checkpoint.name}, where every module fits.'


def _made_again_warnings(
    parts: Sequence[Part], made_again: Sequence[Mapping[str, Reproduction]], checkpoint: Checkpoint
) -> Iterable[str]:
    for part, found in zip(parts, made_again, strict=False):
        if found:
            method = next(iter(found.values())).method
            yield (
                f"The initial {method} factors of {part.name} were made again from {checkpoint.name} in {len(found)} modules, "
                "as PEFT does when it loads the adapter. They depend on the linear algebra library in the last bits; the "
                "factors that the training began with, given with --init, do not."
            )
