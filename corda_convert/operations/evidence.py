"""Whether an adapter, its initial adapter and a model belong together, judged by their numbers.

Names and configs get lost or lie; a residual adapter merged onto the base, or a base adapter onto a residual, gives a
model that is silently wrong. A few modules are read before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from corda_convert.adapters.dora import lora_factors
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint
from corda_convert.checkpoint.tensors import TensorRef, read_tensor
from corda_convert.errors import AdapterMismatch, UnsupportedInput
from corda_convert.operations.shares import SAMPLED_MODULES, Matrices, difference_cosines, repeated_shares, sample

if TYPE_CHECKING:
    from torch import Tensor

REPEATED_SHARE = 0.15
"""A median cosine above this between `s·B·A` and the weight's own part in B's column space tells a residual adapter. On
the fixtures, trained for 300 steps: 0.3 for the CorDA adapter on the base, 0.005 on its residual, −0.006 for plain LoRA."""

PROJECTED_SHARE = 0.9
"""The least median cosine between initial factors and the base that they were taken from: 1 for those of `decompose` and
of PEFT's methods but LoRA-GA; 0.5 for the fixture's CorDA adapter after its training."""

SAMPLED_ROWS = 64
"""Rows of lora_A that are compared of a stack of experts."""

STRAIGHT_COLUMNS = 0.01
"""A mean cosine below this between columns of lora_B tells that they are orthogonal, as far as 16 bits hold them: of the
fixture's initial CorDA adapter it is 2e-7, of the trained one 0.12."""

KEPT_DIRECTION = 0.4
"""A median cosine below this between the rows of lora_A and of its initial adapter tells that they are of two trainings."""


def initial_adapter_of(folder: Path) -> Path | None:
    """The initial adapter that lies in a residual's folder: `corda_init` as we write it, `*_init` as PEFT's examples do.

    None for a folder that holds no residual. A base model has no such thing in it. Of a single file, its folder is meant.
    """
    folder = folder.parent if folder.is_file() else folder
    own = folder / INITIAL_ADAPTER_FOLDER
    others = sorted(folder.glob("*_init")) if folder.is_dir() else []
    return next((path for path in (own, *others) if (path / CONFIG_FILE).is_file()), None)


def kept_directions(trained: TensorRef, initial: TensorRef) -> list[float]:
    """The cosine, without its sign, of each row of lora_A with the same row of the initial one; none for zero rows."""
    from torch.nn.functional import cosine_similarity

    mine, theirs = read_tensor(trained).double(), read_tensor(initial).double()
    alive = theirs.norm(dim=1) > 0
    return [float(cosine) for cosine in cosine_similarity(mine[alive], theirs[alive], dim=1).abs()]


def check_same_training(adapter: Adapter, initial: Adapter) -> None:
    """Refuses an initial adapter from which this one cannot have been trained.

    Training turns the rows of A only a little: after 300 steps on the fixtures their median cosine is 0.98. Rows from
    other covariances, or another end of the spectrum, of the same model are no strangers either: up to 0.3 was found. A
    changed sign is no other adapter: A and B turn together. Raises `AdapterMismatch` with the cosines.
    """
    modules = {factors.module_name: factors for factors in lora_factors(initial.modules)}
    found = _directions_of_stacks(adapter, initial) | {
        factors.module_name: cosines
        for factors in sample(lora_factors(adapter.modules))
        if factors.module_name in modules
        and modules[factors.module_name].lora_A.shape == factors.lora_A.shape
        and (cosines := kept_directions(factors.lora_A, modules[factors.module_name].lora_A))
    }
    if found and median(cosine for cosines in found.values() for cosine in cosines) < KEPT_DIRECTION:
        listed = ", ".join(f"{name} {median(cosines):.3f}" for name, cosines in found.items())
        raise AdapterMismatch(
            f"{adapter.source.name} was not trained from the initial adapter {initial.source.name}: the rows of lora_A "
            f"point elsewhere (median cosine {listed}; {KEPT_DIRECTION} and above was expected).",
            why="The initial adapter is of another training run.",
            next_step="Give the corda_init folder that this training started from.",
        )
    _check_not_swapped(adapter, initial)


