"""Each adapter of a merge with its initial factors, and whether they and the model belong together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters.factors import Adapter, Layout
from corda_convert.adapters.initial import with_initial
from corda_convert.checkpoint.dense_families import dense_structure
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import ModelStructure, read_structure
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import CordaConvertError, raise_problems
from corda_convert.operations import evidence
from corda_convert.operations.edits import Applied, Fitted, fit_changes
from corda_convert.operations.reproduction import Reproduction, method_of, reproductions
from corda_convert.operations.residual import Residual


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of a merge.

    Attributes:
        trained: as its file has it.
        initial: the factors that its training began with, where they are known.
        scale: how many times it is taken.
    """

    trained: Adapter
    initial: Adapter | None
    scale: float

    @property
    def name(self) -> str:
        return self.trained.source.name

    def applied(self) -> Applied:
        adapter = (
            self.trained if self.initial is None else with_initial(self.trained, self.initial, takes_parameters=True)
        )
        return Applied(adapter, self.scale)

    def describe(self) -> dict[str, Any]:
        """For the receipt."""
        described = [change.describe() for change in self.trained.modules]
        base = self.trained.source.base_name
        return {
            "name": self.name,
            "scale": self.scale,
            "init": None if self.initial is None else self.initial.source.name,
            "kind": self.trained.kind,
            "modules": len(self.trained.modules),
            "replaced_parameters": len(self.trained.replacements),
            "ranks": sorted({int(str(facts["rank"])) for facts in described if "rank" in facts}),
            "scalings": sorted({float(str(facts["scaling"])) for facts in described if "scaling" in facts}),
            "alpha": self.trained.source.config.get("lora_alpha"),
            "base_model_name_or_path": Path(base).name if base else None,
        }


def structure_for(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> ModelStructure | None:
    """What the model's class says of the checkpoint; without importing it, where that is not needed."""
    wanted: list[str] = []
    for adapter in adapters:
        wanted += [name for change in adapter.modules for name in change.parameters(())[:1]]
        wanted += [*adapter.replacements, *(f"{module}.weight" for module in adapter.bases)]
    dense = dense_structure(checkpoint.config or {}, checkpoint.tensors, wanted)
    return dense or read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors, wanted)


def fit_all(applied: Sequence[Applied], names: NameMap) -> list[list[Fitted]]:
    """Every change of every adapter with its parameter. Raises every problem together."""
    problems: list[CordaConvertError] = []
    fitted: list[list[Fitted]] = []
    for one in applied:
        try:
            fitted.append(fit_changes(one.adapter, names))
        except CordaConvertError as problem:
            problems.append(problem)
    raise_problems(problems)
    return fitted


def matrices(fitted: Sequence[Fitted], checkpoint: Checkpoint) -> dict[str, tuple[TensorRef, Layout]]:
    """The stored matrix of each adapted module that lies on disk as it is, and how."""
    return {
        each.change.module_name: (checkpoint.tensors[each.target.tensor_name], each.layout)
        for each in fitted
        if each.target.is_plain
        and len(each.target.shape) == 2
        and each.target.shape == checkpoint.spec(each.target.tensor_name).shape
    }


def check_belonging(
    parts: Sequence[Part], fitted: Sequence[Sequence[Fitted]], model: Checkpoint, residual: Residual | None
) -> list[Mapping[str, Reproduction]]:
    """Refuses an adapter that is not for this model, or not without its initial factors. Raises every problem together.

    Returns for each adapter the initial factors that have to be made again from the model: mostly none.
    """
    problems: list[CordaConvertError] = []
    made_again: list[Mapping[str, Reproduction]] = []
    for part, changes in zip(parts, fitted, strict=True):
        try:
            made_again.append(_check_part(part, changes, model, residual))
        except CordaConvertError as problem:
            problems.append(problem)
    raise_problems(problems)
    evidence.check_scales([part.scale for part in parts], model)
    return made_again


def _check_part(
    part: Part, changes: Sequence[Fitted], model: Checkpoint, residual: Residual | None
) -> Mapping[str, Reproduction]:
    weights = matrices(changes, model)
    method = method_of(part.trained)
    if part.initial is not None:
        evidence.check_base_of_initial(part.initial, weights, model)
    elif residual is not None:
        own = {module: (residual.tensor(ref.name), layout) for module, (ref, layout) in weights.items()}
        evidence.check_residual(part.trained, weights, own, residual.name)
    elif method is not None and evidence.was_taken_from(part.trained, weights, model):
        return reproductions(Applied(part.trained, part.scale), changes, method, model)
    else:
        evidence.check_plain(part.trained, weights, model, is_added=part.scale > 0)
    return {}
