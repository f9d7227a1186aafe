"""Weights that several parameters share (embedding and head): what becomes of each, and whether they can stay one.

PEFT wraps modules, not weights: an adapter of the embedding alone leaves the head as it was, although the base holds one
tensor for both. The trained function is kept by writing a tensor for each that differs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.comparison import are_transposed, same_values
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import ModelStructure, read_structure
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import CordaConvertError, UnsupportedInput
from corda_convert.operations.transforms import PlacedChange
from corda_convert.output.side_files import untied_config


@dataclass(slots=True)
class Edit:
    """What becomes of a tensor of the output.

    Attributes:
        source: the stored tensor that it is made of.
        replacement: what takes the place of the stored weight, if anything.
        changes: what is folded into it.
    """

    source: str
    replacement: TensorRef | None = None
    changes: list[PlacedChange] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return self.replacement is None and not self.changes


@dataclass(slots=True)
class SharedEdits:
    """What adapters do to tied parameters, by run-time name.

    Attributes:
        names: of the model.
        edits: what is done to each parameter itself.
        bases: weights that stand for the shared tensor: PEFT saves them along and loads them into it.
    """

    names: NameMap
    edits: dict[str, Edit] = field(default_factory=dict)
    bases: dict[str, TensorRef] = field(default_factory=dict)
    _splits: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=dict)

    def split(self, members: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Of parameters that the class ties those that share a weight, and those whose stored values differ from it.

        transformers leaves the latter alone.
        """
        if members not in self._splits:
            self._splits[members] = _split(members, self.names)
        return self._splits[members]

    def lengths(self) -> dict[str, int]:
        """How many changes each parameter has so far."""
        return {name: len(edit.changes) for name, edit in self.edits.items()}

    def follow(self, before: Mapping[str, int]) -> None:
        """Makes an adapter's changes of the input embedding that keep its ties to what its class ties to it, too.

        As PEFT does, whether their stored values are alike or not: unless one of those has such a change of its own, and
        before its other changes. `before` is what `lengths` was before the adapter.
        """
        for members in {self.names.shared[name] for name in self.edits}:
            added = {
                name: [placed for placed in self.edits[name].changes[before.get(name, 0) :] if placed.change.keeps_tie]
                for name in members
                if name in self.edits
            }
            embedding = next((name for name in members if self._is_embedding(name)), None)
            if embedding not in added or any(added[name] for name in added if name != embedding):
                continue
            for name in members:
                if name != embedding and added[embedding]:
                    start = before.get(name, 0)
                    source = self.edits[embedding].source
                    self.edits.setdefault(name, Edit(source)).changes[start:start] = added[embedding]

    def _is_embedding(self, name: str) -> bool:
        structure = self.names.structure
        return structure is not None and structure.parameters[name].kind == "embedding"


@dataclass(frozen=True, slots=True)
class Untied:
    """Parameters that shared a tensor and become different.

    Attributes:
        members: all that shared it.
        written: disk names of the tensors that the output holds in addition.
        by_config: whether config.json says so; false where the class ties whatever the config says, and only tensors
            that differ keep it from doing so.
    """

    members: tuple[str, ...]
    written: tuple[str, ...]
    by_config: bool

    def facts(self) -> dict[str, Any]:
        return {"parameters": list(self.members), "written": list(self.written), "config_changed": self.by_config}

    def warning(self) -> str:
        """What a user must know of an output that is laid out otherwise than its base."""
        shared = f"{', '.join(self.members[1:])} and {self.members[0]} share one tensor in the base"
        added = f"; written in addition: {', '.join(self.written)}." if self.written else "."
        apart = f"{shared}, and are not alike with the adapter{added}"
        if self.by_config:
            return f'{apart} config.json says "tie_word_embeddings": false.'
        return (
            f"{apart} Their class ties them whatever config.json says; transformers 5 leaves tensors that differ as they "
            "are, older versions drop one of them."
        )


@dataclass(frozen=True, slots=True)
class Settled:
    """The edits of shared weights by the output's tensor names, and what follows from them."""

    edits: dict[str, Edit]
    untied: tuple[Untied, ...] = ()
    config: dict[str, Any] | None = None
    problems: tuple[CordaConvertError, ...] = ()


def settle(shared: SharedEdits) -> Settled:
    """Gives each tensor that shared parameters lie in, or need from now on, its edit."""
    names = shared.names
    groups: dict[tuple[str, ...], dict[str, Edit]] = {}
    result: dict[str, Edit] = {}
    for members in sorted({names.shared[name] for name in (*shared.edits, *shared.bases)}):
        tied, alone = shared.split(members)
        groups[tied] = edits = _spread(tied, alone, shared, names)
        result |= {disk: edits[name] for name, disk in _stored(members, names).items() if not edits[name].is_empty}
    if all(same_edit(edits[tied[0]], edits[name]) for tied, edits in groups.items() for name in tied[1:]):
        return Settled(result)
    return _untie(groups, result, names)


def _stored(members: Iterable[str], names: NameMap) -> dict[str, str]:
    """Those of the parameters that have a tensor of their own on disk, and its name."""
    assert names.structure is not None  # noqa: S101 - ties are known from the class alone
    on_disk = {run_time: disk for disk, run_time in names.structure.run_time_names.items()}
    return {name: on_disk[name] for name in members if name in on_disk}


