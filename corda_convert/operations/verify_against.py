"""A sample of an output's tensors computed again from the inputs that it was made of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.adapters import read_adapter
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Layout
from corda_convert.adapters.lora import LoraFactors, read_scaling
from corda_convert.checkpoint.byte_file import ExtentFile
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, MalformedFile, UnsupportedInput, some
from corda_convert.operations.verify_again import Options, Sources, expected_lora, expected_plan
from corda_convert.operations.verify_receipt import ListedTensor, Sealed
from corda_convert.operations.verify_ulps import Checked

if TYPE_CHECKING:
    from corda_convert.checkpoint.folder import Checkpoint
    from corda_convert.checkpoint.names import NameMap
    from corda_convert.operations.verify_factors import Context, Factored

_UNKNOWN: tuple[None, Layout] = (None, "out_in")

Check = Callable[[], Checked]
"""Computes one tensor again. Raises one of our errors where that cannot be done."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How many tensors of each kind are computed again, and the seed that chooses them; None for all."""

    most: int | None
    seed: int

    def chosen(self, names: Iterable[str], kind: str) -> list[str]:
        listed = list(names)
        if self.most is None or len(listed) <= self.most:
            return listed
        taken = set(random.Random(f"{self.seed} {kind}").sample(range(len(listed)), self.most))  # noqa: S311 - no secret
        return [name for place, name in enumerate(listed) if place in taken]


@dataclass(slots=True)
class Recomputed:
    """What came of the sample.

    Attributes:
        checked: each tensor that was computed again.
        of: how many tensors there are of each kind.
        skipped: tensors of the sample, or kinds of them, that cannot be computed again, and why.
        problems: what is wrong.
    """

    checked: list[Checked] = field(default_factory=list)
    of: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    problems: list[CordaConvertError] = field(default_factory=list)


def recompute(
    sealed: Sealed,
    files: Mapping[str, ExtentFile],
    sources: Sources,
    sample: Sample,
    advance: Callable[[str], None],
) -> Recomputed:
    """Computes a sample again. `files` are the output's, opened; `advance` is told each tensor's name."""
    found = Recomputed()
    try:
        kinds = dict(_kinds(sealed, files, sources, found))
    except CordaConvertError as problem:
        found.problems.append(_unplanned(sealed, problem))
        return found
    for kind, checks in kinds.items():
        found.of[kind] = len(checks)
        for name in sample.chosen(checks, kind):
            advance(name)
            try:
                checked = checks[name]()
            except UnsupportedInput as refusal:
                found.skipped[name] = refusal.what
                continue
            except CordaConvertError as problem:
                found.problems.append(problem)
                continue
            found.checked.append(checked)
            if not checked.is_right:
                found.problems.append(_wrong(checked))
    return found


def _unplanned(sealed: Sealed, problem: CordaConvertError) -> CordaConvertError:
    first, *others = getattr(problem, "problems", (problem,))
    more = f" There are {len(others)} more problems." if others else ""
    return AdapterMismatch(
        f"{sealed.command} cannot be planned again from these inputs: {first.what}{more}",
        why="They are not what the folder was made from.",
    )


def _wrong(checked: Checked) -> CordaConvertError:
    if checked.wrong is not None:
        what = checked.wrong
    elif checked.how == "bits":
        what = "its bits are not those of the input"
    else:
        what = f"off by {checked.measured.ulps:.3g} ulp, {checked.measured.share:.3g} times what rounding may come to"
    return MalformedFile(f"{checked.name} ({checked.kind}) is wrong: {what}.")


def _kinds(
    sealed: Sealed, files: Mapping[str, ExtentFile], sources: Sources, found: Recomputed
) -> Iterator[tuple[str, dict[str, Check]]]:
    """By kind, what can be computed again, by name."""
    if sealed.command == "to-lora":
        yield from _converted(sealed, files, sources, found)
    elif sealed.command in ("decompose", "merge"):
        is_adapter = Options(dict(sealed.options)).flag("no_residual")
        is_truncated = sealed.options.get("truncate") is not None
        if is_truncated:
            yield from _truncated(sealed, files, sources, found)
        elif not is_adapter:
            yield from _planned(sealed, files, sources, found)
        if sealed.command == "decompose" and not is_truncated:
            if sealed.options.get("from_cache") is None:
                yield "factors", _factors(sealed, sources, is_adapter=is_adapter)
            else:
                yield "factors", _cached(sealed, sources)
    else:
        found.skipped[sealed.command] = f"What {sealed.command} writes is not computed again."


