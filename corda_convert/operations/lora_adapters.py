"""Adapters as sums of factors: trained ones with the factors that they began with, several together, blocks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.bias import LoraBias
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter, ParameterChange
from corda_convert.adapters.initial import with_initial
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.rwkv import SUFFIXES
from corda_convert.adapters.source import CONFIG_FILE, PEFT_PREFIX, strip_key
from corda_convert.adapters.tokens import TokenRows
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations import evidence
from corda_convert.operations.belonging import Part, fit_all, matrices, structure_for
from corda_convert.operations.edits import Applied, Fitted
from corda_convert.operations.initials import assign
from corda_convert.operations.lora_biases import summed_biases
from corda_convert.operations.lora_blocks import BatChange, block_module
from corda_convert.operations.lora_brought import brought_warnings, without_known_weights
from corda_convert.operations.lora_dense import Difference, added
from corda_convert.operations.lora_dense import scaled as scaled_change
from corda_convert.operations.lora_description import (
    base_name,
    config_of,
    inputs_of,
    keeps_scaling,
    options_of,
    sentence,
    tokenizers,
    warnings_of,
)
from corda_convert.operations.lora_modules import OUT_PROJ, Carried, DenseChange, LoraModule, LoraSource, Summand
from corda_convert.operations.lora_parameters import check_alike, parameter_module, place_of, rewrapped
from corda_convert.operations.options import RunOptions
from corda_convert.operations.remote_inputs import unread_weights
from corda_convert.operations.residual import Residual, read_residual
from corda_convert.operations.several import scaled
from corda_convert.operations.shares import Matrices, repeated_shares

BASE_SHARE = 0.5
"""The least median cosine between initial factors and the base's own weight: 1 where they were taken from it, chance else."""


@dataclass(frozen=True, slots=True)
class Given:
    """What the user gave.

    Attributes:
        adapters: folders of trained adapters.
        initials: of their initial adapters.
        scales: how many times each adapter is taken; once where there are none.
        base: the base model, where it can be read.
        residual: the model that the one adapter was trained beside, where its initial adapter is lost.
        as_is: do not judge by the numbers what belongs together.
        run: for a dry run, which reads no weights of models on the Hub.
    """

    adapters: Sequence[Path]
    initials: Sequence[Path] = ()
    scales: Sequence[float] = ()
    base: Checkpoint | None = None
    residual: Path | None = None
    as_is: bool = False
    run: RunOptions = RunOptions()  # noqa: RUF009 - frozen


@dataclass(slots=True)
class _Gathered:
    """Modules of all adapters by what tells them apart, carried tensors by their names in the result, biases to be added up.

    `can_read` is false in a dry run whose models are on the Hub: then their weights are not compared.
    """

    can_read: bool = True
    modules: dict[str, LoraModule] = field(default_factory=dict)
    carried: dict[str, Carried] = field(default_factory=dict)
    biases: dict[str, list[tuple[TensorRef, float]]] = field(default_factory=dict)
    problems: list[CordaConvertError] = field(default_factory=list)


def from_adapters(given: Given) -> LoraSource:
    """What the adapters add up to on the base. Raises one of our errors, all problems together."""
    parts, residual = _parts(given)
    for part in parts:
        for one in (part.trained, part.initial):
            if one is not None:
                _check_kind(one)
    fitted, names = _fitted(parts, given)
    models = [*([given.base] if given.base else []), *([residual.checkpoint] if residual else [])]
    unread = unread_weights(given.run, *(model.shards for model in models))
    if not given.as_is and not unread:
        _check_belonging(parts, fitted, given.base, residual)
    gathered = _Gathered(can_read=not unread)
    for place, part in enumerate(parts):
        _gather(gathered, part, fitted[place] if fitted else None, given, residual, is_alone=len(parts) == 1)
    raise_problems(gathered.problems)
    trained = [part.trained for part in parts]
    check_alike(trained, gathered.modules.values())
    warnings = [*warnings_of(parts, fitted, names), *unread]
    warnings += brought_warnings(parts, has_base=given.base is not None)
    modules = rewrapped(gathered.modules, names)
    carried = (*gathered.carried.values(), *summed_biases(modules, gathered.biases))
    return LoraSource(
        modules=modules,
        carried=carried,
        config=config_of(trained, modules, names),
        inputs=inputs_of(parts, given.base, residual),
        options=options_of(parts, residual),
        what=sentence(parts, residual),
        side_files=tokenizers(trained),
        keeps_scaling=len(parts) == 1 and keeps_scaling(parts[0]),
        base=base_name(parts),
        names=names,
        warnings=tuple(warnings),
        facts={"adapters": [part.describe() for part in parts]},
    )


