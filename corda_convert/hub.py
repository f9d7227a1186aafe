"""Publishing a finished folder to the Hugging Face Hub, in one commit that is checked afterwards.

The endpoint, the token and the caches are the client's own business (HF_ENDPOINT, HF_TOKEN, `hf auth login`). Whatever
goes wrong there leaves this module as `PublishFailed`, without a token in its text.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.errors import InputNotFound, PublishFailed

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

LOG_IN = "Log in with: hf auth login"
_WEIGHTS = re.compile(r".*\.safetensors(\.index\.json)?|(.*/)?pytorch_model[^/]*\.bin(\.index\.json)?")
_TOKEN = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9.-]{10,}")
_SIGNATURE = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")  # upload addresses authorise whoever holds them
_CLIENT_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "hf_xet"}
_LISTED = 5


@dataclass(frozen=True, slots=True)
class Publication:
    """What was published, and where."""

    repo_id: str
    url: str
    commit: str
    files: int
    total_bytes: int


def check_access(repo_id: str, *, private: bool = False, api: HfApi | None = None) -> None:
    """Refuses what would make a later push fail, in a few requests and without changing anything on the Hub.

    Args:
        repo_id: where the push will go, as NAMESPACE/NAME.
        private: whether the push will ask for a private repository.
        api: the client to use; by default one that reads the environment and the login cache.

    Raises:
        PublishFailed: the name is not one, there is no token, the Hub does not accept it or does not answer, the token
            cannot write to the namespace, or the repository is public although a private one is asked for.
    """
    _check_name(repo_id)
    with translated_errors(f"The Hub cannot be used to publish {repo_id}.", api=api):
        client = _client(api)
        _check_account(repo_id, client.whoami())
        if private and client.repo_exists(repo_id):
            _check_private(repo_id, client)


def push_folder(
    folder: Path, repo_id: str, *, private: bool = False, commit_message: str, api: HfApi | None = None
) -> Publication:
    """Uploads the files of a folder in one commit and compares what the Hub then has with what the folder has.

    The repository is made if there is none. Hidden files and folders are left out. Files that the repository has
    besides (a licence, an image) stay as they are, but not other weights: a loader could prefer them to the new ones.

    Args:
        folder: a complete output folder.
        repo_id: where to, as NAMESPACE/NAME.
        private: make the repository private; one that exists and is public is refused before anything is uploaded.
        commit_message: the first line of the commit.
        api: the client to use; by default one that reads the environment and the login cache.

    Raises:
        InputNotFound: the folder does not exist or holds no file.
        PublishFailed: the Hub refused, did not answer, or has something else than the folder afterwards.
    """
    paths = _published_files(folder)
    _check_name(repo_id)
    retry = _push_again(folder, repo_id, private)
    with translated_errors(f"Publishing {folder} to {repo_id} failed.", retry=retry, api=api):
        from huggingface_hub import CommitOperationAdd

        client = _client(api)
        # Not asking for "private" leaves the choice to the account's or the organisation's own default.
        client.create_repo(repo_id, private=True if private else None, exist_ok=True)
        head = _check_private(repo_id, client) if private else client.model_info(repo_id).sha
        before = _remote_files(client, repo_id, head)
        _check_other_weights(repo_id, sorted(before.keys() - paths.keys()))

        # `upload_folder` splits a folder into several commits; a checkpoint has to appear all at once.
        additions = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
        made = client.create_commit(repo_id, additions, commit_message=commit_message, parent_commit=head)

        after = _remote_files(client, repo_id, made.oid)
        problems = _differences(additions, after, kept=before.keys())
    if problems:
        raise PublishFailed(
            f"What {repo_id} has at commit {made.oid} is not what {folder} has: {_listing(problems)}.",
            why="The upload was damaged, or the repository has rules (such as a .gitignore) that change it.",
            next_step=retry,
        )
    total = sum(addition.upload_info.size for addition in additions)
    return Publication(repo_id, f"{client.endpoint}/{repo_id}", made.oid, len(additions), total)


@contextmanager
def translated_errors(what: str, *, retry: str | None = None, api: HfApi | None = None) -> Iterator[None]:
    """Turns the failures of the client, of the network and of reading the files into `PublishFailed`.

    Args:
        what: the first line of the message.
        retry: the last line, after the advice that fits the failure, where there is something to do again.
        api: the client in use, for the token that no message may show.
    """
    try:
        yield
    except PublishFailed:
        raise
    except Exception as error:
        if not _is_foreseen(error):
            raise
        cause = _telling(error)
        why = _redacted(_reason(cause), api)
        steps = [*_advice(cause), *([retry] if retry else [])]
        raise PublishFailed(what, why=why, next_step="\n".join(steps)) from error


def _is_foreseen(error: Exception) -> bool:
    # By package and not by class: the client's HTTP library, and with it the base of its errors, differs by version.
    package = type(error).__module__.partition(".")[0]
    return package in _CLIENT_PACKAGES or isinstance(error, (OSError, ValueError, RuntimeError))


def _telling(error: BaseException) -> BaseException:
    """The failure itself where the client wraps it: its upload threads raise `RuntimeError` from the real one."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("For more information check:")]
    return "\n".join(line for line in lines if line) or type(error).__name__


def _redacted(text: str, api: HfApi | None) -> str:
    for token in (api.token if api is not None else None, os.environ.get("HF_TOKEN")):
        if isinstance(token, str) and token:
            text = text.replace(token, "hf_***")
    return _SIGNATURE.sub(r"\1", _TOKEN.sub("hf_***", text))


