"""`push`: publishes an output folder, if it still is what its receipt says."""

from __future__ import annotations

from pathlib import Path

from corda_convert import hub
from corda_convert.checkpoint.folder import RECEIPT_FILE
from corda_convert.errors import InputNotFound, MalformedFile, PublishFailed
from corda_convert.output.digests import file_sha256
from corda_convert.output.receipt import read_receipt


def push(folder: Path | str, repo_id: str, *, private: bool = False) -> hub.Publication:
    """Uploads a sealed folder in one commit.

    Raises `InputNotFound`, `MalformedFile` for a folder that is not sealed or was altered since (the files are listed),
    or `PublishFailed`.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputNotFound(f"No such folder: {path}", next_step="Give an output folder of corda-convert.")
    receipt = read_receipt(path)
    if receipt is None:
        raise PublishFailed(
            f"{path} holds no {RECEIPT_FILE}, so it is not a finished output of corda-convert.",
            next_step="Make it again, or upload it yourself:  hf upload " + f"{repo_id} {path}",
        )
    altered = check_sealed(path, receipt)
    if altered:
        raise MalformedFile(
            f"{path} is not what its receipt says: {'; '.join(altered[:8])}.",
            why="Files were changed, added or removed after it was made.",
            next_step="Make it again.",
        )
    hub.check_access(repo_id, private=private)
    message = f"{receipt.get('command')} with corda-convert"
    return hub.push_folder(path, repo_id, private=private, commit_message=message)


def check_sealed(folder: Path, receipt: dict[str, object]) -> list[str]:
    """What differs between a folder and its receipt: missing, added and changed files."""
    entries = receipt.get("files")
    if not isinstance(entries, list):
        return ["the receipt lists no files"]
    listed = {str(entry["name"]): entry for entry in entries}
    present = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    present.pop(RECEIPT_FILE, None)
    differences = [f"{name} is missing" for name in listed if name not in present]
    differences += [f"{name} was added" for name in present if name not in listed]
    for name, path in present.items():
        if name in listed and (
            path.stat().st_size != listed[name]["bytes"] or file_sha256(path) != listed[name]["sha256"]
        ):
            differences.append(f"{name} was changed")
    return differences
