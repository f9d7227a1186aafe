"""Models and adapters from the Hugging Face Hub: small files at once, of weights only the headers, and the rest when it is run.

Endpoint, token and cache are the client's own business (HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE). Whatever goes
wrong leaves this module as one of our errors, without a token in its text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from corda_convert import hub
from corda_convert.checkpoint.folder import (
    INDEX_FILE,
    PICKLED_INDEX_FILE,
    PICKLED_SINGLE_FILE,
    RECEIPT_FILE,
    SINGLE_FILE,
)
from corda_convert.checkpoint.hub_id import HubId, parse_hub_id
from corda_convert.checkpoint.remote_file import RemoteFile, RemoteFolder, absent, announce, announce_folder
from corda_convert.checkpoint.safetensors_file import MAX_HEADER_BYTES
from corda_convert.errors import DownloadFailed, InputNotFound, MalformedFile, OutputRefused, some
from corda_convert.hub_ranges import RangeReader, client_progress, reading_errors
from corda_convert.output.digests import file_sha256
from corda_convert.output.side_files import is_carried

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_READ_ALONG = ("README.md", RECEIPT_FILE, ADAPTER_CONFIG)
_HEAD_BYTES = 1 << 16
"""Asked for at first of each file of weights; the header of a shard mostly has less."""

_CONNECTIONS = 8
_LARGEST_INDEX_BYTES = MAX_HEADER_BYTES


def located(path: Path | str, what: str) -> Path:
    """A path here as it is; for the name of something on the Hub, the folder or file of the cache that stands for it.

    Everything small is downloaded, an adapter whole; of a model's safetensors only the headers are read, and they are announced
    (`remote_file`) under the paths where they will lie. `what` names it in messages. A name that is neither is returned as it
    is, for the reader to refuse; so is a text that begins with `./`. Raises `InputNotFound`, `DownloadFailed` or
    `MalformedFile`.
    """
    if isinstance(path, str) and path.startswith("./"):
        return Path(path)
    path = Path(path)
    with contextlib.suppress(OSError):
        if path.exists():
            return path
    asked = parse_hub_id(str(path))
    if asked is None:
        return path
    from huggingface_hub import constants

    return _in_cache(asked, what) if constants.HF_HUB_OFFLINE else _Locating(asked, what).path()


def fetch(paths: Iterable[Path], *, progress: bool) -> None:
    """Downloads the files among these that are still on the Hub. Raises `OutputRefused` where the cache has no room."""
    missing = {path: remote for path in paths if (remote := absent(path)) is not None}
    if not missing:
        return
    _check_room(missing)
    with client_progress(shown=progress), ThreadPoolExecutor(_CONNECTIONS) as pool:
        for done in [pool.submit(remote.fetch) for remote in missing.values()]:
            done.result()


def _check_room(missing: Mapping[Path, RemoteFile]) -> None:
    import shutil

    nbytes = sum(remote.nbytes for remote in missing.values())
    folder = next(iter(missing)).parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OutputRefused(
            f"The download needs {nbytes / 1e9:.2f} GB, and the Hub's cache has {free / 1e9:.2f} GB free.",
            next_step="Free disk space, or choose another place with HF_HOME; --stream needs room for a few shards only.",
        )


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Names in the repository: what is downloaded at once, what is announced, what stays there."""

    small: tuple[str, ...]
    weights: tuple[str, ...]
    left: tuple[str, ...] = ()


