"""All or nothing: work goes to a staging folder beside the output, and one rename makes it the output.

What a stopped run has finished stays there, with its journals, for the same command to go on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from corda_convert.checkpoint.folder import RECEIPT_FILE
from corda_convert.errors import CordaConvertError, MalformedFile, OutputRefused, RunStopped
from corda_convert.output.journal import has_notes

STAGING_SUFFIX = ".corda-convert-partial"
_REPLACED_SUFFIX = ".corda-convert-replaced"
LOCK_FILE = "lock"
_IDENTITY_FILE = "identity.json"


def check_output(output: Path, sources: list[Path], *, overwrite: bool) -> None:
    """Refuses an output that would destroy something, before any work.

    Raises `OutputRefused` for a non-empty folder (unless `overwrite` and this program made it), a file, a folder
    inside a source or around it, or a parent that cannot be written.
    """
    try:
        resolved = output.resolve()
    except RuntimeError:
        raise OutputRefused(f"The output {output} is a loop of links.", next_step="Choose another with -o.") from None
    for source in sources:
        inside = source.resolve()
        if resolved == inside or inside in resolved.parents or resolved in inside.parents:
            raise OutputRefused(
                f"The output {output} and the input {source} lie inside one another.",
                next_step="Choose another output folder with -o.",
            )
    if output.exists() and not output.is_dir():
        raise OutputRefused(f"The output {output} is a file.", next_step="Choose a folder with -o.")
    if output.is_mount():
        raise OutputRefused(
            f"The output {output} is a mount point, which a finished folder cannot take the place of.",
            next_step=f"Choose a folder in it: -o {output / 'NAME'}",
        )
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


def work_folder(output: Path) -> Path:
    """The hidden folder beside the output where a run works: `output`, journals, what they belong to, and a lock."""
    output = output.resolve()
    return output.with_name(f".{output.name}{STAGING_SUFFIX}")


def journal_folder(folder: Path) -> Path:
    """Where the journals of a staging folder are."""
    return folder.parent / "journal"


def held_bytes(output: Path) -> int:
    """What an unfinished run holds of the disk."""
    files = [path for path in work_folder(output).rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.stat().st_blocks * 512 for path in files)


@contextlib.contextmanager
def staging_folder(
    output: Path, identity: Mapping[str, str] | None = None, *, overwrite: bool = False
) -> Iterator[Path]:
    """Yields the folder that becomes `output` when the block ends.

    It is empty, or holds what an unfinished run of the same `identity` left (digests of all that the bytes depend on,
    by what they are of). It vanishes when the block refuses; what stops the block otherwise (an interrupt, a lost process)
    leaves it, if the journals have a note, and tells its place in a note of the exception. Raises `OutputRefused` while
    another run holds it, where an unfinished run of another identity left something and `overwrite` is off, and for what
    the file system refuses on the way.
    """
    output = output.resolve()
    work = work_folder(output)
    made = [parent for parent in output.parents if not parent.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    with locked(work, output):
        folder = work / "output"
        _begin(work, identity, overwrite=overwrite)
        try:
            yield folder
            put_in_place(folder, output)
            shutil.rmtree(work)
        except BaseException as error:
            if identity is not None and can_go_on(error) and has_notes(journal_folder(folder)):
                error.add_note(str(work))
                raise
            shutil.rmtree(work, ignore_errors=True)
            for parent in made:
                with contextlib.suppress(OSError):  # not empty: somebody else uses it by now
                    parent.rmdir()
            if isinstance(error, OSError):
                raise refusal_of(error, output, work) from error
            raise


def refusal_of(error: OSError, output: Path, work: Path) -> CordaConvertError:
    """What the file system refused, in words: a file elsewhere can only have been read."""
    if isinstance(error.filename, str) and error.filename2 is None and work not in Path(error.filename).parents:
        return MalformedFile(
            f"{error.filename} cannot be read: {error.strerror}.",
            next_step="Run the same command again once the file is whole.",
        )
    return OutputRefused(
        f"Writing {output} failed: {error}.", next_step="Free disk space, or choose another output with -o."
    )


def can_go_on(error: BaseException) -> bool:
    """Whether the same command may end well next time: not after a refusal."""
    return isinstance(error, RunStopped) or not isinstance(error, (CordaConvertError, OSError))


@contextlib.contextmanager
def locked(work: Path, output: Path) -> Iterator[None]:
    """Holds the folder for this process; a file system that knows no locks is taken without."""
    descriptor = _open_lock(work)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputRefused(
                    f"Another run of corda-convert is writing {output}.", next_step="Wait for it, or choose another -o."
                ) from None
            except OSError:
                break
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), (work / LOCK_FILE).stat()):
                    break
            os.close(descriptor)  # of a run that has ended in between, and removed its folder
            descriptor = _open_lock(work)
        yield
    finally:
        os.close(descriptor)


def _open_lock(work: Path) -> int:
    while True:
        work.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # removed in between
            return os.open(work / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)


def _begin(work: Path, identity: Mapping[str, str] | None, *, overwrite: bool) -> None:
    """Empties the work folder, unless it was left by a run of this identity. Raises `OutputRefused`."""
    left = _identity(work)
    if identity is not None and left == identity:
        return
    if identity is not None and left and has_notes(work / "journal") and not overwrite:
        raise left_by_another(work, left, identity)
    empty(work)
    (work / "output").mkdir()
    if identity is not None:
        draft = work / "draft"
        draft.write_text(json.dumps({"format": "corda_convert.unfinished", "identity": dict(identity)}), "utf-8")
        draft.replace(work / _IDENTITY_FILE)


def empty(work: Path) -> None:
    """Removes all but the lock."""
    for entry in work.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != LOCK_FILE:
            entry.unlink()


def left_by_another(work: Path, left: Mapping[str, str], identity: Mapping[str, str]) -> OutputRefused:
    """The refusal to go on with what a run of another identity left."""
    differing = sorted(key for key in {*left, *identity} if left.get(key) != identity.get(key))
    return OutputRefused(
        f"An unfinished run left its work in {work}. Since then changed: {', '.join(differing)}.",
        next_step="Run the command that was interrupted again to finish it, or start afresh with --overwrite.",
    )


def _identity(work: Path) -> dict[str, str]:
    """What the folder's content was made for; nothing where that is not known."""
    path = work / _IDENTITY_FILE
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return {}
    identity = found.get("identity") if isinstance(found, dict) else None
    return identity if isinstance(identity, dict) and (work / "output").is_dir() else {}


def put_in_place(staging: Path, output: Path) -> None:
    """Makes a finished folder the output, in the place of one that is there."""
    replaced = output.with_name(output.name + _REPLACED_SUFFIX)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        output.rename(replaced)
    try:
        staging.rename(output)
    except OSError:
        if replaced.exists():
            replaced.rename(output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _existing_parent(path: Path) -> Path:
    parent = path.resolve().parent
    while not parent.exists():
        parent = parent.parent
    return parent
