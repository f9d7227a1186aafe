"""What a method makes of what is known of a layer's inputs, once for all the modules that share it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeVar

from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import CovarianceMismatch, NotFinite
from corda_convert.plan.model import Facts

if TYPE_CHECKING:
    from torch import Tensor

    from corda_convert.linalg.covariance import Damping
    from corda_convert.linalg.threads import Team
    from corda_convert.linalg.weighting import Weighting

Method = Literal["corda", "svd", "asvd", "svd-llm"]

FULL_SIDE = 512
"""Up to this side a covariance's rank and condition are found from all of its eigenvalues."""

SURE_TOKENS = 2
"""From so many tokens for each input a large covariance is not tried for singularity: it would tell nothing new."""

MOST_HELD = 2
"""Contexts held at a time for the modules that share them: those of a layer's experts come in turn, their inputs' and their
down projections'."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """T, and what the receipt says of it."""

    weighting: Weighting
    facts: Facts


@dataclass(frozen=True, slots=True)
class ContextMethod:
    """How a method weights a layer's inputs.

    Attributes:
        method: corda and svd-llm take a covariance (d_in, d_in), asvd mean absolute inputs (d_in,), svd nothing.
        damp: corda's: a factor of the mean diagonal, or `peft` for the reference's doubling rule.
        asvd_alpha: the exponent of asvd's scale.
        tokens: how many went into each covariance, where that is known.
        module_tokens: into which covariances fewer went, by the names of the stored tensors.
    """

    method: Method
    damp: float | Literal["peft"]
    asvd_alpha: float
    tokens: int | None
    module_tokens: Mapping[str, int] = field(default_factory=dict)

    def weigh(self, team: Team, context: Tensor, ref: TensorRef, module_name: str) -> Weighed:
        """T of a context on the device, which it may keep. Raises `NotFinite` or `CovarianceMismatch`."""
        import torch

        from corda_convert.linalg import weighting as algebra
        from corda_convert.linalg.covariance import is_symmetric
        from corda_convert.linalg.panels import all_finite

        if not all_finite(team, context):
            raise NotFinite(
                f"{ref.name} in {ref.file.path} holds NaN or Inf.",
                why="The calibration ran over a float16 range, or the file is damaged.",
            )
        if self.method == "asvd":
            return Weighed(self._scale(context, module_name), {"damping": None})
        mean = float(context.diagonal().double().mean())
        if mean <= 0.0:
            raise CovarianceMismatch(
                f"The covariance of {module_name} is zero on average: no sample reached this layer.",
                next_step="Collect covariances on data that uses this layer, or leave it out with --target.",
            )
        if not is_symmetric(team, context):
            raise CovarianceMismatch(
                f"The covariance of {module_name} is not symmetric.",
                why="The file is damaged, or holds one triangle only.",
                next_step="Collect covariances again.",
            )
        facts: Facts = {"covariance": self._covariance_facts(team, context, self.module_tokens.get(ref.name))}
        if self.method == "svd-llm":
            try:
                root, amount = algebra.root_weighting(team, context)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise CovarianceMismatch(
                    f"The covariance of {module_name} is none: it has eigenvalues far below zero.",
                    why="The file is damaged, or holds something else.",
                    next_step="Collect covariances again.",
                ) from None
            return Weighed(root, {**facts, "damping": {"factor": amount / mean, "amount": amount}})
        damping = self._damping(context, module_name)
        facts["damping"] = {"factor": damping.factor, "amount": damping.amount}
        return Weighed(algebra.CovarianceWeighting(context, damping.amount), facts)

    def workspace_elements(self, d_in: int) -> int:
        """Float64 numbers that stay in use beside the solver's."""
        if self.method == "asvd":
            return d_in
        roots = 2 if self.method == "svd-llm" else 1.5 if self.damp == "peft" else 0
        return int(roots * d_in * d_in) + (2 * d_in * d_in if d_in <= FULL_SIDE else 0)

    def trial_elements(self, d_in: int) -> int:
        """Float64 numbers that are held for a while before the solver begins."""
        return d_in * d_in if self.method != "asvd" and self._is_tried(d_in) else 0

    def held_bytes(self, ref: TensorRef) -> int:
        """What a weighting keeps."""
        return ref.spec.nbytes if self.method == "corda" else 8 * ref.spec.elements

    def _is_tried(self, side: int, tokens: int | None = None) -> bool:
        """With the `tokens` of one covariance, or those that the fewest went into."""
        known = [count for count in (self.tokens, *self.module_tokens.values()) if count is not None]
        least = tokens if tokens is not None else min(known, default=0)
        return side > FULL_SIDE and least < SURE_TOKENS * side

    def _covariance_facts(self, team: Team, covariance: Tensor, tokens: int | None) -> Facts:
        """Rank and condition in float32, which covariances are stored in; of a large one whether it is singular in float64.

        `tokens` are given where not all went into this one.
        """
        from corda_convert.linalg.covariance import rank_and_condition
        from corda_convert.linalg.panels import is_positive_definite

        side = covariance.shape[0]
        facts: Facts = {"samples": None, "tokens": tokens, "rank": None, "side": side, "condition": None}
        if side <= FULL_SIDE:
            rank, condition = rank_and_condition(covariance)
            return {**facts, "rank": rank, "condition": condition, "singular": rank < side}
        is_tried = self._is_tried(side, self.tokens if tokens is None else tokens)
        return {**facts, "singular": not is_positive_definite(team, covariance) if is_tried else None}

    def _scale(self, mean_abs: Tensor, module_name: str) -> Weighting:
        from corda_convert.linalg.weighting import DiagonalWeighting

        if float(mean_abs.min()) < 0.0 or float(mean_abs.max()) <= 0.0:
            raise CovarianceMismatch(
                f"The mean absolute inputs of {module_name} are zero or negative.",
                why="No sample reached this layer, or the file holds something else.",
                next_step="Collect them on data that uses this layer, or leave it out with --target.",
            )
        return DiagonalWeighting(mean_abs.double() ** self.asvd_alpha)

    def _damping(self, covariance: Tensor, module_name: str) -> Damping:
        from corda_convert.linalg import covariance as algebra

        if self.damp != "peft":
            return algebra.relative_damping(covariance, self.damp)
        damping = algebra.reference_damping(covariance)
        if damping is None:
            raise CovarianceMismatch(
                f"The covariance of {module_name} stays singular in float32 for every damping of the "
                f"reference's rule up to 0.01·2^{algebra.MAX_DOUBLINGS}.",
                next_step="Use --damp 0.01, which needs no inverse.",
            )
        return damping


