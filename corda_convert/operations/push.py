"""`push`: publishes an output folder, if it still is what its receipt says."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert import hub
from corda_convert.checkpoint.folder import RECEIPT_FILE
from corda_convert.errors import InputNotFound, MalformedFile, PublishFailed, some
from corda_convert.operations.published_names import named_for
from corda_convert.operations.verify_receipt import Sealed, read_sealed
from corda_convert.output.receipt import streamed_files
from corda_convert.output.summary import describe

if TYPE_CHECKING:
    from corda_convert.operations.options import RunOptions


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> hub.Publication:
    """Uploads a sealed folder in one commit.

    Args:
        folder: an output of this program.
        repo_id: where to, as NAMESPACE/NAME.
        private: make the repository private.
        revision: the branch, made if there is none of that name.
        create_pr: open a pull request instead.
        commit_message: first line of the commit.

    Raises `InputNotFound`, `MalformedFile` for a folder that is not sealed or was altered since (the files are listed),
    `UnsupportedInput` for a receipt of another version, or `PublishFailed`.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputNotFound(f"No such folder: {path}", next_step="Give an output folder of corda-convert.")
    if not (path / RECEIPT_FILE).is_file():
        raise PublishFailed(
            f"{path} holds no {RECEIPT_FILE}, so it is not a finished output of corda-convert.",
            next_step="Make it again, or upload it yourself:  hf upload " + f"{repo_id} {path}",
        )
    sealed = read_sealed(path)
    destination = hub.Destination(repo_id, private, revision, create_pr, commit_message)
    hub.check_access(destination)
    files = hub.published_files(path)
    altered = altered_files(sealed, files)
    if altered:
        raise MalformedFile(
            f"{path} is not what its receipt says: {some(altered, 8)}.",
            why="Files were changed, added or removed after it was made.",
            next_step="Make it again.",
        )
    files = named_for(repo_id, path, sealed.receipt, files)
    return _publish(path, sealed.receipt, destination, [*files, *_only_on_the_hub(sealed, files)])


def publish(folder: Path, receipt: Mapping[str, Any], destination: hub.Destination) -> hub.Publication:
    """Uploads a folder that was just sealed: its digests are the receipt's. Raises `PublishFailed`."""
    known = {str(entry["name"]): str(entry["sha256"]) for entry in receipt["files"]}
    return _publish(folder, receipt, destination, hub.published_files(folder, known))


def _publish(
    folder: Path, receipt: Mapping[str, Any], destination: hub.Destination, files: list[hub.PublishedFile]
) -> hub.Publication:
    named = replace(destination, message=commit_message(destination, str(receipt.get("command"))))
    return hub.push_folder(folder, named, description=commit_description(receipt, destination), files=files)


def destination_of(run: RunOptions) -> hub.Destination | None:
    """Where `--push-to` and its companions lead, if they were given."""
    if run.push_to is None:
        return None
    return hub.Destination(run.push_to, run.private, run.revision, run.create_pr, run.commit_message)


def _only_on_the_hub(sealed: Sealed, files: list[hub.PublishedFile]) -> list[hub.PublishedFile]:
    """The weights that `--stream` has left on the Hub only: they must be in the repository as the receipt has them."""
    elsewhere = streamed_files(sealed.receipt) - {file.name for file in files}
    return [
        hub.PublishedFile(listed.name, listed.nbytes, str(listed.sha256), None)
        for listed in sealed.files.values()
        if listed.name in elsewhere
    ]


def commit_message(destination: hub.Destination, command: str) -> str:
    """The first line of the commit: the user's, else one that names the command."""
    return destination.message or f"{command} with corda-convert"


def commit_description(receipt: Mapping[str, Any], destination: hub.Destination) -> str:
    """The receipt's summary, for the body of the commit; nothing where the receipt lacks what that says."""
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # one that somebody else has written
        return describe(receipt, Path(destination.repo_id))
    return ""


def altered_files(sealed: Sealed, files: list[hub.PublishedFile]) -> list[str]:
    """What differs between a folder's files and its receipt: missing, added and changed ones."""
    listed = sealed.files
    present = {file.name: file for file in files if file.name != RECEIPT_FILE}
    elsewhere = streamed_files(sealed.receipt)
    differing = [f"{name} is missing" for name in listed if name not in present and name not in elsewhere]
    differing += [f"{name} was added" for name in present if name not in listed]
    differing += [
        f"{name} was changed"
        for name, file in present.items()
        if name in listed and (listed[name].nbytes, listed[name].sha256) != (file.nbytes, file.sha256)
    ]
    return differing