def _check_not_swapped(adapter: Adapter, initial: Adapter) -> None:
    """Refuses a trained adapter in the place of the one that it began with: the result would be the opposite of the training.

    Whatever takes initial factors out of a weight gives B₀ orthogonal columns, and training turns them against each other.
    Raises `AdapterMismatch`.
    """
    turned, before = _mean_cosine_of_columns(adapter), _mean_cosine_of_columns(initial)
    if turned is not None and before is not None and turned < STRAIGHT_COLUMNS and before > 10 * turned + 1e-4:
        raise AdapterMismatch(
            f"{adapter.source.name} and {initial.source.name} are the wrong way round: the columns of lora_B are orthogonal in "
            f"{adapter.source.name}, as before a training, and not in {initial.source.name} (mean cosines {turned:.1e} and "
            f"{before:.1e}).",
            why="The trained adapter was given as the initial one.",
            next_step=f"Give {adapter.source.name} with --init, and {initial.source.name} as the adapter.",
        )


def _mean_cosine_of_columns(adapter: Adapter) -> float | None:
    """The root of the mean square cosine between columns of lora_B, in the middle of a few modules; None of one column."""
    import torch

    found = []
    for factors in sample([each for each in lora_factors(adapter.modules) if each.rank > 1]):
        columns = torch.nn.functional.normalize(read_tensor(factors.lora_B).double(), dim=0)
        cosines = (columns.T @ columns).fill_diagonal_(0)
        found.append(float(torch.linalg.matrix_norm(cosines)) / (factors.rank * (factors.rank - 1)) ** 0.5)
    return median(found) if found else None


def _directions_of_stacks(adapter: Adapter, initial: Adapter) -> dict[str, list[float]]:
    """The same cosines for the first rows of a few parameters, mostly stacks of experts."""
    theirs = {change.key: change.lora_A for change in initial.modules if isinstance(change, ParameterFactors)}
    mine = {change.key: change.lora_A for change in adapter.modules if isinstance(change, ParameterFactors)}
    rows = {
        key: min(own.shape[0], SAMPLED_ROWS)
        for key, own in mine.items()
        if key in theirs and own.shape == theirs[key].shape
    }
    cosines = {
        key: kept_directions(mine[key].rows(0, count), theirs[key].rows(0, count))
        for key, count in list(rows.items())[:SAMPLED_MODULES]
    }
    return {key: found for key, found in cosines.items() if found}


def _adapted(adapter: Adapter) -> set[str]:
    """Paths of the modules that have LoRA factors, and of the wrappers of parameters."""
    stacks = {change.key for change in adapter.modules if isinstance(change, ParameterFactors)}
    return stacks | {factors.module_name for factors in lora_factors(adapter.modules)}


def check_base_of_initial(initial: Adapter, weights: Matrices, model: Checkpoint) -> None:
    """With `--init`, MODEL must be the base. Refuses one from which `s·B₀A₀` was already taken.

    For projection methods `s·B₀A₀ = Q Qᵀ W` on the base, while `Qᵀ W_res = 0`. Raises `AdapterMismatch`.
    """
    if initial_adapter_of(model.root) is not None:
        raise AdapterMismatch(
            f"{model.name} is a residual (it has its initial adapter with it), and --init is for merging into the base.",
            next_step="Leave out --init, or give the base model.",
        )
    shares = repeated_shares(initial, weights)
    if shares and median(abs(share) for share in shares) < 0.05:
        raise AdapterMismatch(
            f"{model.name} is not the model that {initial.source.name} was taken from: the initial factors make up "
            f"{median(shares):.1%} of the weight in their own column space; on the base it is 100 %.",
            why="MODEL is the residual already, or another model.",
            next_step="Give the base model, or leave out --init if MODEL is the residual. If the initial factors are no "
            "projection of the weights (LoRA-GA), say --as-is.",
        )


