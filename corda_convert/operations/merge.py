"""`merge`: a trained adapter folded into dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.factors import Adapter, Layout, ModuleFactors
from corda_convert.adapters.initial import with_initial
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap, Placement
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations import evidence
from corda_convert.operations.model_side import model_side_files, transformers_card
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.production import Input, Production, checkpoint_files, output_dtype, produce
from corda_convert.operations.transforms import CastTransform, FoldTransform, Rounding
from corda_convert.output.side_files import tokenizer_files
from corda_convert.plan.model import Transform


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
    folded, initial = (trained, None) if options.init is None else _with_init(trained, Path(options.init))
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    placed = place_modules(folded, names)
    weights = {factors.module_name: (weight, layout) for factors, weight, layout in placed}
    if initial is not None and not options.as_is:
        evidence.check_same_training(trained, initial)
        evidence.check_base_of_initial(initial, weights, checkpoint)
    elif not options.as_is:
        evidence.check_plain(trained, weights, checkpoint)
    dtype = run.output_dtype
    touched: dict[str, Transform] = {
        weight.name: FoldTransform(
            folded.bases.get(factors.module_name, weight),
            factors,
            layout,
            output_dtype(weight.spec.dtype, dtype),
            options.rounding,
        )
        for factors, weight, layout in placed
    }
    touched |= _replacements(folded, names, dtype, touched)
    side_files, left = model_side_files(checkpoint, run, (tokenizer_files(trained.source.folder),))
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
        output=Path(output),
        inputs=_inputs(checkpoint, trained, initial),
        files=checkpoint_files(checkpoint, touched, dtype),
        side_files=side_files,
        index_metadata=checkpoint.index_metadata,
        left_behind=left,
        facts={"adapter": _describe(folded)},
        warnings=_warnings(trained, checkpoint, options),
        card=transformers_card(
            checkpoint,
            f"`{checkpoint.name}` with the {folded.kind} adapter `{trained.source.name}` merged into its weights.",
            relation="finetune",
            tags=("merged", folded.kind),
        ),
    )
    return produce(production, run)


def _with_init(trained: Adapter, init: Path) -> tuple[Adapter, Adapter]:
    initial = read_adapter(init)
    for adapter in (trained, initial):
        if adapter.kind != "lora":
            raise AdapterMismatch(
                f"--init is for LoRA adapters trained beside a residual; {adapter.source.name} is {adapter.kind}.",
                next_step="Leave out --init.",
            )
    return with_initial(trained, initial), initial


def place_modules(adapter: Adapter, names: NameMap) -> list[tuple[ModuleFactors, TensorRef, Layout]]:
    """Each module's factors with its weight and how that is laid out. Raises every problem together."""
    placements, missing = names.place([factors.module_name for factors in adapter.modules])
    problems: list[CordaConvertError] = []
    if missing:
        problems.append(_unplaced(adapter, missing, names))
    placed = []
    modules: dict[str, str] = {}
    for factors in adapter.modules:
        placement = placements.get(factors.module_name)
        if placement is None:
            continue
        weight = names.checkpoint.tensors[placement.tensor_name]
        problem = _weight_problem(factors, weight, placement, names)
        other = modules.setdefault(weight.name, factors.module_name)
        if other != factors.module_name:
            problem = AdapterMismatch(f"{other} and {factors.module_name} are the same weight, {weight.name}.")
        if problem is not None:
            problems.append(problem)
            continue
        layout, shape_problems = _layout(factors, weight, placement)
        problems += shape_problems
        base = adapter.bases.get(factors.module_name)
        if base is not None:
            problems += _base_problems(adapter, base, weight)
        placed.append((factors, weight, layout))
    raise_problems(_with_base_hint(problems, adapter))
    return placed


def _base_problems(adapter: Adapter, base: TensorRef, weight: TensorRef) -> list[CordaConvertError]:
    """What keeps a weight that the adapter brings along from taking the place of the model's."""
    if base.shape == weight.shape and base.spec.dtype in COMPUTABLE_DTYPES:
        return []
    return [
        UnsupportedInput(
            f"{adapter.source.name} brings {base.name} {base.spec.dtype} {base.shape} along for {weight.name} "
            f"{weight.spec.dtype} {weight.shape}; this version does not change shapes.",
            why="The vocabulary was resized in training." if base.shape != weight.shape else None,
        )
    ]


def _unplaced(adapter: Adapter, missing: list[str], names: NameMap) -> CordaConvertError:
    fused = names.structure is not None and any(name in names.structure.layers for name in missing)
    return AdapterMismatch(
        f"{len(missing)} of {len(adapter.modules)} adapted modules find no weight in {names.checkpoint.name}: "
        f"{some(missing)}.",
        why="The model fuses or renames these weights on loading, which this version does not undo."
        if fused
        else "The adapter was trained on another model.",
    )