class _Locating:
    """One look at a repository, at the commit that its revision was then."""

    def __init__(self, asked: HubId, what: str) -> None:
        self.asked = asked
        self.what = what

    def path(self) -> Path:
        """The folder or file in the cache."""
        with (
            reading_errors(self.asked, self.what),
            hub.connected(f"{self.asked} cannot be read from the Hub.") as client,
        ):
            self.commit = client.model_info(self.asked.repo_id, revision=self.asked.revision).sha or "main"
            self.files = self._listed(client)
        self.root = _snapshot_folder(self.asked.repo_id, self.commit)
        chosen = self._choose()
        with reading_errors(self.asked, self.what), client_progress(shown=False):
            self.root.mkdir(parents=True, exist_ok=True)
            self._download(chosen.small)
        chosen = self._with_shards(chosen)
        self._announce_all(chosen)
        path = self.root / self.asked.inside if self.asked.inside else self.root
        announce_folder(path, RemoteFolder(self.asked.revision or "main", chosen.left))
        return path

    def _listed(self, client: HfApi) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = client.list_repo_tree(self.asked.repo_id, recursive=True, revision=self.commit)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        for name in files:
            pure = PurePosixPath(name)
            if pure.is_absolute() or {"..", "."} & set(name.split("/")) or {"\\", "\0"} & set(name):
                raise MalformedFile(
                    f"{self.asked.repo_id} lists the file {name!r}, which would lie outside its folder.",
                    next_step="Do not trust this repository.",
                )
        return files

    def _choose(self) -> _Chosen:
        inside = self.asked.inside
        if inside in self.files:
            return _Chosen((), (inside,)) if inside.endswith(".safetensors") else _Chosen((inside,), ())
        prefix = f"{inside}/" if inside else ""
        names = {name.removeprefix(prefix) for name in self.files if name.startswith(prefix)}
        if not names:
            raise InputNotFound(
                f"{self.asked.repo_id} has no folder or file {inside} at {self.asked.revision or 'main'}.",
                next_step=f"It has: {some(sorted(dict.fromkeys(name.split('/')[0] for name in self.files)))}.",
            )
        weights, wants_adapter = _weights_of(names), "adapter" in self.what
        if ADAPTER_CONFIG in names and (wants_adapter or not weights):
            return self._adapter(prefix, names)
        if wants_adapter:
            self._refuse_adapter(names)
        small = [name for name in names if _is_read(name)]
        initial = [f"{folder}/{own}" for folder in _adapters_in(names) for own in _ADAPTER_WEIGHTS]
        index = {INDEX_FILE, PICKLED_INDEX_FILE} & names
        found = [*weights, *(name for name in initial if name in names)]
        left = names - {*small, *found, *index} - {name for name in names if "/." in f"/{name}"}
        return _Chosen(
            tuple(prefix + name for name in sorted({*small, *index})),
            tuple(prefix + name for name in found),
            tuple(sorted(left)),
        )

    def _adapter(self, prefix: str, names: set[str]) -> _Chosen:
        """The files of one adapter, all of them; and the receipt of the folder that it lies in."""
        weights = [name for name in _ADAPTER_WEIGHTS if name in names][:1]
        small = [name for name in names if "/" not in name and _is_read(name)]
        parent = PurePosixPath(prefix).parent / RECEIPT_FILE
        above = [str(parent)] if prefix and str(parent) in self.files else []
        return _Chosen((*(prefix + name for name in sorted({*small, *weights})), *above), ())

    def _refuse_adapter(self, names: set[str]) -> None:
        inner = [f"{self.asked}/{folder}" for folder in sorted(_adapters_in(names))]
        raise InputNotFound(
            f"{self.asked} holds no {ADAPTER_CONFIG}, so it is no adapter of PEFT.",
            next_step=f"It has adapters inside: {some(inner)}." if inner else "Check the name.",
        )

    def _download(self, names: Iterable[str]) -> None:
        """Into the cache. The first one under the revision's own name, which the cache then knows, too."""
        from huggingface_hub import hf_hub_download

        wanted = list(names)
        for first in wanted[:1]:
            revision = self.asked.revision or "main"
            hf_hub_download(self.asked.repo_id, first, revision=revision, library_name="corda-convert")

        def download(name: str) -> None:
            hf_hub_download(self.asked.repo_id, name, revision=self.commit, library_name="corda-convert")
            self._announce(name)

        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            for done in [pool.submit(download, name) for name in wanted]:
                done.result()

    def _with_shards(self, chosen: _Chosen) -> _Chosen:
        """The choice with the shards that the index names, where there is one."""
        prefix = f"{self.asked.inside}/" if self.asked.inside else ""
        index = next((name for name in chosen.weights if name.endswith(".index.json")), None)
        if index is None:
            return chosen
        shards = [prefix + name for name in _shards_of(self.root / index) if prefix + name in self.files]
        weights = [name for name in chosen.weights if name != index]
        left = tuple(name for name in chosen.left if prefix + name not in shards)
        return _Chosen(chosen.small, (*shards, *weights), left)

    def _announce_all(self, chosen: _Chosen) -> None:
        for name in chosen.weights:
            self._announce(name)
        unread = [name for name in chosen.weights if absent(self.root / name) is not None]
        with reading_errors(self.asked, self.what), ThreadPoolExecutor(_CONNECTIONS) as pool:
            for done in [pool.submit(self._read_head, self.root / name) for name in unread]:
                done.result()

    def _announce(self, name: str) -> None:
        entry, path = self.files[name], self.root / name
        sha256 = entry.lfs.sha256 if entry.lfs is not None else None

        def bring() -> Path:
            from huggingface_hub import hf_hub_download

            with reading_errors(self.asked, self.what):
                hf_hub_download(self.asked.repo_id, name, revision=self.commit, library_name="corda-convert")
            check_digest(path, sha256, self.asked)
            return path

        reader = RangeReader(self.asked, name, self.commit, entry.size, self.what)
        announce(path, RemoteFile(entry.size, sha256, reader.read, bring))

    def _read_head(self, path: Path) -> None:
        """Reads a safetensors header; pickled files are brought whole, since what describes them lies all over them."""
        remote = absent(path)
        if remote is None:
            return
        if path.suffix != ".safetensors":
            remote.fetch()
            return
        head = bytearray()
        remote.read_range(0, min(_HEAD_BYTES, remote.nbytes), head.extend)
        end = 8 + int.from_bytes(head[:8], "little")
        if len(head) < end <= min(remote.nbytes, 8 + MAX_HEADER_BYTES):
            remote.read_range(len(head), end - len(head), head.extend)
        remote.head = bytes(head[:end])


