"""What `decompose` takes, whether it makes sense, and how the receipt says it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corda_convert.checkpoint.covariances import Covariances
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.errors import AdapterMismatch, CordaConvertError, InputNotFound, UnsupportedInput
from corda_convert.operations.contexts import Method
from corda_convert.operations.decomposition import Mode
from corda_convert.operations.evidence import initial_adapter_of
from corda_convert.operations.initial_config import Ranks, plain
from corda_convert.operations.options import RunOptions

if TYPE_CHECKING:
    from corda_convert.linalg.subspace import Solver

METHODS: tuple[Method, ...] = ("corda", "svd", "asvd", "svd-llm")


@dataclass(frozen=True, slots=True)
class DecomposeOptions:
    """What `decompose` alone takes: `mode` and `rank` or `rank_budget`, or `truncate` alone.

    Attributes:
        mode: `ipm` takes the largest singular values, `kpm` the smallest.
        rank: rank of the adapter, at most min(d_out, d_in) of every target.
        alpha: `lora_alpha`; None for each module's rank, a scaling of 1 (its root with rslora).
        method: what the singular values are weighted with: `corda` C, `svd-llm` its root, `asvd` mean absolute inputs to
            the power `asvd_alpha`, `svd` nothing (PiSSA with ipm).
        damp: damping of corda's covariance relative to its mean diagonal, or `peft` for the reference's doubling rule.
        targets: module names, their ends, or regular expressions; one string is a regular expression or `all-linear`, as
            in PEFT; none for every Linear but the head.
        excluded: the same, for what is left out.
        rslora: divide alpha by the root of the rank.
        rank_pattern: PEFT's: regular expressions for the end of a path → rank.
        alpha_pattern: the same → alpha.
        truncate: instead of all that: discard so many of the smallest components, and write a dense model.
        residual: false to write the adapter alone; `merge` with `subtract` makes the residual from it.
        solver: `dense`, `krylov`, or `auto` to choose by size, rank and end.
        asvd_alpha: the power of the mean absolute inputs for asvd.
        write_cache: a file outside the output to write as well: PEFT's CorDA `cache_file`, with these very factors.
        rank_budget: instead of a rank: as many parameters for the whole adapter, spread over the modules by what their
            components weigh. Then `alpha` is for the rank that it pays everywhere, and each module has its scaling.
        rank_min: with a budget: no module gets less; 0 may leave some as they are.
        rank_max: with a budget: no module gets more; None for twice what it pays everywhere.
    """

    mode: Mode | None = None
    rank: int | None = None
    alpha: float | None = None
    method: Method = "corda"
    damp: float | Literal["peft"] = 0.01
    targets: str | tuple[str, ...] = ()
    excluded: str | tuple[str, ...] = ()
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    truncate: int | None = None
    residual: bool = True
    solver: Solver = "auto"
    asvd_alpha: float = 0.5
    write_cache: Path | str | None = None
    rank_budget: int | None = None
    rank_min: int = 1
    rank_max: int | None = None

    @property
    def takes_covariances(self) -> bool:
        return self.method != "svd"

    @property
    def size(self) -> str:
        """How large the adapter is to be, in words."""
        return f"rank {self.rank}" if self.rank_budget is None else f"{self.rank_budget:,} parameters"


@dataclass(frozen=True, slots=True)
class Split:
    """What is taken out of each target. `is_dropped`: nowhere is it kept."""

    mode: Mode
    ranks: Ranks
    is_dropped: bool


def split_of(options: DecomposeOptions) -> Split:
    """Rank and end of the spectrum. Raises `UnsupportedInput` for options that contradict each other."""
    if options.truncate is not None:
        others = {
            "mode": options.mode is not None,
            "rank": options.rank is not None,
            "rank_budget": options.rank_budget is not None,
            "alpha": options.alpha is not None,
            "rslora": options.rslora,
            "rank_pattern": bool(options.rank_pattern),
            "alpha_pattern": bool(options.alpha_pattern),
            "residual=False": not options.residual,
            "write_cache": options.write_cache is not None,
        }
        given = [name for name, is_given in others.items() if is_given]
        if given:
            raise UnsupportedInput(f"truncate writes a dense model, so it goes without {', '.join(given)}.")
        return Split("kpm", Ranks(options.truncate), is_dropped=True)
    if options.mode is not None and options.rank_budget is not None:
        if options.rank is not None or options.rank_pattern:
            raise UnsupportedInput("rank_budget chooses the ranks, so it goes without rank and rank_pattern.")
        ranks = Ranks(1, options.alpha, options.rslora, alpha_pattern=options.alpha_pattern)
        return Split(options.mode, ranks, is_dropped=False)
    if options.mode is None or options.rank is None:
        raise UnsupportedInput("mode and rank (or rank_budget) are needed, or truncate.")
    ranks = Ranks(options.rank, options.alpha, options.rslora, options.rank_pattern, options.alpha_pattern)
    return Split(options.mode, ranks, is_dropped=False)


def option_problems(
    options: DecomposeOptions,
    split: Split,
    checkpoint: Checkpoint,
    covariances: Path | str | None,
    run: RunOptions,
) -> list[CordaConvertError]:
    """Why these options cannot be met with this model, as far as that is known without its tensors."""
    problems = [*split.ranks.number_problems(), *_budget_problems(options)]
    if options.takes_covariances and covariances is None:
        needs = "covariances" if options.method != "asvd" else "mean absolute inputs"
        problems.append(
            InputNotFound(
                f"Method {options.method} needs {needs}.",
                next_step="Give them with --cov FILE, or take the plain SVD of the weights with --method svd.",
            )
        )
    if not options.takes_covariances and covariances is not None:
        problems.append(
            UnsupportedInput(
                f"Method {options.method} takes no covariances.",
                next_step=f"Leave out --cov, or choose --method {', '.join(METHODS[:1] + METHODS[2:])}.",
            )
        )
    if options.damp != "peft" and not 0 <= options.damp < math.inf:
        problems.append(UnsupportedInput(f"The damping is {options.damp}, a number from 0 on was expected."))
    if not 0 <= options.asvd_alpha < math.inf:
        problems.append(UnsupportedInput(f"asvd's alpha is {options.asvd_alpha}, a number from 0 on was expected."))
    if not options.residual and run.dtype is not None:
        problems.append(
            UnsupportedInput(
                "--dtype is that of the residual's weights, and with --no-residual there are none.",
                why="Initial factors are always float32.",
                next_step="Leave out --dtype here, and give it when the residual is made.",
            )
        )
    if initial_adapter_of(checkpoint.root) is not None:
        problems.append(
            AdapterMismatch(
                f"{checkpoint.name} is a residual already: it has its initial adapter with it.",
                next_step="Decompose the base model.",
            )
        )
    return problems


def _budget_problems(options: DecomposeOptions) -> list[CordaConvertError]:
    problems: list[CordaConvertError] = []
    if options.rank_budget is None and (options.rank_min != 1 or options.rank_max is not None):
        problems.append(UnsupportedInput("rank_min and rank_max are bounds of the ranks that a rank_budget chooses."))
    if options.rank_budget is not None and options.rank_budget < 1:
        problems.append(UnsupportedInput(f"The budget is {options.rank_budget}, at least 1 was expected."))
    if options.rank_min < 0:
        problems.append(UnsupportedInput(f"The least rank is {options.rank_min}, at least 0 was expected."))
    if options.rank_max is not None and options.rank_max < max(options.rank_min, 1):
        problems.append(
            UnsupportedInput(
                f"The largest rank is {options.rank_max}, at least {max(options.rank_min, 1)} was expected."
            )
        )
    return problems


def describe_options(
    checkpoint: Checkpoint,
    matrices: Covariances | None,
    options: DecomposeOptions,
    split: Split,
    run: RunOptions,
) -> dict[str, Any]:
    """What was chosen, with the defaults that took effect; None and nothing for what does not apply."""
    ranks = split.ranks
    has_budget = options.rank_budget is not None
    alpha = ranks.rank if ranks.alpha is None and not has_budget else ranks.alpha
    return {
        "model": checkpoint.name,
        "covariances": None if matrices is None else matrices.path.name,
        "mode": options.mode,
        "method": options.method,
        "rank": options.rank,
        "rank_budget": options.rank_budget,
        "rank_min": options.rank_min if has_budget else None,
        "rank_max": options.rank_max,
        "alpha": None if split.is_dropped or alpha is None else plain(alpha),
        "rslora": ranks.use_rslora,
        "rank_pattern": [f"{key}={value}" for key, value in ranks.rank_pattern.items()],
        "alpha_pattern": [f"{key}={plain(value)}" for key, value in ranks.alpha_pattern.items()],
        "truncate": options.truncate,
        "no_residual": not options.residual,
        "write_cache": None if options.write_cache is None else Path(options.write_cache).name,
        "damp": options.damp if options.method == "corda" else None,
        "asvd_alpha": options.asvd_alpha if options.method == "asvd" else None,
        "solver": options.solver,
        "targets": _listed(options.targets),
        "excluded": _listed(options.excluded),
        "dtype": run.dtype,
    }


def _listed(names: str | tuple[str, ...]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
