"""`decompose`: a checkpoint and covariances → a residual checkpoint and the initial adapter that PEFT trains beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.covariances import Covariances, at_run_time, read_covariances
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.errors import CordaConvertError, raise_problems, some
from corda_convert.operations.contexts import ContextMethod, SharedContexts
from corda_convert.operations.decompose_options import (
    DecomposeOptions,
    Split,
    describe_options,
    option_problems,
    split_of,
)
from corda_convert.operations.decompose_output import plan_writing
from corda_convert.operations.decomposition import DecomposeTransform, Names
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.peft_cache import check_cache_path, write_cache
from corda_convert.operations.production import Input, Production, produce
from corda_convert.operations.targets import (
    Selection,
    Target,
    choose_targets,
    context_problems,
    rank_problems,
    with_contexts,
)

__all__ = ["DecomposeOptions", "decompose"]


def decompose(
    model: Path | str,
    *,
    output: Path | str,
    options: DecomposeOptions,
    covariances: Path | str | None = None,
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
) -> Outcome:
    """Writes `W − s·B·A` for every target, and A, B as a PEFT adapter in `output/corda_init`.

    `s·B·A = U Uᵀ W`, with U the `rank` left singular vectors of `W T` at the end that the mode says, T the method's (CorDA,
    §3). With `truncate` the adapter is not written, without `residual` it is all that is written.
    Raises a `CordaConvertError`; then nothing was written.
    """
    from corda_convert.linalg.subspace import load_solvers

    if options.write_cache is not None:
        check_cache_path(Path(options.write_cache), Path(output), overwrite=run.overwrite)
    checkpoint = read_checkpoint(Path(model))
    split = split_of(options)
    raise_problems(option_problems(options, split, checkpoint, covariances, run))
    matrices = None if covariances is None else read_covariances(Path(covariances))
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    matrices = None if matrices is None else at_run_time(matrices, names)
    targets, warnings = _targets(names, options, split, matrices)
    shared = _shared(targets, options, matrices)
    transforms = {target.weight.name: _transform(target, options, split, shared) for target in targets}
    writing = plan_writing(names, targets, transforms, options, split, run, output)
    production = Production(
        command="decompose",
        options=describe_options(checkpoint, matrices, options, split, run),
        output=Path(output),
        inputs=_inputs(checkpoint, matrices),
        files=writing.files,
        side_files=writing.side_files,
        index_metadata=writing.index_metadata,
        left_behind=writing.left_behind,
        facts={"covariances": None if matrices is None else _describe(matrices)},
        warnings=warnings,
        card=writing.card,
    )
    load_solvers()
    outcome = produce(production, run)
    if options.write_cache is not None and not run.dry_run:
        write_cache(
            Path(options.write_cache), outcome.output / INITIAL_ADAPTER_FOLDER if options.residual else outcome.output
        )
    return outcome


def _targets(
    names: NameMap, options: DecomposeOptions, split: Split, matrices: Covariances | None
) -> tuple[Sequence[Target], tuple[str, ...]]:
    """The targets with their contexts, and warnings. Raises every problem together."""
    chosen = choose_targets(names, Selection(options.targets, options.excluded), for_peft=not split.is_dropped)
    targets = chosen.targets
    problems: list[CordaConvertError] = [*chosen.problems]
    ranks = {target.module_name: split.ranks.rank_of(target.module_name) for target in targets}
    problems += rank_problems(targets, ranks, is_truncated=split.is_dropped)
    problems += split.ranks.unused_patterns(list(ranks))
    if matrices is not None:
        targets = with_contexts(targets, matrices, options.method)
        problems += context_problems(targets, options.method)
    raise_problems(problems)
    if not chosen.left_out:
        return targets, ()
    return targets, (
        f"{len(chosen.left_out)} Linear layers stay as they are, since their weights are not on disk as tensors of their "
        f"own, or PEFT could not find them: {some(chosen.left_out)}. --target says of each what it is.",
    )


def _shared(targets: Sequence[Target], options: DecomposeOptions, matrices: Covariances | None) -> SharedContexts:
    """The contexts of the targets, which are computed in this order."""
    tokens = None if matrices is None else matrices.count("tokens")
    uses = [(target.module_name, target.context) for target in targets if target.context is not None]
    return SharedContexts(uses, ContextMethod(options.method, options.damp, options.asvd_alpha, tokens))


def _transform(
    target: Target, options: DecomposeOptions, split: Split, shared: SharedContexts | None = None
) -> DecomposeTransform:
    prefix = f"{PEFT_PREFIX}{target.module_name}"
    return DecomposeTransform(
        module_name=target.module_name,
        weight=target.weight,
        context=target.context,
        layout=target.layout,
        mode=split.mode,
        method=options.method,
        rank=split.ranks.rank_of(target.module_name),
        scaling=split.ranks.scaling_of(target.module_name),
        damp=options.damp,
        names=Names(
            residual=target.weight.name if options.residual else None,
            lora_A=None if split.is_dropped else f"{prefix}.lora_A.weight",
            lora_B=None if split.is_dropped else f"{prefix}.lora_B.weight",
        ),
        solver=options.solver,
        asvd_alpha=options.asvd_alpha,
        shared=shared,
    )


def _inputs(checkpoint: Checkpoint, matrices: Covariances | None) -> tuple[Input, ...]:
    model = Input("model", checkpoint.root, checkpoint.shards)
    return (model,) if matrices is None else (model, Input("covariances", matrices.path, matrices.files))


def _describe(matrices: Covariances) -> dict[str, Any]:
    known = {key: matrices.metadata.get(key) for key in ("samples", "tokens", "normalization", "model", "data")}
    for key in ("model", "data"):  # a receipt holds no absolute path
        value = known[key]
        known[key] = Path(value).name if value is not None and Path(value).is_absolute() else value
    return {"matrices": len(matrices.matrices), **known}
