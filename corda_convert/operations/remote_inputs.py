"""Inputs from the Hub: when their weights come, what they are checked against, and what the receipt says of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import model_name
from corda_convert.checkpoint.hub_id import snapshot_of
from corda_convert.checkpoint.remote_file import absent, announced, remote_folder
from corda_convert.checkpoint.tensors import TensorFile
from corda_convert.errors import MalformedFile
from corda_convert.operations.options import RunOptions


def unread_weights(run: RunOptions, *files: Iterable[TensorFile]) -> tuple[str, ...]:
    """What to tell of a dry run that judges nothing by the numbers, since the weights are on the Hub; else nothing."""
    if run.dry_run and any(absent(file.path) is not None for several in files for file in several):
        return (
            "The weights are not downloaded for a dry run: whether adapters, initial adapters and models belong together by "
            "their numbers is told by the run itself.",
        )
    return ()


def stated_sha256(path: Path) -> str | None:
    """The digest that the Hub states of a file; None for one that is not from there."""
    remote = announced(path)
    return None if remote is None else remote.sha256


def check_stated(path: Path, sha256: str | None) -> None:
    """Refuses a file of the cache that is not what the Hub has. Raises `MalformedFile`."""
    stated = stated_sha256(path)
    if stated is not None and sha256 is not None and stated != sha256:
        raise MalformedFile(
            f"{path} is not what the Hub has: its SHA-256 is {sha256}, the Hub states {stated}.",
            why="It was damaged or changed in the cache.",
            next_step=f"Remove it, and run the same command again:  rm {path.resolve()}",
        )


def stamp(path: Path) -> tuple[object, ...]:
    """What tells whether an input is still the same: size and time, and of a file from the Hub size and digest."""
    remote = announced(path)
    if remote is not None:
        return (remote.nbytes, remote.sha256)
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns)


def identity(path: Path) -> str:
    """An input's place: in the Hub's cache with the commit, elsewhere with links resolved."""
    return str(path if announced(path) is not None else path.resolve())


def described(path: Path) -> dict[str, Any]:
    """For the receipt: the name of an input; of one from the Hub also the revision asked for and its commit."""
    snapshot = snapshot_of(path)
    if snapshot is None:
        return {"name": path.resolve().name}
    folder = remote_folder(path)
    revision = {} if folder is None else {"revision": folder.revision}
    return {"name": model_name(path), **revision, "commit": snapshot.commit}
