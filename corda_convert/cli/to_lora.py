"""`corda-convert to-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corda_convert.cli.parameters import InputPath, run_options
from corda_convert.cli.reporting import check_paths, report, run_options_of


@click.command("to-lora")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...", type=InputPath())
@click.option(
    "--init",
    "initials",
    multiple=True,
    type=InputPath(),
    help="Initial adapter (corda_init) of the training, or PEFT's CorDA cache_file; repeatable, and matched to the adapters by "
    "the numbers.",
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=float,
    help="How many times an adapter is taken: one for each ADAPTER, in the same order. [default: 1]",
)
@click.option(
    "--base",
    help="The base model: its name for the new adapter's config; a folder here is also read, where it is needed, and the rest "
    "is checked against it.",
)
@click.option(
    "--residual",
    type=InputPath(),
    help="Residual model that the adapter was trained beside, where --init is lost; with --base.",
)
@click.option(
    "--from-checkpoints",
    nargs=2,
    type=InputPath(),
    metavar="BASE TUNED",
    help="Instead of an ADAPTER: a model and its fine-tune, whose difference is extracted; with --rank or --energy.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Largest rank of a module: the best LoRA of that rank.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of ‖ΔW‖² to keep, by the smallest rank: 0.999."
)
@click.option(
    "--weight-by",
    type=InputPath(),
    metavar="COVS",
    help="Covariances: a lower rank keeps the layers' outputs on that data, not their weights, best.",
)
@click.option("--uniform", is_flag=True, help="One rank for all modules, no patterns, as servers want it.")
@click.option(
    "--for",
    "server",
    type=click.Choice(["vllm", "sglang", "llama.cpp", "peft"]),
    help="Mend what this server does not take of a LoRA (ranks, scalings, patterns), or refuse, and tell how to start it.",
)
@click.option("--as-is", is_flag=True, help="Do not judge by the numbers what belongs together.")
@run_options
def to_lora(adapters: tuple[Path, ...], **options: Any) -> None:
    """Convert ADAPTERs into one ordinary LoRA for the unmodified base model, which PEFT and the servers load.

    An adapter trained beside a residual becomes [A; A0] and [B | -B0], of twice the rank; Bone and MiSS blocks, of which --base
    tells the inputs, the LoRA that they are; several adapters, each --scale times, their sum. Nothing is lost, unless a lower
    rank is chosen with --rank or --energy: then the error of each module stands in the receipt.

    \b
    Example:
      corda-convert to-lora fixtures/adapters/corda --init fixtures/residual/corda_init -o lora

    \b
    A smaller one, for data like that; and of a bat adapter, whose change is of full rank:
      corda-convert to-lora fixtures/adapters/corda --init fixtures/residual/corda_init \\
        --energy 0.99 --weight-by fixtures/covariances/task.safetensors -o lora-small
      corda-convert to-lora fixtures/adapters/miss_bat --base fixtures/model --rank 16 -o lora-bat
    """
    if options["from_checkpoints"] is None and not adapters:
        raise click.UsageError("Missing argument 'ADAPTER' (or '--from-checkpoints').")
    output = check_paths(
        options,
        *(("adapter", path) for path in adapters),
        *(("initial adapter", path) for path in options["initials"]),
        *(("model", path) for path in options["from_checkpoints"] or ()),
        ("residual", options["residual"]),
        ("covariance file", options["weight_by"]),
    )
    from corda_convert.operations import to_lora as operation

    chosen = operation.ToLoraOptions(
        base=options["base"],
        residual=options["residual"],
        from_checkpoints=options["from_checkpoints"],
        scales=options["scales"],
        rank=options["rank"],
        energy=options["energy"],
        weight_by=options["weight_by"],
        uniform=options["uniform"],
        server=options["server"],
        as_is=options["as_is"],
    )
    report(
        operation.to_lora(
            adapters, init=options["initials"], output=output, options=chosen, run=run_options_of(options)
        ),
        options,
    )
