"""A small Hugging Face Hub on loopback, for tests that publish with the real client over HTTP.

It keeps repositories in memory and speaks the part of the Hub's API that publishing and downloading need: accounts,
repositories, branches and pull requests, the upload modes, Git LFS with the `basic` and `multipart` transfers, atomic
commits, trees and `resolve`. It can be told to fail, to break off, to be slow, and to let somebody else be faster.
Nothing here imports huggingface_hub: what the client sends is checked, not shared.

    with running_hub() as hub:
        subprocess.run([...], env=hub.environment(tmp_path / "home"))
        assert hub.repositories["alice/model"].files()
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import io
import json
import os
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

MAIN = "main"
GITATTRIBUTES = b"".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n".encode()
    for pattern in ("*.bin", "*.gguf", "*.onnx", "*.pt", "*.pth", "*.safetensors", "*.zip")
)
REGULAR_LIMIT = 10 * 1024 * 1024  # larger files go to LFS whatever their name
POINTER_SIZE = 134

Change = Callable[[bytes], bytes]


class RequestRecord(NamedTuple):
    """One line of the request log."""

    method: str
    path: str


@dataclass(frozen=True, slots=True)
class Account:
    """Who a token belongs to, and what it may do (`role` is `read` or `write`)."""

    name: str
    organizations: tuple[str, ...] = ()
    role: str = "write"

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.organizations)

    def may_write(self, repo_id: str) -> bool:
        return self.owns(repo_id) and self.role == "write"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """The content of one path of a commit, and whether it is stored with LFS."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """The git object id, of the pointer when the content is stored with LFS."""
        if not self.lfs:
            return git_blob_id(self.content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return git_blob_id(pointer.encode())

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True, slots=True)
class Commit:
    """One state of a repository: the whole tree, not a difference."""

    oid: str
    parent: str | None
    title: str
    files: Mapping[str, StoredFile]
    description: str = ""


@dataclass(slots=True)
class Repository:
    """The state of one model repository. A new one has a first commit with `.gitattributes`, as on the Hub."""

    repo_id: str
    private: bool = False
    gated: bool = False
    ignored: tuple[str, ...] = ()
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs_objects: dict[str, bytes] = field(default_factory=dict)
    unverified: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add_commit(MAIN, "initial commit", {".gitattributes": StoredFile(GITATTRIBUTES)})

    def add_commit(
        self,
        branch: str,
        title: str,
        files: Mapping[str, StoredFile],
        *,
        onto: str | None = None,
        description: str = "",
    ) -> Commit:
        """Makes `files` the whole content of `branch`, in one step. A new branch begins after the commit `onto`."""
        parent = onto or self.branches.get(branch)
        listing = [self.repo_id, parent, title, len(self.commits), *((p, f.blob_id) for p, f in sorted(files.items()))]
        oid = hashlib.sha1(json.dumps(listing).encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent, title, dict(files), description)
        self.branches[branch] = oid
        return self.commits[oid]

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch name or a commit id stands for."""
        commit = self.commits.get(self.branches.get(revision, revision))
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return commit

    def add_folder(self, folder: Path, *, prefix: str = "", branch: str = MAIN) -> Commit:
        """A commit with the files of a local folder in addition."""
        files = dict(self.commits[self.branches[branch]].files) if branch in self.branches else {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, content = prefix + path.relative_to(folder).as_posix(), path.read_bytes()
            files[name] = StoredFile(content, lfs=self.uses_lfs(name, len(content)))
        return self.add_commit(branch, f"Add {folder.name}", files)

    def files(self, revision: str = MAIN) -> dict[str, bytes]:
        """Path to content of everything visible at `revision`, `.gitattributes` aside."""
        tree = self.resolve(revision).files
        return {path: stored.content for path, stored in tree.items() if path != ".gitattributes"}

    def history(self, branch: str = MAIN) -> list[Commit]:
        """The commits that were pushed to `branch`, oldest first, without the one that the creation makes."""
        found: list[Commit] = []
        oid: str | None = self.branches[branch]
        while oid is not None:
            found.append(self.commits[oid])
            oid = self.commits[oid].parent
        return found[-2::-1]

    def uses_lfs(self, path: str, size: int) -> bool:
        """Whether the Hub asks for this path through LFS: by the rules of `.gitattributes`, or by size."""
        rules = [line.split()[0] for line in GITATTRIBUTES.decode().splitlines()]
        return size > REGULAR_LIMIT or _matches(path, rules)

    def ignores(self, path: str) -> bool:
        """Whether a `.gitignore` of the repository, here `ignored`, leaves the path out of every upload."""
        return _matches(path, self.ignored)


@dataclass(slots=True)
class Failure:
    """The next `times` requests with `path_substring` in their path are answered with `status`."""

    path_substring: str
    status: int
    times: int
    method: str | None
    message: str

    def applies(self, method: str, path: str) -> bool:
        return self.times > 0 and self.path_substring in path and self.method in (None, method)


@dataclass(slots=True)
class Cut:
    """The next `times` answers to GET with `path_substring` in their path break off after `after` bytes."""

    path_substring: str
    after: int
    times: int


@dataclass(slots=True)
class Interference:
    """What happens to the next `times` requests with `path_substring` in their path, beside their answer.

    Attributes:
        first: is called before the request is answered.
        delay: seconds before it is answered.
        uploaded: after so many bytes of the request's body the connection is closed; it is not answered.
        is_lost: the request is answered, but the connection is closed before the answer.
    """

    path_substring: str
    method: str | None
    times: int
    first: Callable[[], object] | None
    delay: float
    uploaded: int | None
    is_lost: bool

    def applies(self, method: str, path: str) -> bool:
        return self.times > 0 and self.path_substring in path and self.method in (None, method)


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed request: `path` as sent, still percent-encoded."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Response:
    """What goes back. The body of an answer to HEAD is counted in Content-Length but not sent."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


class HubError(Exception):
    """An answer of the Hub that is not a success; `code` becomes X-Error-Code, from which the client derives a type."""

    def __init__(self, status: int, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message} | ({"X-Error-Code": self.code} if self.code else {})
        return Response.of_json({"error": self.message}, status=self.status, headers=headers)


Handler = Callable[["Hub", Request, Mapping[str, str]], Response]


class Route(NamedTuple):
    """Requests with `method` whose whole path matches `pattern` are answered by `handler`."""

    method: str
    pattern: re.Pattern[str]
    handler: Handler


ROUTES: list[Route] = []
PLACEHOLDERS = {
    "{repo}": r"(?P<repo>[\w.-]+/[\w.-]+)",
    "{revision}": r"(?P<revision>[^/]+)",
    "{branch}": r"(?P<branch>[^/]+)",
    "{oid}": r"(?P<oid>[0-9a-f]{64})",
    "{path}": r"(?P<path>.+)",
}


def route(method: str, template: str) -> Callable[[Handler], Handler]:
    """Adds the decorated handler to the routing table; it receives the unquoted placeholders of `template`."""
    pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for name, expression in PLACEHOLDERS.items():
        pattern = pattern.replace(name, expression)

    def register(handler: Handler) -> Handler:
        ROUTES.append(Route(method, re.compile(pattern), handler))
        return handler

    return register


class Hub:
    """The state of the server, and what tests may ask of it."""

    def __init__(self, account: Account) -> None:
        self.endpoint = ""
        self.accounts: dict[str, Account] = {}
        self.token = self.add_account(account)
        self.repositories: dict[str, Repository] = {}
        self.requests: list[RequestRecord] = []
        self.sent: Counter[str] = Counter()
        self.before_answers: list[Callable[[Request], None]] = []
        self._failures: list[Failure] = []
        self._cuts: list[Cut] = []
        self._corruptions: dict[str, Change] = {}
        self._interferences: list[Interference] = []
        self.part_bytes: int | None = None  # larger files go up in parts of this size
        self._tickets: dict[str, tuple[Repository, str]] = {}
        self._lock = threading.RLock()

    def add_account(self, account: Account) -> str:
        """Registers an account, or another token of one, and returns the new token."""
        token = f"hf_{secrets.token_hex(17)}"
        self.accounts[token] = account
        return token

    def add_repository(self, repo_id: str, *, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(repo_id, private=private)
        return repository

    def fail_next(
        self,
        path_substring: str,
        *,
        status: int = 500,
        times: int = 1,
        method: str | None = None,
        message: str = "Internal Server Error",
    ) -> None:
        """Answers the next `times` matching requests with `status`, whatever they ask."""
        self._failures.append(Failure(path_substring, status, times, method, message))

    def cut_next(self, path_substring: str, after: int, *, times: int = 1) -> None:
        """Closes the connection after `after` bytes of the body of the next `times` matching answers to GET."""
        self._cuts.append(Cut(path_substring, after, times))

    def cut(self, request: Request) -> int | None:
        """After how many bytes this answer breaks off, if it does."""
        for cut in self._cuts:
            if cut.times > 0 and request.method == "GET" and cut.path_substring in request.path:
                cut.times -= 1
                return cut.after
        return None

    def sent_of(self, path_substring: str) -> int:
        """The bytes of bodies that were sent for matching paths."""
        return sum(nbytes for path, nbytes in self.sent.items() if path_substring in path)

    def interfere_next(
        self,
        path_substring: str,
        *,
        method: str | None = None,
        times: int = 1,
        first: Callable[[], object] | None = None,
        delay: float = 0.0,
        uploaded: int | None = None,
        is_lost: bool = False,
    ) -> None:
        """Disturbs the next `times` matching requests, as `Interference` says."""
        self._interferences.append(Interference(path_substring, method, times, first, delay, uploaded, is_lost))

    def interference(self, method: str, path: str) -> Interference | None:
        """What happens to this request."""
        with self._lock:
            for found in self._interferences:
                if found.applies(method, path):
                    found.times -= 1
                    return found
        return None

    def corrupt_next(self, path: str, change: Change) -> None:
        """Stores `change(content)` instead of what the next commit says for `path`."""
        self._corruptions[path] = change

    def requests_to(self, path_substring: str, method: str | None = None) -> list[RequestRecord]:
        return [r for r in self.requests if path_substring in r.path and method in (None, r.method)]

    def environment(self, home: Path, *, token: str | None = "") -> dict[str, str]:
        """The environment of a subprocess that is to see this server as the Hub, and nothing of the real one.

        Args:
            home: the folder for the client's caches and token file.
            token: the token to be logged in with; the first account's when empty, none for `None`.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept.pop("TRANSFORMERS_OFFLINE", None)
        chosen = self.token if token == "" else token
        return kept | client_settings(self.endpoint, home) | ({"HF_TOKEN": chosen} if chosen else {})

    def answer(self, request: Request) -> Response:
        """Routes one request. Requests are answered one at a time, which makes commits atomic."""
        with self._lock:
            self.requests.append(RequestRecord(request.method, request.path))
            try:
                for look in self.before_answers:
                    look(request)
                self._raise_failure(request)
                return self._dispatch(request)
            except HubError as error:
                return error.response()

    def _raise_failure(self, request: Request) -> None:
        for failure in self._failures:
            if failure.applies(request.method, request.path):
                failure.times -= 1
                raise HubError(failure.status, failure.message)

    def _dispatch(self, request: Request) -> Response:
        for method, pattern, handler in ROUTES:
            if method == request.method and (match := pattern.fullmatch(request.path)):
                return handler(self, request, {k: unquote(v) for k, v in match.groupdict(default="").items()})
        raise HubError(404, f"No such route: {request.method} {request.path}")

    def account(self, request: Request) -> Account:
        """Who sends the request; 401 without a token that this server knows."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer":
            raise HubError(401, "Invalid username or password.")
        if token not in self.accounts:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.accounts[token]

    def readable(self, request: Request, repo_id: str) -> Repository:
        """The repository if the sender may see it; 404 as for a missing one otherwise, 401 for who has no token."""
        account = self.account(request) if "authorization" in request.headers else None
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and (account is None or not account.owns(repo_id))):
            if account is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(404, "Repository not found", code="RepoNotFound")
        return repository

    def downloadable(self, request: Request, repo_id: str) -> Repository:
        """The repository if the sender may see its files, too: of a gated one everybody sees the list of files alone."""
        repository = self.readable(request, repo_id)
        account = self.account(request) if "authorization" in request.headers else None
        if repository.gated and (account is None or not account.owns(repo_id)):
            status = 401 if account is None else 403
            raise HubError(status, f"Access to model {repo_id} is restricted", code="GatedRepo")
        return repository

    def writable(self, request: Request, repo_id: str) -> Repository:
        repository = self.readable(request, repo_id)
        if not self.account(request).may_write(repo_id):
            raise HubError(403, "You don't have the rights to write to this repository")
        return repository

    def contributable(self, request: Request, repo_id: str) -> Repository:
        """The repository if the sender may open a pull request there: whoever may read it and write anywhere."""
        account = self.account(request)
        if account.role != "write":
            raise HubError(403, "Your token may only read")
        return self.readable(request, repo_id)

    def new_ticket(self, repository: Repository, oid: str) -> str:
        """What stands for the signature of an upload address: it alone authorises one PUT, without a token."""
        ticket = secrets.token_hex(16)
        self._tickets[ticket] = (repository, oid)
        return ticket

    def ticketed(self, ticket: str, oid: str) -> Repository:
        """The repository into which this ticket lets `oid` be uploaded."""
        repository, allowed = self._tickets.get(ticket, (None, None))
        if repository is None or allowed != oid:
            raise HubError(403, "The signature does not match")
        return repository

    def as_stored(self, path: str, stored: StoredFile) -> StoredFile:
        """What a commit keeps for `path`: `stored`, unless the test asked for damage."""
        change = self._corruptions.pop(path, None)
        return stored if change is None else StoredFile(change(stored.content), stored.lfs)


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(PurePosixPath(path).name, pattern) for pattern in patterns)


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def client_settings(endpoint: str, home: Path) -> dict[str, str]:
    """The client's environment variables: plain LFS over HTTP, caches below `home`, no call to anywhere else."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",  # else the client asks the Hub for a registry to fill its user-agent
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request, _: Mapping[str, str]) -> Response:
    account = hub.account(request)
    return Response.of_json(
        {
            "type": "user",
            "id": f"id-{account.name}",
            "name": account.name,
            "fullname": account.name.title(),
            "orgs": [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organizations],
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}},
        }
    )