def _parts(given: Given) -> tuple[list[Part], Residual | None]:
    """Each adapter with its initial adapter and its scale; and the residual, where it must stand for that."""
    raise_problems(_only_merged(path) for path in given.adapters if _is_rwkv_file(path))
    trained = [read_adapter(path) for path in given.adapters]
    applied = scaled(trained, given.scales)
    initials, residual = list(given.initials), None
    folders = {one.source.folder.resolve() for one in trained}
    if any(path.resolve() in folders for path in initials):
        raise AdapterMismatch("The adapter and --init are the same folder: the result would be zero.")
    if given.residual is not None:
        found = _residual(trained, given)
        if isinstance(found, Residual):
            residual = found
        else:
            initials = [found]
    for one in trained:
        _check_kind(one, has_initial=bool(initials))
    assigned = assign(trained, initials, as_is=given.as_is)
    return [Part(one.adapter, first, one.scale) for one, first in zip(applied, assigned, strict=True)], residual


def _is_rwkv_file(path: Path) -> bool:
    return path.is_file() and path.suffix in SUFFIXES and not (path.parent / CONFIG_FILE).is_file()


def _only_merged(path: Path) -> CordaConvertError:
    return UnsupportedInput(
        f"{path} is a file of RWKV-PEFT, which can be merged, but not converted.",
        why="It mostly holds whole tensors beside the factors (those of ln and time, which RWKV-PEFT trains by default), and "
        "PEFT puts a LoRA on a model that transformers loads, which a .pth base is not.",
        next_step=f"corda-convert merge BASE.pth --adapter {shlex.quote(str(path))} -o OUT, for LoRA with --alpha ALPHA, for "
        "PiSSA with --init init_pissa.pth.",
    )


def _residual(trained: Sequence[Adapter], given: Given) -> Residual | Path:
    if given.initials:
        raise UnsupportedInput("--init and --residual tell the same.", next_step="Give --init alone.")
    if given.base is None:
        raise UnsupportedInput(
            "--residual needs the base model, too: what the training began with is their difference.",
            next_step="Give its folder as --base.",
        )
    found = read_residual(given.residual or Path(), given.base)
    is_one = len(trained) == 1 and trained[0].kind == "lora" and not any(scale != 1 for scale in given.scales)
    if isinstance(found, Residual) and not is_one:
        raise UnsupportedInput(
            "--residual without its initial adapter is for one LoRA adapter, taken once.",
            next_step="Give the initial adapter of the training with --init.",
        )
    return found


def _check_kind(adapter: Adapter, *, has_initial: bool = False) -> None:
    """Raises `UnsupportedInput` for what is no sum of factors."""
    name = adapter.source.name
    if has_initial and adapter.kind != "lora":
        raise UnsupportedInput(
            f"{name} is a {adapter.kind} adapter; --init is for LoRA adapters trained beside a residual.",
            next_step="Leave out --init.",
        )
    others = [change for change in adapter.modules if not isinstance(change, _CONVERTIBLE)]
    if not others and any(isinstance(change, _FACTORS) for change in adapter.modules):
        return
    named = some(change.module_name for change in others)
    if adapter.source.config.get("use_dora"):
        raise UnsupportedInput(
            f"{name} is a DoRA: in {named} it sets the norm of every output, which depends on the weight beneath it.",
            why="On another weight, the base instead of the residual, its factors and norms are another function, and no LoRA "
            "is it."
            if has_initial
            else "No LoRA does what it does.",
            next_step="Merge it into the base, " + ("with --init." if has_initial else "or serve it as DoRA."),
        )
    raise UnsupportedInput(
        f"{name} adapts {named} by target_parameters or in another way that this version does not convert to LoRA."
        if others
        else f"{name} has no factors to convert.",
        next_step="Merge it into the base instead.",
    )


_FACTORS = (LoraFactors, ParameterFactors, BlockFactors)
_CONVERTIBLE = (*_FACTORS, LoraBias, TokenRows)


def _fitted(parts: Sequence[Part], given: Given) -> tuple[list[list[Fitted]], NameMap | None]:
    """Every change with its parameter of the base, where that can be read. Raises `UnsupportedInput` where it must."""
    blocks = [part.name for part in parts if part.trained.kind != "lora"]
    if given.base is None:
        if blocks:
            raise UnsupportedInput(
                f"{some(blocks)} holds blocks, and how many inputs its layers have stands in the base model alone.",
                next_step="Give the base model's folder with --base; for balance and mini only headers are read.",
            )
        return [], None
    applied = [Applied(part.trained, part.scale) for part in parts]
    names = NameMap(given.base, structure_for(given.base, [one.adapter for one in applied]))
    return fit_all(applied, names), names


