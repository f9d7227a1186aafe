"""The README and docs/commands.md are true: their commands run as they stand, and every command and option stands there."""

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
DETAILS = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands_of(page: str) -> list[str]:
    return [line for block in blocks("bash", page) for line in block.splitlines() if line.startswith("corda-convert ")]


COMMANDS = commands_of(README) + commands_of(DETAILS)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's relative paths mean what they say."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "fixtures").symlink_to(ROOT / "fixtures")
    return folder


def test_the_commands_of_the_documentation_run_one_after_the_other(workplace: Path) -> None:
    """One test: the later ones take what the earlier ones wrote."""
    failed = []
    for command in COMMANDS:
        arguments = shlex.split(command)[1:]
        done = subprocess.run(
            [sys.executable, "-m", "corda_convert", *arguments],
            cwd=workplace,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            failed.append(f"{command}\n{done.stderr}")
        elif "-o" in arguments:
            output = workplace / arguments[arguments.index("-o") + 1]
            if not (output if output.suffix else output / "corda_convert.json").is_file():
                failed.append(f"{command}\nmade no {output.name}")
    assert not failed, "\n\n".join(failed)


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
    shown = {shlex.split(command)[1] for command in commands_of(README)} | set(
        re.findall(r"^    corda-convert (\S+)", README, re.M)
    )
    assert shown == set(cli.commands)


def test_the_readme_and_its_details_have_the_commands_in_one_order() -> None:
    in_readme = re.findall(r"^\*\*([a-z-]+)\*\*: ", README, re.M)
    assert in_readme == re.findall(r"^## ([a-z-]+)$", DETAILS, re.M)
    assert set(in_readme) == set(cli.commands)


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
    links = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert links
    assert [target for target in links if not is_there(ROOT, target)] == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_place_that_a_page_of_docs_links_to_exists(page: Path) -> None:
    links = [target for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")) if "://" not in target]
    assert [target for target in links if not is_there(page.parent, target)] == []


def is_there(folder: Path, target: str) -> bool:
    """Whether a relative link leads to a file, and to a heading of it if it names one."""
    name, _, heading = target.partition("#")
    if not name or not (folder / name).exists() or not heading:
        return bool(name) and (folder / name).exists() and not heading
    lines = re.findall(r"^#+ (.*)$", (folder / name).read_text(encoding="utf-8"), re.M)
    return heading in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}
