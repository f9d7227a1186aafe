"""`plot spectrum`: singular values of weighted layers, and which of them an adapter would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from corda_convert.checkpoint.covariances import Covariances, at_run_time, read_covariances
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.errors import CordaConvertError, NotFinite, UnsupportedInput, raise_problems
from corda_convert.hub_reading import fetch, located
from corda_convert.operations.compared_methods import method_problems
from corda_convert.operations.contexts import ContextMethod, Method
from corda_convert.operations.options import resolve_device
from corda_convert.operations.plot_covs import matching, middle_layers
from corda_convert.operations.targets import (
    Selection,
    Target,
    choose_targets,
    context_problems,
    with_contexts,
)
from corda_convert.plotting.pictures import check_outputs, check_size, save
from corda_convert.plotting.spectra import Cut, Spectrum, layout_of, spectra_figure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.threads import Team

MOST_BY_DEFAULT = 9


@dataclass(frozen=True, slots=True)
class SpectrumOptions:
    """What `plot_spectrum` draws.

    Attributes:
        methods: what the weight is multiplied with; several are compared.
        layers: paths of modules, ends of them, or regular expressions for the whole path; none for the middle decoder layer.
        mode, rank: which values an adapter would take; None to mark nothing.
        damp, asvd_alpha: as in `DecomposeOptions`.
        device: where the singular values are computed.
    """

    methods: Sequence[Method] = ("corda",)
    layers: Sequence[str] = ()
    mode: Literal["ipm", "kpm"] | None = None
    rank: int | None = None
    damp: float | Literal["peft"] = 0.01
    asvd_alpha: float = 0.5
    device: str = "auto"


def plot_spectrum(
    model: Path,
    *,
    outputs: Sequence[Path],
    covariances: Path | None = None,
    options: SpectrumOptions = SpectrumOptions(),
    overwrite: bool = False,
) -> tuple[Spectrum, ...]:
    """Draws all singular values of `W T` for chosen layers, T each method's own, and returns them.

    They are those of a float64 SVD. Raises a `CordaConvertError`; then nothing was written.
    """
    check_outputs(outputs, overwrite=overwrite)
    device = resolve_device(options.device)
    covariances = None if covariances is None else located(covariances, "covariance file")
    checkpoint = read_checkpoint(located(model, "model"))
    names = NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    matrices = None if covariances is None else at_run_time(read_covariances(covariances), names)
    try:
        by_method = _targets(names, matrices, options)
        check_size(*layout_of(len(by_method))[2:])
        fetch([shard.path for shard in checkpoint.shards], progress=False)
        spectra = [_spectrum(targets, matrices, options, device) for targets in by_method]
        cut = None if options.mode is None or options.rank is None else Cut(options.rank, options.mode)
        save(spectra_figure(spectra, cut), outputs)
    finally:
        for opened in (checkpoint, matrices):
            if opened is not None:
                opened.close()
    return tuple(spectra)


def _targets(names: NameMap, matrices: Covariances | None, options: SpectrumOptions) -> list[dict[Method, Target]]:
    """For each layer its target with each method's context. Raises every problem together."""
    problems = _option_problems(matrices, options)
    raise_problems(problems)
    targets = choose_targets(names, Selection(), for_peft=False).targets
    modules = [target.module_name for target in targets]
    chosen = matching(modules, options.layers) if options.layers else middle_layers(modules, MOST_BY_DEFAULT)
    found = {target.module_name: target for target in targets}
    chosen = tuple(sorted(chosen, key=_by_block))
    layers = [found[module] for module in chosen]
    if options.rank is not None:
        problems += [
            UnsupportedInput(
                f"--rank {options.rank} is above what {target.module_name} has: its weight is "
                f"({target.d_out}, {target.d_in}), {min(target.d_out, target.d_in)} components.",
                next_step="Choose a smaller --rank, or other layers with --layer.",
            )
            for target in layers
            if options.rank > min(target.d_out, target.d_in)
        ]
    weighed: dict[Method, tuple[Target, ...]] = {}
    for method in options.methods:
        if method == "svd" or matrices is None:
            weighed[method] = tuple(layers)
        else:
            weighed[method] = with_contexts(layers, matrices, method)
            problems += context_problems(weighed[method], method)
    raise_problems(problems)
    return [{method: weighed[method][place] for method in options.methods} for place in range(len(layers))]


def _by_block(module_name: str) -> list[tuple[int, str]]:
    """Orders modules by name, numbers in them as numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in module_name.split(".")]


def _option_problems(matrices: Covariances | None, options: SpectrumOptions) -> list[CordaConvertError]:
    problems = method_problems(options.methods, matrices, options.damp, options.asvd_alpha)
    if (options.mode is None) != (options.rank is None):
        problems.append(
            UnsupportedInput("--mode and --rank say together which values are taken.", next_step="Give both, or none.")
        )
    return problems


def _spectrum(
    targets: dict[Method, Target], matrices: Covariances | None, options: SpectrumOptions, device: torch.device
) -> Spectrum:
    from corda_convert.linalg.threads import Team

    tokens = None if matrices is None else matrices.count("tokens")
    values: dict[str, list[float]] = {}
    with Team(device) as team:
        for method, target in targets.items():
            weighing = ContextMethod(method, options.damp, options.asvd_alpha, tokens)
            values[method] = _singular_values(team, target, weighing, device).tolist()
    first = next(iter(targets.values()))
    return Spectrum(first.module_name, (first.d_out, first.d_in), values)


def _singular_values(team: Team, target: Target, weighing: ContextMethod, device: torch.device) -> Tensor:
    """All singular values of `W T`, float64, largest first. Raises `NotFinite` or `CovarianceMismatch`."""
    import torch

    from corda_convert.linalg.finite import is_finite

    stored = read_tensor(target.weight).to(device)
    if not is_finite(stored):
        raise NotFinite(f"{target.weight.name} in {target.weight.file.path} holds NaN or Inf.")
    weight = (stored.T if target.layout == "in_out" else stored).double()
    matrix = weight.T.contiguous()
    if target.context is not None:
        context = read_tensor(target.context).to(device)
        weighed = weighing.weigh(team, context, target.context, target.module_name)
        matrix = weighed.weighting.transposed_times(team, matrix)
    values: Tensor = torch.linalg.svdvals(matrix)
    return values
