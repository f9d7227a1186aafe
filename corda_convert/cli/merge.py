"""`corda-convert merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corda_convert.cli.parameters import InputPath, run_options
from corda_convert.cli.reporting import check_paths, report, run_options_of


@click.command()
@click.argument("model", type=InputPath())
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=InputPath(),
    help="Folder of a trained adapter, or RWKV-PEFT's .pth; repeatable. The order does not matter but for DoRA, bat and "
    "--rounding peft.",
)
@click.option(
    "--scale",
    "scales",
    multiple=True,
    type=float,
    help="How many times an adapter is taken, such as 0.5 or -1: one for each --adapter, in the same order. [default: 1]",
)
@click.option(
    "--init",
    "initials",
    multiple=True,
    type=InputPath(),
    help="Initial adapter (corda_init), PEFT's CorDA cache_file, or RWKV-PEFT's init_pissa.pth, to merge a residual adapter "
    "into the base; repeatable, and matched to the adapters by the numbers.",
)
@click.option(
    "--residual",
    type=InputPath(),
    help="Residual model that the adapter was trained beside, to merge into the base where --init is lost. A "
    "corda_init in it is taken for --init.",
)
@click.option(
    "--subtract",
    type=InputPath(),
    help="Instead of an adapter: initial adapter to take out of MODEL. OUTPUT is the residual, as decompose writes it.",
)
@click.option("--alpha", type=float, help="lora_alpha of the training, for a LoRA .pth of RWKV-PEFT, which lacks it.")
@click.option(
    "--format",
    type=click.Choice(["safetensors", "pth"]),
    help="Write the weights as safetensors, or as one .pth. [default: .pth for a MODEL that is one, else safetensors]",
)
@click.option(
    "--rounding",
    default="nearest",
    show_default=True,
    type=click.Choice(["nearest", "peft"]),
    help="nearest: round once. peft: PEFT's bits, where it rounds twice (embeddings).",
)
@click.option(
    "--requantize",
    is_flag=True,
    help="Keep a block-fp8 MODEL fp8, and quantize what changes again. [default: the output has plain weights]",
)
@click.option(
    "--as-is",
    is_flag=True,
    help="Do not judge by the numbers whether adapters, initial adapters and MODEL belong together.",
)
@run_options
def merge(model: Path, adapters: tuple[Path, ...], **options: Any) -> None:
    """Fold trained adapters into MODEL's weights, or take an initial adapter out of them.

    Takes LoRA (rsLoRA, DoRA, rank and alpha patterns), CorDA, PiSSA and OLoRA, trained tokens, and Bone/MiSS of PEFT; and
    DiSHA/Bone, LoRA and PiSSA of RWKV-PEFT, one .pth each, for a MODEL that is one .pth too. A MODEL of the CorDA authors'
    scripts (ALinear, BLinear, weight_residual) holds its adapter and becomes dense without --adapter. An adapter
    that was trained beside a residual goes into its residual, or into the base with --init or --residual. PiSSA and OLoRA
    go into the base without: what the training began with is computed again. Weights in block-fp8 and mxfp4 become plain
    ones, unless --requantize is given. Anything else is refused.

    \b
    Example:
      corda-convert merge fixtures/model --adapter fixtures/adapters/lora -o merged

    \b
    Half of one adapter less another; and a residual made without any SVD:
      corda-convert merge fixtures/model --adapter fixtures/adapters/lora --scale 0.5 \\
        --adapter fixtures/adapters/lora_patterns --scale -1 -o merged
      corda-convert merge fixtures/model --subtract fixtures/residual/corda_init -o residual
    """
    output = check_paths(
        options,
        ("model", model),
        *(("adapter", path) for path in adapters),
        *(("initial adapter", path) for path in (*options["initials"], options["subtract"])),
        ("residual", options["residual"]),
    )
    from corda_convert.operations import merge as operation

    chosen = operation.MergeOptions(
        init=options["initials"],
        scales=options["scales"],
        residual=options["residual"],
        subtract=options["subtract"],
        alpha=options["alpha"],
        format=options["format"],
        rounding=options["rounding"],
        requantize=options["requantize"],
        as_is=options["as_is"],
    )
    report(
        operation.merge(model, adapter=adapters, output=output, options=chosen, run=run_options_of(options)), options
    )