def _check_belonging(
    parts: Sequence[Part], fitted: Sequence[Sequence[Fitted]], base: Checkpoint | None, residual: Residual | None
) -> None:
    """Refuses adapters that are not what the options say. Raises every problem together."""
    problems: list[CordaConvertError] = []
    for place, part in enumerate(parts):
        try:
            _check_part(part, fitted[place] if fitted else (), base, residual)
        except CordaConvertError as problem:
            problems.append(problem)
    raise_problems(problems)


def _check_part(part: Part, fitted: Sequence[Fitted], base: Checkpoint | None, residual: Residual | None) -> None:
    weights = {} if base is None else matrices(fitted, base)
    if part.initial is not None:
        if base is not None:
            evidence.check_base_of_initial(part.initial, weights, base)
            _check_share(part.initial, repeated_shares(part.initial, weights), base)
    elif residual is not None:
        own = {module: (residual.tensor(ref.name), layout) for module, (ref, layout) in weights.items()}
        evidence.check_residual(part.trained, weights, own, residual.name)
    elif base is not None and evidence.initial_adapter_of(base.root) is not None:
        raise AdapterMismatch(
            f"{base.name} is a residual (it has its initial adapter with it); a LoRA is converted for the base model.",
            next_step="Give the base model as --base, and the residual's initial adapter as --init.",
        )
    elif (reason := _reason_against(part, weights, base)) is not None:
        raise AdapterMismatch(
            f"{part.name} was trained beside a residual: {reason}.",
            why="On the base, what the residual lacks would be added twice.",
            next_step="Give its initial adapter (corda_init, or PEFT's CorDA cache_file) with --init, or --base and --residual "
            "where that is lost. If you know that it belongs on the base as it is, say --as-is.",
        )


def _reason_against(part: Part, weights: Matrices, base: Checkpoint | None) -> str | None:
    """What tells that an adapter without its initial one needs it."""
    if base is None:
        return evidence.residual_reason(part.trained)
    return evidence.repeated_reason(part.trained, weights, base, is_added=part.scale > 0)


def _check_share(initial: Adapter, shares: Sequence[float], base: Checkpoint) -> None:
    """Refuses a base of which the initial factors are no part. Raises `AdapterMismatch`."""
    if shares and median(shares) < BASE_SHARE:
        raise AdapterMismatch(
            f"{base.name} is not the model that {initial.source.name} was taken from: the initial factors make up "
            f"{median(shares):.1%} of the weight in their own column space; on the base it is 100 %.",
            why="The training began on another model.",
            next_step="Give that as --base. If the initial factors are no projection of the weights (LoRA-GA), say --as-is.",
        )


def _gather(
    gathered: _Gathered,
    part: Part,
    fitted: Sequence[Fitted] | None,
    given: Given,
    residual: Residual | None,
    *,
    is_alone: bool,
) -> None:
    """Adds one adapter to what is there."""
    weights = _weights(fitted or (), given) if gathered.can_read else {}
    adapter = without_known_weights(part, weights, residual)
    if part.initial is not None:
        adapter = with_initial(adapter, part.initial, takes_parameters=True)
    by_name = {_name(each.change): each for each in fitted or ()}
    for module in _modules(adapter, part, by_name, given, residual, gathered):
        own = module if is_alone else _unscaled(module)
        place = place_of(own)
        before = gathered.modules.get(place)
        if before is None:
            gathered.modules[place] = own
        elif _form(before) != _form(own):
            gathered.problems.append(
                AdapterMismatch(
                    f"{place} is {_form(before)[0]} in one adapter, {_form(own)[0]} in {part.name}.",
                    why="The adapters are for different models.",
                )
            )
        else:
            gathered.modules[place] = added(before, own)
    for bias in (change for change in adapter.modules if isinstance(change, LoraBias)):
        name, times = strip_key(bias.bias.name), bias.scaling * part.scale
        if is_alone:
            gathered.carried[f"{PEFT_PREFIX}{name}"] = Carried(f"{PEFT_PREFIX}{name}", bias.bias, times)
        else:
            gathered.biases.setdefault(name.removesuffix(".lora_B.bias"), []).append((bias.bias, times))
    for carried in _carried(adapter):
        before_it = gathered.carried.setdefault(carried.name, carried)
        if before_it is not carried and not same_values(before_it.ref, carried.ref):
            gathered.problems.append(
                AdapterMismatch(
                    f"Two adapters bring {carried.name} along, and not the same.",
                    why="A tensor that replaces the model's cannot be added to another.",
                )
            )


def _form(module: LoraModule) -> tuple[object, ...]:
    """What modules that are added up have in common; the matrix's shape first, of a stack with the number of experts."""
    shape = (module.experts, *module.shape) if module.is_parameter else module.shape
    return shape, module.kernel, module.is_embedding


