"""`corda-convert decompose`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from corda_convert.cli.parameters import Count, Damp, InputPath, Pattern, run_options
from corda_convert.cli.reporting import check_paths, report, run_options_of


@click.command()
@click.argument("model", type=InputPath())
@click.option("--cov", "covariances", type=InputPath(), help="Covariances: safetensors, or PEFT's file.")
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
    type=InputPath(),
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
    output = check_paths(options, ("model", model), ("covariance file", covariances))
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
    report(
        operation.decompose(model, output=output, options=chosen, covariances=covariances, run=run_options_of(options)),
        options,
    )


def _decompose_from_cache(model: Path, covariances: Path | None, options: dict[str, Any]) -> None:
    """`decompose --from-cache`. Raises `click.UsageError` for options that would have no effect."""
    kept = {"mode", "rank", "alpha", "rslora", "from_cache", "output", "device", "dtype", "max_memory", "dry_run"}
    kept |= {"overwrite", "stream", "push_to", "private", "revision", "create_pr", "commit_message"}
    kept |= {"as_json", "quiet", "verbose"}
    without = {"method": "corda", "solver": "auto"}
    others = {name: value for name, value in options.items() if name not in kept} | {"cov": covariances}
    given = sorted(name for name, value in others.items() if value not in (None, False, (), without.get(name)))
    if given:
        raise click.UsageError(f"--from-cache computes nothing; leave out {', '.join(map(_option_name, given))}.")
    if options["mode"] is None:
        raise click.UsageError("Missing option '--mode': what the cache was made with.")
    output = check_paths(options, ("model", model), ("cache file", options["from_cache"]))
    from corda_convert.operations import from_cache as operation

    chosen = operation.CacheOptions(options["mode"], options["alpha"], rslora=options["rslora"], rank=options["rank"])
    outcome = operation.decompose_from_cache(
        model, cache=options["from_cache"], output=output, options=chosen, run=run_options_of(options)
    )
    report(outcome, options)


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
