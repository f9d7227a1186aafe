"""The command line: click → operation → print. The one place that catches our errors.

Exit status: 0 done; 1 refused or failed, with what, why and the next step; 2 wrong usage; 130 interrupted;
143 terminated.
Nothing here imports torch before an operation needs it, so help and a wrong path answer at once.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from corda_convert.distributed import Alone, Group, Ranks, place_in
from corda_convert.errors import CordaConvertError
from corda_convert.version import __version__

if TYPE_CHECKING:
    from corda_convert.hub import Publication
    from corda_convert.operations.options import Outcome, RunOptions
    from corda_convert.operations.server_rules import Server

_Command = TypeVar("_Command", bound=Callable[..., Any])

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes, with a decimal or binary unit: 700MB, 1.5GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(value).lower())
        if match is None:
            self.fail(f"{value!r} is no size; write 700MB or 1.5GiB", param, ctx)
        return int(float(match[1]) * _UNITS[match[2] or ""])


class Damp(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number, or `peft`."""

    name = "number|peft"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "peft":
            return value
        try:
            return float(value)
        except (TypeError, ValueError):
            self.fail(f"{value!r} is neither a number nor 'peft'", param, ctx)


class Count(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A number of parameters: 20000000 or 20M."""

    name = "params"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?)\s*", str(value).lower())
        count = 0 if match is None else round(float(match[1]) * _UNITS[match[2]])
        if count < 1:
            self.fail(f"{value!r} is no number of parameters; write 20000000 or 20M", param, ctx)
        return count


class Pattern(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """`NAME=VALUE`: a pattern for module names, and a value of another type."""

    name = "name=value"

    def __init__(self, value_type: click.ParamType) -> None:  # type: ignore[type-arg,unused-ignore]
        self.value_type = value_type

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        pattern, separator, number = str(value).rpartition("=")
        if not separator or not pattern:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return pattern, self.value_type.convert(number, param, ctx)


def run_options(command: _Command) -> _Command:
    """The options that every command that writes a folder has."""
    options = (
        click.option(
            "-o", "--output", required=True, type=click.Path(path_type=Path), help="Output folder; must be new."
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            help="Dtype of the output's weights. [default: each tensor's own]",
        ),
        click.option("--max-memory", type=Size(), help="Most memory to use, the program included, such as 700MB."),
        click.option("--dry-run", is_flag=True, help="Plan and check everything; write nothing."),
        click.option("--overwrite", is_flag=True, help="Replace an output that corda-convert made."),
        click.option("--push-to", metavar="REPO_ID", help="Publish the output to this Hub repository (owner/name)."),
        click.option("--private", is_flag=True, help="Make that repository private."),
        click.option("--json", "as_json", is_flag=True, help="Print the receipt as one JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no summary."),
        click.option("-v", "--verbose", is_flag=True, help="Also list every tensor that was changed."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="corda-convert")
def cli() -> None:
    """Convert, merge and publish CorDA, PiSSA, LoRA and Bone/MiSS checkpoints, one shard at a time.

    No command ever holds the whole model in memory, and none writes anything before all inputs are checked. Every
    output folder has a receipt, corda_convert.json, that says what was done to each tensor.
    """


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--cov", "covariances", type=click.Path(path_type=Path), help="Covariances: safetensors, or PEFT's file.")
@click.option(
    "--mode",
    type=click.Choice(["ipm", "kpm"]),
    help="ipm: the largest components, to learn the task. kpm: the smallest, to keep the knowledge.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Rank of the adapter.")
@click.option(
    "--rank-budget",
    type=Count(),
    help="Instead of a rank: so many parameters (20M) for the whole adapter, spread by the spectra of the layers.",
)
@click.option("--rank-min", type=click.IntRange(min=0), help="With --rank-budget: no module gets less. [default: 1]")
@click.option(
    "--rank-max",
    type=click.IntRange(min=1),
    help="With --rank-budget: no module gets more. [default: twice the rank that it pays everywhere]",
)
@click.option("--alpha", type=float, help="lora_alpha. [default: the rank, a scaling of 1; with --rslora its root]")
@click.option("--rslora", is_flag=True, help="Scale by alpha / √rank, as PEFT's use_rslora does, not by alpha / rank.")
@click.option(
    "--rank-pattern",
    multiple=True,
    type=Pattern(click.IntRange(min=1)),
    metavar="NAME=RANK",
    help="Another rank for some modules: end of path or regex, as in PEFT's rank_pattern; repeatable, the first counts.",
)
@click.option(
    "--alpha-pattern",
    multiple=True,
    type=Pattern(click.FLOAT),
    metavar="NAME=ALPHA",
    help="Another lora_alpha for some modules; repeatable. [default without --alpha: each module's rank]",
)
@click.option(
    "--method",
    default="corda",
    show_default=True,
    type=click.Choice(["corda", "svd", "asvd", "svd-llm"]),
    help="Components of the weight times: corda the covariance, svd nothing (PiSSA), asvd mean absolute inputs, svd-llm the "
    "covariance's root.",
)
@click.option("--asvd-alpha", type=float, help="Power of the mean absolute inputs in asvd. [default: 0.5]")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="NAME",
    help="Module to decompose: path, end of path, or regex for the path; repeatable. [default: all-linear, which is every "
    "Linear but lm_head]",
)
@click.option("--exclude", "excluded", multiple=True, metavar="NAME", help="Module to leave out; as --target.")
@click.option("--damp", type=Damp(), help="Damping of corda's covariance; peft: PEFT's own rule. [default: 0.01]")
@click.option(
    "--solver",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "dense", "krylov"]),
    help="dense: all eigenvectors. krylov: only the wanted ones. auto: by size, rank and end.",
)
@click.option(
    "--no-residual", is_flag=True, help="Write the adapter alone, to OUTPUT; merge --subtract makes the residual."
)
@click.option(
    "--from-cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Compute nothing: take the decomposition out of PEFT's CorDA cache_file, with its modules and ranks.",
)
@click.option(
    "--write-cache",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also write PEFT's CorDA cache_file, from which preprocess_corda starts with these very factors.",
)
@click.option(
    "--truncate",
    type=click.IntRange(min=1),
    metavar="R",
    help="Instead of an adapter: discard the R smallest components of each module, and write a dense model.",
)
@run_options
def decompose(model: Path, covariances: Path | None, **options: Any) -> None:
    """Split MODEL into a residual and the CorDA (or PiSSA) adapter to train beside it.

    Writes the residual model to OUTPUT and the initial adapter to OUTPUT/corda_init. Train it with PEFT:

    \b
      residual = AutoModelForCausalLM.from_pretrained(OUTPUT)
      model = PeftModel.from_pretrained(residual, OUTPUT, subfolder="corda_init", is_trainable=True)

    Targets, exclusions and patterns are matched as PEFT matches them.

    \b
    Example:
      corda-convert decompose fixtures/model --cov fixtures/covariances/knowledge.safetensors \\
        --mode kpm --rank 8 -o residual

    \b
    Another rank for some modules; only the adapter; or a dense model without its 4 smallest components:
      corda-convert decompose fixtures/model --method svd --mode ipm --rank 8 --rslora \\
        --rank-pattern down_proj=16 --exclude o_proj -o pissa
      corda-convert decompose fixtures/model --method svd --mode ipm --rank 8 --no-residual -o init
      corda-convert decompose fixtures/model --cov fixtures/covariances/task.safetensors --truncate 4 -o truncated
    """
    if options["from_cache"] is not None:
        _decompose_from_cache(model, covariances, options)
        return
    _check_decompose_usage(options)
    output = _check_paths(options, ("model", model), ("covariance file", covariances))
    from corda_convert.operations import decompose as operation

    chosen = operation.DecomposeOptions(
        mode=options["mode"],
        rank=options["rank"],
        alpha=options["alpha"],
        method=options["method"],
        damp=0.01 if options["damp"] is None else options["damp"],
        targets=options["targets"],
        excluded=options["excluded"],
        rslora=options["rslora"],
        rank_pattern=dict(options["rank_pattern"]),
        alpha_pattern=dict(options["alpha_pattern"]),
        truncate=options["truncate"],
        residual=not options["no_residual"],
        solver=options["solver"],
        asvd_alpha=0.5 if options["asvd_alpha"] is None else options["asvd_alpha"],
        write_cache=options["write_cache"],
        rank_budget=options["rank_budget"],
        rank_min=1 if options["rank_min"] is None else options["rank_min"],
        rank_max=options["rank_max"],
    )
    _report(
        operation.decompose(model, output=output, options=chosen, covariances=covariances, run=_run(options)), options
    )


def _decompose_from_cache(model: Path, covariances: Path | None, options: dict[str, Any]) -> None:
    """`decompose --from-cache`. Raises `click.UsageError` for options that would have no effect."""
    kept = {"mode", "rank", "alpha", "rslora", "from_cache", "output", "device", "dtype", "max_memory", "dry_run"}
    kept |= {"overwrite", "push_to", "private", "as_json", "quiet", "verbose"}
    without = {"method": "corda", "solver": "auto"}
    others = {name: value for name, value in options.items() if name not in kept} | {"cov": covariances}
    given = sorted(name for name, value in others.items() if value not in (None, False, (), without.get(name)))
    if given:
        raise click.UsageError(f"--from-cache computes nothing; leave out {', '.join(map(_option_name, given))}.")
    if options["mode"] is None:
        raise click.UsageError("Missing option '--mode': what the cache was made with.")
    output = _check_paths(options, ("model", model), ("cache file", options["from_cache"]))
    from corda_convert.operations import from_cache as operation

    chosen = operation.CacheOptions(options["mode"], options["alpha"], rslora=options["rslora"], rank=options["rank"])
    outcome = operation.decompose_from_cache(
        model, cache=options["from_cache"], output=output, options=chosen, run=_run(options)
    )
    _report(outcome, options)


def _option_name(parameter: str) -> str:
    """`--target` for `targets`."""
    names = {"targets": "target", "excluded": "exclude"}
    return f"--{names.get(parameter, parameter).replace('_', '-')}"


def _check_decompose_usage(options: dict[str, Any]) -> None:
    """Raises `click.UsageError` for options that are missing, contradict each other, or would have no effect."""
    of_ranks = ("rank", "rank_budget", "alpha", "rslora", "rank_pattern", "alpha_pattern")
    of_adapters = ("mode", *of_ranks, "no_residual", "write_cache")
    if options["truncate"] is not None:
        given = [f"--{name.replace('_', '-')}" for name in of_adapters if options[name] not in (None, False, ())]
        if given:
            raise click.UsageError(f"--truncate makes no adapter; leave out {', '.join(given)}.")
    elif options["rank_budget"] is not None:
        if options["mode"] is None:
            raise click.UsageError("Missing option '--mode'.")
        if options["rank"] is not None or options["rank_pattern"]:
            raise click.UsageError("--rank-budget chooses the ranks; leave out --rank and --rank-pattern.")
        if options["rank_max"] is not None and options["rank_max"] < (options["rank_min"] or 1):
            raise click.UsageError("--rank-max is below --rank-min.")
    else:
        for name, instead in (("mode", ""), ("rank", "'--rank-budget', or ")):
            if options[name] is None:
                raise click.UsageError(f"Missing option '--{name}' (or {instead}'--truncate').")
    if options["rank_budget"] is None:
        for name in ("rank_min", "rank_max"):
            if options[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --rank-budget.")
    for name, method in (("damp", "corda"), ("asvd_alpha", "asvd")):
        if options[name] is not None and options["method"] != method:
            raise click.UsageError(f"--{name.replace('_', '-')} is for --method {method}.")
    if options["no_residual"] and options["dtype"] is not None:
        raise click.UsageError("--dtype is for the residual, which --no-residual does not write.")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = [pattern for pattern, _ in options[name]]
        if len(set(patterns)) != len(patterns):
            raise click.UsageError(f"--{name.replace('_', '-')} has a name twice.")


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
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
    type=click.Path(path_type=Path),
    help="Initial adapter (corda_init), PEFT's CorDA cache_file, or RWKV-PEFT's init_pissa.pth, to merge a residual adapter "
    "into the base; repeatable, and matched to the adapters by the numbers.",
)
@click.option(
    "--residual",
    type=click.Path(path_type=Path),
    help="Residual model that the adapter was trained beside, to merge into the base where --init is lost. A "
    "corda_init in it is taken for --init.",
)
@click.option(
    "--subtract",
    type=click.Path(path_type=Path),
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
    output = _check_paths(
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
    _report(operation.merge(model, adapter=adapters, output=output, options=chosen, run=_run(options)), options)


@cli.command("to-lora")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...", type=click.Path(path_type=Path))
@click.option(
    "--init",
    "initials",
    multiple=True,
    type=click.Path(path_type=Path),
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
    type=click.Path(path_type=Path),
    help="Residual model that the adapter was trained beside, where --init is lost; with --base.",
)
@click.option(
    "--from-checkpoints",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="BASE TUNED",
    help="Instead of an ADAPTER: a model and its fine-tune, whose difference is extracted; with --rank or --energy.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Largest rank of a module: the best LoRA of that rank.")
@click.option(
    "--energy", type=click.FloatRange(0, 1, min_open=True), help="Share of ‖ΔW‖² to keep, by the smallest rank: 0.999."
)
@click.option(
    "--weight-by",
    type=click.Path(path_type=Path),
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
    output = _check_paths(
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
    _report(
        operation.to_lora(adapters, init=options["initials"], output=output, options=chosen, run=_run(options)), options
    )


@cli.command()
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path(path_type=Path))
@click.option(
    "--base", type=click.Path(path_type=Path), help="Model: tell which of its tensors the adapter would touch."
)
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


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--json", "as_json", is_flag=True, help="Print what was published as one JSON object on stdout.")
def push(folder: Path, repo_id: str, private: bool, as_json: bool) -> None:
    """Publish FOLDER, an output of corda-convert, to the Hub repository REPO_ID (owner/name).

    The folder is first compared with its receipt; everything goes up in one commit, which is checked afterwards.

    \b
    Example:
      corda-convert push merged alice/merged-model --private
    """
    from corda_convert.operations import push as operation

    if _ranks().place.rank > 0:
        return
    publication = operation.push(folder, repo_id, private=private)
    if as_json:
        click.echo(json.dumps(_publication(publication)))
    else:
        _print_publication(publication)


def _check_paths(options: dict[str, Any], *paths: tuple[str, Path | None]) -> Path:
    """Refuses paths that are not there, before torch is imported. Returns the output."""
    from corda_convert.checkpoint.folder import missing_path

    for what, path in paths:
        if path is not None and not path.exists():
            raise missing_path(path, what)
    output: Path = options["output"]
    return output


def _run(options: dict[str, Any]) -> RunOptions:
    from corda_convert.operations.options import RunOptions

    return RunOptions(
        device=options["device"],
        dtype=options["dtype"],
        max_memory_bytes=options["max_memory"],
        dry_run=options["dry_run"],
        overwrite=options["overwrite"],
        push_to=options["push_to"],
        private=options["private"],
        progress=not options["quiet"],
        ranks=_ranks(),
    )


def _ranks() -> Ranks:
    """The processes that share the work of the command that is run."""
    found: Ranks | None = click.get_current_context().obj
    return Alone() if found is None else found


def _report(outcome: Outcome, options: dict[str, Any]) -> None:
    if _ranks().place.rank > 0:
        return
    for warning in outcome.warnings:
        click.echo(f"Note: {warning}", err=True)
    if options["as_json"]:
        published = {} if outcome.publication is None else {"published": _publication(outcome.publication)}
        click.echo(json.dumps({**outcome.receipt, **published}, indent=1, ensure_ascii=False))
    elif not options["quiet"]:
        _print_summary(outcome, dry_run=options["dry_run"], verbose=options["verbose"])
        if outcome.publication is not None:
            _print_publication(outcome.publication)


def _print_summary(outcome: Outcome, *, dry_run: bool, verbose: bool) -> None:
    from corda_convert.output.summary import describe, describe_plan, describe_tensors

    if dry_run:
        click.echo(describe_plan(outcome.receipt, outcome.output))
        return
    if verbose:
        click.echo(describe_tensors(outcome.receipt))
    click.echo(describe(outcome.receipt, outcome.output))


def _publication(publication: Publication) -> dict[str, Any]:
    return {
        "repo_id": publication.repo_id,
        "url": publication.url,
        "commit": publication.commit,
        "files": publication.files,
        "bytes": publication.total_bytes,
    }


def _print_publication(publication: Publication) -> None:
    click.echo(
        f"Published {publication.files} files ({publication.total_bytes / 1e6:,.1f} MB) as {publication.repo_id}, "
        f"commit {publication.commit[:12]}: {publication.url}"
    )


_LESS_MEMORY = "Use --device cpu, or a smaller --rank; --dry-run tells what a run needs."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, on this process or as one of several, and exits with its status."""
    try:
        place = place_in(os.environ)
    except CordaConvertError as refusal:
        sys.exit(_failed(refusal))
    if place is None:
        sys.exit(_run_command(arguments, Alone())[0])
    with _silent() if place.rank else contextlib.nullcontext():
        try:
            with _terminable():
                group = Group(place)
        except (CordaConvertError, KeyboardInterrupt) as error:
            sys.exit(_failed(error))
        status, failure = _run_command(arguments, group)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, once one of the processes has ended
        group.end(failure)
        sys.exit(status)


def _run_command(arguments: Sequence[str] | None, ranks: Ranks) -> tuple[int, BaseException | None]:
    """The exit status, and what the command failed with; the user has been told."""
    try:
        with _terminable():
            status = cli.main(args=arguments, prog_name="corda-convert", standalone_mode=False, obj=ranks)
    except (Exception, KeyboardInterrupt) as error:
        if ranks.place.size > 1 and _is_unexpected(error):
            click.echo(f"Error: {type(error).__name__}: {error}", err=True)
            return 1, error
        return _failed(error), error
    return status if isinstance(status, int) else 0, None


def _failed(error: BaseException) -> int:
    """Tells the user what went wrong. Returns the exit status. Raises what should not happen again."""
    if isinstance(error, click.ClickException):
        error.show()
        return error.exit_code
    if isinstance(error, (click.exceptions.Abort, KeyboardInterrupt)):
        return _stopped(error.__cause__ or error)
    if _is_unexpected(error):
        raise error
    if isinstance(error, CordaConvertError):
        text = str(error)
    elif isinstance(error, OSError):
        text = f"{error.strerror or error}: {error.filename or 'no file named'}"
    else:
        text = f"Out of memory. {str(error).partition('.')[0]}\n{_LESS_MEMORY}"
    click.echo(f"Error: {text}", err=True)
    if getattr(error, "__notes__", None):
        click.echo(_going_on(error), err=True)
    return 1


def _is_unexpected(error: BaseException) -> bool:
    """Whether the error is a fault of this program."""
    known = (CordaConvertError, click.ClickException, click.exceptions.Abort, KeyboardInterrupt, OSError, MemoryError)
    return not isinstance(error, known) and type(error).__name__ != "OutOfMemoryError"


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing is printed inside: rank 0 speaks for all."""
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM stops what is done inside as the interrupt key does."""

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stopped(stop: BaseException) -> int:
    """Says what stays of a run that was stopped. Returns the exit status."""
    is_terminated = isinstance(stop, Terminated)
    kept = f". {_going_on(stop)}" if getattr(stop, "__notes__", None) else "; nothing was written."
    click.echo(f"{'Terminated' if is_terminated else 'Interrupted'}{kept}", err=True)
    return 143 if is_terminated else 130


def _going_on(stopped: BaseException) -> str:
    """What to do with the work of a run that was stopped; its place is the exception's note."""
    return f"Run the same command again to go on, or remove what is finished: rm -r {shlex.quote(stopped.__notes__[0])}"


def run() -> None:
    """The program: `main`, and then an end without taking torch apart, which takes a quarter of a second."""
    gc.set_threshold(100_000, 50, 100)  # importing makes many objects and no garbage
    status: object = 1
    try:
        main()
    except SystemExit as exit_:
        status = exit_.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, as by `| head`
            stream.flush()
    os._exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    run()
