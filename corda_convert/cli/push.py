"""`corda-convert push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from corda_convert.cli.parameters import publishing_options
from corda_convert.cli.reporting import print_publication, publication_facts, ranks


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repo_id")
@publishing_options
@click.option("--json", "as_json", is_flag=True, help="Print what was published as one JSON object on stdout.")
def push(folder: Path, repo_id: str, as_json: bool, **options: Any) -> None:
    """Publish FOLDER, an output of corda-convert, to the Hub repository REPO_ID (owner/name).

    The folder is first compared with its receipt. Then the weights go up, of which the Hub takes only what it lacks, and
    one commit makes everything visible, which is checked afterwards. A push that failed is gone on with by the same command.

    \b
    Example:
      corda-convert push merged alice/merged-model --private --revision v2
    """
    from corda_convert.operations import push as operation

    if ranks().place.rank > 0:
        return
    publication = operation.push(folder, repo_id, **options)
    if as_json:
        click.echo(json.dumps(publication_facts(publication)))
    else:
        print_publication(publication)
