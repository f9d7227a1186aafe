"""From a parameter's name, as an adapter or a covariance file has it, to the tensors on disk.

Tried in this order: the run-time name, the disk name, an older name that the model renames on loading, and one prefix
substitution that is the same for all. What none of them finds is refused by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from corda_convert.checkpoint.conversions import NotFollowed, follow
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.layout import DiskLayout, Piece, whole
from corda_convert.checkpoint.structure import LayerKind, ModelStructure


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor on disk and the piece of it that belongs to a parameter."""

    tensor_name: str
    layout: DiskLayout
    piece: Piece


@dataclass(frozen=True, slots=True)
class Target:
    """A parameter at run time, and where it lies on disk.

    Attributes:
        name: run-time name; the disk's where the model's class does not tell, or fuses the tensor that was meant.
        shape: its shape at run time.
        kind: the type of its module, None if the model's class does not tell.
        places: every piece of it on disk, in the order of the tensors.
        is_transposed: whether its module says that it stores its stack of matrices as (experts, d_in, d_out).
    """

    name: str
    shape: tuple[int, ...]
    kind: LayerKind | None
    places: tuple[Place, ...]
    is_transposed: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it lies on disk as it is, as one tensor."""
        return len(self.places) == 1 and self.places[0].layout.is_plain

    @property
    def tensor_name(self) -> str:
        """The disk name of its first, often only, tensor."""
        return self.places[0].tensor_name

    @property
    def is_stack(self) -> bool:
        return self.places[0].piece.expert is not None


@dataclass(frozen=True)
class NameMap:
    """Resolves parameter names of one checkpoint."""

    checkpoint: Checkpoint
    structure: ModelStructure | None

    @cached_property
    def _layouts(self) -> Mapping[str, DiskLayout]:
        return {} if self.structure is None else self.structure.layouts

    @cached_property
    def _places(self) -> dict[str, tuple[Place, ...]]:
        """Every parameter's places, by run-time name."""
        found: dict[str, list[Place]] = {}
        for tensor_name, layout in self._layouts.items():
            for piece in layout.pieces:
                found.setdefault(piece.parameter, []).append(Place(tensor_name, layout, piece))
        for name, members in self.shared.items():  # what is tied lies where the one of them lies that is on disk
            for places in [found[member] for member in members if member in found][:1]:
                found.setdefault(name, places)
        return {name: tuple(places) for name, places in found.items()}

    @cached_property
    def shared(self) -> Mapping[str, tuple[str, ...]]:
        """Each tied parameter, by run-time name, and all that share its weight: first the one that the others are tied to."""
        ties = {} if self.structure is None else self.structure.ties
        groups: dict[str, list[str]] = {}
        for name, source in ties.items():
            while source in ties and ties[source] != name:
                source = ties[source]
            groups.setdefault(source, [source]).append(name)
        return {name: tuple(members) for members in groups.values() for name in members}

    @cached_property
    def known(self) -> tuple[str, ...]:
        """The model's parameters in the order of their registration; nothing without its class."""
        return () if self.structure is None else tuple(self.structure.parameters)

    @cached_property
    def _run_time_names(self) -> Mapping[str, str]:
        return {} if self.structure is None else self.structure.run_time_names

    def parameter(self, run_time_name: str) -> str | None:
        """The disk name of a parameter that lies on disk as it is, by its run-time or its disk name."""
        target = self.target(run_time_name)
        return target.tensor_name if target is not None and len(target.places) == 1 else None

    @cached_property
    def _unsupported(self) -> Mapping[str, str]:
        return {} if self.structure is None else self.structure.unsupported

    def target(self, name: str) -> Target | None:
        """The parameter of that run-time or disk name; None, too, for a tensor whose conversion cannot be followed."""
        if name in self._unsupported:
            return None
        if name in self._places:
            return self._known_target(name)
        if name in self.checkpoint.tensors:
            return self._disk_target(name)
        renamed = self.structure.rename(name) if self.structure is not None else name
        return self._known_target(renamed) if renamed in self._places else self._inside_stack(name)

    @cached_property
    def _stacks(self) -> Mapping[str, tuple[int, ...]]:
        parameters = {} if self.structure is None else self.structure.parameters
        return {name: found.shape for name, found in parameters.items() if found.is_stack}

    @cached_property
    def _experts(self) -> Mapping[str, int]:
        return {name: shape[0] for name, shape in self._stacks.items() if name in self._places}

    @cached_property
    def _unstacked(self) -> dict[str, Mapping[str, DiskLayout]]:
        """For each stack that was asked for: the tensors that older checkpoints have instead of it."""
        return {}

    def _inside_stack(self, name: str) -> Target | None:
        """What older checkpoints have as a tensor of its own, one expert's, where this one has the stack."""
        naming = None if self.structure is None else self.structure.naming
        conversion = None if naming is None else naming.conversion_of(name, self._experts)
        if conversion is None:
            return None
        stack = conversion.parameter
        _, rows, columns = self._stacks[stack]
        shape = (rows // len(conversion.collected), columns)
        if name not in self._unstacked.get(stack, {}):
            sources = dict.fromkeys(conversion.disk_names, shape)
            try:
                self._unstacked[stack] = follow(conversion, sources, self._stacks, self._stacks.keys())
            except NotFollowed:
                return None
        for piece in self._unstacked[stack][name].pieces:
            for place in self._places[stack]:
                inner = _inside(piece, place.piece)
                if inner is not None:
                    return Target(name, shape, "linear", (Place(place.tensor_name, place.layout, inner),))
        return None

    def _known_target(self, name: str) -> Target:
        places = self._places[name]
        parameter = self.structure.parameters[name] if self.structure is not None else None
        is_plain = len(places) == 1 and places[0].layout.is_plain
        shape = self.checkpoint.spec(places[0].tensor_name).shape
        if parameter is None:
            return Target(name, shape, None, places)
        return Target(
            name, shape if is_plain else parameter.shape, parameter.kind, places, is_transposed=parameter.is_transposed
        )

    def _disk_target(self, name: str) -> Target:
        layout = self._layouts.get(name)
        if layout is not None and layout.is_plain and layout.pieces[0].parameter in self._places:
            return self._known_target(layout.pieces[0].parameter)
        shape = self.checkpoint.spec(name).shape
        own = whole(name, shape)
        is_matrix = layout is not None and len(shape) == 2 and name.endswith(".weight")
        return Target(name, shape, "linear" if is_matrix else None, (Place(name, own, own.pieces[0]),))

    def find(self, wanted: Sequence[Sequence[str]]) -> list[Target | None]:
        """For each list of names that a parameter may have, the first one that is there."""
        found = [next((target for name in names if (target := self.target(name))), None) for names in wanted]
        if any(found) or not all(wanted):
            return found
        placed = self._substitute_prefix([tuple(names) for names in wanted])
        return [self._disk_target(placed[tuple(names)]) if placed else None for names in wanted]

    def is_tied(self, tensor_name: str) -> bool:
        """Whether another parameter shares this tensor."""
        if self.structure is None:
            return False
        name = self._run_time_names.get(tensor_name, tensor_name)
        return name in self.structure.ties or name in self.structure.ties.values()

    def may_be_tied(self, tensor_name: str) -> bool:
        """Whether, without the model's class to tell, this may be an embedding that the head shares.

        So it is for the only matrix of its shape that has the most rows, unless the config says that nothing is tied.
        """
        if self.structure is not None:
            return False
        config = self.checkpoint.config or {}
        levels = (config, config.get("text_config"))
        if any(isinstance(level, dict) and level.get("tie_word_embeddings") is False for level in levels):
            return False
        shape = self.checkpoint.spec(tensor_name).shape
        matrices = [ref.shape for ref in self.checkpoint.tensors.values() if len(ref.shape) == 2]
        return shape in matrices and matrices.count(shape) == 1 and shape[0] == max(rows for rows, _ in matrices)

    def _substitute_prefix(self, wanted: Sequence[tuple[str, ...]]) -> Mapping[tuple[str, ...], str]:
        """The one prefix substitution that takes every parameter to a tensor of its own, or nothing."""
        tensors = [name for name in self.checkpoint.tensors if name not in self._unsupported]
        known = frozenset(tensors)
        solutions: set[tuple[tuple[tuple[str, ...], str], ...]] = set()
        for old, new in {pair for first in wanted[:1] for name in first for pair in _substitutions(name, tensors)}:
            placed = {
                names: next((place for name in names if (place := _replace_prefix(name, old, new)) in known), None)
                for names in wanted
            }
            if None not in placed.values() and len(set(placed.values())) == len(placed):
                solutions.add(tuple((names, place) for names, place in sorted(placed.items()) if place is not None))
        return dict(solutions.pop()) if len(solutions) == 1 else {}


def _inside(piece: Piece, outer: Piece) -> Piece | None:
    """The rows of a stored stack that a piece of one of its matrices is, as a parameter of its own; None if it is not in it."""
    first, end = piece.first, piece.first + piece.count
    if piece.expert != outer.expert or piece.transposed or outer.transposed:
        return None
    if not outer.first <= first <= end <= outer.first + outer.count:
        return None
    return Piece(outer.row + first - outer.first, piece.count, piece.parameter, None, 0, piece.count)


def _substitutions(name: str, tensors: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Each prefix of the name, and what stands in its place in a tensor's name that ends in the same way."""
    parts = name.split(".")
    for cut in range(len(parts) - 1):
        old, suffix = ".".join(parts[:cut]), ".".join(parts[cut:])
        for tensor in tensors:
            if tensor == suffix or tensor.endswith(f".{suffix}"):
                yield old, tensor[: len(tensor) - len(suffix)].rstrip(".")


def _replace_prefix(name: str, old: str, new: str) -> str:
    if old and not name.startswith(f"{old}."):
        return f"\0{name}"  # no tensor has this name: the substitution does not apply
    rest = name[len(old) :].lstrip(".")
    return ".".join(part for part in (new, rest) if part)
