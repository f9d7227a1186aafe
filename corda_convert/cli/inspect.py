"""`corda-convert inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from corda_convert.cli.parameters import InputPath
from corda_convert.errors import CordaConvertError

if TYPE_CHECKING:
    from corda_convert.operations.server_rules import Server


@click.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=InputPath())
@click.option("--base", type=InputPath(), help="Model: tell which of its tensors the adapter would touch.")
@click.option(
    "--for",
    "server",
    type=click.Choice(["vllm", "sglang", "llama.cpp", "peft"]),
    help="Tell what stands against serving the adapter as it is, and what mends it. Exit status 1 if anything does.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each PATH, a line each.")
def inspect(paths: tuple[Path, ...], base: Path | None, server: Server | None, as_json: bool) -> None:
    """Say what each PATH is, and what can be done with it.

    An adapter (a folder of PEFT, or RWKV-PEFT's .pth), a model or a file of its weights, a residual, covariances, PEFT's
    CorDA cache_file, or an output of corda-convert and its receipt. Only headers and configs are read. The exit status is
    1 if a PATH is nothing of these or damaged, does not fit --base, or is not served by --for as it is.

    \b
    Example:
      corda-convert inspect fixtures/adapters/corda --base fixtures/model --for vllm
    """
    from corda_convert.operations import inspect as operation
    from corda_convert.output.inspection import describe

    is_fine = True
    for place, path in enumerate(paths):
        try:
            found = operation.inspect(path, base=base, server=server)
        except CordaConvertError as problem:
            is_fine = False
            if as_json:
                click.echo(json.dumps(operation.failure(path, problem), ensure_ascii=False))
            else:
                click.echo(f"Error: {problem}", err=True)
            continue
        is_fine = is_fine and found.is_fine
        if as_json:
            click.echo(json.dumps(found.facts, ensure_ascii=False))
        else:
            click.echo(("\n" if place else "") + describe(found.facts))
    if not is_fine:
        click.get_current_context().exit(1)