def check_subtracted(initial: Adapter, weights: Matrices, model: Checkpoint) -> None:
    """With `--subtract`, the factors must be those that MODEL's residual lacks. Raises `AdapterMismatch`."""
    if initial_adapter_of(model.root) is not None:
        raise AdapterMismatch(
            f"{model.name} is a residual already: it has its initial adapter with it.",
            next_step="Subtract the initial adapter from the base model.",
        )
    shares = repeated_shares(initial, weights)
    if shares and median(shares) < PROJECTED_SHARE:
        raise AdapterMismatch(
            f"{initial.source.name} is no initial adapter of {model.name}: its B·A is {median(shares):.1%} of the weight in "
            "its own column space; 100 % was expected.",
            why="It is a trained adapter, or of another model.",
            next_step="Give the initial adapter as it was before the training. To take a plain LoRA out of a model, give it "
            "as --adapter with --scale -1. If the initial factors are no projection of the weights (LoRA-GA), say --as-is.",
        )


def check_residual(adapter: Adapter, base: Matrices, residual: Matrices, name: str) -> None:
    """With `--residual`, the adapter must have been trained beside it, and MODEL minus it be what the training took out.

    `B·A` has little to do with what the residual holds in B's column space, and much with the difference of the two: on
    the fixtures, after a long training, its median cosine with that is 0.5; with another difference 0.05. Raises
    `AdapterMismatch`.
    """
    shares = repeated_shares(adapter, residual)
    if shares and median(shares) > REPEATED_SHARE:
        raise AdapterMismatch(
            f"{adapter.source.name} was not trained beside {name}: its B·A repeats {median(shares):.0%} of {name}'s own "
            "weight there.",
            why="It is the base, or the residual of another training.",
            next_step="Give the residual model that the training loaded.",
        )
    taken = difference_cosines(adapter, base, residual)
    if taken and median(taken) < REPEATED_SHARE:
        raise AdapterMismatch(
            f"{adapter.source.name} was not trained beside {name}: what the model has more than {name} is not what its "
            f"B·A began with (median cosine {median(taken):.3f}).",
            why="The residual, the base and the adapter are not of one training.",
            next_step="Give the residual model that the training loaded.",
        )


def check_scales(scales: Sequence[float], model: Checkpoint) -> None:
    """On a residual, adapters that were trained beside it must be taken once together. Raises `UnsupportedInput`.

    `W_res + Σ cᵢ·s·BᵢAᵢ` has `s·B₀A₀` in it `Σ cᵢ` times, and the model has it once.
    """
    if initial_adapter_of(model.root) is not None and abs(sum(scales) - 1.0) > 1e-6:
        raise UnsupportedInput(
            f"{model.name} is a residual: the scales of adapters trained beside it must add up to 1; these add up to "
            f"{sum(scales):g}.",
            why="Each holds the part that the residual lacks, which the model must have once.",
            next_step="Merge into the base model with --init.",
        )


def was_taken_from(adapter: Adapter, weights: Matrices, model: Checkpoint) -> bool:
    """Whether the model is the base that this adapter's initial factors are a part of, as far as the numbers tell."""
    named = local_folder(adapter.source.base_name)
    if initial_adapter_of(model.root) is not None or (named is not None and initial_adapter_of(named) is not None):
        return False
    shares = repeated_shares(adapter, weights)
    return bool(shares) and median(shares) > REPEATED_SHARE


def check_plain(adapter: Adapter, weights: Matrices, model: Checkpoint, *, is_added: bool = True) -> None:
    """Without `--init`: refuses a residual adapter on a model that is not its residual, and the reverse.

    An adapter that is taken out may well repeat what the model has of it: then the numbers do not count.
    Raises `AdapterMismatch` with what gave it away: the residual's initial adapter, the adapter's config, the place that
    its base name points to, or its numbers.
    """
    initial = initial_adapter_of(model.root)
    if initial is not None:
        _check_on_residual(adapter, model, initial)
    elif (reason := repeated_reason(adapter, weights, model, is_added=is_added)) is not None:
        raise _needs_initial(adapter, model, reason)


def repeated_reason(adapter: Adapter, weights: Matrices, model: Checkpoint, *, is_added: bool = True) -> str | None:
    """What tells that an adapter does not belong on a model as it is, in words: the numbers, or `residual_reason`."""
    shares = repeated_shares(adapter, weights) if is_added else []
    if shares and median(shares) > REPEATED_SHARE:
        return f"its B·A repeats {median(shares):.0%} of {model.name}'s own weight there"
    return residual_reason(adapter)


