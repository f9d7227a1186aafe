"""Which stacks of experts' matrices `decompose` takes, where they lie on disk, and what is known of each expert's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from corda_convert.adapters.factors import Layout
from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.covariances import Covariances
from corda_convert.checkpoint.names import NameMap, Place
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, TensorSpec
from corda_convert.errors import CordaConvertError, CovarianceMismatch, UnsupportedInput, some
from corda_convert.operations.contexts import Method, SharedContexts
from corda_convert.operations.decompose_options import DecomposeOptions, Split
from corda_convert.operations.decomposition import DecomposeTransform, Names
from corda_convert.operations.experts_decomposition import (
    LORA_A,
    LORA_B,
    RESIDUAL,
    Expert,
    ExpertsTransform,
    Stack,
    StoredRows,
)
from corda_convert.plan.model import Part

OUTWARD = ("down_proj", "fc2", "w2", "output_linear")
"""Stacks that read what is inside their module, and not the module's own inputs."""


@dataclass(frozen=True, slots=True)
class StackTarget:
    """A stack of experts' matrices to decompose.

    Attributes:
        name: the parameter's path.
        shape: (E, d1, d2) at run time.
        layout: whether an expert's matrix is (d_out, d_in) or transposed.
        is_transposed: whether PEFT takes it for transposed.
        rows: for each expert its rows on disk, the first of them first.
        contexts: for each expert what the method knows of its inputs.
    """

    name: str
    shape: tuple[int, int, int]
    layout: Layout
    is_transposed: bool
    rows: tuple[tuple[StoredRows, ...], ...]
    contexts: tuple[TensorRef | None, ...]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def d_in(self) -> int:
        return self.shape[2] if self.layout == "out_in" else self.shape[1]

    @property
    def place(self) -> int:
        """Of the first of its tensors on disk."""
        return min(rows.place for expert in self.rows for rows in expert)

    def expert_name(self, number: int) -> str:
        return f"{self.module}.{number}.{self.name.rpartition('.')[2]}"


def find_stack(names: NameMap, name: str) -> StackTarget | CordaConvertError:
    """The stack where it lies on disk, or what is in the way."""
    target = names.target(name)
    if target is None or not target.is_stack or names.structure is None:
        reason = next(iter((names.structure.unsupported if names.structure else {}).values()), None)
        return UnsupportedInput(
            f"{name} is not on disk in a form that can be decomposed and written back.",
            why=reason,
            next_step="Leave it out with --exclude, or choose others with --target.",
        )
    dtypes = {names.checkpoint.spec(place.tensor_name).dtype for place in target.places}
    first = names.checkpoint.spec(target.tensor_name)
    if not dtypes <= set(COMPUTABLE_DTYPES):
        return UnsupportedInput(
            f"{first.name} is stored as {first.dtype}: the model is quantized.",
            next_step="Decompose the unquantized model.",
        )
    experts, rows, columns = target.shape
    order = {tensor: place for place, tensor in enumerate(names.checkpoint.tensors)}
    pieces: list[list[StoredRows]] = [[] for _ in range(experts)]
    for place in target.places:
        pieces[place.piece.expert or 0].append(_stored(names, place, order[place.tensor_name]))
    for own in pieces:
        own.sort(key=lambda each: each.first)
    if len(dtypes) > 1 or any(len({each.tensor for each in own}) != len(own) for own in pieces):
        return UnsupportedInput(
            f"{name} is on disk in several dtypes, or has several parts of one matrix in one tensor.",
            next_step="Save the model again with transformers.",
        )
    parameter = names.structure.parameters[target.name]
    layout: Layout = "in_out" if parameter.is_transposed else _layout(names, target.name)
    return StackTarget(
        target.name,
        (experts, rows, columns),
        layout,
        parameter.is_transposed,
        tuple(tuple(own) for own in pieces),
        (None,) * experts,
    )


def _stored(names: NameMap, place: Place, number: int) -> StoredRows:
    piece, matrix = place.piece, place.layout.matrix
    ref = names.checkpoint.tensors[place.tensor_name].reshaped(matrix).rows(piece.row, piece.row + piece.rows)
    part = Part(piece.row, piece.row + piece.rows, matrix[0])
    return StoredRows(place.tensor_name, number, ref, part, piece.first, piece.count, piece.transposed)


