"""`plot covs`: covariances of chosen layers side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.checkpoint.covariances import Covariances, read_covariances
from corda_convert.checkpoint.tensors import TensorRef, read_tensor
from corda_convert.errors import (
    CordaConvertError,
    CovarianceMismatch,
    NotFinite,
    UnsupportedInput,
    raise_problems,
    some,
)
from corda_convert.hub_reading import located
from corda_convert.plotting.heatmaps import Heatmap, covariances_figure
from corda_convert.plotting.pictures import check_outputs, save

if TYPE_CHECKING:
    from torch import Tensor

CELLS = 32
"""Cells on each side, as in the paper."""

MOST_BY_DEFAULT = 4


def plot_covs(
    paths: Sequence[Path],
    *,
    outputs: Sequence[Path],
    layers: Sequence[str] = (),
    cells: int = CELLS,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Draws a heatmap of each file's covariance of each layer, all on one scale. Returns the layers' names.

    `layers` are paths of modules, ends of them, or regular expressions for the whole path; none for the inputs of the middle
    decoder layer. A covariance is drawn as `cells` × `cells` means of absolute values, relative to its mean diagonal, so that
    different amounts of text compare. Raises a `CordaConvertError`; then nothing was written.
    """
    check_outputs(outputs, overwrite=overwrite)
    files = [read_covariances(located(path, "covariance file")) for path in paths]
    try:
        chosen = _choose(files, layers)
        rows = [(layer, [_heatmap(file, layer, cells) for file in files]) for layer in chosen]
    finally:
        for file in files:
            file.close()
    save(covariances_figure(rows, _column_names(paths)), outputs)
    return chosen


def matching(modules: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The modules that the names mean: whole paths, ends of paths, or else regular expressions.

    Raises `UnsupportedInput`, for all names that mean none.
    """
    found: dict[str, None] = {}
    problems: list[CordaConvertError] = []
    for name in names:
        matched = [module for module in modules if module == name or module.endswith(f".{name}")]
        if not matched:
            try:
                matched = [module for module in modules if re.fullmatch(name, module)]
            except re.error:
                matched = []
        if not matched:
            ends = sorted({module.rpartition(".")[2] for module in modules})
            problems.append(
                UnsupportedInput(
                    f"--layer {name!r} matches no layer.", next_step=f"The layers end in: {some(ends, 12)}."
                )
            )
        found.update(dict.fromkeys(matched))
    raise_problems(problems)
    return tuple(found)


def middle_layers(modules: Sequence[str], most: int) -> tuple[str, ...]:
    """Those of the middle decoder layer, `most` at most; the first ones of a model without numbers in its names."""
    numbers = [[int(part) for part in module.split(".") if part.isdigit()][:1] for module in modules]
    known = sorted({number[0] for number in numbers if number})
    if not known:
        return tuple(modules[:most])
    middle = known[len(known) // 2]
    return tuple(module for module, number in zip(modules, numbers, strict=True) if number == [middle])[:most]


def _choose(files: Sequence[Covariances], layers: Sequence[str]) -> tuple[str, ...]:
    """The layers to draw. Raises `CovarianceMismatch` where a file lacks one that was named, or nothing is common."""
    common = [module for module in files[0].matrices if all(file.find(module) is not None for file in files)]
    if not layers:
        if not common:
            raise CovarianceMismatch(
                f"{some(str(file.path) for file in files)} have no covariance in common.",
                next_step="Give files of the same model, or of covariances rather than mean absolute inputs.",
            )
        return middle_layers(common, MOST_BY_DEFAULT)
    known = dict.fromkeys(module for file in files for module in (*file.matrices, *file.aliases))
    chosen = matching(list(known), layers)
    raise_problems(
        CovarianceMismatch(f"{file.path} has no covariance of {layer}.", next_step="Leave the file or the layer out.")
        for layer in chosen
        for file in files
        if file.find(layer) is None
    )
    return chosen


def _heatmap(file: Covariances, layer: str, cells: int) -> Heatmap:
    ref = file.find(layer)
    if ref is None:
        raise CovarianceMismatch(f"{file.path} has no covariance of {layer}.")
    return Heatmap(_cells(read_tensor(ref), ref, cells).tolist(), ref.shape[0])


def _cells(covariance: Tensor, ref: TensorRef, cells: int) -> Tensor:
    """Means of |C| over cells, (n, n) with n at most `cells`, relative to the mean of the diagonal.

    Raises `NotFinite`, or `CovarianceMismatch` for a covariance that is zero.
    """
    import torch

    mean = float(covariance.diagonal().double().mean())
    count = min(cells, covariance.shape[0])
    pooled = torch.nn.functional.adaptive_avg_pool2d(covariance.float().abs()[None], count)[0].double() / abs(
        mean or 1.0
    )
    if not bool(pooled.isfinite().all()):
        raise NotFinite(f"{ref.name} in {ref.file.path} holds NaN or Inf.")
    if mean <= 0.0:
        raise CovarianceMismatch(f"{ref.name} in {ref.file.path} is zero: no sample reached this layer.")
    return pooled


def _column_names(paths: Sequence[Path]) -> list[str]:
    """The files' names without their endings where that tells them apart, else their paths."""
    stems = [path.stem if path.is_file() else path.name for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]
