"""The files of a publication, here and on the Hub, and whether both are the same."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.errors import InputNotFound, PublishFailed, some

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

_WEIGHTS = re.compile(r".*\.safetensors|(.*/)?pytorch_model[^/]*\.bin|.*\.pth")
_LOADED = re.compile(r".*\.safetensors(\.index\.json)?|(.*/)?pytorch_model[^/]*\.bin(\.index\.json)?")


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file as it is to stand on the Hub.

    Attributes:
        name: path in the repository.
        nbytes: size.
        sha256: digest of the content, in hex.
        content: where it is, or the content itself; None for what only the Hub has any more.
        stamp: size and time of change of the file when it was hashed, to notice a later change.
    """

    name: str
    nbytes: int
    sha256: str
    content: Path | bytes | None
    stamp: tuple[int, int] | None = None

    @property
    def is_weights(self) -> bool:
        return _WEIGHTS.fullmatch(self.name) is not None

    @property
    def path(self) -> Path | None:
        """Where it lies, if it does."""
        return self.content if isinstance(self.content, Path) else None

    def blob_id(self) -> str | None:
        """The git object id of a small file, None where there is no content to take it of."""
        if self.content is None:
            return None
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

    def is_stored_as(self, stored: RepoFile) -> bool:
        """Whether the Hub's file has this size and content."""
        if stored.size != self.nbytes:
            return False
        return stored.lfs.sha256 == self.sha256 if stored.lfs is not None else stored.blob_id == self.blob_id()

    def is_changed(self) -> bool:
        """Whether the file was written to since it was hashed."""
        return isinstance(self.content, Path) and self.stamp is not None and _stamp(self.content) != self.stamp


def published_files(folder: Path, known: Mapping[str, str] | None = None) -> list[PublishedFile]:
    """Everything in the folder that is not hidden, hashed on all cores unless its digest is `known` by its name.

    Raises `InputNotFound` for a folder that is none, or is empty.
    """
    if not folder.is_dir():
        raise InputNotFound(f"{folder} is not a folder.", next_step="Name the folder that a conversion wrote.")
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {n.as_posix(): path for n, path in names.items() if not any(part.startswith(".") for part in n.parts)}
    if not shown:
        raise InputNotFound(f"{folder} holds no file to publish.", next_step="Name the folder that a conversion wrote.")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: _hashed(name, shown[name], (known or {}).get(name)), shown))


def finished_file(name: str, path: Path, sha256: str) -> PublishedFile:
    """A file whose digest is known, as it lies there now."""
    return _hashed(name, path, sha256)


def published_content(name: str, content: bytes) -> PublishedFile:
    """A file that is published with this content, which no folder has."""
    return PublishedFile(name, len(content), hashlib.sha256(content).hexdigest(), content)


def _hashed(name: str, path: Path, sha256: str | None) -> PublishedFile:
    stamp = _stamp(path)
    if sha256 is None:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return PublishedFile(name, stamp[0], sha256, path, stamp)


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def remote_files(client: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    """The files of a revision by their paths."""
    from huggingface_hub.hf_api import RepoFile

    entries = client.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def changed_files(before: Mapping[str, RepoFile], after: Mapping[str, RepoFile]) -> set[str]:
    """The paths that are in one of two listings only, or differ."""
    return {
        name
        for name in {*before, *after}
        if name not in before or name not in after or before[name].blob_id != after[name].blob_id
    }


def differences(files: Iterable[PublishedFile], remote: Mapping[str, RepoFile], *, kept: Iterable[str]) -> list[str]:
    """One phrase for each file that the Hub lacks, has otherwise, or has although nobody put it there."""
    problems = []
    sent = {file.name: file for file in files}
    for name, file in sent.items():
        stored = remote.get(name)
        if stored is None:
            problems.append(f"{name} is missing")
        elif stored.size != file.nbytes:
            problems.append(f"{name} has {stored.size} bytes instead of {file.nbytes}")
        elif not file.is_stored_as(stored):
            problems.append(f"{name} has another content")
    return problems + [f"{name} is not of this folder" for name in sorted(remote.keys() - sent.keys() - set(kept))]


def check_other_weights(where: str, others: Iterable[str]) -> None:
    """Raises `PublishFailed` for weights that would stay beside the new ones."""
    weights = sorted(name for name in others if _LOADED.fullmatch(name))
    if weights:
        raise PublishFailed(
            f"{where} has weights that the folder does not have: {some(weights)}.",
            why="They would stay beside the new ones, and a loader could take them instead. Nothing was uploaded.",
            next_step="Delete them on the Hub, or push to another repository.",
        )