def _layout(names: NameMap, name: str) -> Layout:
    """How a stack lies whose module does not say so: by the side that is the model's own width (Llama 4 has it first)."""
    config = names.checkpoint.config or {}
    text = config.get("text_config")
    width = config.get("hidden_size") or (text.get("hidden_size") if isinstance(text, dict) else None)
    module = name.rpartition(".")[0]
    votes: set[Layout] = set()
    for other, parameter in names.structure.parameters.items() if names.structure is not None else ():
        if other.rpartition(".")[0] != module or not parameter.is_stack or width not in parameter.shape[1:]:
            continue
        _, first, last = parameter.shape
        if first != last:
            votes.add("out_in" if (last == width) != (other.rpartition(".")[2] in OUTWARD) else "in_out")
    return votes.pop() if len(votes) == 1 else "out_in"


def context_names(stack: StackTarget, number: int) -> list[str]:
    """Under which names a covariance of an expert's inputs is looked for, its own before its layer's."""
    module, parameter = stack.module, stack.name.rpartition(".")[2]
    named = [stack.expert_name(number)]
    named += [rows.tensor.removesuffix(".weight") for rows in stack.rows[number] if rows.tensor != stack.name]
    if parameter in OUTWARD:
        return [*named, stack.name]
    return [*named, f"{module}.{number}", stack.name, module]


def with_stack_contexts(
    stacks: Iterable[StackTarget], covariances: Covariances, method: Method
) -> tuple[StackTarget, ...]:
    """The stacks with each expert's covariance, or for asvd mean absolute inputs, where there are such."""
    find = covariances.find_scale if method == "asvd" else covariances.find
    return tuple(
        replace(
            stack,
            contexts=tuple(
                next((ref for name in context_names(stack, number) if (ref := find(name)) is not None), None)
                for number in range(stack.shape[0])
            ),
        )
        for stack in stacks
    )


def stack_context_problems(stacks: Sequence[StackTarget], method: Method) -> list[CordaConvertError]:
    """One for each stack with a context of another shape, and one that lists those without."""
    what = "mean absolute inputs" if method == "asvd" else "covariance"
    problems: list[CordaConvertError] = []
    for stack in stacks:
        expected = (stack.d_in,) if method == "asvd" else (stack.d_in, stack.d_in)
        odd = [ref for ref in stack.contexts if ref is not None and ref.shape != expected]
        if odd:
            problems.append(
                CovarianceMismatch(
                    f"{odd[0].name} is {odd[0].shape}; the matrices of {stack.name} have {stack.d_in} inputs, so {expected} "
                    "was expected.",
                    why="The covariances are of another model, or of other inputs.",
                    next_step="Collect covariances with this model.",
                )
            )
    starved = [stack for stack in stacks if None in stack.contexts and any(stack.contexts)]
    if starved:
        count = sum(stack.contexts.count(None) for stack in starved)
        problems.append(
            CovarianceMismatch(
                f"No {what} for {count} of the {sum(stack.shape[0] for stack in starved)} experts' matrices in "
                f"{len(starved)} stacks: {'; '.join(map(_without, starved))}.",
                why="Others in these stacks have one: no token of the text reached these experts.",
                next_step="Collect on more text, or one for all experts of a layer with collect --experts shared; or leave the "
                "stacks out with --exclude.",
            )
        )
    missing = [stack for stack in stacks if not any(stack.contexts)]
    if missing:
        stack = missing[0]
        number = stack.contexts.index(None)
        looked = dict.fromkeys(context_names(stack, number))
        problems.append(
            CovarianceMismatch(
                f"No {what} for experts of {len(missing)} of {len(stacks)} stacks: {some([each.name for each in missing])}.",
                why=f"Of {stack.expert_name(number)} none of these is there: {', '.join(looked)}.",
                next_step="Collect them too, or choose the modules that have one with --target.",
            )
        )
    return problems


def _without(stack: StackTarget) -> str:
    """`M.down_proj (experts 2, 5)`: those that have no context."""
    numbers = [str(number) for number, context in enumerate(stack.contexts) if context is None]
    return f"{stack.name} (expert{'s' if len(numbers) > 1 else ''} {', '.join(numbers)})"


def stack_rank_problems(
    stacks: Iterable[StackTarget], ranks: Mapping[str, int], *, is_truncated: bool
) -> list[CordaConvertError]:
    """A problem for each stack whose matrices have fewer components than are taken."""
    return [
        UnsupportedInput(
            f"Rank {ranks[stack.name]} is {'all' if ranks[stack.name] == side else 'above what'} the matrices of {stack.name} "
            f"have: they are {stack.shape[1:]}.",
            next_step="Choose a smaller number, or leave them out with --exclude.",
        )
        for stack in stacks
        for side in [min(stack.shape[1:])]
        if ranks[stack.name] > side or (is_truncated and ranks[stack.name] == side)
    ]


