"""Whether the covariances of a decomposition had enough text behind them, judged by what the run found of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TOKENS_PER_INPUT = 10
"""With n = 10·d tokens the eigenvalues of a sample covariance lie between 0.47 and 1.73 times the true ones, where tokens
are independent (Marchenko and Pastur, 1967); with fewer, the smallest are mostly chance."""

LEAST_SHARE = 0.5
"""With that many tokens some directions below float32's resolution of the largest are ordinary (20 of 96 in a layer of the
fixtures), and what damping is for. Where more than half are, the text repeats itself, or inputs are dead."""


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is known of the covariance of one module: `rank` of `side` directions, None for what is not known."""

    module: str
    side: int
    rank: int
    samples: int | None
    tokens: int | None
    condition: float | None
    is_singular: bool = False

    @property
    def has_many_tokens(self) -> bool:
        return self.tokens is not None and self.tokens >= TOKENS_PER_INPUT * self.side

    @property
    def is_deficient(self) -> bool:
        """A singular one of unknown rank (here the full one) is deficient, unless many tokens went into it."""
        if self.is_singular and not self.has_many_tokens:
            return True
        return self.rank < self.side * (LEAST_SHARE if self.has_many_tokens else 1)

    @property
    def has_few_tokens(self) -> bool:
        return not self.is_deficient and self.tokens is not None and not self.has_many_tokens

    def origin(self) -> str:
        counts = [(self.tokens, "tokens"), (self.samples, "samples")]
        known = " of ".join(f"{count:,} {what}" for count, what in counts if count is not None)
        return f", from {known}" if known else ""

    def size(self) -> str:
        if self.rank == self.side:
            return f"of an unknown rank below its {self.side:,} inputs"
        return f"of rank {self.rank:,} for {self.side:,} inputs"

    def advice(self) -> str:
        if self.has_many_tokens:
            return (
                "Its tokens hardly vary there, or a few inputs are so large that float32 loses the others beside them."
            )
        return f"Collect {TOKENS_PER_INPUT * self.side:,} tokens or more of varied text."

    def share(self) -> float:
        return (self.rank if self.is_deficient or self.tokens is None else self.tokens) / self.side


def covariance_warnings(
    entries: Iterable[Mapping[str, Any]], collected: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """A warning where covariances are rank-deficient, and one where few tokens went into them.

    `entries` are the receipt's facts by tensor; those of a decomposition have
    `covariance: {samples, tokens, rank, side, condition, singular}`, with None for what is not known. `collected` has
    `samples` and `tokens` of all of them, where the entries do not say. Each token adds one to the rank at most: with
    fewer tokens than inputs it is deficient for certain.
    """
    judged = [_judge(entry, entry["covariance"], collected or {}) for entry in entries if entry.get("covariance")]
    deficient = [each for each in judged if each.is_deficient]
    few = [each for each in judged if each.has_few_tokens]
    warnings = []
    if deficient:
        worst = min(deficient, key=_Judged.share)
        condition = "" if worst.condition is None else f" (condition {worst.condition:.1g})"
        warnings.append(
            f"The covariances of {len(deficient)} of {len(judged)} modules are rank-deficient; the worst is that of "
            f"{worst.module}, {worst.size()}{condition}{worst.origin()}. In the other directions the decomposition goes by "
            f"the weights alone, or by float32's noise. {worst.advice()}"
        )
    if few:
        worst = min(few, key=_Judged.share)
        warnings.append(
            f"Few tokens went into the covariances of {len(few)} of {len(judged)} modules: {worst.share():.1f} for each input "
            f"of {worst.module}, which has {worst.side:,}{worst.origin()}. The smallest directions are then mostly chance. "
            f"Collect {TOKENS_PER_INPUT} or more for each input."
        )
    return tuple(warnings)


def _judge(entry: Mapping[str, Any], facts: Mapping[str, Any], collected: Mapping[str, Any]) -> _Judged:
    samples, tokens = (
        _count(collected.get(key) if facts.get(key) is None else facts[key]) for key in ("samples", "tokens")
    )
    side = int(facts["side"])
    bounds = [side, *(count for count in (_count(facts.get("rank")), tokens) if count is not None)]
    condition = facts.get("condition")
    return _Judged(
        module=str(entry.get("module") or entry["name"]),
        side=side,
        rank=min(bounds),
        samples=samples,
        tokens=tokens,
        condition=None if condition is None else float(condition),
        is_singular=facts.get("singular") is True,
    )


def _count(value: object) -> int | None:
    """A count, also as the text that a file's metadata has."""
    if isinstance(value, str):
        return int(value) if value.isascii() and value.isdecimal() and len(value) < 19 else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None