def _weight_problem(
    factors: ModuleFactors, weight: TensorRef, placement: Placement, names: NameMap
) -> CordaConvertError | None:
    if weight.spec.dtype not in COMPUTABLE_DTYPES:
        return UnsupportedInput(
            f"{weight.name} is stored as {weight.spec.dtype}: the base is quantized.",
            next_step="Merge into the unquantized base model.",
        )
    if names.is_tied(weight.name):
        return UnsupportedInput(
            f"{factors.module_name}: its weight is tied to another one (embedding and head), which this version does not "
            "untie.",
            why="Folding into the shared tensor would change both.",
        )
    if factors.is_embedding and names.may_be_tied(weight.name):
        return _maybe_tied(factors.module_name)
    if names.structure is not None and weight.name in names.structure.converted:
        return UnsupportedInput(f"{factors.module_name}: the model fuses {weight.name} with others on loading.")
    if placement.kind == "other":
        return UnsupportedInput(f"{factors.module_name} is no Linear, Conv1D or Embedding layer.")
    return None


def _maybe_tied(name: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{name}: without the model's class it is not known whether the head shares this embedding.",
        why="Changing a shared tensor would change both.",
        next_step="Give the model's folder, with a config.json that transformers knows or that says "
        '"tie_word_embeddings": false.',
    )


def _layout(factors: ModuleFactors, weight: TensorRef, placement: Placement) -> tuple[Layout, list[CordaConvertError]]:
    if factors.is_embedding != (placement.kind == "embedding") and placement.kind is not None:
        return "out_in", [
            AdapterMismatch(
                f"{factors.module_name} is of type {placement.kind}, the adapter's factors are not for that."
            )
        ]
    if factors.is_embedding or placement.kind == "conv1d":
        return "in_out", factors.check(weight.spec, "in_out")
    if placement.kind == "linear":
        return "out_in", factors.check(weight.spec, "out_in")
    as_linear, as_conv1d = factors.check(weight.spec, "out_in"), factors.check(weight.spec, "in_out")
    if not as_linear and not as_conv1d:
        return "out_in", [
            UnsupportedInput(
                f"{weight.name} is square, and without the model's class it is not known whether it is stored as "
                "(d_out, d_in) or transposed.",
                next_step="Put the model's config.json beside its weights, of an architecture that transformers knows.",
            )
        ]
    return ("in_out", []) if as_linear and not as_conv1d else ("out_in", as_linear)


def _with_base_hint(problems: list[CordaConvertError], adapter: Adapter) -> list[CordaConvertError]:
    if any(isinstance(problem, AdapterMismatch) for problem in problems) and adapter.source.base_name:
        last = problems[-1]
        if last.next_step is None:
            last.next_step = (
                f'adapter_config.json names the base model "{adapter.source.base_name}". Merge into that one.'
            )
    return problems


def _replacements(
    adapter: Adapter, names: NameMap, dtype: str | None, folded: Mapping[str, Transform]
) -> Mapping[str, Transform]:
    problems: list[CordaConvertError] = []
    found: dict[str, Transform] = {}
    for name, ref in adapter.replacements.items():
        tensor_name = names.parameter(name)
        if tensor_name is None:
            problems.append(
                AdapterMismatch(f"{adapter.source.name} replaces {name}, which {names.checkpoint.name} lacks.")
            )
            continue
        spec = names.checkpoint.spec(tensor_name)
        if spec.shape != ref.shape:
            problems.append(
                UnsupportedInput(
                    f"{adapter.source.name} replaces {name} {spec.shape} with a tensor of shape {ref.shape}; this version "
                    "does not change shapes.",
                    why="The vocabulary was resized in training." if "embed" in name or "lm_head" in name else None,
                )
            )
        elif not {spec.dtype, ref.spec.dtype} <= set(COMPUTABLE_DTYPES):
            problems.append(
                UnsupportedInput(
                    f"{adapter.source.name} replaces {name}, {spec.dtype} in the base, with {ref.spec.dtype}: only "
                    "floating-point numbers can be replaced.",
                    next_step="Merge into the unquantized base model.",
                )
            )
        elif tensor_name in folded or tensor_name in found:
            problems.append(
                AdapterMismatch(f"{adapter.source.name} replaces {name}, and changes it in another way too.")
            )
        elif names.is_tied(tensor_name):
            problems.append(
                UnsupportedInput(f"{adapter.source.name} replaces {name}, which is tied; this version does not untie.")
            )
        elif names.may_be_tied(tensor_name):
            problems.append(_maybe_tied(name))
        else:
            found[tensor_name] = CastTransform(ref, output_dtype(spec.dtype, dtype), action="replaced")
    raise_problems(problems)
    return found


def _describe(adapter: Adapter) -> dict[str, Any]:
    loras = [factors for factors in adapter.modules if isinstance(factors, LoraFactors)]
    return {
        "kind": adapter.kind,
        "modules": len(adapter.modules),
        "replaced_parameters": len(adapter.replacements),
        "ranks": sorted({int(str(factors.describe()["rank"])) for factors in adapter.modules}),
        "scalings": sorted({factors.scaling for factors in loras}),
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
