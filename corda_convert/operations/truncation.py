"""Perplexity against the number of discarded components (the CorDA paper's Figure 2), without writing a model."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from corda_convert.checkpoint.covariances import Covariances, at_run_time, read_covariances
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import dtype_name
from corda_convert.corpus.options import CorpusOptions
from corda_convert.errors import CordaConvertError, UnsupportedInput, raise_problems, some
from corda_convert.hub_reading import fetch, located
from corda_convert.operations.compared_methods import method_problems
from corda_convert.operations.computed import with_computed
from corda_convert.operations.contexts import Method
from corda_convert.operations.decomposition import DecomposeTransform, Names
from corda_convert.operations.options import resolve_device
from corda_convert.operations.perplexity import PerplexityOptions, Text, build_model, perplexity_of, read_text
from corda_convert.operations.targets import (
    Selection,
    Target,
    choose_targets,
    context_problems,
    with_contexts,
)
from corda_convert.operations.window_losses import Losses, window_losses
from corda_convert.plan.model import Produced
from corda_convert.version import __version__

if TYPE_CHECKING:
    import torch

FORMAT = "corda_convert.truncation"
FORMAT_VERSION = 1

DISCARDED = (16, 32, 64, 128, 256, 512, 1024)
"""The paper's numbers of components; those that every layer has more of are taken."""


@dataclass(frozen=True, slots=True)
class TruncationOptions:
    """What a sweep tries.

    Attributes:
        methods: what the components are those of.
        discarded: numbers of smallest components to discard in each layer; none for the paper's.
        damp, asvd_alpha: as in `DecomposeOptions`.
    """

    methods: Sequence[Method] = ("svd", "asvd", "corda", "svd-llm")
    discarded: Sequence[int] = ()
    damp: float | Literal["peft"] = 0.01
    asvd_alpha: float = 0.5


@dataclass(frozen=True, slots=True)
class Truncation:
    """A sweep: the JSON object, and warnings."""

    facts: Mapping[str, Any]
    warnings: tuple[str, ...] = ()


def truncation_sweep(
    model: Path | str,
    corpus: CorpusOptions,
    *,
    covariances: Path | None = None,
    options: TruncationOptions = TruncationOptions(),
    measuring: PerplexityOptions = PerplexityOptions(),  # noqa: B008 - frozen
) -> Truncation:
    """The perplexity of the model, and of it without each number of components of each method.

    Every Linear layer but the head becomes `W − U Uᵀ W`, U the left singular vectors of the smallest singular values of `W T`:
    what `decompose --truncate` writes. Each is computed when its block's turn comes, in every run anew. Raises every problem
    together, before anything is run.
    """
    started = time.monotonic()
    device = resolve_device(measuring.device)
    covariances = None if covariances is None else located(covariances, "covariance file")
    checkpoint = read_checkpoint(located(model, "model"))
    try:
        sweep, warnings = _plan(checkpoint, covariances, options)
        text = read_text(checkpoint.root, corpus, measuring, build_model(checkpoint, measuring).model.config)
        fetch([shard.path for shard in checkpoint.shards], progress=measuring.progress)
        points, whole = _measure(checkpoint, sweep, text, measuring, device)
    finally:
        checkpoint.close()
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": {"name": "corda-convert", "version": __version__},
        "model": checkpoint.name,
        "covariances": None if covariances is None else covariances.name,
        "damp": options.damp,
        "asvd_alpha": options.asvd_alpha,
        "layers": len(sweep.layers),
        **text.facts,
        "device": str(device),
        "whole": whole,
        "points": points,
        "seconds": round(time.monotonic() - started, 3),
    }
    return Truncation(facts, (*warnings, *text.warnings))


