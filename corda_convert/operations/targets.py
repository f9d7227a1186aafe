"""Which modules `decompose` takes, by PEFT's own matching, and whether each can be decomposed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from corda_convert.adapters.factors import Layout, dimensions
from corda_convert.checkpoint.covariances import Covariances
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import CLASSIFIER_HEADS, ModelStructure
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import CordaConvertError, CovarianceMismatch, MalformedFile, UnsupportedInput
from corda_convert.operations.contexts import Method

ALL_LINEAR = "all-linear"
"""PEFT's word for every Linear and Conv1D but the head."""


@dataclass(frozen=True, slots=True)
class Target:
    """A module to decompose: its weight, and what its method knows of its inputs (nothing for plain SVD)."""

    module_name: str
    weight: TensorRef
    layout: Layout
    context: TensorRef | None = None

    @property
    def d_out(self) -> int:
        return dimensions(self.weight.spec, self.layout)[0]

    @property
    def d_in(self) -> int:
        return dimensions(self.weight.spec, self.layout)[1]


@dataclass(frozen=True, slots=True)
class Selection:
    """The modules that are meant, in the terms of PEFT's `target_modules` and `exclude_modules`.

    One string is a regular expression for the whole path, or `all-linear`. Each of several is a path, the end of one, or
    `all-linear`; and, unlike in PEFT, a regular expression for the whole path where no Linear layer is called so.

    Attributes:
        targets: what is chosen; nothing for `all-linear`.
        excluded: what is left out of that.
    """

    targets: str | tuple[str, ...] = ()
    excluded: str | tuple[str, ...] = ()

    @property
    def is_explicit(self) -> bool:
        """Whether the modules were named, rather than all Linear layers taken that there are."""
        return not all(_is_all_linear(target) for target in _listed(self.targets))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The modules to decompose in the order of their weights on disk.

    Attributes:
        targets: the modules.
        left_out: Linear layers that `all-linear` means and that cannot be decomposed.
        problems: why modules that were named cannot be.
        stacks: chosen parameters that hold the matrices of experts, in the order of their registration.
        other_stacks: those that were not chosen.
    """

    targets: tuple[Target, ...]
    left_out: tuple[str, ...]
    problems: tuple[CordaConvertError, ...]
    stacks: tuple[str, ...] = ()
    other_stacks: tuple[str, ...] = ()


def choose_targets(names: NameMap, selection: Selection, *, for_peft: bool = True) -> Chosen:
    """The modules that the selection means. Raises `UnsupportedInput` where it means none.

    `for_peft`: they are to be adapted by PEFT, which must find each under its own name.
    """
    structure = names.structure
    if structure is None:
        raise UnsupportedInput(
            f"The architecture of {names.checkpoint.name} is not known to transformers, so its Linear layers cannot be told.",
            next_step="Put its config.json beside the weights; models that need remote code are not supported yet.",
        )
    linears = [module for module, kind in structure.layers.items() if kind in ("linear", "conv1d")]
    stacks = structure.expert_stacks()
    others = [name for name, found in structure.parameters.items() if found.kind not in ("linear", "conv1d")]
    everything = _Selectable(linears, stacks, [name for name in others if name not in stacks])
    selected = _select(everything, _heads(structure), selection)
    chosen = [module for module in linears if module in selected]
    chosen_stacks = tuple(name for name in stacks if name in selected)
    mistaken = _names_of_experts(names.checkpoint.config) if for_peft else frozenset()
    found = {module: _find(names, module, mistaken) for module in chosen}
    targets = [target for target in found.values() if isinstance(target, Target)]
    if not found and not chosen_stacks:
        raise UnsupportedInput(f"{names.checkpoint.name} has no Linear layer to decompose.")
    order = {name: place for place, name in enumerate(names.checkpoint.tensors)}
    wrong = {module: problem for module, problem in found.items() if isinstance(problem, CordaConvertError)}
    problems = [*(wrong.values() if selection.is_explicit or not (targets or chosen_stacks) else ())]
    problems += [problem for target in targets for problem in _quantized(target)]
    targets.sort(key=lambda target: order[target.weight.name])
    left = tuple(name for name in stacks if name not in selected)
    return Chosen(tuple(targets), tuple(wrong), tuple(problems), chosen_stacks, left)


def with_contexts(targets: Sequence[Target], covariances: Covariances, method: Method) -> tuple[Target, ...]:
    """The targets with their covariances, or for asvd their mean absolute inputs, where there are such."""
    find = covariances.find_scale if method == "asvd" else covariances.find
    return tuple(replace(target, context=find(target.module_name)) for target in targets)


def context_problems(targets: Sequence[Target], method: Method) -> list[CordaConvertError]:
    """A problem for each context of another shape, and one that lists every module without."""
    is_scale = method == "asvd"
    missing = [target.module_name for target in targets if target.context is None]
    problems = [problem for target in targets for problem in _misfit(target, is_scale=is_scale)]
    return [*problems, _missing(missing, len(targets), is_scale=is_scale)] if missing else problems


def rank_problems(
    targets: Iterable[Target], ranks: Mapping[str, int], *, is_truncated: bool
) -> list[CordaConvertError]:
    """A problem for each module whose weight has fewer components than are taken, by module name.

    Truncation must leave one at least.
    """
    problems: list[CordaConvertError] = []
    for target in targets:
        rank, side, shape = ranks[target.module_name], min(target.d_out, target.d_in), (target.d_out, target.d_in)
        if is_truncated and rank >= side:
            problems.append(
                UnsupportedInput(
                    f"--truncate {rank} leaves nothing of {target.module_name}: its weight is {shape}, {side} components.",
                    next_step="Choose a smaller number, or leave the module out with --exclude.",
                )
            )
        elif rank > side:
            problems.append(
                UnsupportedInput(
                    f"Rank {rank} is above what {target.module_name} has: its weight is {shape}, rank {side} at most.",
                    next_step="Choose a smaller --rank, or leave the module out with --exclude.",
                )
            )
    return problems


def _heads(structure: ModelStructure) -> frozenset[str]:
    """What `all-linear` leaves out: the language model's head, and those of classifiers."""
    return frozenset((*((structure.output_embedding,) if structure.output_embedding else ()), *CLASSIFIER_HEADS))


