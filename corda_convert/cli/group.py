"""The commands as one group."""

from __future__ import annotations

import click

from corda_convert.cli.collect import collect
from corda_convert.cli.decompose import decompose
from corda_convert.cli.inspect import inspect
from corda_convert.cli.merge import merge
from corda_convert.cli.perplexity import perplexity
from corda_convert.cli.plot import plot
from corda_convert.cli.push import push
from corda_convert.cli.to_lora import to_lora
from corda_convert.cli.verify import verify
from corda_convert.version import __version__


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="corda-convert")
def cli() -> None:
    """Convert, merge and publish CorDA, PiSSA, LoRA and Bone/MiSS checkpoints, one shard at a time.

    No command ever holds the whole model in memory, and none writes anything before all inputs are checked. Every
    output folder has a receipt, corda_convert.json, that says what was done to each tensor.
    """


for _command in (collect, decompose, merge, to_lora, inspect, push, perplexity, plot, verify):
    cli.add_command(_command)
