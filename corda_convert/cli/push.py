"""`corda-convert push`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from corda_convert.cli.reporting import print_publication, publication_facts, ranks


@click.command()
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

    if ranks().place.rank > 0:
        return
    publication = operation.push(folder, repo_id, private=private)
    if as_json:
        click.echo(json.dumps(publication_facts(publication)))
    else:
        print_publication(publication)
