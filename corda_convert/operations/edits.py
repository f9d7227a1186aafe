"""From adapters to the tensors that they change: each change finds its parameter, and its rows on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from corda_convert.adapters.factors import Adapter, Layout, ParameterChange, block_of
from corda_convert.adapters.replacements import is_module_to_save, originals
from corda_convert.adapters.source import CONFIG_FILE, AdapterSource
from corda_convert.checkpoint.comparison import same_values
from corda_convert.checkpoint.dequantized import written_dtype
from corda_convert.checkpoint.layout import matrix_shape, whole
from corda_convert.checkpoint.names import NameMap, Place, Target
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, TensorSpec
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.operations.production import output_dtype
from corda_convert.operations.replacing import maybe_tied, parts_of, replacement_problem
from corda_convert.operations.ties import Edit, SharedEdits, Untied, settle
from corda_convert.operations.transforms import CastTransform, FoldTransform, PlacedChange, Rounding
from corda_convert.operations.verbatim import VerbatimTransform
from corda_convert.operations.vocabulary import Resized, resize, resized_shape, tokenizer_warnings
from corda_convert.plan.model import Facts, Produced, Transform


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


@dataclass(frozen=True, slots=True)
class Edits:
    """What becomes of the tensors that adapters touch, by the output's names, and of the config.

    Attributes:
        tensors: the edits; those of names that are not on disk are tensors in addition.
        config: the model's config, where it changes.
        untied: parameters that shared a tensor and become different.
        vocabulary: the vocabulary's size, where it changes.
        warnings: for the user.
    """

    tensors: dict[str, Edit]
    config: dict[str, Any] | None = None
    untied: tuple[Untied, ...] = ()
    vocabulary: Resized | None = None
    warnings: tuple[str, ...] = ()

    def facts(self) -> Facts:
        """For the receipt."""
        untied = {"untied": [each.facts() for each in self.untied]} if self.untied else {}
        return untied if self.vocabulary is None else {**untied, "vocabulary": self.vocabulary.facts()}


def fit_changes(adapter: Adapter, names: NameMap) -> list[Fitted]:
    """Every change of an adapter with its parameter. Raises every problem together."""
    problems: list[CordaConvertError] = []
    targets = names.find([change.parameters(names.known) for change in adapter.modules])
    missing = [change.module_name for change, target in zip(adapter.modules, targets, strict=True) if target is None]
    if missing:
        problems.append(_unplaced(adapter, missing, names))
    resized = _resized_parameters(adapter, targets, names)
    fitted: list[Fitted] = []
    taken: dict[tuple[str, str], str] = {}
    for change, target in zip(adapter.modules, targets, strict=True):
        if target is None:
            continue
        try:
            _check_target(change, target, names)
            target = resized.get(target.name, target)
            own = change.for_target(target)
            fitted.append(Fitted(own, target, own.fit(target)))
        except CordaConvertError as problem:
            problems.append(problem)
            continue
        other = taken.setdefault((target.name, type(own).__name__), own.module_name)
        if other != own.module_name:
            problems.append(AdapterMismatch(f"{other} and {own.module_name} are the same weight, {target.name}."))
    raise_problems(_with_base_hint(problems, adapter))
    return fitted


def _unplaced(adapter: Adapter, missing: list[str], names: NameMap) -> CordaConvertError:
    reasons = sorted(set(names.structure.unsupported.values())) if names.structure is not None else []
    stems = {name: name.removesuffix(".bias") for name in missing}
    if all(stem != name and names.target(f"{stem}.weight") is not None for name, stem in stems.items()):
        return UnsupportedInput(
            f"{adapter.source.name} has lora_B.bias for {len(missing)} of the layers without a bias in "
            f"{names.checkpoint.name}: {some(stems.values())}.",
            why="There is no tensor that it could be added to; PEFT cannot merge it either.",
            next_step="Load the adapter with PEFT beside the model.",
        )
    return AdapterMismatch(
        f"{len(missing)} of {len(adapter.modules)} adapted modules find no weight in {names.checkpoint.name}: "
        f"{some(missing)}.",
        why=f"The model changes some weights on loading in a way that cannot be undone here: {'; '.join(reasons)}."
        if reasons
        else "The adapter was trained on another model.",
    )


def _resized_parameters(adapter: Adapter, targets: Sequence[Target | None], names: NameMap) -> dict[str, Target]:
    """The parameters whose weights the adapter brings along for another vocabulary, as they are then, by name."""
    brought = [
        (target, adapter.bases[change.module_name])
        for change, target in zip(adapter.modules, targets, strict=True)
        if target is not None and change.module_name in adapter.bases
    ]
    brought += [
        (target, ref)
        for name, ref in adapter.replacements.items()
        if not is_module_to_save(adapter.source, name) and (target := names.target(name)) is not None
    ]
    resized: dict[str, Target] = {}
    for target, ref in brought:
        shape = resized_shape(target, ref.shape, names)
        for name in names.shared.get(target.name, (target.name,)) if shape is not None else ():
            sharing = names.target(name)
            if sharing is not None and sharing.tensor_name == target.tensor_name and shape is not None:
                own = whole(name, shape)
                place = Place(target.tensor_name, own, own.pieces[0])
                resized[name] = replace(sharing, shape=shape, places=(place,))
    return resized


def _check_target(change: ParameterChange, target: Target, names: NameMap) -> None:
    """Refuses a parameter that cannot be changed where it lies."""
    for place in target.places:
        stored = names.checkpoint.spec(place.tensor_name)
        if stored.dtype not in COMPUTABLE_DTYPES:
            raise UnsupportedInput(
                f"{stored.name} is stored as {stored.dtype}: the base is quantized.",
                next_step="Merge into the unquantized base model.",
            )
    if change.is_embedding and names.may_be_tied(target.tensor_name):
        raise maybe_tied(change.module_name)


def _with_base_hint(problems: list[CordaConvertError], adapter: Adapter) -> list[CordaConvertError]:
    if any(isinstance(problem, AdapterMismatch) for problem in problems) and adapter.source.base_name:
        last = problems[-1]
        if last.next_step is None:
            last.next_step = (
                f'adapter_config.json names the base model "{adapter.source.base_name}". Merge into that one.'
            )
    return problems


def collect_edits(applied: Sequence[Applied], fitted: Sequence[Sequence[Fitted]], names: NameMap) -> Edits:
    """What becomes of each tensor that an adapter touches. Raises every problem together."""
    collector = _Collector(names, SharedEdits(names))
    for one, changes in zip(applied, fitted, strict=True):
        before = collector.shared.lengths()
        collector.replace(one, changes)
        for each in changes:
            collector.change(one, each)
        collector.shared.follow(before)
    raise_problems(collector.problems)
    settled = settle(collector.shared)
    raise_problems(settled.problems)
    tensors = {**collector.tensors, **settled.edits}
    vocabulary = resize(tensors, settled.config or names.checkpoint.config, names)
    raise_problems(_size_problems(tensors, names))
    warnings = [each.warning() for each in settled.untied]
    for source in (one.adapter.source for one in applied):
        warnings += _nothing_saved(source, names)
        warnings += tokenizer_warnings(source.name, source.folder, vocabulary, names)
    config = settled.config if vocabulary is None else vocabulary.config
    return Edits(tensors, config, settled.untied, vocabulary, tuple(warnings))


def _nothing_saved(source: AdapterSource, names: NameMap) -> tuple[str, ...]:
    """A warning of modules_to_save that nothing is called: all that is left of a head that the file lacks."""
    saved = source.config.get("modules_to_save") or []
    there = (*source.tensors, *(names.known or names.checkpoint.tensors))
    if not saved or any(is_module_to_save(source, name) for name in there):
        return ()
    return (
        f"{source.name}: {CONFIG_FILE} has modules_to_save {some(map(str, saved))}, which neither its file nor "
        f"{names.checkpoint.name} has. If it was trained with a head of its own, that is not in the output.",
    )


@dataclass(slots=True)
class _Collector:
    """Notes what adapters do to each tensor, and to each parameter that shares one."""

    names: NameMap
    shared: SharedEdits
    tensors: dict[str, Edit] = field(default_factory=dict)
    problems: list[CordaConvertError] = field(default_factory=list)

    def edit(self, target: Target, place: Place) -> Edit:
        if target.name in self.names.shared:
            return self.shared.edits.setdefault(target.name, Edit(place.tensor_name))
        return self.tensors.setdefault(place.tensor_name, Edit(place.tensor_name))

    def change(self, one: Applied, fitted: Fitted) -> None:
        for place in fitted.target.places:
            self.edit(fitted.target, place).changes.append(_placed(fitted, place, one.scale))

    def replace(self, one: Applied, changes: Sequence[Fitted]) -> None:
        """Notes the tensors that the adapter brings along in place of the model's."""
        targets = {each.change.module_name: each.target for each in changes}
        for module, ref in one.adapter.bases.items():
            if module in targets:
                self._place(one, ref, targets[module], is_own=False)
        for name, ref in originals(one.adapter.source).items():
            target = self.names.target(name)
            if target is not None and target.name in self.names.shared:
                self._place(one, ref, target, is_own=False)
        self._check_saved(one.adapter)
        changed = {each.target.name for each in changes}
        for name, ref in one.adapter.replacements.items():
            target = self.names.target(name)
            is_own = is_module_to_save(one.adapter.source, name)
            if target is None:
                self.problems.append(_lacking(one.adapter, name, self.names))
            elif target.name in changed and is_own:
                self._refuse(f"{one.adapter.source.name} replaces {name}, and changes it in another way too.")
            else:
                self._place(one, ref, target, is_own=is_own)

    def _check_saved(self, adapter: Adapter) -> None:
        """Notes the parameters of modules_to_save that are not in the file: what was trained of them is lost."""
        found = {target.name for name in adapter.replacements if (target := self.names.target(name)) is not None}
        missing = [
            name
            for name in self.names.known or self.names.checkpoint.tensors
            if is_module_to_save(adapter.source, name)
            and (target := self.names.target(name)) is not None
            and found.isdisjoint(self.names.shared.get(target.name, (target.name,)))
        ]
        if missing:
            self._refuse(
                f"{adapter.source.name}: {CONFIG_FILE} has modules_to_save, but its file lacks {some(missing)}.",
                why="The adapter file is incomplete.",
            )

    def _refuse(self, what: str, why: str | None = None) -> None:
        self.problems.append(AdapterMismatch(what, why=why))

    def _place(self, one: Applied, ref: TensorRef, target: Target, *, is_own: bool) -> None:
        parts = parts_of(ref, target, self.names)
        problem = replacement_problem(one.adapter, ref, target, parts, self.names)
        if problem is not None:
            self.problems.append(problem)
            return
        for place in target.places:
            part = parts[place.tensor_name]
            if target.name in self.names.shared and not is_own:
                others = [self.shared.bases.get(name) for name in self.names.shared[target.name]]
                earlier = next((base for base in others if base is not None and base.file is not part.file), part)
                self.shared.bases.setdefault(target.name, part)
            else:
                edit = self.edit(target, place)
                earlier = edit.replacement = edit.replacement or part
            if not same_values(earlier, part):
                self._refuse(
                    f"{one.adapter.source.name} replaces {target.name} with other values than an adapter before it."
                )
                return