def residual_reason(adapter: Adapter) -> str | None:
    """What, but for the numbers of a model, tells that a LoRA adapter was trained beside a residual, in words.

    Files of RWKV-PEFT have no config to tell it.
    """
    if adapter.source.is_file or not _adapted(adapter):
        return None
    named = local_folder(adapter.source.base_name)
    if named is not None and initial_adapter_of(named) is not None:
        return f"its base_model_name_or_path {adapter.source.base_name} is a residual"
    if adapter.initialization == "residual":
        return f"its config says init_lora_weights={adapter.source.config.get('init_lora_weights')!r}"
    if adapter.source.config.get("corda_config") and not is_converted(adapter):
        return "its config has a corda_config, and its factors are not a converted LoRA's"
    return None


def _check_on_residual(adapter: Adapter, model: Checkpoint, folder: Path) -> None:
    from corda_convert.adapters import read_adapter

    initial = read_adapter(folder)
    mine, theirs = _adapted(adapter), _adapted(initial)
    if (adapter.kind, initial.kind) != ("lora", "lora") or mine != theirs:
        raise AdapterMismatch(
            f"{model.name} is a residual, and {adapter.source.name} was not trained beside it: it adapts other modules than "
            f"{folder.name}.",
            why="It was trained on the base model.",
            next_step="Merge it into the base model.",
        )
    ranks = {factors.module_name: factors.rank for factors in lora_factors(initial.modules)}
    for factors in lora_factors(adapter.modules):
        rank, initial_rank = factors.rank, ranks.get(factors.module_name)
        if rank != initial_rank:
            raise AdapterMismatch(
                f"{model.name} is a residual, and {adapter.source.name} was not trained beside it: at "
                f"{factors.module_name} it has rank {rank}, {folder.name} has {initial_rank}.",
                why="It was trained on the base model, or converted to an ordinary LoRA for it.",
                next_step="Merge it into the base model.",
            )
    check_same_training(adapter, initial)


def _needs_initial(adapter: Adapter, model: Checkpoint, evidence: str) -> AdapterMismatch:
    return AdapterMismatch(
        f"{adapter.source.name} was trained beside a residual, and {model.name} is not that residual: {evidence}.",
        why="Merged as it is, the part that the residual lacks would be added twice.",
        next_step="Merge into the residual, or into the base with --init (the corda_init folder, or PEFT's CorDA cache_file) "
        "or --residual (the residual's folder). If you know that it belongs on this model as it is, say --as-is.",
    )


def local_folder(name: str) -> Path | None:
    """The folder of that name, resolved, if there is one here. A config may name anything, a path or not."""
    try:
        return Path(name).resolve() if name and Path(name).is_dir() else None
    except (OSError, ValueError):
        return None


def is_converted(adapter: Adapter) -> bool:
    """Whether the factors look like `[A; A₀]`, `[B | −B₀]`, PEFT's converted LoRA: two halves that are much alike."""
    stacks = [change for change in adapter.modules if isinstance(change, ParameterFactors)]
    factors = [(each.lora_A, each.lora_B) for each in sample(lora_factors(adapter.modules))]
    factors += [_first_expert(each) for each in stacks[:SAMPLED_MODULES]]
    votes = [_has_alike_halves(read_tensor(A).double(), read_tensor(B).double()) for A, B in factors]
    return sum(votes) * 2 > len(votes)


def _first_expert(factors: ParameterFactors) -> tuple[TensorRef, TensorRef]:
    """lora_A and lora_B of the first matrix of a stack, whose rank the config gives for one of its names at least."""
    rank = factors.scalings.rank_of(f"{factors.module}.{factors.candidates[0]}")
    experts = max(factors.lora_A.shape[0] // rank, 1)
    d_out, width = factors.lora_B.shape
    if experts * rank != width:
        return factors.lora_A, factors.lora_B
    own = factors.columns.of(factors.lora_B, experts).rows(0, 1).reshaped((d_out, rank))
    return factors.lora_A.rows(0, rank), own


def _has_alike_halves(right: Tensor, left: Tensor) -> bool:
    """Of a lora_A (r, d_in) and a lora_B (d_out, r)."""
    half, odd = divmod(right.shape[0], 2)
    if odd:
        return False
    cosines = [
        float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300))
        for x, y in ((right[:half], right[half:]), (left[:, :half], -left[:, half:]))
    ]
    return all(cosine > 0.3 for cosine in cosines)