def _advice(error: BaseException) -> Iterable[str]:
    """What to do about a failure, by its kind."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        yield LOG_IN
    elif isinstance(error, OfflineModeIsEnabled):
        yield "Unset HF_HUB_OFFLINE."
    elif isinstance(error, HFValidationError):
        yield "Name the repository as NAMESPACE/NAME."
    elif status == 403:
        yield "Use a token that may write to this namespace: hf auth login"
    elif status == 404:
        yield "Check the name of the repository, and that the token may see it."
    elif status in (409, 412):
        yield "Somebody else changed the repository meanwhile."
    elif status is not None and status >= 500:
        yield "The Hub itself has a problem; try again later."
    elif type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        yield "Check the connection, the proxy settings and HF_ENDPOINT."


def _client(api: HfApi | None) -> HfApi:
    from huggingface_hub import HfApi

    return api if api is not None else HfApi(library_name="corda-convert")


def _check_name(repo_id: str) -> None:
    """Refuses what is not NAMESPACE/NAME: without the namespace, where it goes would depend on who is logged in."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__

    reason = "It needs a namespace (a user or an organisation), a name, and ASCII characters only."
    try:
        validate_repo_id(repo_id)
        if "/" in repo_id and repo_id.isascii():
            return
    except HFValidationError as error:
        reason = _redacted(_reason(error), None)
    raise PublishFailed(
        f"'{_redacted(repo_id, None)}' does not name a repository on the Hub.",
        why=reason,
        next_step="Name it as NAMESPACE/NAME, for example alice/my-model.",
    )


def _check_account(repo_id: str, account: Mapping[str, Any]) -> None:
    """Refuses a token that is known to be unable to write to the namespace; what cannot be known is let through."""
    namespace = repo_id.split("/")[0]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    names = [account.get("name"), *(organisation.get("name") for organisation in account.get("orgs", []))]
    if role == "read":
        what, why = f"The token of {names[0]} cannot publish {repo_id}.", "It is a token that may only read."
    elif role == "write" and namespace not in names:
        what = f"The account {names[0]} cannot publish {repo_id}."
        why = f"'{namespace}' is neither the account nor one of its organisations: {', '.join(map(str, names))}."
    else:
        return
    raise PublishFailed(what, why=why, next_step="Log in with a token that may write there: hf auth login")


def _check_private(repo_id: str, client: HfApi) -> str | None:
    """The head of a repository that is private; `PublishFailed` for a public one."""
    info = client.model_info(repo_id)
    if not info.private:
        raise PublishFailed(
            f"{repo_id} exists and is public, but a private repository was asked for.",
            why="Whatever is published there can be read by everyone. No file was uploaded.",
            next_step="Make it private in its settings on the Hub, or choose another name.",
        )
    return info.sha


def _check_other_weights(repo_id: str, others: Iterable[str]) -> None:
    weights = [name for name in others if _WEIGHTS.fullmatch(name)]
    if weights:
        raise PublishFailed(
            f"{repo_id} has weights that the folder does not have: {_listing(weights)}.",
            why="They would stay beside the new ones, and a loader could take them instead. Nothing was uploaded.",
            next_step="Delete them on the Hub, or push to another repository.",
        )


def _published_files(folder: Path) -> dict[str, Path]:
    """Path in the repository to file, of everything in the folder that is not hidden."""
    if not folder.is_dir():
        raise InputNotFound(f"{folder} is not a folder.", next_step="Name the folder that a conversion wrote.")
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    shown = {n.as_posix(): path for n, path in names.items() if not any(part.startswith(".") for part in n.parts)}
    if not shown:
        raise InputNotFound(f"{folder} holds no file to publish.", next_step="Name the folder that a conversion wrote.")
    return shown


def _remote_files(client: HfApi, repo_id: str, revision: str | None) -> dict[str, RepoFile]:
    from huggingface_hub.hf_api import RepoFile

    entries = client.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differences(
    additions: Iterable[CommitOperationAdd], remote: Mapping[str, RepoFile], *, kept: Iterable[str]
) -> list[str]:
    """One phrase for each file that the Hub lacks, has otherwise, or has although nobody put it there."""
    problems = []
    sent = {addition.path_in_repo: addition for addition in additions}
    for name, addition in sent.items():
        stored, size = remote.get(name), addition.upload_info.size
        if stored is None:
            problems.append(f"{name} is missing")
        elif stored.size != size:
            problems.append(f"{name} has {stored.size} bytes instead of {size}")
        elif _stored_digest(stored) != _digest(addition, lfs=stored.lfs is not None):
            problems.append(f"{name} has another content")
    return problems + [f"{name} is not of this folder" for name in sorted(remote.keys() - sent.keys() - set(kept))]


def _stored_digest(stored: RepoFile) -> str:
    return stored.lfs.sha256 if stored.lfs is not None else stored.blob_id


def _digest(addition: CommitOperationAdd, *, lfs: bool) -> str:
    """The sha256 that the client uploaded under, or the git object id of a small file."""
    if lfs:
        return addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _listing(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + more


def _push_again(folder: Path, repo_id: str, private: bool) -> str:
    command = f"corda-convert push {shlex.quote(str(folder))} {repo_id}{' --private' if private else ''}"
    return f"The folder {folder} is complete; push it again with: {command}"