def _lacking(adapter: Adapter, name: str, names: NameMap) -> CordaConvertError:
    """The refusal of a weight, mostly a new head, that the model has no tensor for."""
    if adapter.source.is_file:
        return AdapterMismatch(f"{adapter.source.name} replaces {name}, which {names.checkpoint.name} lacks.")
    architectures = (names.checkpoint.config or {}).get("architectures")
    own = f" ({architectures[0]})" if isinstance(architectures, list) and architectures else ""
    task = adapter.source.config.get("task_type")
    return AdapterMismatch(
        f"{adapter.source.name} replaces {name}, which {names.checkpoint.name}{own} lacks.",
        why="The training added it to the model" + (f", for the task {task}." if task else "."),
        next_step="Load the base with the class that was trained (such as AutoModelForSequenceClassification, with its "
        "num_labels), save it with save_pretrained, and merge into that.",
    )


def _placed(fitted: Fitted, place: Place, scale: float) -> PlacedChange:
    shape = fitted.target.shape
    experts = shape[0] if fitted.target.is_stack else 1
    matrix = (shape[1], shape[2]) if fitted.target.is_stack else matrix_shape(shape)
    block = block_of(place.piece, fitted.layout, matrix, experts)
    return PlacedChange(fitted.change, block, place.piece.row, place.piece.rows, scale)