@route("POST", "/api/repos/create")
def create_repository(hub: Hub, request: Request, _: Mapping[str, str]) -> Response:
    account, asked = hub.account(request), request.json()
    if asked.get("type", "model") != "model":
        raise HubError(400, "Only model repositories exist here")
    repo_id = f"{asked.get('organization') or account.name}/{asked['name']}"
    if not account.may_write(repo_id):
        raise HubError(403, f"You don't have the rights to create a model under the namespace of {repo_id}")
    described = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id, "id": repo_id}
    if repo_id in hub.repositories:
        return Response.of_json({"error": "You already created this model repo", **described}, status=409)
    hub.add_repository(repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
    return Response.of_json(described)


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request, _: Mapping[str, str]) -> Response:
    front_matter = re.match(r"---\r?\n(.*?)\r?\n---", request.json()["content"], re.DOTALL)
    if front_matter is None:
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return Response.of_json({"errors": [], "warnings": [warning]})
    try:
        metadata = yaml.safe_load(front_matter[1])
        problem = None if isinstance(metadata, dict) else "the metadata is not a mapping"
    except yaml.YAMLError as error:
        problem = str(error)
    if problem is None:
        return Response.of_json({"errors": [], "warnings": []})
    return Response.of_json({"errors": [{"message": problem}], "warnings": []}, status=400)


