"""A model with adapters as `merge` would leave it, each tensor folded when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.adapters import read_adapter
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.belonging import Part
from corda_convert.operations.computed import with_computed
from corda_convert.operations.fold_plan import plan_fold
from corda_convert.operations.initials import assign
from corda_convert.operations.several import scaled

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Adapted:
    """The checkpoint, what is said of each adapter, and warnings."""

    checkpoint: Checkpoint
    adapters: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()


def adapted(
    checkpoint: Checkpoint,
    adapters: Sequence[Path],
    *,
    init: Sequence[Path] = (),
    dtype: str | None = None,
    as_is: bool = False,
    device: torch.device,
) -> Adapted:
    """The checkpoint with adapters folded in on reading.

    `init` are the initial adapters of residual ones, `dtype` is what folded tensors are rounded to, by its safetensors name
    (None for their own), `as_is` trusts that the adapters belong on this model. Raises what `merge` does, and
    `UnsupportedInput` for adapters that change the model's class: resized vocabularies and untied embeddings.
    """
    if not adapters:
        return Adapted(checkpoint)
    applied = scaled([read_adapter(path) for path in adapters], ())
    initials = assign([one.adapter for one in applied], init, as_is=as_is)
    parts = [Part(one.adapter, initial, one.scale) for one, initial in zip(applied, initials, strict=True)]
    plan = plan_fold(parts, checkpoint, judges=not as_is)
    touched = plan.touched(dtype)
    if plan.edits.config is not None or any(len(each) > 1 for each in touched.values()):
        raise UnsupportedInput(
            f"{' and '.join(part.name for part in parts)} changes the model's class: it unties the embedding, or resizes the "
            "vocabulary.",
            next_step="Merge it first, and measure the result: corda-convert merge",
        )
    computed = with_computed(checkpoint, {name: each[0] for name, each in touched.items()}, device)
    return Adapted(computed, tuple(part.describe() for part in plan.parts), (*plan.warnings, *plan.edits.warnings))