def in_order_of_disk(stack: StackTarget) -> list[int]:
    """The experts' numbers as their tensors come on disk: 0, 1, 10, 11, … 2 in most files."""
    return sorted(range(stack.shape[0]), key=lambda number: _span(stack.rows[number])[0])


def expert_uses(stacks: Sequence[StackTarget]) -> list[tuple[str, TensorRef]]:
    """Each expert's matrix with its context, in the order in which they are computed."""
    return [
        (stack.expert_name(number), context)
        for group in _groups(stacks)
        for stack, number in group
        if (context := stack.contexts[number]) is not None
    ]


def by_module(stacks: Iterable[StackTarget]) -> list[tuple[StackTarget, ...]]:
    """The stacks of each module, in the order of their registration."""
    modules: dict[str, list[StackTarget]] = {}
    for stack in stacks:
        modules.setdefault(stack.module, []).append(stack)
    return [tuple(group) for group in modules.values()]


def expert_transform(
    stacks: Sequence[StackTarget], options: DecomposeOptions, split: Split, shared: SharedContexts
) -> ExpertsTransform:
    """The decomposition of one module's stacks, which are in the order of their registration.

    The keys are those of PEFT's wrappers, the first registered innermost.
    """
    described: dict[str, Stack] = {}
    for depth, stack in zip(reversed(range(len(stacks))), stacks, strict=True):
        described[stack.name] = _stack(stack, f"{PEFT_PREFIX}{stack.module}{depth * '.base_layer'}", split)
    groups = tuple(
        tuple(_expert(stack, number, described[stack.name], options, split, shared) for stack, number in group)
        for group in _groups(stacks)
    )
    return ExpertsTransform(tuple(described.values()), groups)


def _stack(stack: StackTarget, prefix: str, split: Split) -> Stack:
    experts, first, last = stack.shape
    rank = split.ranks.rank_of(stack.name)
    is_kept = not split.is_dropped
    inputs, outputs = (first, last) if stack.is_transposed else (last, first)
    return Stack(
        stack.name,
        experts,
        rank,
        (f"{prefix}.lora_A.weight", (rank * experts, inputs)) if is_kept else None,
        (f"{prefix}.lora_B.weight", (outputs, rank * experts)) if is_kept else None,
        is_swapped=stack.layout == "in_out" and not stack.is_transposed,
    )


def _expert(
    target: StackTarget, number: int, stack: Stack, options: DecomposeOptions, split: Split, shared: SharedContexts
) -> Expert:
    shape = (target.shape[1], target.shape[2])
    rows = target.rows[number]
    stored = rows[0].ref
    decomposition = DecomposeTransform(
        module_name=target.expert_name(number),
        weight=TensorRef(stored.file, TensorSpec(stored.name, stored.spec.dtype, shape), stored.begin),
        context=target.contexts[number],
        layout=target.layout,
        mode=split.mode,
        method=options.method,
        rank=stack.rank,
        scaling=split.ranks.scaling_of(target.name),
        damp=options.damp,
        names=Names(
            residual=RESIDUAL if options.residual else None,
            lora_A=None if split.is_dropped else LORA_A,
            lora_B=None if split.is_dropped else LORA_B,
        ),
        solver=options.solver,
        asvd_alpha=options.asvd_alpha,
        shared=shared,
    )
    return Expert(stack, number, shape, rows, decomposition)


_Place = tuple[int, int]


def _span(rows: Sequence[StoredRows]) -> tuple[_Place, _Place]:
    """The first and the last place on disk: tensor and row."""
    places = [(each.place, each.part.begin) for each in rows]
    return min(places), max(places)


def _groups(stacks: Sequence[StackTarget]) -> list[list[tuple[StackTarget, int]]]:
    """The matrices of a module in the order of the disk; together those of one expert whose tensors lie among each other."""
    every = [(stack, number) for stack in stacks for number in range(stack.shape[0])]
    every.sort(key=lambda each: _span(each[0].rows[each[1]])[0])
    groups: list[list[tuple[StackTarget, int]]] = []
    end: _Place = (-1, -1)
    for stack, number in every:
        begin, own_end = _span(stack.rows[number])
        if groups and begin < end and groups[-1][0][1] == number:
            groups[-1].append((stack, number))
        else:
            groups.append([(stack, number)])
        end = max(end, own_end)
    return groups
