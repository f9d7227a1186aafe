"""The README is true: its commands run as they stand, and every command and option of the program stands in it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from corda_convert.cli import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("corda-convert ")]


# Later commands take what earlier ones wrote, so one process runs them all.
pytestmark = pytest.mark.xdist_group("readme")


@pytest.fixture(scope="session")  # among tests of other files a module's would end in between
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths mean what they say."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "fixtures").symlink_to(ROOT / "fixtures")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_runs(command: str, workplace: Path) -> None:
    arguments = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "corda_convert", *arguments], cwd=workplace, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if "-o" in arguments:
        output = workplace / arguments[arguments.index("-o") + 1]
        assert (output if output.suffix else output / "corda_convert.json").is_file()


def test_the_python_example_of_the_readme_runs(workplace: Path) -> None:
    (example,) = [block for block in blocks("python") if "import MergeOptions" in block]
    done = subprocess.run(
        [sys.executable, "-c", example],
        cwd=workplace,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "delta_norm" in done.stdout


def test_every_command_stands_in_the_readme_with_an_example() -> None:
    shown = {shlex.split(command)[1] for command in COMMANDS} | set(
        re.findall(r"^    corda-convert (\S+)", README, re.M)
    )
    assert shown == set(cli.commands)


def test_every_common_option_stands_in_the_readme() -> None:
    options = [
        {option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts}
        for command in cli.commands.values()
        if any("--push-to" in parameter.opts for parameter in command.params)
    ]
    missing = [
        option
        for option in set.intersection(*options)
        if option.startswith("--") and option not in README and option not in ("--output", "--quiet", "--verbose")
    ]
    assert missing == []


def test_the_readme_names_both_commands_of_a_newcomer_and_they_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test"):
        assert f"    make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.M)


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in target]
    assert links
    assert [target for target in links if not (ROOT / target).exists()] == []
