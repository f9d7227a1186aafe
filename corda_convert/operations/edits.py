"""From adapters to the tensors that they change: each change finds its parameter, and its rows on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from corda_convert.adapters.factors import Adapter, Layout, ParameterChange, block_of
from corda_convert.checkpoint.layout import matrix_shape
from corda_convert.checkpoint.names import NameMap, Place, Target
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations.production import output_dtype
from corda_convert.operations.transforms import CastTransform, FoldTransform, PlacedChange, Rounding
from corda_convert.plan.model import Produced, Transform


@dataclass(frozen=True, slots=True)
class Applied:
    """An adapter, and how many times it is taken."""

    adapter: Adapter
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A change with the parameter that it is for, and how that parameter's matrix lies at run time."""

    change: ParameterChange
    target: Target
    layout: Layout


@dataclass(slots=True)
class Edit:
    """What becomes of one stored tensor: what takes its place, if anything, and what is folded into it."""

    replacement: TensorRef | None = None
    changes: list[PlacedChange] = field(default_factory=list)


def fit_changes(adapter: Adapter, names: NameMap) -> list[Fitted]:
    """Every change of an adapter with its parameter. Raises every problem together."""
    problems: list[CordaConvertError] = []
    targets = names.find([change.parameters(names.known) for change in adapter.modules])
    missing = [change.module_name for change, target in zip(adapter.modules, targets, strict=True) if target is None]
    if missing:
        problems.append(_unplaced(adapter, missing, names))
    fitted: list[Fitted] = []
    taken: dict[tuple[str, str], str] = {}
    for change, target in zip(adapter.modules, targets, strict=True):
        if target is None:
            continue
        try:
            _check_target(change, target, names)
            fitted.append(Fitted(change, target, change.fit(target)))
        except CordaConvertError as problem:
            problems.append(problem)
            continue
        other = taken.setdefault((target.name, type(change).__name__), change.module_name)
        if other != change.module_name:
            problems.append(AdapterMismatch(f"{other} and {change.module_name} are the same weight, {target.name}."))
    raise_problems(_with_base_hint(problems, adapter))
    return fitted


def _unplaced(adapter: Adapter, missing: list[str], names: NameMap) -> CordaConvertError:
    reasons = sorted(set(names.structure.unsupported.values())) if names.structure is not None else []
    return AdapterMismatch(
        f"{len(missing)} of {len(adapter.modules)} adapted modules find no weight in {names.checkpoint.name}: "
        f"{some(missing)}.",
        why=f"The model changes some weights on loading in a way that cannot be undone here: {'; '.join(reasons)}."
        if reasons
        else "The adapter was trained on another model.",
    )


def _check_target(change: ParameterChange, target: Target, names: NameMap) -> None:
    """Refuses a parameter that cannot be changed where it lies."""
    for place in target.places:
        stored = names.checkpoint.spec(place.tensor_name)
        if stored.dtype not in COMPUTABLE_DTYPES:
            raise UnsupportedInput(
                f"{stored.name} is stored as {stored.dtype}: the base is quantized.",
                next_step="Merge into the unquantized base model.",
            )
    if names.is_tied(target.tensor_name):
        raise UnsupportedInput(
            f"{change.module_name}: its weight is tied to another one (embedding and head), which this version does not "
            "untie.",
            why="Folding into the shared tensor would change both.",
        )
    if change.is_embedding and names.may_be_tied(target.tensor_name):
        raise maybe_tied(change.module_name)


def maybe_tied(name: str) -> UnsupportedInput:
    """The refusal of a tensor that, for all that is known, another one may share."""
    return UnsupportedInput(
        f"{name}: without the model's class it is not known whether the head shares this embedding.",
        why="Changing a shared tensor would change both.",
        next_step="Give the model's folder, with a config.json that transformers knows or that says "
        '"tie_word_embeddings": false.',
    )


def _with_base_hint(problems: list[CordaConvertError], adapter: Adapter) -> list[CordaConvertError]:
    if any(isinstance(problem, AdapterMismatch) for problem in problems) and adapter.source.base_name:
        last = problems[-1]
        if last.next_step is None:
            last.next_step = (
                f'adapter_config.json names the base model "{adapter.source.base_name}". Merge into that one.'
            )
    return problems


def collect_edits(applied: Sequence[Applied], fitted: Sequence[Sequence[Fitted]], names: NameMap) -> dict[str, Edit]:
    """What becomes of each stored tensor that an adapter touches, by its name. Raises every problem together."""
    edits: dict[str, Edit] = {}
    problems: list[CordaConvertError] = []
    for one, changes in zip(applied, fitted, strict=True):
        problems += _replace(one.adapter, changes, names, edits)
        for each in changes:
            for place in each.target.places:
                edits.setdefault(place.tensor_name, Edit()).changes.append(_placed(each, place, one.scale))
    raise_problems(problems)
    return edits


