"""The options that commands share which read text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from corda_convert.corpus.options import CorpusOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])


def text_options(command: _Command) -> _Command:
    """Where the text is, and what of it is read."""
    options = (
        click.option(
            "--data",
            "files",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="FILE",
            help="Text: .jsonl, .json, .txt or .parquet; repeatable.",
        ),
        click.option("--preset", metavar="NAME", help="A known data set instead, such as wikitext2 (needs datasets)."),
        click.option(
            "--field",
            multiple=True,
            metavar="NAME|TEMPLATE",
            help="Field of a record; repeatable, joined by line breaks; or a template: 'Q: {question} A: {answer}'. "
            "[default: text]",
        ),
        click.option("--chat", is_flag=True, help="Render records with the tokenizer's chat template."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def sample_options(command: _Command) -> _Command:
    """How text is cut into samples."""
    options = (
        click.option("--seq-len", default=2048, show_default=True, help="Tokens of a sample."),
        click.option("--samples", default=256, show_default=True, help="Number of samples."),
        click.option("--seed", default=0, show_default=True, help="Decides which text is taken."),
        click.option(
            "--pack/--no-pack",
            default=None,
            help="Lay texts end to end and cut, or make each record a sample. [default: --pack, but for instruction presets]",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def corpus_from(options: Mapping[str, Any]) -> CorpusOptions:
    """The options of a command with `text_options`, and perhaps `sample_options`, as the corpus takes them."""
    names = ("files", "preset", "field", "chat", "seq_len", "samples", "seed", "pack")
    return CorpusOptions(**{name: options[name] for name in names if name in options})
