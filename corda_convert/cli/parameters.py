"""Types of the command line's values, and the options that many commands share."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

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


class InputPath(click.Path):
    """A path here, or a name on the Hub. What begins with `./` is no such name, although `Path` drops the dot."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if str(value).startswith((f".{os.sep}", "./")) and not _is_there(Path(value)):
            value = Path(value).absolute()
        return super().convert(value, param, ctx)


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return path.exists()
    return False


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


_PUBLISHING = (
    click.option("--private", is_flag=True, help="Make the repository private; a public one is refused."),
    click.option("--revision", metavar="BRANCH", help="Publish to this branch, made if there is none of that name."),
    click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch."),
    click.option("--commit-message", metavar="TEXT", help="First line of the commit. [default: names the command]"),
)


def publishing_options(command: _Command) -> _Command:
    """How something is published."""
    for option in reversed(_PUBLISHING):
        command = option(command)
    return command


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
        click.option(
            "--stream",
            is_flag=True,
            help="Of a model on the Hub keep only a few files of weights on the disk at a time, beside the output. "
            "With --push-to: finished shards go up at once, and are not kept here.",
        ),
        click.option("--push-to", metavar="REPO_ID", help="Publish the output to this Hub repository (owner/name)."),
        *_PUBLISHING,
        click.option("--json", "as_json", is_flag=True, help="Print the receipt as one JSON object on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="No progress and no summary."),
        click.option("-v", "--verbose", is_flag=True, help="Also list every tensor that was changed."),
    )
    for option in reversed(options):
        command = option(command)
    return command
