"""What all tests share: the command line in this process, and how it refuses."""

import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from corda_convert.cli import main

settings.register_profile("corda-convert", deadline=None, derandomize=True)
settings.load_profile("corda-convert")

# A job in the background is started with the interrupt ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skips what the installed PEFT cannot do with the installed transformers.

    PEFT 0.21 loads adapters of mixtures of experts with an argument that transformers 5.0 does not have yet.
    """
    try:
        return (yield)
    except TypeError as error:
        if not str(error).endswith(".convert() got an unexpected keyword argument 'loading_info'"):
            raise
        pytest.skip("this PEFT loads adapters of mixtures of experts with a later transformers only")


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs the command line in this process: `command("merge", model, "--adapter", adapter, "-o", output)`."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return Ran(int(exit_.value.code or 0), printed.out, printed.err)

    return run


@pytest.fixture
def done(command: Callable[..., Ran]) -> Callable[..., Ran]:
    """Runs a command that must succeed."""

    def run(*arguments: object) -> Ran:
        ran = command(*arguments)
        assert ran.status == 0, ran.err
        return ran

    return run


@pytest.fixture
def refusal(command: Callable[..., Ran], tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused, with `-o` added. Returns its message, without the leading `Error: `."""

    def run(*arguments: object) -> str:
        output = tmp_path / "output"
        ran = command(*arguments, "-o", output)
        return checked_refusal(ran, output)

    return run


def checked_refusal(ran: Ran, output: Path) -> str:
    """The message of a refusal, which is the only thing that it leaves behind."""
    assert ran.status == 1, ran
    assert ran.out == ""
    assert ran.err.startswith("Error: ")
    assert ran.err.count("Error: ") == 1, ran.err
    assert "Traceback" not in ran.err
    assert not output.exists()
    assert_no_leftovers(output.parent)
    return ran.err.removeprefix("Error: ").rstrip("\n")


def assert_no_leftovers(folder: Path) -> None:
    """No staging folder and no replaced output beside the outputs of `folder`."""
    assert [path.name for path in folder.iterdir() if ".corda-convert-" in path.name] == []