def _planned(
    sealed: Sealed, files: Mapping[str, ExtentFile], sources: Sources, found: Recomputed
) -> Iterator[tuple[str, dict[str, Check]]]:
    """Tensors of a model, by what was done to them."""
    from corda_convert.operations.verify_tensors import Expected

    stored = _stored(sealed, files)
    expected = Expected(expected_plan(sealed, sources), stored)
    own = f"{INITIAL_ADAPTER_FOLDER}/" if sealed.command == "decompose" else None
    specs = {(file, spec.name): spec for file, spec in expected.specs()}
    listed = {(tensor.file, tensor.name): tensor for tensor in sealed.tensors}
    compared = {key: tensor for key, tensor in listed.items() if own is None or not key[0].startswith(own)}
    planned = {key: spec for key, spec in specs.items() if own is None or not key[0].startswith(own)}
    found.problems += _key_problems(planned.keys(), compared.keys())
    kinds: dict[str, dict[str, Check]] = {}
    for (file, name), tensor in compared.items():
        spec = planned.get((file, name))
        if spec is None or (file, name) not in stored:
            continue
        if spec != tensor.spec:
            found.problems.append(
                MalformedFile(
                    f"{name} is {tensor.spec.dtype} {tensor.spec.shape}; from these inputs it would be {spec.dtype} "
                    f"{spec.shape}."
                )
            )
            continue
        kinds.setdefault(tensor.action, {})[name] = _bound(expected.check, file, name, tensor.action)
    yield from kinds.items()


def _bound(check: Callable[..., Checked], *arguments: str) -> Check:
    return lambda: check(*arguments)


def _key_problems(expected: Iterable[tuple[str, str]], there: Iterable[tuple[str, str]]) -> Iterator[CordaConvertError]:
    """Tensors of the base that the output lacks, and those that nothing accounts for."""
    wanted, found = {name for _, name in expected}, {name for _, name in there}
    if lacking := sorted(wanted - found):
        yield MalformedFile(f"{len(lacking)} tensors that these inputs give are not in the output: {some(lacking)}.")
    if unknown := sorted(found - wanted):
        yield MalformedFile(f"{len(unknown)} tensors of the output come from none of these inputs: {some(unknown)}.")


def _stored(sealed: Sealed, files: Mapping[str, ExtentFile]) -> dict[tuple[str, str], TensorRef]:
    return {
        (tensor.file, tensor.name): TensorRef(files[tensor.file], tensor.spec)
        for tensor in sealed.tensors
        if tensor.file in files and files[tensor.file].specs.get(tensor.name) == tensor.spec
    }


def _converted(
    sealed: Sealed, files: Mapping[str, ExtentFile], sources: Sources, found: Recomputed
) -> Iterator[tuple[str, dict[str, Check]]]:
    """Modules of a converted LoRA."""
    from corda_convert.operations.verify_lora import ConvertedLora

    adapter = read_adapter(sealed.folder)
    lora = ConvertedLora(
        source=expected_lora(sealed, sources),
        stored={name: ref for (_, name), ref in _stored(sealed, files).items()},
        scalings=read_scaling(adapter.source.config),
        facts={tensor.name: tensor.facts for tensor in sealed.tensors},
        is_baked=bool(sealed.receipt.get("scaling_baked_in")),
        is_weighted=sealed.options.get("weight_by") is not None,
    )
    found.problems += _key_problems(
        (("", name) for name in lora.expected), (("", tensor.name) for tensor in sealed.tensors)
    )
    kinds: dict[str, dict[str, Check]] = {}
    names = {**lora.modules, **lora.carried}
    for tensor in sealed.tensors:
        if tensor.name in names and lora.stored.keys() >= _needed(lora.modules.get(tensor.name), tensor):
            kinds.setdefault(tensor.action, {})[tensor.name] = _bound(lora.check, tensor.name, tensor.action)
    yield from kinds.items()


def _needed(module: Any, tensor: ListedTensor) -> set[str]:
    from corda_convert.adapters.source import PEFT_PREFIX

    return {tensor.name} if module is None else {f"{PEFT_PREFIX}{name}" for name in module.names}


def _names_of(model: Path) -> tuple[Checkpoint, NameMap]:
    from corda_convert.checkpoint.folder import read_checkpoint
    from corda_convert.checkpoint.names import NameMap
    from corda_convert.checkpoint.structure import read_structure

    checkpoint = read_checkpoint(model)
    return checkpoint, NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))


