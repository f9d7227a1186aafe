"""All or nothing: work goes to a staging folder beside the output, and one rename makes it the output."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from corda_convert.checkpoint.folder import RECEIPT_FILE
from corda_convert.errors import OutputRefused

STAGING_SUFFIX = ".corda-convert-partial"
_REPLACED_SUFFIX = ".corda-convert-replaced"


def check_output(output: Path, sources: list[Path], *, overwrite: bool) -> None:
    """Refuses an output that would destroy something, before any work.

    Raises `OutputRefused` for a non-empty folder (unless `overwrite` and this program made it), a file, a folder
    inside a source or around it, or a parent that cannot be written.
    """
    resolved = output.resolve()
    for source in sources:
        inside = source.resolve()
        if resolved == inside or inside in resolved.parents or resolved in inside.parents:
            raise OutputRefused(
                f"The output {output} and the input {source} lie inside one another.",
                next_step="Choose another output folder with -o.",
            )
    if output.exists() and not output.is_dir():
        raise OutputRefused(f"The output {output} is a file.", next_step="Choose a folder with -o.")
    if output.is_dir() and any(output.iterdir()):
        _check_replaceable(output, overwrite=overwrite)
    parent = _existing_parent(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputRefused(f"The folder {parent} cannot be written.", next_step="Choose another output with -o.")


def _check_replaceable(output: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise OutputRefused(
            f"The output {output} exists and is not empty.",
            next_step="Choose another folder with -o, or replace it with --overwrite.",
        )
    if not (output / RECEIPT_FILE).is_file():
        raise OutputRefused(
            f"The output {output} was not made by corda-convert (it holds no {RECEIPT_FILE}); --overwrite leaves it alone.",
            next_step="Remove it yourself, or choose another folder with -o.",
        )


def check_space(output: Path, nbytes: int) -> None:
    """Raises `OutputRefused` if the file system has no room for `nbytes`."""
    parent = _existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputRefused(
            f"The output needs {nbytes / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB free.",
            next_step="Free disk space, or choose another file system with -o.",
        )


@contextlib.contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """Yields an empty folder beside `output`; it becomes `output` when the block ends, and vanishes when it raises.

    What an earlier, killed run left there is removed. Raises `OutputRefused` while another run holds it, and for what
    the file system refuses on the way.
    """
    output = output.resolve()
    staging = output.with_name(output.name + STAGING_SUFFIX)
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(staging, output):
        _empty(staging)
        try:
            yield staging
            _replace(staging, output)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                    parent.rmdir()
            if isinstance(error, OSError):
                raise OutputRefused(
                    f"Writing {output} failed: {error}.", next_step="Free disk space, or choose another output with -o."
                ) from error
            raise


@contextlib.contextmanager
def _lock(staging: Path, output: Path) -> Iterator[None]:
    staging.mkdir(exist_ok=True)
    descriptor = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputRefused(
                f"Another run of corda-convert is writing {output}.", next_step="Wait for it, or choose another -o."
            ) from None
        yield
    finally:
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _replace(staging: Path, output: Path) -> None:
    replaced = output.with_name(output.name + _REPLACED_SUFFIX)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    staging.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent
