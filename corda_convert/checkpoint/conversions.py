"""transformers' conversions of a checkpoint on loading, followed with shapes and places instead of values.

Loading stacks, joins, splits and transposes tensors. Here each result is described by boxes: which part of it is which
part of which tensor on disk. Seen from the disk, the boxes are the pieces of a `DiskLayout`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

from corda_convert.checkpoint.layout import DiskLayout, Piece, matrix_shape
from corda_convert.checkpoint.naming import Conversion

Shape = tuple[int, ...]


class NotFollowed(Exception):
    """A conversion cannot be described by rows of tensors on disk; the message says why."""


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a tensor, and where its elements lie on disk.

    Attributes:
        start: first index in each dimension of the tensor.
        size: number of indices in each dimension.
        source: name of the disk tensor.
        source_start: first index in each dimension of the disk tensor.
        axes: for each dimension of the tensor, the disk tensor's dimension that runs along it; None for a stack's.
    """

    start: Shape
    size: Shape
    source: str
    source_start: Shape
    axes: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor put together from parts of tensors on disk."""

    shape: Shape
    boxes: tuple[Box, ...]


Assemblies = dict[str, list[Assembly]]
"""What stands under each pattern of a converter, between two of its operations."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One use of a converter.

    Attributes:
        sources: the converter's source patterns.
        targets: its target patterns.
        layer_name: run-time name of the first parameter that it makes here.
        shapes: the shapes of all run-time parameters.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layer_name: str
    shapes: Mapping[str, Shape]


def follow(
    conversion: Conversion, sources: Mapping[str, Shape], shapes: Mapping[str, Shape], stacks: Collection[str]
) -> dict[str, DiskLayout]:
    """The layout of each tensor on disk that the conversion takes.

    `sources` are the shapes of these tensors, `shapes` those of all run-time parameters; `stacks` names the parameters
    that hold one matrix for each expert. Raises `NotFollowed`.
    """
    converter = conversion.converter
    use = _Use(tuple(converter.source_patterns), tuple(converter.target_patterns), conversion.parameter, shapes)
    values: Assemblies = {
        pattern: [_from_disk(name, sources[name]) for name in names] for pattern, names in conversion.collected.items()
    }
    for operation in converter.operations:
        step = _OPERATIONS.get(type(operation).__name__)
        if step is None:
            raise NotFollowed(f"{type(operation).__name__} is no change of whole rows")
        values = step(use, operation, values)
    assemblies = {_full_name(use.layer_name, values, pattern): _only(tensors) for pattern, tensors in values.items()}
    for name, assembly in assemblies.items():
        if shapes.get(name) != assembly.shape:
            raise NotFollowed(f"this gives {assembly.shape} for {name}, which is {shapes.get(name)} in the model")
    return _by_source(assemblies, sources, stacks)


def _full_name(layer_name: str, patterns: Iterable[str], pattern: str) -> str:
    """The run-time name of what stands under a target pattern, as transformers expands it."""
    name = layer_name.replace("*.", "0.")
    known = next((key for key in patterns if key in name), None)
    if known is None:
        return pattern
    prefix, _, suffix = name.partition(known)
    return prefix + pattern + suffix


def _by_source(
    assemblies: Mapping[str, Assembly], sources: Mapping[str, Shape], stacks: Collection[str]
) -> dict[str, DiskLayout]:
    pieces: dict[str, list[Piece]] = {name: [] for name in sources}
    stacked: set[str] = set()
    for parameter, assembly in assemblies.items():
        for box in assembly.boxes:
            if parameter in stacks and box.axes[0] == 0:
                stacked.add(box.source)
            shape = sources[box.source]
            pieces[box.source] += _pieces(parameter, assembly.shape, box, shape, is_stack=parameter in stacks)
    layouts = {name: _covered(name, shape, pieces[name], is_stacked=name in stacked) for name, shape in sources.items()}
    joined = {name for name, layout in layouts.items() if layout.is_plain and _is_part(layout.pieces[0], assemblies)}
    return {name: replace(layout, is_part=True) if name in joined else layout for name, layout in layouts.items()}


def _is_part(piece: Piece, assemblies: Mapping[str, Assembly]) -> bool:
    return piece.count != matrix_shape(assemblies[piece.parameter].shape)[0]


def stack_layout(parameter: str, shape: Shape) -> DiskLayout:
    """The layout of a stack of matrices (E, d1, d2) that lies on disk as it is."""
    experts, rows, columns = shape
    pieces = tuple(Piece(expert * rows, rows, parameter, expert, 0, rows) for expert in range(experts))
    return DiskLayout((experts * rows, columns), pieces)


def _from_disk(name: str, shape: Shape) -> Assembly:
    zeros = (0,) * len(shape)
    return Assembly(shape, (Box(zeros, shape, name, zeros, tuple(range(len(shape)))),))