_Key = tuple[str, str]
_T = TypeVar("_T")


def _key(ref: TensorRef) -> _Key:
    return str(ref.file.path), ref.name


@dataclass(slots=True, eq=False)
class SharedContexts:
    """Weightings of contexts that several modules share, from the first of the modules to the last.

    Modules are computed one after the other in the order of `uses`; a run that does only some of them finds less here, and
    reads what it lacks.

    Attributes:
        uses: every module with a context, in the order of computation.
        method: what is made of them.
        reads: the modules whose context is not held when their turn comes.
        held_bytes: the most that is held.
    """

    uses: Iterable[tuple[str, TensorRef]]
    method: ContextMethod
    reads: frozenset[str] = field(init=False)
    held_bytes: int = field(init=False)
    _last: dict[_Key, str] = field(init=False)
    _held: dict[_Key, Weighed] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        uses = tuple(self.uses)
        self.uses = uses
        self._last = {_key(ref): module for module, ref in uses}
        counts = Counter(_key(ref) for _, ref in uses)
        sizes = {key: self.method.held_bytes(ref) for _, ref in uses if counts[key := _key(ref)] > 1}
        self.held_bytes = sum(sorted(sizes.values())[-MOST_HELD:])
        held: dict[_Key, None] = {}
        reads = []
        for module, ref in uses:
            if _key(ref) not in held:
                reads.append(module)
            _keep(held, _key(ref), None, is_last=self._last[_key(ref)] == module)
        self.reads = frozenset(reads)

    def is_shared(self, module_name: str, ref: TensorRef) -> bool:
        """Whether a module after this one has the same context."""
        return self._last[_key(ref)] != module_name

    def take(self, ref: TensorRef) -> Weighed | None:
        return self._held.get(_key(ref))

    def keep(self, module_name: str, ref: TensorRef, weighed: Weighed) -> None:
        """Notes that the module has had its turn with it."""
        _keep(self._held, _key(ref), weighed, is_last=not self.is_shared(module_name, ref))


def _keep(held: dict[_Key, _T], key: _Key, value: _T, *, is_last: bool) -> None:
    """Puts it in as the newest, or out with its last use; the oldest beyond `MOST_HELD` goes."""
    held.pop(key, None)
    if not is_last:
        held[key] = value
    while len(held) > MOST_HELD:
        del held[next(iter(held))]