def _size_problems(edits: Mapping[str, Edit], names: NameMap) -> list[CordaConvertError]:
    """Changes that are for another number of rows than the weight has after it was replaced."""
    return [
        AdapterMismatch(
            f"{placed.change.module_name}: its change is for {placed.rows} rows, another adapter resizes {name} to "
            f"{edit.replacement.shape[0]}.",
            why="The adapters were trained with different vocabularies.",
        )
        for name, edit in edits.items()
        for placed in edit.changes
        if edit.replacement is not None
        and edit.replacement.shape != names.checkpoint.spec(edit.source).shape
        and placed.rows != edit.replacement.shape[0]
    ]


def produced(edits: Edits, names: NameMap, dtype: str | None, rounding: Rounding) -> dict[str, tuple[Produced, ...]]:
    """What takes the place of each stored tensor in the output; what is written in addition comes behind its source."""
    sources = dict.fromkeys(edit.source for edit in edits.tensors.values())
    result: dict[str, tuple[Produced, ...]] = {}
    for source in sources:
        own = edits.tensors.get(source, Edit(source))
        added = [(name, edit) for name, edit in edits.tensors.items() if edit.source == source and name != source]
        result[source] = tuple(_produce(name, edit, names, dtype, rounding) for name, edit in [(source, own), *added])
    return result


def _produce(name: str, edit: Edit, names: NameMap, dtype: str | None, rounding: Rounding) -> Produced:
    stored = names.checkpoint.tensors[edit.source]
    target = output_dtype(written_dtype(stored), dtype)
    weight = edit.replacement or stored
    transform: Transform
    if edit.changes:
        matrix = weight.reshaped(_matrix(edit, names))
        replaced = written_dtype(stored) if edit.replacement is not None else None
        transform = FoldTransform(matrix, tuple(edit.changes), target, rounding, model_dtype=replaced)
    elif edit.replacement is not None:
        transform = CastTransform(edit.replacement, target, action="replaced")
    elif target != stored.spec.dtype:
        transform = CastTransform(stored, target)
    else:
        transform = VerbatimTransform(stored)
    return Produced(TensorSpec(name, target, weight.shape), transform)


def _matrix(edit: Edit, names: NameMap) -> tuple[int, int]:
    shape = names.checkpoint.spec(edit.source).shape
    if edit.replacement is not None and edit.replacement.shape != shape:
        return matrix_shape(edit.replacement.shape)
    layout = names.structure.layouts.get(edit.source) if names.structure is not None else None
    return layout.matrix if layout is not None else matrix_shape(shape)
