"""`corda-convert collect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corda_convert.cli.corpus import corpus_from, sample_options, text_options
from corda_convert.cli.parameters import InputPath, Size
from corda_convert.cli.reporting import check_paths, ranks

if TYPE_CHECKING:
    from corda_convert.operations.collect import Collected


@click.command()
@click.argument("model", required=False, type=InputPath())
@text_options
@sample_options
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A file, if it ends in .safetensors; else a folder with an index.",
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="Module whose inputs are collected, as decompose takes them; repeatable. [default: every Linear but lm_head]",
)
@click.option("--exclude", "excluded", multiple=True, metavar="NAME", help="Module to leave out; as --target.")
@click.option(
    "--normalize",
    "normalization",
    default="peft",
    show_default=True,
    type=click.Choice(["peft", "none"]),
    help="peft: each sample divided by its largest entry, the sum by their number. none: the sum as it is.",
)
@click.option(
    "--experts",
    default="shared",
    show_default=True,
    type=click.Choice(["shared", "each"]),
    help="One covariance for all experts of a layer (named with --target), or one for each.",
)
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "float64"]),
    help="Of the products; their sums are float64 anyway.",
)
@click.option("--batch-tokens", default=8192, show_default=True, help="Tokens run at a time; one sample at least.")
@click.option(
    "--offload",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep hidden states in this folder, not in memory.",
)
@click.option("--whole-model", is_flag=True, help="Load all of the model, where its blocks cannot be run one by one.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that the model brings along.")
@click.option(
    "--from-peft",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Run nothing: turn PEFT's covariance_file, or the CorDA authors' cache, into this format.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, type=Size(), help="Of a file, in a folder.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the model computes in. [default: the checkpoint's own]",
)
@click.option("--dry-run", is_flag=True, help="Plan and check everything; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace covariances that corda-convert made.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no summary.")
def collect(model: Path | None, **options: Any) -> None:
    """Collect the covariances of MODEL's layer inputs on a text, for decompose.

    Only one block of the model is loaded at a time; what stands between two blocks waits in memory. Each distinct input is
    stored once. An interrupted run is gone on with by the same command.

    \b
    Example:
      corda-convert collect fixtures/model --data fixtures/data/task.jsonl --field question --field answer \\
        --no-pack --samples 64 -o covs.safetensors

    \b
    PEFT's covariance_file, without running anything:
      corda-convert collect --from-peft fixtures/covariances/task.peft.pt -o task.safetensors
    """
    if options["from_peft"] is not None:
        _from_peft(model, options)
        return
    if model is None:
        raise click.UsageError("Missing argument 'MODEL' (or '--from-peft').")
    output = check_paths(options, ("model", model))
    from corda_convert.operations import collect as operation
    from corda_convert.operations.collect_options import CollectOptions
    from corda_convert.operations.options import RunOptions

    names = ("targets", "excluded", "normalization", "experts", "precision", "batch_tokens", "whole_model")
    chosen = CollectOptions(
        corpus=corpus_from(options),
        **{name: options[name] for name in names},
        offload=options["offload"],
        trust_remote_code=options["trust_remote_code"],
        max_shard_bytes=options["max_shard_size"],
    )
    run = RunOptions(
        device=options["device"],
        dtype=options["dtype"],
        dry_run=options["dry_run"],
        overwrite=options["overwrite"],
        progress=not options["quiet"],
        ranks=ranks(),
    )
    _report(operation.collect(model, output=output, options=chosen, run=run), options)


def _from_peft(model: Path | None, options: dict[str, Any]) -> None:
    """`collect --from-peft`. Raises `click.UsageError` for options that would have no effect."""
    kept = {"output", "from_peft", "dry_run", "overwrite", "as_json", "quiet", "max_shard_size"}
    context = click.get_current_context()
    given = sorted(
        option.opts[-1]
        for option in context.command.params
        if option.name not in kept
        and option.name is not None
        and context.get_parameter_source(option.name) is click.core.ParameterSource.COMMANDLINE
    )
    if model is not None or given:
        raise click.UsageError(f"--from-peft runs no model; leave out {', '.join(given) or 'MODEL'}.")
    output = check_paths(options, ("covariance file", options["from_peft"]))
    from corda_convert.operations import collect_conversion as operation

    converted = operation.convert_covariances(
        options["from_peft"],
        output=output,
        max_shard_bytes=options["max_shard_size"],
        dry_run=options["dry_run"],
        overwrite=options["overwrite"],
    )
    _report(converted, options)


def _report(collected: Collected, options: dict[str, Any]) -> None:
    if ranks().place.rank > 0:
        return
    for warning in collected.warnings:
        click.echo(f"Note: {warning}", err=True)
    if options["as_json"]:
        click.echo(json.dumps(collected.receipt, indent=1, ensure_ascii=False))
    elif not options["quiet"]:
        from corda_convert.operations.collect_summary import describe

        click.echo(describe(collected.receipt, collected.output))