def check_digest(path: Path, sha256: str | None, asked: HubId) -> None:
    """Refuses a file whose content is not what the Hub states, and takes it out of the cache. Raises `DownloadFailed`."""
    if sha256 is None or file_sha256(path) == sha256:
        return
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise DownloadFailed(
        f"{path.name} of {asked} was not downloaded as the Hub has it: its SHA-256 is another one.",
        why="The download was damaged. What was downloaded is removed.",
        next_step="Run the same command again.",
    )


def _weights_of(names: set[str]) -> list[str]:
    """The file of a model's weights that transformers would load, or its index."""
    for single, index in ((SINGLE_FILE, INDEX_FILE), (PICKLED_SINGLE_FILE, PICKLED_INDEX_FILE)):
        for name in (single, index):
            if name in names:
                return [name]
    return []


def _shards_of(index: Path) -> list[str]:
    """Names in an index, for what it is worth: the reader of the checkpoint checks it."""
    try:
        if index.stat().st_size > _LARGEST_INDEX_BYTES:
            return []
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({name for name in weight_map.values() if isinstance(name, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _is_read(name: str) -> bool:
    """Whether a file of the repository is carried over into outputs, or tells something."""
    base = name.rpartition("/")[2]
    return base in _READ_ALONG or (is_carried(base) and "/." not in f"/{name}")


def _adapters_in(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(f"/{ADAPTER_CONFIG}") for name in names if name.endswith(f"/{ADAPTER_CONFIG}")]


def _snapshot_folder(repo_id: str, commit: str) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / repo_folder_name(repo_id=repo_id, repo_type="model") / "snapshots" / commit


def _in_cache(asked: HubId, what: str) -> Path:
    """What the cache has, where the Hub must not be asked. Raises `InputNotFound`."""
    from huggingface_hub import try_to_load_from_cache

    known = ("config.json", ADAPTER_CONFIG, SINGLE_FILE, INDEX_FILE, PICKLED_SINGLE_FILE, PICKLED_INDEX_FILE)
    names = [f"{asked.inside}/{name}" for name in known] if asked.inside else list(known)
    for name in [asked.inside, *names] if asked.inside else names:
        found = try_to_load_from_cache(asked.repo_id, name, revision=asked.revision)
        if isinstance(found, str):
            path = Path(found).absolute()
            return path if name == asked.inside else path.parent
    raise InputNotFound(
        f"No such {what}: {asked}",
        why="It is no path here, and not in the Hub's cache; HF_HUB_OFFLINE is set, so the Hub is not asked.",
        next_step="Unset HF_HUB_OFFLINE, or check the path.",
    )