def _unscaled(module: LoraModule) -> LoraModule:
    """The same with the scaling in each summand, for those of other adapters to join."""
    own = tuple(replace(summand, factor=summand.factor * module.scaling) for summand in module.summands)
    return replace(module, summands=own, scaling=1.0)


def _modules(
    adapter: Adapter,
    part: Part,
    fitted: Mapping[str, Fitted],
    given: Given,
    residual: Residual | None,
    gathered: _Gathered,
) -> Iterable[LoraModule]:
    weights = _weights(list(fitted.values()), given)
    keys = {_key(change) for change in adapter.modules if isinstance(change, LoraFactors)}
    seen: set[str] = set()
    for change in adapter.modules:
        if isinstance(change, BlockFactors):
            dense: DenseChange | None = None
            if change.depends_on_weight:
                if change.module_name not in weights:
                    gathered.problems.append(_no_weight(change, given))
                    continue
                dense = scaled_change(BatChange(change.block, *weights[change.module_name]), part.scale)
            shape = fitted[change.module_name].target.shape
            yield block_module(change, (shape[0], shape[1]), dense, part.scale if dense is None else 1.0)
        elif isinstance(change, ParameterFactors):
            if residual is not None:
                gathered.problems.append(_no_difference(change))
                continue
            try:
                yield parameter_module(change, fitted.get(_name(change)), part.scale)
            except CordaConvertError as problem:
                gathered.problems.append(problem)
        elif isinstance(change, LoraFactors) and _key(change) not in seen:
            key = _key(change)
            seen.add(key)
            outer = key.removesuffix(OUT_PROJ)
            summands = [Summand(change.lora_A, change.lora_B, 1.0)]
            if change.initial_lora_A is not None and change.initial_lora_B is not None:
                summands.append(Summand(change.initial_lora_A, change.initial_lora_B, -1.0))
            lost = None
            if residual is not None and change.module_name not in adapter.bases:
                if change.module_name not in weights:
                    gathered.problems.append(_no_weight(change, given))
                    continue
                lost = _lost(change, weights, residual, gathered)
            yield LoraModule(
                key=key,
                pattern_name=outer if outer in keys else key,
                summands=tuple(summands),
                scaling=change.scaling * part.scale,
                dense=lost,
                dense_rank=change.rank if lost is not None else 0,
                is_embedding=change.is_embedding,
                kernel=change.kernel,
            )


def _weights(fitted: Sequence[Fitted], given: Given) -> Matrices:
    """The base's own matrices of the adapted modules, where it can be read."""
    return {} if given.base is None else matrices(fitted, given.base)


def _name(change: ParameterChange) -> str:
    """What tells a change of an adapter from its others: of a parameter, its wrapper's path."""
    return change.key if isinstance(change, ParameterFactors) else change.module_name


def _no_difference(change: ParameterFactors) -> CordaConvertError:
    return UnsupportedInput(
        f"{change.module_name}: initial factors of a parameter are not taken from the difference of two models.",
        next_step="Give the initial adapter of the training with --init, or merge into the residual.",
    )


def _key(change: LoraFactors) -> str:
    """The module's path in the file's keys, which for the output projection of a MultiheadAttention is not its name."""
    return strip_key(change.lora_A.name).removesuffix(".lora_A.weight").removesuffix(".lora_embedding_A")


def _lost(change: LoraFactors, weights: Mapping[str, Any], residual: Residual, gathered: _Gathered) -> Difference:
    """`W_res − W`, which is `−s·B₀A₀` up to the residual's rounding."""
    weight, layout = weights[change.module_name]
    own = residual.tensor(weight.name)
    if own.shape != weight.shape:
        gathered.problems.append(
            AdapterMismatch(
                f"{weight.name} is {own.shape} in {residual.name}, {weight.shape} in the base.",
                why="It is not the residual of this model.",
            )
        )
    return Difference(own, weight, layout)


def _no_weight(change: ParameterChange, given: Given) -> CordaConvertError:
    name = "the base" if given.base is None else given.base.name
    return UnsupportedInput(
        f"{change.module_name}: its weight does not lie in {name} as one matrix, from which its change could be computed.",
        next_step="Merge the adapter instead.",
    )


def _carried(adapter: Adapter) -> Iterable[Carried]:
    """modules_to_save, saved embeddings, trained biases, and token rows."""
    refs = [*adapter.replacements.values(), *adapter.bases.values()]
    refs += [change.rows for change in adapter.modules if isinstance(change, TokenRows)]
    for ref in refs:
        yield Carried(f"{PEFT_PREFIX}{strip_key(ref.name)}", ref)
