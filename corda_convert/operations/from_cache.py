"""`decompose --from-cache`: the residual and initial adapter that a CorDA cache of PEFT stands for, without any SVD."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from corda_convert.adapters.cache import Cache, Eigens, open_cache
from corda_convert.adapters.factors import Adapter
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.errors import AdapterMismatch, CordaConvertError, NotFinite, UnsupportedInput, raise_problems, some
from corda_convert.hub_reading import located
from corda_convert.operations.decomposition import Mode
from corda_convert.operations.evidence import initial_adapter_of
from corda_convert.operations.initial_config import Ranks, initial_config
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.shares import Matrices, repeated_shares
from corda_convert.operations.subtraction import Taking, take_out
from corda_convert.operations.targets import Selection, Target, choose_targets

LEAST_SHARE = 0.5
"""The least median cosine between a cache's `B₀A₀` and the base in B₀'s column space: 1 for an exact decomposition. PEFT's
float32 loses up to a quarter of the smallest components, which gives 0.97; vectors of another model give about 0."""


_KINDS = ("linear", "conv1d")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """What is not in a cache file.

    Attributes:
        mode: what the cache was made with; PEFT's training keeps it in `corda_config`.
        alpha: `lora_alpha`; None for each module's rank, a scaling of 1 (its root with rslora).
        rslora: divide alpha by the root of the rank.
        rank: the rank that is expected; None for the cache's own, which may differ from module to module.
    """

    mode: Mode
    alpha: float | None = None
    rslora: bool = False
    rank: int | None = None


def decompose_from_cache(
    model: Path | str,
    *,
    cache: Path | str,
    output: Path | str,
    options: CacheOptions,
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Writes `W − U diag(S) Vᵀ` for every module of the cache, and PEFT's factors of it in `output/corda_init`.

    `A₀ = √(S/s)·Vᵀ` and `B₀ = U·√(S/s)` have the bits of PEFT's `corda_init`; the residual is computed in float64 and
    rounded once. Raises a `CordaConvertError`; then nothing was written.
    """
    checkpoint = read_checkpoint(located(model, "model"))
    if initial_adapter_of(checkpoint.root) is not None:
        raise AdapterMismatch(
            f"{checkpoint.name} is a residual already: it has its initial adapter with it.",
            next_step="Give the base model.",
        )
    opened = open_cache(located(cache, "cache file"))
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    found = eigens_at_run_time(opened, names)
    targets = _targets(found, names)
    ranks = _ranks(found, options)
    raise_problems([*ranks.number_problems(), *_problems(found, targets, options)])
    if names.structure is None:
        raise TypeError(f"{checkpoint.name} has no structure")
    config = initial_config(
        checkpoint, names.structure, targets, ranks, mode=options.mode, residual_name=run.push_to or str(output)
    )
    scalings = {target.module_name: ranks.scaling_of(target.module_name) for target in targets}
    taking = Taking(
        initial=Cache(opened.file, found).adapter(scalings, config),
        command="decompose",
        options={
            "model": checkpoint.name,
            "from_cache": opened.path.name,
            "method": "corda",
            "mode": options.mode,
            "rank": ranks.rank,
            "alpha": config["lora_alpha"],
            "rslora": options.rslora,
            "dtype": run.dtype,
        },
        role="cache",
        origin=f"the adapter that PEFT's CorDA cache `{opened.path.name}` holds",
        check=_check_base,
    )
    return take_out(checkpoint, taking, Path(output), run, names)


def eigens_at_run_time(cache: Cache, names: NameMap) -> dict[str, Eigens]:
    """What the cache holds by the model's present module names. Raises `AdapterMismatch` for modules that it has not."""
    places = names.find([(f"{module}.weight",) for module in cache.modules])
    found = {
        place.name.removesuffix(".weight"): eigens
        for place, eigens in zip(places, cache.modules.values(), strict=True)
        if place is not None
    }
    missing = [module for module, place in zip(cache.modules, places, strict=True) if place is None]
    if missing or len(found) != len(cache.modules):
        raise AdapterMismatch(
            f"{cache.path.name} has vectors for {len(cache.modules)} modules; {len(cache.modules) - len(found)} of them are "
            f"not in {names.checkpoint.name}: {some(missing)}.",
            why="The cache is of another model.",
        )
    return found


def _targets(found: Mapping[str, Eigens], names: NameMap) -> list[Target]:
    """Each module's weight. Raises every problem together."""
    structure = names.structure
    others = [] if structure is None else [name for name in found if structure.layers.get(name) not in _KINDS]
    if others:
        raise AdapterMismatch(
            f"The cache has vectors for {some(others)}, no Linear or Conv1D in {names.checkpoint.name}.",
            why="The cache is of another model.",
        )
    chosen = choose_targets(names, Selection("|".join(map(re.escape, found))))
    raise_problems(chosen.problems)
    return list(chosen.targets)


def _ranks(found: Mapping[str, Eigens], options: CacheOptions) -> Ranks:
    """The commonest rank, and a pattern for each module of another one."""
    ranks = {module: _rank(eigens) for module, eigens in found.items()}
    (most, _), *_ = Counter(ranks.values()).most_common(1)
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != most}
    return Ranks(most, options.alpha, options.rslora, others)


def _rank(eigens: Eigens) -> int:
    return eigens.S.shape[0] if len(eigens.S.shape) == 1 else 0


def _problems(found: Mapping[str, Eigens], targets: list[Target], options: CacheOptions) -> list[CordaConvertError]:
    """Vectors that do not fit their weights, and ranks that were not expected."""
    problems: list[CordaConvertError] = []
    for target in targets:
        eigens = found[target.module_name]
        rank = _rank(eigens)
        shapes = (eigens.S.shape, eigens.U.shape, eigens.V.shape)
        expected = ((rank,), (target.d_out, rank), (target.d_in, rank))
        if shapes != expected or rank > min(target.d_out, target.d_in):
            problems.append(
                AdapterMismatch(
                    f"S, U, V of {target.module_name} are {', '.join(map(str, shapes))}; its weight is ({target.d_out}, "
                    f"{target.d_in}), so (r,), ({target.d_out}, r), ({target.d_in}, r) were expected.",
                    why="The cache is of another model, or damaged.",
                )
            )
        elif not bool((read_tensor(eigens.S) >= 0).all()):
            problems.append(
                NotFinite(
                    f"{eigens.S.name} in {eigens.S.file.path} holds NaN or negative numbers; singular values were expected."
                )
            )
    wrong = [module for module, eigens in found.items() if options.rank not in (None, _rank(eigens))]
    if wrong:
        ranks = sorted({_rank(found[module]) for module in wrong})
        problems.append(
            UnsupportedInput(
                f"The cache has rank {', '.join(map(str, ranks))} for {some(wrong)}; rank {options.rank} was asked for.",
                why="A cache holds the components of one rank, and no others.",
                next_step="Leave out --rank, or decompose with the covariances.",
            )
        )
    return problems


def _check_base(initial: Adapter, weights: Matrices, model: Checkpoint) -> None:
    """Refuses a model that the cache was not taken from. Raises `AdapterMismatch`."""
    shares = repeated_shares(initial, weights)
    if shares and median(shares) < LEAST_SHARE:
        raise AdapterMismatch(
            f"{initial.source.name} is not of {model.name}: its U diag(S) Vᵀ is {median(shares):.1%} of the weight in U's "
            "column space; about 100 % was expected.",
            why="The cache is of another model, or of one that was trained since.",
            next_step="Give the model that preprocess_corda was run on.",
        )
