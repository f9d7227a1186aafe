"""`corda-convert perplexity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corda_convert.cli.corpus import corpus_from, text_options
from corda_convert.cli.parameters import InputPath

if TYPE_CHECKING:
    from corda_convert.operations.perplexity import Perplexity


@click.command()
@click.argument("model", type=InputPath())
@text_options
@click.option(
    "--no-pack", is_flag=True, help="Each record by itself, instead of all text as one stream; lines of a .txt file."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=InputPath(),
    help="Adapter to fold in, of the kinds that merge takes; repeatable.",
)
@click.option("--init", multiple=True, type=InputPath(), help="Initial adapter of a residual one; as merge.")
@click.option("--as-is", is_flag=True, help="Do not judge by the numbers whether the adapter is for this very model.")
@click.option(
    "--window",
    type=click.IntRange(min=2),
    help="Tokens that are run together. [default: 2048, or the model's positions]",
)
@click.option(
    "--stride", type=click.IntRange(min=1), help="Tokens from one window's beginning to the next. [default: the window]"
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Measure the first so many tokens of the text.")
@click.option(
    "--batch-tokens",
    default=4096,
    show_default=True,
    type=click.IntRange(min=1),
    help="Windows of equal length are run together up to this.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the model computes in. [default: the checkpoint's own]",
)
@click.option("--offload", type=click.Path(path_type=Path), metavar="DIR", help="Keep hidden states in a file there.")
@click.option("--whole-model", is_flag=True, help="Load all of the model, where its blocks cannot be run one by one.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def perplexity(model: Path, as_json: bool, quiet: bool, **options: Any) -> None:
    """Measure the perplexity of a text under MODEL, with or without an adapter.

    One block of the model is on the device at a time, for all of the text, so the model may be larger than the device's
    memory. The text is one stream of tokens in windows, of which each scores the tokens that no window before it had.

    \b
    Example:
      corda-convert perplexity fixtures/model --adapter fixtures/adapters/lora --data fixtures/data/task.txt --no-pack

    \b
    As papers report it:
      corda-convert perplexity MODEL --preset wikitext2
    """
    from corda_convert.operations.perplexity import PerplexityOptions
    from corda_convert.operations.perplexity import perplexity as measure

    pack = False if options.pop("no_pack") else None
    text = corpus_from({**options, "pack": pack})
    for name in ("files", "preset", "field", "chat"):
        del options[name]
    found = measure(model, text, PerplexityOptions(**options, progress=not quiet))
    for warning in found.warnings:
        click.echo(f"Note: {warning}", err=True)
    click.echo(json.dumps(found.facts, indent=1, ensure_ascii=False) if as_json else _described(found))


def _described(found: Perplexity) -> str:
    facts = found.facts
    with_adapters = "".join(f" + {adapter['name']}" for adapter in facts["adapters"])
    unit = "window" if facts["windows"] == 1 else "windows"
    form = f"{facts['windows']:,} {unit} of up to {facts['window']:,} tokens"
    overlap = f", stride {facts['stride']:,}" if facts["stride"] != facts["window"] else ""
    apart = ", each record by itself" if facts["records_apart"] else ""
    return (
        f"perplexity {found.value:.6g}  ({found.losses.mean:.6g} nats per token)\n"
        f"  model  {facts['model']}{with_adapters}, {facts['dtype']} on {facts['device']}, {facts['seconds']:.1f} s\n"
        f"  text   {facts['text']}: {facts['tokens']:,} tokens scored in {form}{overlap}{apart}"
    )
