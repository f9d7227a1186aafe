"""What adapters make of a model, planned: for `merge`, which writes it, and for `perplexity`, which only measures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.operations.belonging import Part, check_belonging, fit_all, structure_for
from corda_convert.operations.edits import Edits, collect_edits, produced
from corda_convert.operations.half_tied import half_tied_warnings
from corda_convert.operations.reproduction import Reproduction, reproduced
from corda_convert.operations.residual import Residual
from corda_convert.operations.several import check_together, in_fixed_order, order_matters
from corda_convert.operations.transforms import Rounding
from corda_convert.plan.model import Produced


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """Adapters that fit a model.

    Attributes:
        parts: in the order in which they are folded.
        names: the model's.
        edits: of its tensors.
        made_again: for each part, the initial factors that have to be made again from the model.
        keeps_order: whether the order is the one given, because it matters.
        warnings: for the user, beside those of the edits.
    """

    parts: tuple[Part, ...]
    names: NameMap
    edits: Edits
    made_again: Sequence[Mapping[str, Reproduction]]
    keeps_order: bool
    warnings: tuple[str, ...]

    def touched(self, dtype: str | None, rounding: Rounding = "nearest") -> dict[str, tuple[Produced, ...]]:
        """The tensors in the place of the stored ones that adapters touch, rounded to `dtype` (None for their own)."""
        return reproduced(produced(self.edits, self.names, dtype, rounding), self.made_again)


def plan_fold(
    given: Sequence[Part],
    checkpoint: Checkpoint,
    *,
    residual: Residual | None = None,
    rounding: Rounding = "nearest",
    judges: bool = True,
) -> FoldPlan:
    """Adapters with their parameters in the model. `judges`: by the numbers, whether they belong together.

    Raises every problem of a kind together.
    """
    applied = [part.applied() for part in given]
    keeps_order = order_matters(applied, rounds_each=rounding == "peft")
    order = list(range(len(applied))) if keeps_order else in_fixed_order(applied)
    parts, applied = [given[place] for place in order], [applied[place] for place in order]
    names = NameMap(checkpoint, structure_for(checkpoint, [one.adapter for one in applied]))
    fitted = fit_all(applied, names)
    made_again = check_belonging(parts, fitted, checkpoint, residual) if judges else []
    check_together(applied, fitted, names)
    edits = collect_edits(applied, fitted, names)
    warnings = [
        text
        for part, changes in zip(parts, fitted, strict=True)
        for text in half_tied_warnings(part, changes, names, brought=part.trained.bases)
    ]
    return FoldPlan(tuple(parts), names, edits, made_again, keeps_order, tuple(warnings))