def _listed(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _is_all_linear(name: str) -> bool:
    return name.lower() == ALL_LINEAR


@dataclass(frozen=True, slots=True)
class _Selectable:
    """Paths of Linear layers, of parameters that are stacks of experts' matrices, and of all other parameters."""

    linears: Sequence[str]
    stacks: Sequence[str]
    others: Sequence[str]


def _select(everything: _Selectable, heads: frozenset[str], selection: Selection) -> set[str]:
    """The chosen modules and stacks. Raises `UnsupportedInput` for a name that is none.

    A name means Linear layers, and stacks only where no Linear layer is called so; what is excluded may be either.
    """
    linears = [module for module in everything.linears if module not in heads]
    chosen = set() if _listed(selection.targets) else set(linears)
    for target in _listed(selection.targets):
        if _is_all_linear(target):
            chosen.update(linears)
        else:
            chosen.update(_matching(everything, target, "--target", is_pattern=isinstance(selection.targets, str)))
    for name in _listed(selection.excluded):
        chosen.difference_update(
            _matching(everything, name, "--exclude", is_pattern=isinstance(selection.excluded, str))
        )
    if everything.linears and not chosen:
        raise UnsupportedInput(
            "--exclude leaves out every layer that was chosen.", next_step="Exclude less, or choose more with --target."
        )
    return chosen


def _matching(everything: _Selectable, name: str, option: str, *, is_pattern: bool) -> list[str]:
    """The modules that a name means: as a regular expression if that is what it is, or if nothing is called so."""
    kinds = [everything.linears, everything.stacks]
    if option == "--exclude":
        kinds = [[*everything.linears, *everything.stacks]]
    for modules in kinds if not is_pattern else ():
        matched = _called(modules, name)
        if matched:
            return matched
    try:
        pattern = re.compile(name)
    except re.error as error:
        raise UnsupportedInput(f"{option} {name!r} is no name and no regular expression: {error}.") from None
    for modules in kinds:
        matched = [module for module in modules if pattern.fullmatch(module)]
        if matched:
            return matched
    raise _matches_nothing(everything, name, option)


def _called(modules: Sequence[str], name: str) -> list[str]:
    return [module for module in modules if module == name or module.endswith(f".{name}")]


def _matches_nothing(everything: _Selectable, name: str, option: str) -> CordaConvertError:
    others = _called(everything.others, name) or _called(everything.others, f"{name}.weight")
    ends = sorted({module.rpartition(".")[2] for module in everything.linears})
    ends += sorted({".".join(stack.split(".")[-2:]) for stack in everything.stacks})
    return UnsupportedInput(
        f"{option} {name!r} matches no Linear layer.",
        why=f"{others[0]} is of another kind; only Linear layers and experts are decomposed." if others else None,
        next_step=f"The layers end in: {', '.join(ends)}.",
    )


_EXPERTS: Mapping[str, frozenset[str]] = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}
"""What transformers 4 called the experts' Linear layers, by transformers 5's name for a kind of models."""


