"""Whether the output's dtype could hold what the adapters changed, judged by the norms that the run found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import fsum, sqrt
from typing import Any

MOST = 0.5
"""The share of a change's energy that is lost at which most of it is: `‖rounding‖² > 0.5 · ‖ΔW‖²`."""


def rounding_warnings(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A warning where rounding took most of the change, in all or in more than half of the changed tensors.

    A weight that is already of the output's dtype cannot lose more than the change itself: the loss is then at most 1.
    """
    changed = [entry for entry in tensors if entry.get("delta_norm") and "rounding_norm" in entry]
    lost = [entry for entry in changed if _loss(entry) ** 2 > MOST]
    if not changed:
        return ()
    delta = sqrt(fsum(float(entry["delta_norm"]) ** 2 for entry in changed))
    rounding = sqrt(fsum(float(entry["rounding_norm"]) ** 2 for entry in changed))
    if (rounding / delta) ** 2 <= MOST and 2 * len(lost) <= len(changed):
        return ()
    worst = max(changed, key=_loss)
    dtypes = ", ".join(sorted({str(entry["dtype"]) for entry in lost or changed}))
    return (
        f"Most of the change is below the resolution of {dtypes}: ‖rounding‖/‖ΔW‖ is {rounding / delta:.2g} over "
        f"{len(changed)} tensors, above {sqrt(MOST):.1g} in {len(lost)} of them; the worst is {worst['name']} with "
        f"{_loss(worst):.2g}. --dtype float32 keeps it.",
    )


def _loss(entry: Mapping[str, Any]) -> float:
    return float(entry["rounding_norm"]) / float(entry["delta_norm"])
