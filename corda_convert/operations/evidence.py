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
from corda_convert.adapters.factors import Adapter, Layout
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef, read_rows, read_tensor
from corda_convert.errors import AdapterMismatch
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED_MODULES = 8
"""Modules that are read for a judgement: the smallest ones, so that it costs milliseconds."""

REPEATED_SHARE = 0.15
"""A median cosine above this between `s·B·A` and the weight's own part in B's column space tells a residual adapter. On
the fixtures, trained for 300 steps: 0.3 for the CorDA adapter on the base, 0.005 on its residual, −0.006 for plain LoRA."""

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


def sample(modules: Sequence[LoraFactors]) -> list[LoraFactors]:
    """A few small modules, by a fixed rule."""
    return sorted(modules, key=lambda factors: factors.lora_A.spec.nbytes + factors.lora_B.spec.nbytes)[
        :SAMPLED_MODULES
    ]


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
    found = {
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


def check_base_of_initial(initial: Adapter, weights: dict[str, tuple[TensorRef, Layout]], model: Checkpoint) -> None:
    """With `--init`, MODEL must be the base. Refuses one from which `s·B₀A₀` was already taken.

    For projection methods `s·B₀A₀ = Q Qᵀ W` on the base, while `Qᵀ W_res = 0`. Raises `AdapterMismatch`.
    """
    if initial_adapter_of(model.root) is not None:
        raise AdapterMismatch(
            f"{model.name} is a residual (it has its initial adapter with it), and --init is for merging into the base.",
            next_step="Leave out --init, or give the base model.",
        )
    shares = _shares(initial, weights)
    if shares and median(abs(share) for share in shares) < 0.05:
        raise AdapterMismatch(
            f"{model.name} is not the model that {initial.source.name} was taken from: the initial factors make up "
            f"{median(shares):.1%} of the weight in their own column space; on the base it is 100 %.",
            why="MODEL is the residual already, or another model.",
            next_step="Give the base model, or leave out --init if MODEL is the residual. If the initial factors are no "
            "projection of the weights (LoRA-GA), say --as-is.",
        )


def check_plain(adapter: Adapter, weights: dict[str, tuple[TensorRef, Layout]], model: Checkpoint) -> None:
    """Without `--init`: refuses a residual adapter on a model that is not its residual, and the reverse.

    Raises `AdapterMismatch` with what gave it away: the residual's initial adapter, the adapter's config, the place that
    its base name points to, or its numbers.
    """
    loras = lora_factors(adapter.modules)
    initial = initial_adapter_of(model.root)
    if initial is not None:
        return _check_on_residual(adapter, model, initial)
    if not loras:
        return None
    shares = _shares(adapter, weights)
    if shares and median(shares) > REPEATED_SHARE:
        raise _needs_initial(adapter, model, f"its B·A repeats {median(shares):.0%} of {model.name}'s own weight there")
    named = _local_folder(adapter.source.base_name)
    if named is not None and named != model.root.resolve() and initial_adapter_of(named) is not None:
        raise _needs_initial(adapter, model, f"its base_model_name_or_path {adapter.source.base_name} is a residual")
    if adapter.initialization == "residual":
        method = adapter.source.config.get("init_lora_weights")
        raise _needs_initial(adapter, model, f"its config says init_lora_weights={method!r}")
    if adapter.source.config.get("corda_config") and not _is_converted(loras):
        raise _needs_initial(
            adapter, model, "its config has a corda_config, and its factors are not a converted LoRA's"
        )
    return None


def _check_on_residual(adapter: Adapter, model: Checkpoint, folder: Path) -> None:
    from corda_convert.adapters import read_adapter

    initial = read_adapter(folder)
    mine = {factors.module_name for factors in lora_factors(adapter.modules)}
    theirs = {factors.module_name for factors in lora_factors(initial.modules)}
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
        next_step="Merge into the residual, or into the base with --init DIR (the corda_init folder). "
        "If you know that it belongs on this model as it is, say --as-is.",
    )


def _local_folder(name: str) -> Path | None:
    """The folder of that name, resolved, if there is one here. A config may name anything, a path or not."""
    try:
        return Path(name).resolve() if name and Path(name).is_dir() else None
    except (OSError, ValueError):
        return None


def _shares(adapter: Adapter, weights: dict[str, tuple[TensorRef, Layout]]) -> list[float]:
    from corda_convert.linalg import lora

    shares = []
    for factors in sample(lora_factors(adapter.modules)):
        if factors.module_name not in weights:
            continue  # it lies on disk in another form
        weight, layout = weights[factors.module_name]
        if weight.spec.dtype in COMPUTABLE_DTYPES:
            A, B = read_tensor(factors.lora_A), read_tensor(factors.lora_B)
            share = lora.projection_share(_projected(weight, layout, lora.column_space(B)), A, B)
            shares.append(share if factors.scaling >= 0 else -share)
    return shares


def _projected(weight: TensorRef, layout: Layout, basis: Tensor) -> Tensor:
    """`basisᵀ W` (r, d_in) in float64, reading the weight by blocks of rows, whatever its size."""
    import torch

    total = torch.zeros(basis.shape[1], weight.shape[1] if layout == "out_in" else 0, dtype=torch.float64)
    columns = []
    for begin, end in row_blocks(weight.shape):
        rows = read_rows(weight, begin, end).double()
        if layout == "out_in":
            total += basis[begin:end].T @ rows
        else:
            columns.append(basis.T @ rows.T)
    return total if layout == "out_in" else torch.cat(columns, dim=1)


def _is_converted(modules: Sequence[LoraFactors]) -> bool:
    """Whether the factors look like `[A; A₀]`, `[B | −B₀]`, PEFT's converted LoRA: two halves that are much alike."""
    votes = []
    for factors in sample(modules):
        A, B = read_tensor(factors.lora_A).double(), read_tensor(factors.lora_B).double()
        half, odd = divmod(factors.rank, 2)
        if odd:
            return False
        cosines = [
            float((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-300))
            for x, y in ((A[:half], A[half:]), (B[:, :half], -B[:, half:]))
        ]
        votes.append(all(cosine > 0.3 for cosine in cosines))
    return sum(votes) * 2 > len(votes)