def _split(members: tuple[str, ...], names: NameMap) -> tuple[tuple[str, ...], tuple[str, ...]]:
    stored = _stored(members, names)
    if len(stored) < 2:
        return members, ()
    first, *others = stored
    refs = {name: names.checkpoint.tensors[disk] for name, disk in stored.items()}
    alone = tuple(name for name in others if not same_values(refs[first], refs[name]))
    return tuple(name for name in members if name not in alone), alone


def _spread(tied: Sequence[str], alone: Sequence[str], shared: SharedEdits, names: NameMap) -> dict[str, Edit]:
    """Each parameter's edit, with what the adapter does to the shared tensor itself."""
    stored = _stored((*tied, *alone), names)
    source = next(stored[name] for name in tied if name in stored)
    bases = {name: shared.bases[name] for name in tied if name in shared.bases}
    common = next(iter(bases.values()), None)
    if common is not None and not all(same_values(common, base) for base in bases.values()):
        common = bases.get(tied[0])  # trained untied: each has its own
    edits = {}
    for name in (*tied, *alone):
        edit = shared.edits.get(name, Edit(source))
        base = shared.bases.get(name, common if name in tied else None)
        edits[name] = Edit(stored.get(name, source), edit.replacement or base, list(edit.changes))
    return edits


def _untie(groups: Mapping[tuple[str, ...], Mapping[str, Edit]], settled: dict[str, Edit], names: NameMap) -> Settled:
    """Writes a tensor for each parameter of its own, and says so in the config where the class heeds that."""
    assert names.structure is not None  # noqa: S101 - ties are known from the class alone
    config = untied_config(names.checkpoint.config or {})
    after = structure_with(config, names)
    heeds = after is not None and not any(_differ(edits, after.ties) for edits in groups.values())
    ties = after.ties if after is not None and heeds else names.structure.ties
    problems: list[CordaConvertError] = []
    untied: list[Untied] = []
    for members in dict.fromkeys(names.shared.values()):
        tied = next((group for group in groups if set(group) <= set(members)), members)
        source = Edit(next(iter(_stored(tied, names).values()), ""))
        edits = groups.get(tied, dict.fromkeys(tied, source))
        added = []
        for name in _lacking(tied, edits, ties, names) if source.source else ():
            disk_name = names.structure.disk_name(name)
            if disk_name is None or disk_name in names.checkpoint.tensors:
                problems.append(_nameless(name))
                continue
            settled[disk_name] = edits[name]
            added.append(disk_name)
        if added or _differ(edits, names.structure.ties):
            untied.append(Untied(tied, tuple(added), heeds))
    return Settled(settled, tuple(untied), config if heeds else None, tuple(problems))


def _differ(edits: Mapping[str, Edit], ties: Mapping[str, str]) -> set[str]:
    """The parameters that are not what they are tied to."""
    return {name for name in edits if ties.get(name) in edits and not same_edit(edits[name], edits[ties[name]])}


def _lacking(tied: Sequence[str], edits: Mapping[str, Edit], ties: Mapping[str, str], names: NameMap) -> list[str]:
    """The parameters that need a tensor and have none: those that are tied to nothing any longer, and those that differ."""
    stored, differing = _stored(tied, names), _differ(edits, ties)
    if not differing and any(name in ties for name in tied):
        return []
    return [name for name in tied if name not in stored and (name not in ties or name in differing)]


def _nameless(name: str) -> CordaConvertError:
    return UnsupportedInput(
        f"{name} needs a tensor of its own, and it is not known under which name the model would load it.",
        next_step="Untie the base first: load it with transformers, clone the head's weight, set tie_word_embeddings to "
        "false, and save it.",
    )


def structure_with(config: dict[str, Any], names: NameMap) -> ModelStructure | None:
    """What the model's class would say of the same checkpoint with this config."""
    wanted = tuple(names.structure.parameters) if names.structure is not None else ()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return read_structure(Path(folder), config, names.checkpoint.tensors, wanted)


def same_edit(one: Edit, other: Edit) -> bool:
    """Whether two parameters that began alike are alike afterwards. Compares factors, not products."""
    if (one.replacement is None) != (other.replacement is None) or len(one.changes) != len(other.changes):
        return False
    pairs = [(one.replacement, other.replacement)]
    if not all(same_values(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None):
        return False
    return all(_same_change(*pair) for pair in zip(one.changes, other.changes, strict=True))


def _same_change(one: PlacedChange, other: PlacedChange) -> bool:
    if one.change is other.change:
        return one.scale == other.scale
    if type(one.change) is not type(other.change) or one.scale != other.scale:
        return False
    if one.change.describe() != other.change.describe():
        return False
    mine, theirs = one.change.operands(one.block), other.change.operands(other.block)
    if mine.keys() != theirs.keys():
        return False
    if one.block.layout == other.block.layout:
        return all(same_values(mine[name], theirs[name]) for name in mine)
    crossed = {
        "lora_A": "lora_B",
        "lora_B": "lora_A",
        "initial_lora_A": "initial_lora_B",
        "initial_lora_B": "initial_lora_A",
    }
    return mine.keys() <= crossed.keys() and all(are_transposed(mine[name], theirs[crossed[name]]) for name in mine)
