"""`corda-convert plot`: pictures of covariances, spectra and truncation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from corda_convert.cli.corpus import corpus_from, text_options
from corda_convert.cli.parameters import Damp, InputPath

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
@click.argument("files", nargs=-1, required=True, metavar="COVS...", type=InputPath())
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
    _say(f"{_counted(len(chosen), 'layer')} of {_counted(len(files), 'file')}", outputs, quiet=quiet)


@plot.command()
@click.argument("model", type=InputPath())
@click.option("--cov", "covariances", type=InputPath(), help="Covariances, as for decompose.")
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
    _say(f"{_counted(len(found), 'layer')}, {', '.join(methods)}", outputs, quiet=quiet)


@plot.command()
@click.argument("model", required=False, type=InputPath())
@click.option("--cov", "covariances", type=InputPath(), help="Covariances, as for decompose.")
@text_options
@click.option("--no-pack", is_flag=True, help="As for perplexity.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("svd", "asvd", "corda", "svd-llm"),
    show_default=True,
    type=_METHODS,
    help="Repeatable.",
)
@click.option(
    "--discard",
    "discarded",
    multiple=True,
    type=click.IntRange(min=1),
    metavar="R",
    help="Discard the R smallest components of each layer; repeatable. [default: 16, 32, … 1024, as far as layers have more]",
)
@click.option("--window", type=click.IntRange(min=2), help="As for perplexity.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="As for perplexity.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="As for perplexity.")
@click.option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Draw what --json printed, here or of perplexity, instead of measuring; repeatable, a panel for each text.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was measured as one JSON object on stdout.")
@method_options
@picture_options
def truncation(
    model: Path | None,
    covariances: Path | None,
    results: tuple[Path, ...],
    outputs: tuple[Path, ...],
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity against discarded components, as in the CorDA paper's Figure 2.

    Measures MODEL as it is, and once for each method and number of components; no model is written. Or draws results.

    \b
    Example:
      corda-convert plot truncation fixtures/model --cov fixtures/covariances/knowledge.safetensors \\
        --data fixtures/data/knowledge.txt --no-pack --discard 8 --discard 16 -o truncation.png
    """
    from corda_convert.operations.plot_truncation import plot_truncation, read_results
    from corda_convert.plotting.pictures import check_outputs

    if model is None and not results:
        raise click.UsageError("Give a MODEL to measure, or --results.")
    if model is not None and results:
        raise click.UsageError("--results are drawn instead of measuring a MODEL; give one of the two.")
    context = click.get_current_context()
    if results and (
        measuring := [
            parameter.opts[-1]
            for parameter in context.command.params
            if parameter.name in options and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
        ]
    ):
        raise click.UsageError(f"{', '.join(measuring)} is for measuring a MODEL, not for --results.")
    check_outputs(outputs, overwrite=overwrite)
    found: list[Any] = list(read_results(results))
    if model is not None:
        found = [_swept(model, covariances, options, progress=not quiet)]
    if as_json:
        click.echo(json.dumps(found if len(found) > 1 else found[0], indent=1, ensure_ascii=False))
    plot_truncation(found, outputs=outputs)
    if not as_json:
        _say(_counted(len(found), "result"), outputs, quiet=quiet)


def _swept(model: Path, covariances: Path | None, options: dict[str, Any], *, progress: bool) -> Any:
    """What a sweep measures; warnings are printed."""
    from corda_convert.operations.perplexity import PerplexityOptions
    from corda_convert.operations.truncation import TruncationOptions, truncation_sweep

    swept = truncation_sweep(
        model,
        corpus_from({**options, "pack": False if options["no_pack"] else None}),
        covariances=covariances,
        options=TruncationOptions(options["methods"], options["discarded"], options["damp"], options["asvd_alpha"]),
        measuring=PerplexityOptions(
            window=options["window"],
            max_tokens=options["max_tokens"],
            device=options["device"],
            dtype=options["dtype"],
            progress=progress,
        ),
    )
    for warning in swept.warnings:
        click.echo(f"Note: {warning}", err=True)
    return swept.facts


def _say(what: str, outputs: tuple[Path, ...], *, quiet: bool) -> None:
    if not quiet:
        click.echo(f"{what}: {', '.join(map(str, outputs))}")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