@route("GET", "/api/models/{repo}")
@route("GET", "/api/models/{repo}/revision/{revision}")
def model_info(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    repository = hub.readable(request, found["repo"])
    commit = repository.resolve(found.get("revision", MAIN))
    return Response.of_json(
        {
            "_id": git_blob_id(repository.repo_id.encode())[:24],
            "id": repository.repo_id,
            "modelId": repository.repo_id,
            "author": repository.repo_id.split("/")[0],
            "sha": commit.oid,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [_sibling(p, f, blobs="blobs" in request.query) for p, f in sorted(commit.files.items())],
        }
    )


def _sibling(path: str, stored: StoredFile, *, blobs: bool) -> dict[str, Any]:
    described: dict[str, Any] = {"rfilename": path}
    if blobs:
        described |= {"size": len(stored.content), "blobId": stored.blob_id}
        if stored.lfs:
            described["lfs"] = {
                "size": len(stored.content),
                "sha256": stored.sha256,
                "pointerSize": POINTER_SIZE,
            }
    return described


@route("GET", "/api/models/{repo}/tree/{revision}")
@route("GET", "/api/models/{repo}/tree/{revision}/{path}")
def tree(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    commit = hub.readable(request, found["repo"]).resolve(found["revision"])
    root = PurePosixPath(found.get("path", ""))
    below = {p: f for p, f in commit.files.items() if root in PurePosixPath(p).parents}
    if found.get("path") and not below:
        raise HubError(404, f"{root} does not exist on {found['revision']}", code="EntryNotFound")
    folders = {str(parent) for p in below for parent in PurePosixPath(p).parents if root in parent.parents}
    recursive = request.query.get("recursive", "").lower() in ("true", "1")
    entries = [_tree_entry(p, f) for p, f in below.items()]
    entries += [{"type": "directory", "oid": git_blob_id(p.encode()), "size": 0, "path": p} for p in folders]
    shown = [e for e in entries if recursive or PurePosixPath(e["path"]).parent == root]
    return Response.of_json(sorted(shown, key=lambda entry: str(entry["path"])))


def _tree_entry(path: str, stored: StoredFile) -> dict[str, Any]:
    size = len(stored.content)
    described = {"type": "file", "oid": stored.blob_id, "size": size, "path": path}
    if stored.lfs:
        described["lfs"] = {"oid": stored.sha256, "size": size, "pointerSize": POINTER_SIZE}
    return described


@route("GET", "/api/models/{repo}/refs")
def references(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    branches = hub.readable(request, found["repo"]).branches
    listed = [
        {"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid}
        for n, oid in branches.items()
        if not n.startswith("refs/")
    ]
    return Response.of_json({"branches": listed, "converts": [], "tags": []})


@route("POST", "/api/models/{repo}/branch/{branch}")
def create_branch(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    repository, branch = hub.writable(request, found["repo"]), found["branch"]
    if branch in repository.branches:
        raise HubError(409, f"Reference already exists: {branch}")
    asked = request.json() if request.body else {}
    repository.branches[branch] = repository.resolve(asked.get("startingPoint", MAIN)).oid
    return Response.of_json({"success": True})


@route("POST", "/api/models/{repo}/preupload/{revision}")
def preupload(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    asks_for_pr = request.query.get("create_pr") == "1"
    repository = (hub.contributable if asks_for_pr else hub.writable)(request, found["repo"])
    existing = repository.resolve(found["revision"]).files
    described = []
    for asked in request.json()["files"]:
        path = asked["path"]
        mode = "lfs" if repository.uses_lfs(path, asked["size"]) else "regular"
        oid = existing[path].etag if path in existing else None
        ignore = repository.ignores(path)
        described.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
    return Response.of_json({"files": described, "commitOid": repository.resolve(found["revision"]).oid})


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    repository, asked = hub.contributable(request, found["repo"]), request.json()
    if "ref" in asked and not hub.account(request).may_write(found["repo"]):
        raise HubError(403, "You don't have the rights to write to this branch")
    if asked["operation"] != "upload" or "basic" not in asked["transfers"] or asked["hash_algo"] != "sha256":
        raise HubError(400, "Only basic uploads by sha256 exist here")
    described = []
    for wanted in asked["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repository.lfs_objects:
            upload = f"{hub.endpoint}/lfs-storage/{wanted['oid']}?Signature={hub.new_ticket(repository, wanted['oid'])}"
            verify = f"{hub.endpoint}/{repository.repo_id}.git/info/lfs/objects/verify"
            answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            if hub.part_bytes is not None and wanted["size"] > hub.part_bytes and "multipart" in asked["transfers"]:
                answer["actions"]["upload"] = _in_parts(hub, repository, wanted)
        described.append(answer)
    return Response.of_json({"transfer": "basic", "objects": described})


@route("PUT", "/lfs-storage/{oid}")
def lfs_upload(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    if "authorization" in request.headers:
        raise HubError(400, "Only one authorisation is allowed: the token was sent to the storage")
    repository = hub.ticketed(request.query.get("Signature", ""), found["oid"])
    repository.unverified[found["oid"]] = request.body
    return Response(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def _in_parts(hub: Hub, repository: Repository, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The upload action of a file that goes up in parts: an address for each, and one that puts them together."""
    assert hub.part_bytes is not None
    oid, signature = wanted["oid"], f"Signature={hub.new_ticket(repository, wanted['oid'])}"
    parts = range(1, -(-wanted["size"] // hub.part_bytes) + 1)
    addresses = {str(part): f"{hub.endpoint}/lfs-part/{oid}?{signature}&part={part}" for part in parts}
    header = {"chunk_size": str(hub.part_bytes), **addresses}
    return {"href": f"{hub.endpoint}/lfs-parts/{oid}?{signature}", "header": header}


@route("PUT", "/lfs-part/{oid}")
def lfs_upload_part(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    repository = hub.ticketed(request.query.get("Signature", ""), found["oid"])
    repository.parts.setdefault(found["oid"], {})[int(request.query["part"])] = request.body
    return Response(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@route("POST", "/lfs-parts/{oid}")
def lfs_join_parts(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    repository = hub.ticketed(request.query.get("Signature", ""), found["oid"])
    parts = repository.parts.pop(found["oid"], {})
    etags = {each["partNumber"]: each["etag"].strip('"') for each in request.json()["parts"]}
    if etags != {part: hashlib.md5(content).hexdigest() for part, content in parts.items()}:
        raise HubError(400, "The parts are not those that were uploaded")
    repository.unverified[found["oid"]] = b"".join(parts[part] for part in sorted(parts))
    return Response.of_json({"success": True})


@route("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    repository, claimed = hub.contributable(request, found["repo"]), request.json()
    content = repository.unverified.pop(claimed["oid"], None)
    if content is None:
        raise HubError(404, f"Object {claimed['oid']} was not uploaded")
    if len(content) != claimed["size"] or hashlib.sha256(content).hexdigest() != claimed["oid"]:
        raise HubError(422, f"Object {claimed['oid']} has another size or another sha256")
    repository.lfs_objects[claimed["oid"]] = content
    return Response.of_json({"success": True})


@route("POST", "/api/models/{repo}/commit/{revision}")
def commit(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    asks_for_pr = request.query.get("create_pr") == "1"
    repository = (hub.contributable if asks_for_pr else hub.writable)(request, found["repo"])
    branch = found["revision"]
    if branch not in repository.branches:
        raise HubError(404, f"Invalid rev id: {branch}", code="RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    if header["key"] != "header" or not header["value"]["summary"]:
        raise HubError(400, "The first line is not a header with a summary")
    head = repository.resolve(branch)
    parent = header["value"].get("parentCommit", head.oid)
    if asks_for_pr:
        head = repository.resolve(parent)
    elif parent != head.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for operation in operations:
        _apply(hub, repository, files, operation["key"], operation["value"])
    number = 1 + sum(name.startswith("refs/pr/") for name in repository.branches)
    made = repository.add_commit(
        f"refs/pr/{number}" if asks_for_pr else branch,
        header["value"]["summary"],
        files,
        onto=head.oid,
        description=header["value"].get("description", ""),
    )
    page = f"{hub.endpoint}/{repository.repo_id}"
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{page}/commit/{made.oid}", "hookOutput": ""}
    return Response.of_json(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if asks_for_pr else {}))


def _apply(hub: Hub, repository: Repository, files: dict[str, StoredFile], key: str, value: dict[str, Any]) -> None:
    """Applies one operation of a commit to `files`."""
    path = value["path"]
    if key == "file":
        content = _inline_content(repository, value)
        files[path] = hub.as_stored(path, StoredFile(content))
    elif key == "lfsFile":
        stored = repository.lfs_objects.get(value["oid"])
        if stored is None or len(stored) != value.get("size", len(stored)):
            raise HubError(400, f"The LFS object of {path} was not uploaded, or has another size")
        files[path] = hub.as_stored(path, StoredFile(stored, lfs=True))
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise HubError(404, "A file with this name doesn't exist", code="EntryNotFound")
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise HubError(400, f"Unknown operation {key}")


def _inline_content(repository: Repository, value: dict[str, Any]) -> bytes:
    if value["encoding"] != "base64":
        raise HubError(400, f"Unknown encoding {value['encoding']}")
    try:
        content = base64.b64decode(value["content"], validate=True)
    except binascii.Error as error:
        raise HubError(400, f"{value['path']} is not base64") from error
    # The Hub, too, takes an empty file inline whatever its name.
    if content and repository.uses_lfs(value["path"], len(content)):
        raise HubError(400, f"{value['path']} must be uploaded with LFS")
    return content


@route("HEAD", "/{repo}/resolve/{revision}/{path}")
@route("GET", "/{repo}/resolve/{revision}/{path}")
def resolve(hub: Hub, request: Request, found: Mapping[str, str]) -> Response:
    commit = hub.downloadable(request, found["repo"]).resolve(found["revision"])
    stored = commit.files.get(found["path"])
    if stored is None:
        raise HubError(404, "Entry not found", code="EntryNotFound")
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{stored.etag}"', "Accept-Ranges": "bytes"}
    if stored.lfs:
        headers |= {"X-Linked-Etag": f'"{stored.sha256}"', "X-Linked-Size": str(len(stored.content))}
    return _ranged(stored.content, request.headers.get("range"), headers)


def _ranged(content: bytes, asked: str | None, headers: Mapping[str, str]) -> Response:
    """All of `content`, or the one range that was asked for."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
    if match is None or match.groups() == ("", ""):
        return Response(200, content, headers)
    size = len(content)
    first, last = (int(group) if group else None for group in match.groups())
    if first is None:
        start, stop = max(0, size - (last or 0)), size
    else:
        start, stop = first, size if last is None else min(last + 1, size)
    if start >= stop:
        raise HubError(416, "The range is outside the file")
    return Response(206, content[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


class _Server(ThreadingHTTPServer):
    """Remembers its open connections, so that closing it ends the kept-alive ones and their threads."""

    daemon_threads = False

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        hub.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """Stops listening, ends what is open and waits for the threads."""
        self.shutdown()
        with self._open_lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _HubHandler(BaseHTTPRequestHandler):
    """Turns HTTP into `Request` and `Response`."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment, and at once: else each answer waits for a delayed acknowledgement
    disable_nagle_algorithm = True
    server: _Server

    def do_GET(self) -> None:
        found = self.server.hub.interference(self.command, urlsplit(self.path).path)
        if found is None:
            return self._serve()
        threading.Event().wait(found.delay)  # not `time.sleep`, which a test may have made short
        if found.uploaded is not None:
            self.rfile.read(found.uploaded)
            self.close_connection = True
            return None
        if found.first is not None:
            found.first()
        if not found.is_lost:
            return self._serve()
        stream, self.wfile = self.wfile, io.BytesIO()
        self._serve()
        self.wfile, self.close_connection = stream, True
        return None

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client went away, or the server is closing
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """The log is `Hub.requests`."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, address.path, query, headers, self._read_body())
        response = self.server.hub.answer(request)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            cut = self.server.hub.cut(request)
            body = response.body[:cut]
            self.wfile.write(body)
            self.server.hub.sent[address.path] += len(body)
            if cut is not None and cut < len(response.body):
                self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            length = int(self.headers.get("Content-Length", "0"))
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionError("the client went away")  # what it sent is no upload
            return body
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)


@contextmanager
def running_hub(account: Account | None = None) -> Iterator[Hub]:
    """A Hub that answers at `.endpoint` while the context lasts; `.token` is that of `account` (user `alice`)."""
    hub = Hub(account or Account("alice", organizations=("wonderland",)))
    server = _Server(hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="hub-server")
    thread.start()
    try:
        yield hub
    finally:
        server.close()
        thread.join()
