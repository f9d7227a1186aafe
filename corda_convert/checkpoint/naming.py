"""How the model's class names what lies on disk: transformers' renamings and converters, applied to names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True, slots=True)
class Conversion:
    """Tensors on disk that one `WeightConverter` of transformers takes together.

    Attributes:
        parameter: run-time name of the first parameter that it makes of them.
        converter: transformers' object.
        collected: under each of its source patterns the disk names, in the order in which it takes them.
    """

    parameter: str
    converter: Any
    collected: dict[str, list[str]] = field(default_factory=dict)

    @property
    def disk_names(self) -> tuple[str, ...]:
        return tuple(name for names in self.collected.values() for name in names)


class Naming:
    """The names of one model, at run time and on one disk.

    Attributes:
        known: run-time names of all that a checkpoint of this model can hold.
        run_time_names: disk name → run-time name, for tensors that are taken as they are.
        conversions: the tensors that are not.
    """

    def __init__(self, model: Any, disk_names: Iterable[str] = ()) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.known: dict[str, bool] = dict.fromkeys(model.state_dict(), True)
        self._rename_source_key = rename_source_key
        self._prefix = str(model.base_model_prefix or "")
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self.run_time_names: dict[str, str] = {}
        self.conversions: tuple[Conversion, ...] = self._read(disk_names)
        fresh = get_model_conversion_mapping(model, add_legacy=False)
        self._saving = (
            [entry for entry in fresh if isinstance(entry, WeightRenaming) and type(entry).__name__ != "PrefixChange"],
            [renaming for renaming in self._renamings if getattr(renaming, "_was_used", False)],
        )

    def rename(self, name: str) -> str:
        """The name after the model's renamings, if the model has it; else the name itself."""
        renamed, _ = self._forward(name, convert=False)
        return renamed if renamed in self.known or name not in self.known else name

    def disk_name(self, run_time_name: str) -> str | None:
        """A name that loads as this parameter, in the style of the names on disk; None if none does."""
        candidates = (_renamed(run_time_name, self._saving_renamings), run_time_name)
        if run_time_name not in self.known:
            return None
        return next((name for name in candidates if self._forward(name) == (run_time_name, None)), None)

    def conversion_of(self, name: str, experts: Mapping[str, int]) -> Conversion | None:
        """What a tensor of this name would go into if it were on disk, with those of all experts; None for other names.

        `experts` are the numbers of them in each stack.
        """
        parameter, pattern = self._forward(name)
        converter = next((each for each in self._converters if pattern in each.source_patterns), None)
        count = experts.get(parameter, 0)
        if pattern is None or converter is None or not count:
            return None
        own = next((own for expert in range(count) if (own := pattern.replace("*", str(expert))) in name), None)
        if own is None:
            return None
        outer, _, inner = name.partition(own)
        collected = {
            pattern: [outer + pattern.replace("*", str(expert)) + inner for expert in range(count)]
            for pattern in converter.source_patterns
        }
        return Conversion(parameter, converter, collected)

    @cached_property
    def _saving_renamings(self) -> list[Any]:
        """The reversed renamings that give back most of the names on disk: those of a new model, or those used here."""

        def reproduced(renamings: list[Any]) -> int:
            return sum(_renamed(run_time, renamings) == disk for disk, run_time in self.run_time_names.items())

        reverses = [[renaming.reverse_transform() for renaming in reversed(renamings)] for renamings in self._saving]
        return max(reverses, key=reproduced)

    def _read(self, disk_names: Iterable[str]) -> tuple[Conversion, ...]:
        from transformers.core_model_loading import dot_natural_key

        converter_of = {pattern: converter for converter in self._converters for pattern in converter.source_patterns}
        conversions: dict[str, Conversion] = {}
        for name in sorted(disk_names, key=dot_natural_key):
            renamed, pattern = self._forward(name)
            if renamed not in self.known:
                continue
            if pattern is None:
                self.run_time_names[name] = renamed
                continue
            conversion = conversions.setdefault(renamed, Conversion(renamed, converter_of[pattern]))
            conversion.collected.setdefault(pattern, []).append(name)
        return tuple(conversions.values())

    def _forward(self, name: str, *, convert: bool = True) -> tuple[str, str | None]:
        """The run-time name, and the source pattern of the converter that takes the tensor, if one does."""
        converters = self._converters if convert else []
        renamed, pattern = self._rename_source_key(name, self._renamings, converters, self._prefix, self.known)
        if renamed not in self.known and name in self.known:
            renamed, pattern = self._rename_source_key(name, [], [], self._prefix, self.known)
        return str(renamed), pattern


def _renamed(name: str, renamings: Iterable[Any]) -> str:
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    return name
