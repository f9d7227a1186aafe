"""From a module path, as an adapter or a covariance file has it, to the tensor on disk.

Tried in this order: the run-time name, the disk name, and one prefix substitution that is the same for all modules.
What none of them finds is refused by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.structure import LayerKind, ModelStructure


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a module's weight lies: the tensor's disk name, and how it is laid out if the model's class tells."""

    module_name: str
    tensor_name: str
    kind: LayerKind | None


@dataclass(frozen=True)
class NameMap:
    """Resolves module paths and parameter names of one checkpoint."""

    checkpoint: Checkpoint
    structure: ModelStructure | None

    @cached_property
    def _disk_names(self) -> dict[str, str]:
        """Run-time parameter name → disk name."""
        if self.structure is None:
            return {}
        return {run_time: disk for disk, run_time in self.structure.run_time_names.items()}

    @cached_property
    def _run_time_names(self) -> dict[str, str]:
        return {} if self.structure is None else self.structure.run_time_names

    def parameter(self, run_time_name: str) -> str | None:
        """The disk name of a parameter, by its run-time or its disk name."""
        if run_time_name in self._disk_names:
            return self._disk_names[run_time_name]
        return run_time_name if run_time_name in self.checkpoint.tensors else None

    def module_of(self, tensor_name: str) -> str:
        """The run-time module path of a disk tensor."""
        return self._run_time_names.get(tensor_name, tensor_name).rpartition(".")[0]

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

    def kind(self, tensor_name: str) -> LayerKind | None:
        if self.structure is None:
            return None
        return self.structure.layers.get(self.module_of(tensor_name))

    def place(self, module_names: Iterable[str]) -> tuple[dict[str, Placement], list[str]]:
        """Places each module's `weight`. Returns the placements, and the modules that found no tensor."""
        wanted = list(module_names)
        found = {module: self.parameter(f"{module}.weight") for module in wanted}
        missing = [module for module, tensor in found.items() if tensor is None]
        if missing and len(missing) == len(wanted):
            found |= self._substitute_prefix(wanted)
            missing = [module for module, tensor in found.items() if tensor is None]
        placements = {
            module: Placement(module, tensor, self.kind(tensor))
            for module, tensor in found.items()
            if tensor is not None
        }
        return placements, missing

    def _substitute_prefix(self, modules: list[str]) -> Mapping[str, str]:
        """The one prefix substitution that takes every module to a tensor of its own, or nothing."""
        first = modules[0].split(".")
        names = self.checkpoint.tensors
        solutions: set[tuple[tuple[str, str], ...]] = set()
        for cut in range(len(first)):
            old, suffix = ".".join(first[:cut]), ".".join(first[cut:]) + ".weight"
            for name in names:
                if name != suffix and not name.endswith(f".{suffix}"):
                    continue
                new = name[: len(name) - len(suffix)].rstrip(".")
                placed = {module: _replace_prefix(module, old, new) + ".weight" for module in modules}
                if all(tensor in names for tensor in placed.values()) and len(set(placed.values())) == len(placed):
                    solutions.add(tuple(sorted(placed.items())))
        return dict(solutions.pop()) if len(solutions) == 1 else {}


def _replace_prefix(module: str, old: str, new: str) -> str:
    if old and module != old and not module.startswith(f"{old}."):
        return f"\0{module}"  # no tensor has this name: the substitution does not apply to this module
    rest = module[len(old) :].lstrip(".")
    return ".".join(part for part in (new, rest) if part)