@dataclass(frozen=True, slots=True)
class _Sweep:
    """The layers by method with their contexts, and what is tried."""

    layers: Sequence[Target]
    weighed: Mapping[Method, Sequence[Target]]
    discarded: Sequence[int]
    options: TruncationOptions
    tokens: int | None

    def runs(self) -> list[tuple[Method, int]]:
        return [(method, count) for method in self.options.methods for count in self.discarded]

    def produced(self, method: Method, count: int, dtype: str) -> dict[str, Produced]:
        """The truncated weights, by name."""
        return {
            target.weight.name: Produced(
                replace(target.weight.spec, dtype=dtype), self._transform(target, method, count)
            )
            for target in self.weighed[method]
        }

    def _transform(self, target: Target, method: Method, count: int) -> DecomposeTransform:
        return DecomposeTransform(
            module_name=target.module_name,
            weight=target.weight,
            context=target.context,
            layout=target.layout,
            mode="kpm",
            method=method,
            rank=count,
            scaling=1.0,
            damp=self.options.damp,
            names=Names(residual=target.weight.name, lora_A=None, lora_B=None),
            asvd_alpha=self.options.asvd_alpha,
            tokens=self.tokens,
        )


def _plan(
    checkpoint: Checkpoint, covariances: Path | None, options: TruncationOptions
) -> tuple[_Sweep, tuple[str, ...]]:
    """What is run, and warnings. Raises every problem together."""
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    matrices = None if covariances is None else at_run_time(read_covariances(covariances), names)
    problems = method_problems(options.methods, matrices, options.damp, options.asvd_alpha)
    if odd := [count for count in options.discarded if count < 1]:
        problems.append(UnsupportedInput(f"{odd[0]} components cannot be discarded; 1 is the least."))
    raise_problems(problems)
    chosen = choose_targets(names, Selection(), for_peft=False)
    least = min(min(target.d_out, target.d_in) for target in chosen.targets)
    discarded = sorted(dict.fromkeys(options.discarded)) or [count for count in DISCARDED if count < least]
    if not discarded:
        problems.append(
            UnsupportedInput(
                f"The smallest layer has {least} components, fewer than the paper discards at least.",
                next_step="Say how many: --discard 2 --discard 4",
            )
        )
    problems += [
        UnsupportedInput(
            f"--discard {count} leaves nothing of the smallest layer, which has {least} components.",
            next_step="Choose a smaller number.",
        )
        for count in discarded
        if count >= least
    ]
    weighed = _weighed(chosen.targets, matrices, options.methods, problems)
    raise_problems([*chosen.problems, *problems])
    tokens = None if matrices is None else matrices.count("tokens")
    left = [*chosen.left_out, *chosen.other_stacks]
    warnings = (f"{len(left)} layers stay whole: {some(left)}.",) if left else ()
    return _Sweep(chosen.targets, weighed, discarded, options, tokens), warnings


def _weighed(
    targets: Sequence[Target],
    matrices: Covariances | None,
    methods: Sequence[Method],
    problems: list[CordaConvertError],
) -> dict[Method, Sequence[Target]]:
    weighed: dict[Method, Sequence[Target]] = {}
    for method in methods:
        if method == "svd" or matrices is None:
            weighed[method] = targets
        else:
            weighed[method] = with_contexts(targets, matrices, method)
            problems += context_problems(weighed[method], method)
    return weighed


def _measure(
    checkpoint: Checkpoint, sweep: _Sweep, text: Text, measuring: PerplexityOptions, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A point for each run, and the whole model's."""
    from tqdm import tqdm

    dtype = dtype_name(build_model(checkpoint, measuring).dtype)

    def described(produced: Mapping[str, Produced]) -> dict[str, Any]:
        architecture = build_model(with_computed(checkpoint, produced, device), measuring)
        return _described(
            window_losses(
                architecture,
                text.windows,
                device=device,
                batch_tokens=measuring.batch_tokens,
                offload=measuring.offload,
                whole_model=measuring.whole_model,
            )
        )

    points = []
    runs = sweep.runs()
    with tqdm(
        total=len(runs) + 1, unit=" models", disable=None if measuring.progress else True, file=sys.stderr, leave=False
    ) as bar:
        whole = described({})
        bar.update()
        for method, count in runs:
            found = described(sweep.produced(method, count, dtype))
            points.append({"method": method, "discarded": count, **found})
            bar.update()
    return points, whole


def _described(losses: Losses) -> dict[str, Any]:
    value = perplexity_of(losses)
    return {"perplexity": value if math.isfinite(value) else None, "loss": losses.mean, "tokens": losses.tokens}
