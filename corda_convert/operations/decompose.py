"""`decompose`: a checkpoint and covariances → a residual checkpoint and the initial adapter that PEFT trains beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.covariances import Covariances, at_run_time, read_covariances
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.errors import CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.hub_reading import fetch, located
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
from corda_convert.operations.experts_targets import (
    StackTarget,
    by_module,
    expert_transform,
    expert_uses,
    find_stack,
    stack_context_problems,
    stack_rank_problems,
    with_stack_contexts,
)
from corda_convert.operations.options import Outcome, RunOptions
from corda_convert.operations.peft_cache import check_cache_path, write_cache
from corda_convert.operations.production import Input, Production, input_paths, produce
from corda_convert.operations.rank_budget import choose_ranks, plan_first_pass, rank_bounds
from corda_convert.operations.streaming import streamed_paths
from corda_convert.operations.targets import (
    Chosen,
    Selection,
    Target,
    choose_targets,
    context_problems,
    rank_problems,
    with_contexts,
)
from corda_convert.output.summary import size

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
    covariances = None if covariances is None else located(covariances, "covariance file")
    checkpoint = read_checkpoint(located(model, "model"))
    split = split_of(options)
    raise_problems(option_problems(options, split, checkpoint, covariances, run))
    matrices = None if covariances is None else read_covariances(Path(covariances))
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    matrices = None if matrices is None else at_run_time(matrices, names)
    targets, stacks, warnings = _targets(names, options, split, matrices)
    work = _Work(names, matrices, options, run, Path(output), stacks)
    load_solvers()
    if options.rank_budget is None:
        outcome = produce(work.production(targets, split, warnings), run)
    else:
        outcome = _spend(work, targets, split, warnings)
    if options.write_cache is not None and not run.dry_run and run.ranks.place.rank == 0:
        write_cache(
            Path(options.write_cache), outcome.output / INITIAL_ADAPTER_FOLDER if options.residual else outcome.output
        )
    return outcome


@dataclass(frozen=True, slots=True)
class _Work:
    """A run as it was asked for, with the model and the covariances that it is about, and the experts that it takes."""

    names: NameMap
    matrices: Covariances | None
    options: DecomposeOptions
    run: RunOptions
    output: Path
    stacks: tuple[StackTarget, ...] = ()

    def production(
        self, targets: Sequence[Target], split: Split, warnings: tuple[str, ...], **facts: Any
    ) -> Production:
        """What the run writes with these ranks. `facts` are further ones for the receipt."""
        checkpoint = self.names.checkpoint
        shared = self._shared(targets)
        transforms = self._transforms(targets, split, shared)
        experts = [expert_transform(stacks, self.options, split, shared) for stacks in by_module(self.stacks)]
        writing = plan_writing(self.names, targets, transforms, self.options, split, self.run, self.output, experts)
        return Production(
            command="decompose",
            options=describe_options(checkpoint, self.matrices, self.options, split, self.run),
            output=self.output,
            inputs=_inputs(checkpoint, self.matrices),
            files=writing.files,
            side_files=writing.side_files,
            index_metadata=writing.index_metadata,
            left_behind=writing.left_behind,
            facts={"covariances": None if self.matrices is None else _describe(self.matrices), **facts},
            warnings=warnings,
            card=writing.card,
        )

    def transforms(self, targets: Sequence[Target], split: Split) -> dict[str, DecomposeTransform]:
        """By the weights' names on disk."""
        return self._transforms(targets, split, self._shared(targets))

    def _transforms(
        self, targets: Sequence[Target], split: Split, shared: SharedContexts
    ) -> dict[str, DecomposeTransform]:
        return {target.weight.name: _transform(target, self.options, split, shared) for target in targets}

    def _shared(self, targets: Sequence[Target]) -> SharedContexts:
        """The contexts of all that is decomposed, in the order of computation."""
        options, order = self.options, {name: place for place, name in enumerate(self.names.checkpoint.tensors)}
        uses = [
            (order[target.weight.name], [(target.module_name, target.context)])
            for target in targets
            if target.context is not None
        ]
        uses += [(min(each.place for each in stacks), expert_uses(stacks)) for stacks in by_module(self.stacks)]
        uses.sort(key=lambda each: each[0])
        tokens = None if self.matrices is None else self.matrices.count("tokens")
        own_tokens = {} if self.matrices is None else self.matrices.tokens_by_tensor()
        method = ContextMethod(options.method, options.damp, options.asvd_alpha, tokens, own_tokens)
        return SharedContexts([use for _, several in uses for use in several], method)