def _placed(fitted: Fitted, place: Place, scale: float) -> PlacedChange:
    shape = fitted.target.shape
    experts = shape[0] if fitted.target.is_stack else 1
    matrix = (shape[1], shape[2]) if fitted.target.is_stack else matrix_shape(shape)
    block = block_of(place.piece, fitted.layout, matrix, experts)
    return PlacedChange(fitted.change, block, place.piece.row, place.piece.rows, scale)


def _replace(
    adapter: Adapter, changes: Sequence[Fitted], names: NameMap, edits: dict[str, Edit]
) -> list[CordaConvertError]:
    """Notes the tensors that the adapter brings along in place of the model's. Returns what does not fit."""
    problems: list[CordaConvertError] = []
    targets = {each.change.module_name: each.target for each in changes}
    folded = {each.target.tensor_name for each in changes}
    for module, ref in adapter.bases.items():
        problem = _base_problem(adapter, ref, targets[module], names) if module in targets else None
        if problem is not None:
            problems.append(problem)
        elif module in targets:
            edits.setdefault(targets[module].tensor_name, Edit()).replacement = ref
    for name, ref in adapter.replacements.items():
        target = names.target(name)
        if target is None:
            problems.append(
                AdapterMismatch(f"{adapter.source.name} replaces {name}, which {names.checkpoint.name} lacks.")
            )
            continue
        found = _replacement_problem(adapter, name, ref, target, names)
        edit = edits.setdefault(target.tensor_name, Edit())
        if found is None and (edit.replacement is not None or target.tensor_name in folded):
            found = AdapterMismatch(f"{adapter.source.name} replaces {name}, and changes it in another way too.")
        if found is not None:
            problems.append(found)
            continue
        edit.replacement = ref
    return problems


def _base_problem(adapter: Adapter, base: TensorRef, target: Target, names: NameMap) -> CordaConvertError | None:
    """What keeps a weight that the adapter brings along from taking the place of the model's."""
    weight = names.checkpoint.spec(target.tensor_name)
    if base.shape == weight.shape and base.spec.dtype in COMPUTABLE_DTYPES:
        return None
    return UnsupportedInput(
        f"{adapter.source.name} brings {base.name} {base.spec.dtype} {base.shape} along for {weight.name} "
        f"{weight.dtype} {weight.shape}; this version does not change shapes.",
        why="The vocabulary was resized in training." if base.shape != weight.shape else None,
    )


def _replacement_problem(
    adapter: Adapter, name: str, ref: TensorRef, target: Target, names: NameMap
) -> CordaConvertError | None:
    spec = names.checkpoint.spec(target.tensor_name)
    if not target.is_plain:
        return UnsupportedInput(
            f"{adapter.source.name} replaces {name}, which lies on disk in {len(target.places)} tensors or in another form."
        )
    if spec.shape != ref.shape:
        return UnsupportedInput(
            f"{adapter.source.name} replaces {name} {spec.shape} with a tensor of shape {ref.shape}; this version "
            "does not change shapes.",
            why="The vocabulary was resized in training." if "embed" in name or "lm_head" in name else None,
        )
    if not {spec.dtype, ref.spec.dtype} <= set(COMPUTABLE_DTYPES):
        return UnsupportedInput(
            f"{adapter.source.name} replaces {name}, {spec.dtype} in the base, with {ref.spec.dtype}: only "
            "floating-point numbers can be replaced.",
            next_step="Merge into the unquantized base model.",
        )
    if names.is_tied(target.tensor_name):
        return UnsupportedInput(f"{adapter.source.name} replaces {name}, which is tied; this version does not untie.")
    return maybe_tied(name) if names.may_be_tied(target.tensor_name) else None


def produced(
    edits: Iterable[tuple[str, Edit]], names: NameMap, dtype: str | None, rounding: Rounding
) -> dict[str, tuple[Produced, ...]]:
    """What takes the place of each touched tensor in the output."""
    result: dict[str, tuple[Produced, ...]] = {}
    for name, edit in edits:
        stored = names.checkpoint.tensors[name]
        target = output_dtype(stored.spec.dtype, dtype)
        transform: Transform
        if edit.changes:
            weight = (edit.replacement or stored).reshaped(_matrix(name, names))
            transform = FoldTransform(weight, tuple(edit.changes), target, rounding)
        else:
            assert edit.replacement is not None  # noqa: S101 - an edit has one or the other
            transform = CastTransform(edit.replacement, target, action="replaced")
        result[name] = (Produced(stored.spec.with_dtype(target), transform),)
    return result


def _matrix(tensor_name: str, names: NameMap) -> tuple[int, int]:
    layout = names.structure.layouts.get(tensor_name) if names.structure is not None else None
    return layout.matrix if layout is not None else matrix_shape(names.checkpoint.spec(tensor_name).shape)
