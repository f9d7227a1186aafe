"""How far stored numbers are from what they should be, in units of the last place of their dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SIGNIFICAND_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}
_LEAST_EXPONENT = {"F64": -1074, "F32": -149, "F16": -24, "BF16": -133}

CANCELLED = 1 / 4
"""Where terms cancel to less than this share of their sizes, what the computation loses counts more than the last place."""


UNIT = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""The largest relative error of one rounding."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Numbers in float64, and what a computation in another precision may lose of each.

    Attributes:
        values: what is right.
        sizes: for each number the sum of the magnitudes of its terms.
        loss: share of these sizes that rounding on the way may come to.
        roundings: how often a result is rounded to the stored dtype: once, or more with `--rounding peft`; 0 where only `loss`
            counts.
    """

    values: Tensor
    sizes: Tensor
    loss: float
    roundings: int = 1


@dataclass(slots=True)
class Measured:
    """The largest error so far.

    Attributes:
        ulps: in units of the last place, over numbers that are no small rest of large terms.
        share: of what rounding may come to at most, over all numbers; above 1 something is wrong.
        same_bits: whether every number was the nearest one or the very bits that were expected.
        entries: how many were compared.
    """

    ulps: float = 0.0
    share: float = 0.0
    same_bits: bool = True
    entries: int = 0

    def add(self, other: Measured) -> None:
        self.ulps, self.share = max(self.ulps, other.ulps), max(self.share, other.share)
        self.same_bits = self.same_bits and other.same_bits
        self.entries += other.entries

    @property
    def is_right(self) -> bool:
        return self.share <= 1.0  # never for NaN


def last_place(values: Tensor, dtype: str) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at each value, in float64."""
    import torch

    _, exponents = torch.frexp(values)
    exponents = torch.where(values == 0, _LEAST_EXPONENT[dtype], exponents - _SIGNIFICAND_BITS[dtype])
    return torch.ldexp(torch.ones_like(values), exponents.clamp(min=_LEAST_EXPONENT[dtype]))


def measure(stored: Tensor, exact: Exact, dtype: str) -> Measured:
    """Compares numbers of `dtype` with what they should be."""
    import torch

    if not exact.values.numel():
        return Measured()
    unit = last_place(exact.values.abs(), dtype)
    found = stored.double()
    is_same = (found == exact.values) | (found.isnan() & exact.values.isnan())
    error = torch.where(is_same, 0.0, (found - exact.values).abs())
    allowed = 0.5 * exact.roundings * unit * (1 + 1e-9) + exact.loss * exact.sizes
    if exact.roundings > 1:
        allowed += exact.roundings * last_place(exact.sizes, dtype)
    share = torch.where(is_same, 0.0, error / allowed).max()
    counted = exact.values.abs() >= CANCELLED * exact.sizes
    ulps = torch.where(counted, error / unit, 0.0).max()
    finite = bool(torch.isfinite(share))
    nearest = exact.values.to(stored.dtype)
    return Measured(
        float(ulps) if finite else float("inf"),
        float(share) if finite else float("inf"),
        bool(torch.equal(nearest, stored)),
        exact.values.numel(),
    )


def measure_bits(stored: Tensor, expected: Tensor) -> Measured:
    """Compares bits: any difference is too much. `ulps` is then what it comes to, where these are numbers."""
    import torch

    same = torch.equal(stored.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))
    entries = stored.numel()
    if same:
        return Measured(entries=entries)
    return Measured(float("inf"), float("inf"), same_bits=False, entries=entries)


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of one tensor, or of the factors of one module.

    Attributes:
        kind: what was done to it, by the receipt.
        how: `exact` in float64 by other code, `bits` that were expected, `again` by the code that made it.
        figures: further measures, of which smaller is better.
        wrong: why it is not right, beside what was measured.
    """

    name: str
    kind: str
    how: str
    measured: Measured
    figures: Mapping[str, float] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def is_right(self) -> bool:
        return self.measured.is_right and self.wrong is None