# The operations. Each takes the use, transformers' operation and what stands under the patterns.


def _only(tensors: Sequence[Assembly]) -> Assembly:
    """The only tensor; transformers takes the first of several silently."""
    if len(tensors) != 1:
        raise NotFollowed(f"{len(tensors)} tensors stand where one is expected")
    return tensors[0]


def _single(values: Assemblies) -> Assembly:
    if len(values) != 1:
        raise NotFollowed(f"{len(values)} kinds of tensors stand where one is expected")
    return _only(next(iter(values.values())))


def _merge_list(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    if len(values) == 1:
        return {use.targets[0]: [_stack(next(iter(values.values())), operation.dim)]}
    return {pattern: [_stack(tensors, operation.dim)] for pattern, tensors in values.items()}


def _concatenate(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    parts = [tensor for pattern in use.sources for tensor in values.get(pattern, [])]
    return {use.targets[0]: [_join(parts, operation.dim)]}


def _chunk(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    tensor = _single(values)
    dim, parts = operation.dim % len(tensor.shape), len(use.targets)
    step = -(-tensor.shape[dim] // parts)
    sizes = [max(0, min(step, tensor.shape[dim] - step * part)) for part in range(parts)]
    return {target: [part] for target, part in zip(use.targets, _cut(tensor, dim, sizes), strict=True)}


def _split(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    tensor = _single(values)
    dim = operation.dim % len(tensor.shape)
    names = [use.layer_name.replace(use.targets[0], target) for target in use.targets]
    missing = [name for name in names if name not in use.shapes]
    if missing:
        raise NotFollowed(f"the model has no {missing[0]}")
    sizes = [use.shapes[name][dim] for name in names]
    if sum(sizes) != tensor.shape[dim]:
        raise NotFollowed(f"{tensor.shape} cannot be split into {sizes}")
    return {target: [part] for target, part in zip(use.targets, _cut(tensor, dim, sizes), strict=True)}


def _transpose(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    tensor = _single(values)
    target = use.sources[0] if len(use.targets) > 1 else use.targets[0]
    if getattr(operation, "check_dims", False) and tensor.shape == use.shapes[use.layer_name]:
        return {target: [tensor]}
    order = list(range(len(tensor.shape)))
    order[operation.dim0], order[operation.dim1] = order[operation.dim1], order[operation.dim0]
    boxes = tuple(
        Box(_permuted(box.start, order), _permuted(box.size, order), box.source, box.source_start,
            tuple(box.axes[place] for place in order))
        for box in tensor.boxes
    )  # fmt: skip
    return {target: [Assembly(_permuted(tensor.shape, order), boxes)]}


def _keep(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    return {use.targets[0]: [_single(values)]}


def _fuse_experts(use: _Use, operation: Any, values: Assemblies) -> Assemblies:
    """Each list of experts is cut into one run for each target; the runs are stacked, and joined over the sources."""
    runs: dict[str, list[Assembly]] = {target: [] for target in use.targets}
    for pattern in use.sources:
        tensors = values.get(pattern, [])
        step = -(-len(tensors) // len(use.targets))
        for place, target in enumerate(use.targets):
            runs[target].append(_stack(tensors[place * step : (place + 1) * step], operation.stack_dim))
    return {target: [_join(parts, operation.concat_dim)] for target, parts in runs.items()}


_OPERATIONS: dict[str, Callable[[_Use, Any, Assemblies], Assemblies]] = {
    "MergeModulelist": _merge_list,
    "Concatenate": _concatenate,
    "Chunk": _chunk,
    "Split": _split,
    "Transpose": _transpose,
    "Force16BytesAlignment": _keep,
    "ErnieFuseAndSplitTextVisionExperts": _fuse_experts,
}


def _stack(parts: Sequence[Assembly], dim: int) -> Assembly:
    if not parts or any(part.shape != parts[0].shape for part in parts):
        raise NotFollowed("tensors of different shapes cannot be stacked" if parts else "there is nothing to stack")
    inner = parts[0].shape
    dim %= len(inner) + 1
    boxes = tuple(
        Box((*box.start[:dim], place, *box.start[dim:]), (*box.size[:dim], 1, *box.size[dim:]), box.source,
            box.source_start, (*box.axes[:dim], None, *box.axes[dim:]))
        for place, part in enumerate(parts)
        for box in part.boxes
    )  # fmt: skip
    return Assembly((*inner[:dim], len(parts), *inner[dim:]), boxes)


def _join(parts: Sequence[Assembly], dim: int) -> Assembly:
    if not parts:
        raise NotFollowed("there is nothing to join")
    dim %= len(parts[0].shape)
    if len({_replaced(part.shape, dim, 0) for part in parts}) != 1:
        raise NotFollowed("tensors of different shapes cannot be joined")
    ends = list(accumulate(part.shape[dim] for part in parts))
    boxes = tuple(
        Box(_replaced(box.start, dim, box.start[dim] + end - part.shape[dim]), box.size, box.source, box.source_start,
            box.axes)
        for part, end in zip(parts, ends, strict=True)
        for box in part.boxes
    )  # fmt: skip
    return Assembly(_replaced(parts[0].shape, dim, ends[-1]), boxes)


def _cut(tensor: Assembly, dim: int, sizes: Iterable[int]) -> list[Assembly]:
    """The tensor in consecutive parts along a dimension."""
    parts, first = [], 0
    for size in sizes:
        boxes = tuple(cut for box in tensor.boxes if (cut := _cut_box(box, dim, first, first + size)) is not None)
        parts.append(Assembly(_replaced(tensor.shape, dim, size), boxes))
        first += size
    return parts


def _cut_box(box: Box, dim: int, first: int, end: int) -> Box | None:
    low, high = max(first, box.start[dim]), min(end, box.start[dim] + box.size[dim])
    if low >= high:
        return None
    axis, skipped = box.axes[dim], low - box.start[dim]
    source_start = box.source_start
    if axis is not None:
        source_start = _replaced(source_start, axis, source_start[axis] + skipped)
    return Box(
        _replaced(box.start, dim, low - first), _replaced(box.size, dim, high - low), box.source, source_start, box.axes
    )


def _replaced(shape: Shape, dim: int, value: int) -> Shape:
    return (*shape[:dim], value, *shape[dim + 1 :])


def _permuted(values: Shape, order: Iterable[int]) -> Shape:
    return tuple(values[place] for place in order)


# From boxes to rows.


def _pieces(parameter: str, shape: Shape, box: Box, source_shape: Shape, *, is_stack: bool) -> Iterable[Piece]:
    """The blocks of rows of the disk tensor that one box is."""
    if not is_stack:
        yield _piece(parameter, None, shape, box, source_shape)
        return
    axis = box.axes[0]
    if axis not in (None, 0):
        raise NotFollowed("the experts do not run along the first dimension on disk")
    for place in range(box.size[0]):
        matrix = Box(box.start[1:], box.size[1:], box.source, box.source_start, box.axes[1:])
        if axis is None:
            yield _piece(parameter, box.start[0] + place, shape[1:], matrix, source_shape)
            continue
        matrix = Box(
            box.start[1:], box.size[1:], box.source, box.source_start[1:],
            tuple(None if axis is None else axis - 1 for axis in box.axes[1:]),
        )  # fmt: skip
        piece = _piece(parameter, box.start[0] + place, shape[1:], matrix, source_shape[1:])
        row = (box.source_start[0] + place) * source_shape[1] + piece.row
        yield Piece(row, piece.rows, piece.parameter, piece.expert, piece.first, piece.count, piece.transposed)


def _piece(parameter: str, expert: int | None, shape: Shape, box: Box, source_shape: Shape) -> Piece:
    """The block that a box of one matrix is: whole rows on both sides, or whole rows that are columns on disk."""
    first, count = (box.start[0], box.size[0]) if shape else (0, 1)
    if box.start[1:] != (0,) * len(shape[1:]) or box.size[1:] != shape[1:]:
        raise NotFollowed("a tensor on disk holds only some columns of the parameter")
    if box.axes == tuple(range(len(source_shape))):
        if any(box.source_start[1:]) or source_shape[1:] != shape[1:]:
            raise NotFollowed("the parameter has only some columns of a tensor on disk")
        return Piece(box.source_start[0] if shape else 0, count, parameter, expert, first, count)
    if len(shape) == 2 and box.axes in ((1, 0), (None, 0)):
        columns = prod(source_shape[1:])
        if any(box.source_start[1:]) or columns != count:
            raise NotFollowed("the parameter has only some columns of a tensor on disk")
        return Piece(box.source_start[0], box.size[1], parameter, expert, first, count, transposed=True)
    raise NotFollowed("the dimensions lie in another order on disk")


def _covered(name: str, shape: Shape, pieces: list[Piece], *, is_stacked: bool) -> DiskLayout:
    """The layout, if the pieces cover all rows once."""
    matrix = (shape[0] * shape[1], shape[2]) if is_stacked else matrix_shape(shape)
    if len(pieces) == 1 and pieces[0].row == 0 and pieces[0].rows == matrix[0]:
        return DiskLayout(matrix, (pieces[0],))
    pieces.sort(key=lambda piece: piece.row)
    ends = list(accumulate((piece.rows for piece in pieces), initial=0))
    if [piece.row for piece in pieces] != ends[:-1] or ends[-1] != matrix[0]:
        raise NotFollowed(f"the model takes only a part of {name}")
    return DiskLayout(matrix, tuple(pieces))
