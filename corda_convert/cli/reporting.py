"""What the commands have in common: paths that must be there, the options of a run, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from corda_convert.distributed import Alone, Ranks

if TYPE_CHECKING:
    from corda_convert.hub import Publication
    from corda_convert.operations.options import Outcome, RunOptions


def check_paths(options: dict[str, Any], *paths: tuple[str, Path | None]) -> Path:
    """Refuses paths that are neither here nor may be on the Hub, before torch is imported. Returns the output."""
    from corda_convert.checkpoint.folder import missing_path
    from corda_convert.checkpoint.hub_id import parse_hub_id

    for what, path in paths:
        if path is not None and not path.exists() and parse_hub_id(str(path)) is None:
            raise missing_path(path, what)
    output: Path = options["output"]
    return output


def run_options_of(options: dict[str, Any]) -> RunOptions:
    """What `run_options` gave, as the operations take it."""
    from corda_convert.operations.options import RunOptions

    if options["push_to"] is None:
        for name in ("private", "revision", "create_pr", "commit_message"):
            if options[name]:
                raise click.UsageError(f"--{name.replace('_', '-')} is about publishing: give --push-to, too.")
    return RunOptions(
        device=options["device"],
        dtype=options["dtype"],
        max_memory_bytes=options["max_memory"],
        dry_run=options["dry_run"],
        overwrite=options["overwrite"],
        stream=options["stream"],
        push_to=options["push_to"],
        private=options["private"],
        revision=options["revision"],
        create_pr=options["create_pr"],
        commit_message=options["commit_message"],
        progress=not options["quiet"],
        ranks=ranks(),
    )


def ranks() -> Ranks:
    """The processes that share the work of the command that is run."""
    found: Ranks | None = click.get_current_context().obj
    return Alone() if found is None else found


def report(outcome: Outcome, options: dict[str, Any]) -> None:
    """Prints the notes of a finished command, and its receipt or a summary. Only rank 0 speaks."""
    if ranks().place.rank > 0:
        return
    for warning in outcome.warnings:
        click.echo(f"Note: {warning}", err=True)
    if options["as_json"]:
        published = {} if outcome.publication is None else {"published": publication_facts(outcome.publication)}
        click.echo(json.dumps({**outcome.receipt, **published}, indent=1, ensure_ascii=False))
    elif not options["quiet"]:
        _print_summary(outcome, dry_run=options["dry_run"], verbose=options["verbose"])
        if outcome.publication is not None:
            print_publication(outcome.publication)


def _print_summary(outcome: Outcome, *, dry_run: bool, verbose: bool) -> None:
    from corda_convert.output.summary import describe, describe_plan, describe_tensors

    if dry_run:
        click.echo(describe_plan(outcome.receipt, outcome.output))
        return
    if verbose:
        click.echo(describe_tensors(outcome.receipt))
    click.echo(describe(outcome.receipt, outcome.output))


def publication_facts(publication: Publication) -> dict[str, Any]:
    """For `--json`."""
    return {
        "repo_id": publication.repo_id,
        "url": publication.url,
        "commit": publication.commit,
        "pull_request": publication.pull_request,
        "files": publication.files,
        "bytes": publication.total_bytes,
        "new_commit": publication.is_new,
    }


def print_publication(publication: Publication) -> None:
    """Says what was published, and where, in a line."""
    from corda_convert.output.summary import size

    files = f"{publication.files} files ({size(publication.total_bytes)})"
    if not publication.is_new:
        click.echo(
            f"{publication.repo_id} has all {files} already, commit {publication.commit[:12]}: {publication.url}"
        )
    elif publication.pull_request:
        click.echo(f"Opened a pull request for {files} in {publication.repo_id}: {publication.pull_request}")
    else:
        where = f"{publication.repo_id}, commit {publication.commit[:12]}: {publication.url}"
        click.echo(f"Published {files} as {where}")
