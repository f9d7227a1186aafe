"""Weights that an adapter brings along whole: which stored tensors they take the place of, and whether they can."""

from __future__ import annotations

from collections.abc import Mapping

from corda_convert.adapters.factors import Adapter
from corda_convert.checkpoint.layout import matrix_shape
from corda_convert.checkpoint.names import NameMap, Target
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import CordaConvertError, UnsupportedInput, some
from corda_convert.operations.vocabulary import resized_shape


def parts_of(ref: TensorRef, target: Target, names: NameMap) -> dict[str, TensorRef]:
    """For each tensor on disk that a parameter lies in: what of `ref` is in its place, if that is one run of rows."""
    if target.is_plain:
        return {target.tensor_name: ref}
    if ref.shape != target.shape:
        return {}
    per_expert = target.shape[1] if target.is_stack else target.shape[0]
    matrix = ref.reshaped(
        (target.shape[0] * per_expert, target.shape[2]) if target.is_stack else matrix_shape(ref.shape)
    )
    runs: dict[str, tuple[int, int]] = {}
    for place in sorted(target.places, key=lambda place: (place.tensor_name, place.piece.row)):
        piece = place.piece
        begin, end = runs.get(place.tensor_name, (None, piece.row))
        first = (piece.expert or 0) * per_expert + piece.first
        start = first if begin is None else begin
        if piece.transposed or piece.row != end or first - start != piece.row:
            return {}
        runs[place.tensor_name] = (start, piece.row + piece.rows)
    sizes = {place.tensor_name: place.layout.matrix[0] for place in target.places}
    if any(rows != sizes[name] for name, (_, rows) in runs.items()):
        return {}
    return {
        name: matrix.rows(start, start + rows).reshaped(names.checkpoint.spec(name).shape)
        for name, (start, rows) in runs.items()
    }


def replacement_problem(
    adapter: Adapter, ref: TensorRef, target: Target, parts: Mapping[str, TensorRef], names: NameMap
) -> CordaConvertError | None:
    """What keeps a tensor that the adapter brings along from taking the place of the model's."""
    stored = [names.checkpoint.spec(place.tensor_name) for place in target.places]
    expected = target.shape if not target.is_plain else stored[0].shape
    replaces = f"{adapter.source.name} replaces {target.name}"
    if ref.shape != expected and resized_shape(target, ref.shape, names) is None:
        return UnsupportedInput(
            f"{replaces} {expected} with a tensor of shape {ref.shape}.",
            why="Shapes change with the vocabulary's size alone.",
        )
    if not parts:
        return UnsupportedInput(
            f"{replaces}, which lies on disk in {len({spec.name for spec in stored})} tensors or transposed: "
            f"{some(dict.fromkeys(spec.name for spec in stored))}."
        )
    if not {spec.dtype for spec in (*stored, ref.spec)} <= set(COMPUTABLE_DTYPES):
        return UnsupportedInput(
            f"{replaces}, {stored[0].dtype} in the base, with {ref.spec.dtype}: only floating-point numbers can be "
            "replaced.",
            next_step="Merge into the unquantized base model.",
        )
    return maybe_tied(target.name) if names.may_be_tied(target.tensor_name) else None


def maybe_tied(name: str) -> UnsupportedInput:
    """The refusal of a tensor that, for all that is known, another one may share."""
    return UnsupportedInput(
        f"{name}: without the model's class it is not known whether the head shares this embedding.",
        why="Changing a shared tensor would change both.",
        next_step="Give the model's folder, with a config.json that transformers knows or that says "
        '"tie_word_embeddings": false.',
    )