def _factors(sealed: Sealed, sources: Sources, *, is_adapter: bool) -> dict[str, Check]:
    """The factors of each module that was decomposed."""
    from corda_convert.operations.belonging import fit_all, matrices
    from corda_convert.operations.edits import Applied
    from corda_convert.operations.verify_factors import Factored, check_factors

    if sources.model is None:
        raise UnsupportedInput("The model is not given.")
    adapter = read_adapter(sealed.folder if is_adapter else sealed.folder / INITIAL_ADAPTER_FOLDER)
    checkpoint, names = _names_of(sources.model)
    (fitted,) = fit_all([Applied(adapter)], names)
    weights = matrices(fitted, checkpoint)
    contexts = _contexts(sealed, sources, names)
    mode = Options(dict(sealed.options)).text("mode") or "ipm"
    checks: dict[str, Check] = {}

    def bound(factored: Factored) -> Check:
        return lambda: check_factors(factored)

    for each in fitted:
        change = each.change
        if isinstance(change, LoraFactors):
            weight, layout = weights.get(change.module_name, _UNKNOWN)
            factored = Factored(
                change.module_name, change.lora_A, change.lora_B, change.scaling, weight, layout,
                context=contexts(change.module_name), mode=mode,
            )  # fmt: skip
        elif isinstance(change, ParameterFactors):
            factors = change.lora_A, change.lora_B
            factored = Factored(change.module_name, *factors, change.scaling, experts=change.experts)
        else:
            continue
        checks[factored.module_name] = bound(factored)
    return checks


def _cached(sealed: Sealed, sources: Sources) -> dict[str, Check]:
    """The factors of each module of PEFT's cache."""
    from corda_convert.operations.verify_cache import cached_factors

    if sources.model is None or len(sources.inits) != 1:
        raise UnsupportedInput("The model and its cache are not given.")
    _, names = _names_of(sources.model)
    return dict(cached_factors(sources.inits[0], read_adapter(sealed.folder / INITIAL_ADAPTER_FOLDER), names))


def _contexts(sealed: Sealed, sources: Sources, names: NameMap) -> Callable[[str], Context | None]:
    """What each module's weight was multiplied with, where that is known: the covariances are given, or none were needed."""
    from corda_convert.checkpoint.covariances import at_run_time, read_covariances
    from corda_convert.checkpoint.tensors import read_tensor
    from corda_convert.operations.verify_factors import Context

    options = Options(dict(sealed.options))
    method = options.text("method") or "corda"
    if method == "svd":
        return lambda _module: Context("svd")
    if sources.covariances is None:
        return lambda _module: None
    covariances = at_run_time(read_covariances(sources.covariances), names)
    facts = {str(tensor.facts.get("module")): tensor.facts for tensor in sealed.tensors}

    def context(module: str) -> Context | None:
        if method == "asvd":
            return Context(method, covariances.find_scale(module), exponent=options.number("asvd_alpha") or 0.0)
        matrix = covariances.find(module)
        if matrix is None:
            raise AdapterMismatch(f"{sources.covariances} has no covariance of {module}.")
        damp = sealed.options.get("damp")
        if method == "corda" and isinstance(damp, int | float):
            return Context(method, matrix, damp * float(read_tensor(matrix).diagonal().double().mean()))
        damping = facts.get(module, {}).get("damping")
        amount = damping.get("amount") if isinstance(damping, dict) else 0.0
        return Context(method, matrix, float(amount or 0.0))

    return context


def _truncated(
    sealed: Sealed, files: Mapping[str, ExtentFile], sources: Sources, found: Recomputed
) -> Iterator[tuple[str, dict[str, Check]]]:
    """A dense model without the smallest components: what is copied, and the rank of what was taken out."""
    checkpoint, _ = _names_of(sources.model or Path())
    stored = {name: ref for (_, name), ref in _stored(sealed, files).items()}
    found.problems += _key_problems(
        (("", name) for name in checkpoint.tensors), (("", tensor.name) for tensor in sealed.tensors)
    )
    rank = Options(dict(sealed.options)).number("truncate") or 0.0
    kinds: dict[str, dict[str, Check]] = {}
    for tensor in sealed.tensors:
        if tensor.name not in stored or tensor.name not in checkpoint.tensors:
            continue
        check = _truncation(stored[tensor.name], checkpoint.tensors[tensor.name], tensor.action, int(rank))
        kinds.setdefault(tensor.action, {})[tensor.name] = check
    yield from kinds.items()


def _truncation(stored: TensorRef, source: TensorRef, action: str, rank: int) -> Check:
    from corda_convert.operations.verify_truncated import check_cast, check_truncated

    if action == "truncated":
        return lambda: check_truncated(stored, source, rank)
    return lambda: check_cast(stored, source, action)
