"""The program: runs the command line, catches our errors, and ends with its exit status."""

from __future__ import annotations

import contextlib
import gc
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from corda_convert.cli.group import cli
from corda_convert.distributed import Alone, Group, Ranks, place_in
from corda_convert.errors import CordaConvertError

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
