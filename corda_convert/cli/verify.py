"""`corda-convert verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from corda_convert.cli.parameters import InputPath
from corda_convert.errors import CordaConvertError


class Sample(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of tensors, or `all`."""

    name = "number|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "all":
            return value
        try:
            count = int(value)
        except (TypeError, ValueError):
            count = 0
        if count < 1:
            self.fail(f"{value!r} is neither a number of tensors nor 'all'", param, ctx)
        return count


@click.command()
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--against",
    metavar="MODEL",
    type=InputPath(),
    help="The model it was made from: its numbers are computed again.",
)
@click.option("--adapter", "adapters", multiple=True, type=InputPath(), help="An adapter it was made of.")
@click.option(
    "--init", "initials", multiple=True, type=InputPath(), help="An initial adapter it was made of, or a cache."
)
@click.option("--residual", type=InputPath(), help="The residual, or the fine-tune of to-lora --from-checkpoints.")
@click.option(
    "--scale", "scales", multiple=True, type=float, help="Scales to compare with the receipt's; mostly left out."
)
@click.option("--cov", type=InputPath(), help="Covariances: are decompose's factors singular vectors?")
@click.option(
    "--sample",
    type=Sample(),
    default=16,
    show_default=True,
    help="Tensors of each kind that are computed again, or all.",
)
@click.option("--seed", type=int, help="Chooses the sample. [default: another one each time, which is told]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; print problems only.")
def verify(folder: Path, **options: Any) -> None:
    """Check that OUT, an output of corda-convert, is complete, intact, and what its receipt says.

    Every file is there, and nothing else, in its size and SHA-256; the index and the headers name what the receipt names;
    no number is NaN or Inf; adapters in it are whole. With --against, and the adapters that it was made of, a random sample
    of its tensors is computed again in float64, and the largest error is told in units of the last place. The exit status
    is 1 if anything is wrong.

    \b
    Example:
      corda-convert verify merged --against fixtures/model --adapter fixtures/adapters/lora
    """
    context = click.get_current_context()
    chosen_sample = [
        f"--{name}" for name in ("sample", "seed") if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    ]
    if chosen_sample and options["against"] is None and not options["adapters"]:
        raise click.UsageError(f"{' and '.join(chosen_sample)} without --against MODEL: nothing is computed again.")
    from corda_convert.operations import verify as operation
    from corda_convert.output.verification import describe

    chosen = operation.VerifyOptions(
        against=options["against"],
        adapters=options["adapters"],
        init=options["initials"],
        residual=options["residual"],
        covariances=options["cov"],
        scales=options["scales"],
        sample=None if options["sample"] == "all" else options["sample"],
        seed=options["seed"],
        progress=not options["quiet"],
    )
    try:
        found = operation.verify(folder, options=chosen)
    except CordaConvertError as problem:
        if not options["as_json"]:
            raise
        click.echo(json.dumps(operation.failure(folder, problem), ensure_ascii=False))
        context.exit(1)
    if options["as_json"]:
        click.echo(json.dumps(found.facts, ensure_ascii=False))
    elif not (options["quiet"] and found.is_fine):
        click.echo(describe(found.facts))
    if not found.is_fine:
        context.exit(1)