def _spend(work: _Work, targets: Sequence[Target], split: Split, warnings: tuple[str, ...]) -> Outcome:
    """A first pass chooses the ranks, the second one is the decomposition with them.

    What can be refused without the ranks is refused before the first pass; a dry run makes none, and plans as if all ranks
    were equal.
    """
    bounds = rank_bounds(targets, work.options)

    def ranked(ranks: Mapping[str, int]) -> Split:
        return replace(split, ranks=replace(split.ranks, rank=max(bounds.uniform, 1), chosen=ranks))

    widest = ranked({target.module_name: bounds.most_of(target) for target in targets})
    first = plan_first_pass(
        [
            replace(transform, names=Names(None, None, None, singular_values=transform.module_name))
            for transform in work.transforms(targets, widest).values()
        ],
        work.run,
    )
    uniform = ranked({target.module_name: bounds.uniform_of(target) for target in targets})
    note = f"Planned as if all ranks were equal; the first pass, which chooses them, needs {size(first.memory_bytes)} at most."
    planned = work.production(targets, uniform, (*warnings, note), rank_budget=bounds.receipt(split.mode))
    outcome = produce(planned, replace(work.run, dry_run=True))
    if work.run.dry_run:
        return outcome
    if work.run.stream and streamed_paths(planned.inputs):
        raise UnsupportedInput(
            "--stream does not go with --rank-budget, which reads the model twice.",
            next_step="Leave out --stream, or choose ranks with --rank and --rank-pattern.",
        )
    fetch(input_paths(planned), progress=work.run.progress)
    choice = choose_ranks(targets, first.shares(split.mode), bounds, split.mode)
    ranked_targets = [target for target in targets if target.module_name in choice.ranks]
    notes = (*warnings, *choice.warnings)
    return produce(work.production(ranked_targets, ranked(choice.ranks), notes, rank_budget=choice.facts), work.run)


def _targets(
    names: NameMap, options: DecomposeOptions, split: Split, matrices: Covariances | None
) -> tuple[Sequence[Target], tuple[StackTarget, ...], tuple[str, ...]]:
    """The targets with their contexts, and warnings. Raises every problem together."""
    chosen = choose_targets(names, Selection(options.targets, options.excluded), for_peft=not split.is_dropped)
    targets = chosen.targets
    found = [find_stack(names, name) for name in chosen.stacks]
    stacks = tuple(stack for stack in found if isinstance(stack, StackTarget))
    problems: list[CordaConvertError] = [*chosen.problems, *_stack_problems(chosen.stacks, options)]
    problems += [problem for problem in found if isinstance(problem, CordaConvertError)]
    adapted = [*(target.module_name for target in targets), *(stack.name for stack in stacks)]
    ranks = {name: split.ranks.rank_of(name) for name in adapted}
    problems += rank_problems(targets, ranks, is_truncated=split.is_dropped)
    problems += stack_rank_problems(stacks, ranks, is_truncated=split.is_dropped)
    problems += split.ranks.unused_patterns(adapted)
    if matrices is not None:
        targets = with_contexts(targets, matrices, options.method)
        stacks = with_stack_contexts(stacks, matrices, options.method)
        problems += context_problems(targets, options.method)
        problems += stack_context_problems(stacks, options.method)
    raise_problems(problems)
    return targets, stacks, _warnings(chosen)


def _stack_problems(stacks: Sequence[str], options: DecomposeOptions) -> list[CordaConvertError]:
    """What cannot be done with experts."""
    refused = {
        "--rank-budget spreads over Linear layers only": options.rank_budget is not None,
        "PEFT's cache file (--write-cache) is for Linear layers only": options.write_cache is not None,
    }
    return [
        UnsupportedInput(
            f"{what}, and {some(stacks)} hold matrices of experts.", next_step="Choose others with --target."
        )
        for what, is_asked in refused.items()
        if is_asked and stacks
    ]


def _warnings(chosen: Chosen) -> tuple[str, ...]:
    warnings: list[str] = []
    if chosen.left_out:
        warnings.append(
            f"{len(chosen.left_out)} Linear layers stay as they are, since their weights are not on disk as tensors of their "
            f"own, or PEFT could not find them: {some(chosen.left_out)}. --target says of each what it is."
        )
    if chosen.other_stacks:
        ends = dict.fromkeys(".".join(name.split(".")[-2:]) for name in chosen.other_stacks)
        warnings.append(
            f"The experts' matrices in {len(chosen.other_stacks)} parameters stay as they are: {some(chosen.other_stacks)}. As "
            f"in PEFT, they are no Linear layers; choose them with --target {' --target '.join(ends)}."
        )
    return tuple(warnings)


def _transform(target: Target, options: DecomposeOptions, split: Split, shared: SharedContexts) -> DecomposeTransform:
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
