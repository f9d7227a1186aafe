"""A model and a fine-tune of it: what became of each Linear layer is a LoRA, what else changed is brought along whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.hub_id import snapshot_of
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import ModelStructure, read_structure
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.hub_reading import fetch
from corda_convert.operations.initial_config import target_modules
from corda_convert.operations.lora_dense import Difference
from corda_convert.operations.lora_modules import Carried, LoraModule, LoraSource
from corda_convert.operations.options import RunOptions
from corda_convert.operations.production import Input
from corda_convert.operations.remote_inputs import unread_weights
from corda_convert.output.side_files import tokenizer_files


@dataclass(slots=True)
class _Changes:
    """What the fine-tune changed: Linear weights, biases, whole modules, by run-time names."""

    linears: dict[str, Difference] = field(default_factory=dict)
    biases: dict[str, TensorRef] = field(default_factory=dict)
    saved: dict[str, TensorRef] = field(default_factory=dict)
    tied: set[str] = field(default_factory=set)
    unchanged: list[str] = field(default_factory=list)
    problems: list[CordaConvertError] = field(default_factory=list)


def from_checkpoints(before: Path, after: Path, run: RunOptions = RunOptions()) -> LoraSource:  # noqa: B008 - frozen
    """The difference of two checkpoints of one architecture, which are both read through once to find it.

    Linear and Conv1D weights become factors, the head too; changed biases of theirs, norms and embeddings are brought along
    whole (`bias`, `modules_to_save`), since no factors are these. A weight that two layers share is brought along for both.
    Raises one of our errors, all problems together.
    """
    base, tuned = read_checkpoint(before), read_checkpoint(after)
    shards = [*base.shards, *tuned.shards]
    if unread_weights(run, shards):
        raise UnsupportedInput(
            "There is no dry run of --from-checkpoints for a model on the Hub.",
            why="What is planned depends on which weights differ, so both models are read first; a dry run downloads none.",
            next_step="Leave out --dry-run, or download the models first with: hf download",
        )
    if not run.stream:
        fetch([file.path for file in shards], progress=run.progress)
    structure = read_structure(base.root, base.config, base.tensors)
    if structure is None:
        raise UnsupportedInput(
            f"The architecture of {base.name} is not known to transformers, so its Linear layers cannot be told.",
            next_step="Put its config.json beside the weights.",
        )
    names = NameMap(base, structure)
    changes = _compare(base, tuned, names, structure)
    raise_problems(changes.problems)
    if not changes.linears and not changes.saved and not changes.biases:
        raise AdapterMismatch(f"{base.name} and {tuned.name} hold the same numbers: there is nothing to extract.")
    if not changes.linears:
        raise UnsupportedInput(
            f"{tuned.name} differs from {base.name} in no Linear layer, only in {some([*changes.saved, *changes.biases])}."
        )
    modules = tuple(LoraModule(module, module, (), dense=difference) for module, difference in changes.linears.items())
    return LoraSource(
        modules=modules,
        carried=_carried(changes),
        config=_config(base, structure, changes),
        inputs=(Input("base", base.root, base.shards), Input("tuned", tuned.root, tuned.shards)),
        options={"from_checkpoints": [base.name, tuned.name], "init": []},
        what=f"The difference of `{tuned.name}` and `{base.name}` as an ordinary LoRA for `{base.name}`.",
        side_files=tokenizer_files(tuned.root),
        base=str(before) if snapshot_of(before) is None else base.name,
        names=names,
        warnings=tuple(_warnings(tuned, changes)),
        facts={
            "extracted": {"modules": len(modules), "unchanged": len(changes.unchanged), "whole": sorted(changes.saved)}
        },
    )


def _compare(base: Checkpoint, tuned: Checkpoint, names: NameMap, structure: ModelStructure) -> _Changes:
    changes = _Changes()
    missing = [name for name in base.tensors if name not in tuned.tensors]
    extra = [name for name in tuned.tensors if name not in base.tensors]
    if missing or extra:
        changes.problems.append(
            AdapterMismatch(
                f"{base.name} and {tuned.name} do not hold the same tensors: {some([*missing, *extra])} "
                f"{'stands' if len(missing) + len(extra) == 1 else 'stand'} in only one of them.",
                why="They are of different architectures, or are stored under other names.",
            )
        )
    for name, ref in base.tensors.items():
        other = tuned.tensors.get(name)
        if other is None:
            continue
        if ref.shape != other.shape:
            changes.problems.append(
                AdapterMismatch(f"{name} is {ref.shape} in {base.name}, {other.shape} in {tuned.name}.")
            )
        elif not {ref.spec.dtype, other.spec.dtype} <= set(COMPUTABLE_DTYPES):
            changes.problems.append(
                UnsupportedInput(
                    f"{name} is stored as {ref.spec.dtype} and {other.spec.dtype}: no plain numbers to subtract.",
                    next_step="Give unquantized models.",
                )
            )
        elif same_values(ref, other):
            changes.unchanged.append(name)
        else:
            _sort_in(changes, name, ref, other, names, structure)
    return changes


def _sort_in(
    changes: _Changes, name: str, ref: TensorRef, other: TensorRef, names: NameMap, structure: ModelStructure
) -> None:
    """Finds what a changed tensor is at run time."""
    parameter = structure.run_time_names.get(name)
    if parameter is None:
        changes.problems.append(
            UnsupportedInput(
                f"{name} changed, and the model fuses or reshapes it on loading (experts, joined projections).",
                why="Its parts would be factors of parameters, which this version does not extract.",
            )
        )
        return
    module, _, end = parameter.rpartition(".")
    kind = structure.layers.get(module)
    sharing = names.shared.get(parameter, ())
    if sharing:
        changes.saved |= dict.fromkeys(sharing, other)
        changes.tied |= set(sharing)
    elif kind in ("linear", "conv1d") and end == "weight":
        changes.linears[module] = Difference(other, ref, "in_out" if kind == "conv1d" else "out_in")
    elif kind in ("linear", "conv1d") and end == "bias":
        changes.biases[module] = other
    elif kind is not None and end in ("weight", "bias"):
        changes.saved[parameter] = other
    else:
        changes.problems.append(
            UnsupportedInput(
                f"{name} changed, and is no weight or bias of a layer that PEFT could save whole.",
            )
        )


def _carried(changes: _Changes) -> tuple[Carried, ...]:
    """Biases under PEFT's names for those of adapted and other layers, and the parameters of modules that are saved."""
    carried = []
    for module, ref in changes.biases.items():
        inner = ".base_layer" if module in changes.linears else ""
        carried.append(Carried(f"{PEFT_PREFIX}{module}{inner}.bias", ref))
    carried += [Carried(f"{PEFT_PREFIX}{name}", ref) for name, ref in changes.saved.items()]
    return tuple(carried)


def _config(base: Checkpoint, structure: ModelStructure, changes: _Changes) -> Mapping[str, Any]:
    saved = sorted({name.rpartition(".")[0] for name in changes.saved})
    architecture = str(((base.config or {}).get("architectures") or [""])[0])
    is_causal = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "bias": "all" if changes.biases else "none",
        "fan_in_fan_out": any(each.layout == "in_out" for each in changes.linears.values()),
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "ensure_weight_tying": bool(changes.tied),
        "target_modules": target_modules(structure, list(changes.linears)),
        "use_dora": False,
    }


def _warnings(tuned: Checkpoint, changes: _Changes) -> list[str]:
    if not changes.saved:
        return []
    nbytes = sum(ref.spec.nbytes for ref in changes.saved.values())
    names = sorted({name.rpartition(".")[0] for name in changes.saved})
    return [
        f"{tuned.name} also changed {some(names)}, which are no Linear layers of their own: they are brought along whole as "
        f"modules_to_save ({nbytes / 1e6:,.1f} MB), which PEFT loads and most servers do not."
    ]
