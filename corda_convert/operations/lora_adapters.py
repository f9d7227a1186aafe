"""Adapters as sums of factors: trained ones with the factors that they began with, several together, blocks."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from corda_convert.adapters import read_adapter
from corda_convert.adapters.bias import LoraBias
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.rwkv import SUFFIXES
from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.adapters.tokens import TokenRows
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations import evidence
from corda_convert.operations.belonging import Part, fit_all, matrices, structure_for
from corda_convert.operations.edits import Applied, Fitted
from corda_convert.operations.initials import assign
from corda_convert.operations.lora_biases import summed_biases
from corda_convert.operations.lora_brought import brought_warnings
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
from corda_convert.operations.lora_gathering import Gathered
from corda_convert.operations.lora_modules import LoraSource
from corda_convert.operations.lora_parameters import check_alike, rewrapped
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
    gathered = Gathered(given.base, residual, is_alone=len(parts) == 1, can_read=not unread)
    for place, part in enumerate(parts):
        gathered.add(part, fitted[place] if fitted else ())
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
