"""`corda-convert plot`: pictures of covariances, spectra and truncation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from corda_convert.cli.parameters import Damp

_Command = TypeVar("_Command", bound=Callable[..., Any])

_METHODS = click.Choice(["corda", "svd", "asvd", "svd-llm"])


def picture_options(command: _Command) -> _Command:
    """The options that every picture has."""
    options = (
        click.option(
            "-o",
            "--output",
            "outputs",
            multiple=True,
            required=True,
            type=click.Path(path_type=Path),
            help="Picture to write: .png or .svg; repeatable.",
        ),
        click.option("--overwrite", is_flag=True, help="Replace pictures that are there."),
        click.option("-q", "--quiet", is_flag=True, help="Do not say what was drawn."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def method_options(command: _Command) -> _Command:
    """What several methods are compared by."""
    options = (
        click.option(
            "--damp", default=0.01, show_default=True, type=Damp(), help="Damping of corda's covariance, or peft."
        ),
        click.option("--asvd-alpha", default=0.5, show_default=True, help="Power of the mean absolute inputs in asvd."),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
    )
    for option in reversed(options):
        command = option(command)
    return command


_layers = click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NAME",
    help="Layer to draw: path, end of path, or regex for the path; repeatable. [default: those of the middle block]",
)


@click.group()
def plot() -> None:
    """Draw covariances, spectra, or perplexity against truncation.

    Needs matplotlib. The same numbers give the same bytes.

    \b
    Example:
      corda-convert plot covs fixtures/covariances/knowledge.safetensors fixtures/covariances/task.safetensors \\
        --layer layers.3.mlp.down_proj --layer layers.3.self_attn.o_proj -o covs.png
    """


@plot.command()
@click.argument("files", nargs=-1, required=True, metavar="COVS...", type=click.Path(path_type=Path))
@_layers
@click.option(
    "--cells", default=32, show_default=True, type=click.IntRange(min=1), help="Cells on each side of a heatmap."
)
@picture_options
def covs(
    files: tuple[Path, ...],
    layers: tuple[str, ...],
    cells: int,
    outputs: tuple[Path, ...],
    overwrite: bool,
    quiet: bool,
) -> None:
    """Covariances of chosen layers side by side, all on one scale.

    Each cell is the mean of |C| over its inputs, relative to the mean of C's diagonal, on a scale of logarithms: what files
    have in common, and which inputs stand out.

    \b
    Example:
      corda-convert plot covs fixtures/covariances/knowledge.safetensors fixtures/covariances/task.safetensors -o covs.png
    """
    from corda_convert.operations.plot_covs import plot_covs

    chosen = plot_covs(files, outputs=outputs, layers=layers, cells=cells, overwrite=overwrite)
    _say(f"{len(chosen)} layers of {len(files)} files", outputs, quiet=quiet)


@plot.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--cov", "covariances", type=click.Path(path_type=Path), help="Covariances, as for decompose.")
@click.option(
    "--method", "methods", multiple=True, default=("corda",), show_default=True, type=_METHODS, help="Repeatable."
)
@_layers
@click.option("--mode", type=click.Choice(["ipm", "kpm"]), help="With --rank: mark what decompose would take.")
@click.option("--rank", type=click.IntRange(min=1), help="With --mode: so many components.")
@method_options
@picture_options
def spectrum(
    model: Path, covariances: Path | None, outputs: tuple[Path, ...], overwrite: bool, quiet: bool, **options: Any
) -> None:
    """Singular values of chosen layers of MODEL times what a method knows of their inputs.

    All of them are computed, in float64: seconds for a layer of 4096 on a GPU, minutes on a CPU.

    \b
    Example:
      corda-convert plot spectrum fixtures/model --cov fixtures/covariances/knowledge.safetensors \\
        --mode kpm --rank 16 -o spectrum.png
    """
    from corda_convert.operations.plot_spectrum import SpectrumOptions, plot_spectrum

    methods = tuple(dict.fromkeys(options.pop("methods")))
    found = plot_spectrum(
        model,
        outputs=outputs,
        covariances=covariances,
        options=SpectrumOptions(methods=methods, **options),
        overwrite=overwrite,
    )
    _say(f"{len(found)} layers, {', '.join(methods)}", outputs, quiet=quiet)


def _say(what: str, outputs: tuple[Path, ...], *, quiet: bool) -> None:
    if not quiet:
        click.echo(f"{what}: {', '.join(map(str, outputs))}")