def _names_of_experts(config: Mapping[str, Any] | None) -> frozenset[str]:
    """Names that PEFT takes for those of experts, which transformers 5 joins, wherever they stand in the model.

    So shared experts and dense layers of the same names cannot be adapted with it.
    """
    from transformers import conversion_mapping

    kinds = {**getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}), "mixtral": "mixtral"}
    return _EXPERTS.get(kinds.get((config or {}).get("model_type"), ""), frozenset())


def _find(names: NameMap, module: str, mistaken: frozenset[str]) -> Target | CordaConvertError:
    """The module's weight if it lies on disk as it is and belongs to no other module as well, else what is in the way."""
    if module.rpartition(".")[2] in mistaken:
        return UnsupportedInput(
            f"PEFT cannot adapt {module}: in this architecture it takes the name for that of the experts.",
            next_step="Leave it out with --exclude, or choose other modules with --target.",
        )
    found = names.target(f"{module}.weight")
    if found is None or not found.is_plain:
        return UnsupportedInput(
            f"{module} is not on disk as one tensor of its own.",
            why="The model stores it joined with others, in another form, or not at all.",
            next_step="Leave it out with --exclude, or choose other modules with --target.",
        )
    if names.is_tied(found.tensor_name):
        return UnsupportedInput(
            f"{module} shares its weight with {', '.join(_sharing(names, module))}, which a residual would change too.",
            next_step="Leave it out with --exclude.",
        )
    layout: Layout = "in_out" if found.kind == "conv1d" else "out_in"
    weight = names.checkpoint.tensors[found.tensor_name]
    if len(weight.shape) != 2:
        raise MalformedFile(f"{found.tensor_name} is {weight.shape}; the weight of a Linear layer is a matrix.")
    return Target(module, weight, layout)


def _sharing(names: NameMap, module: str) -> list[str]:
    parameter = f"{module}.weight"
    return [name for name in names.shared.get(parameter, ()) if name != parameter] or ["another parameter"]


def _quantized(target: Target) -> list[CordaConvertError]:
    if target.weight.spec.dtype in COMPUTABLE_DTYPES:
        return []
    return [
        UnsupportedInput(
            f"{target.weight.name} is stored as {target.weight.spec.dtype}: the model is quantized.",
            next_step="Decompose the unquantized model.",
        )
    ]


def _misfit(target: Target, *, is_scale: bool) -> list[CordaConvertError]:
    expected = (target.d_in,) if is_scale else (target.d_in, target.d_in)
    if target.context is None or target.context.shape == expected:
        return []
    what = "mean absolute input" if is_scale else "covariance"
    return [
        CovarianceMismatch(
            f"The {what} of {target.module_name} is {target.context.shape}; its weight is ({target.d_out}, {target.d_in}), "
            f"so {expected} was expected.",
            why="The covariances are of another model.",
            next_step="Collect covariances with this model.",
        )
    ]


def _missing(missing: Sequence[str], count: int, *, is_scale: bool) -> CordaConvertError:
    are_all = len(missing) == count
    if is_scale and are_all:
        return CovarianceMismatch(
            "The covariance file has no mean absolute inputs, which method asvd takes.",
            why="It holds covariances only, or is of another model.",
            next_step="Collect them too (vectors named MODULE.mean_abs), or choose --method corda or svd-llm.",
        )
    return CovarianceMismatch(
        f"No {'mean absolute inputs' if is_scale else 'covariance'} for {len(missing)} of {count} modules: "
        f"{', '.join(missing)}.",
        why="The covariances are of another model, or were collected for other targets." if are_all else None,
        next_step="Collect them too, or choose the modules that have one with --target.",
    )
