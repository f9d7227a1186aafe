"""One publication: the weights first, file by file, then one commit that makes everything visible together."""

from __future__ import annotations

import shlex
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.errors import PublishFailed, some
from corda_convert.hub.access import check_name, check_private
from corda_convert.hub.client import connected, is_foreseen, redacted, status_of
from corda_convert.hub.files import (
    PublishedFile,
    changed_files,
    check_other_weights,
    differences,
    published_files,
    remote_files,
)

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

COMMIT_ATTEMPTS = 3
COMMIT_PAUSE_SECONDS = 0.5
"""How often a commit is tried while others commit files of their own, and what is waited in between."""

_AT_ONCE = 5
"""So many files are uploaded at the same time: the client's own number of threads."""


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a publication goes.

    Attributes:
        repo_id: the repository, as NAMESPACE/NAME.
        private: make the repository private; one that exists and is public is refused before anything is uploaded.
        revision: the branch, made from the default one if there is none of that name; None for the default branch.
        create_pr: open a pull request against the branch instead of committing to it.
        message: the first line of the commit; None leaves it to the command.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None

    def __str__(self) -> str:
        return f"{self.repo_id} (branch {self.revision})" if self.revision else self.repo_id

    @property
    def options(self) -> str:
        """The options of `push` that lead here, with a space before each."""
        flags = [" --private"] if self.private else []
        flags += [f" --revision {shlex.quote(self.revision)}"] if self.revision else []
        flags += [" --create-pr"] if self.create_pr else []
        flags += [f" --commit-message {shlex.quote(self.message)}"] if self.message else []
        return "".join(flags)


@dataclass(frozen=True, slots=True)
class Publication:
    """What was published, and where.

    Attributes:
        repo_id: the repository.
        url: its page, that of the branch where one was named.
        commit: what holds the files, checked against them.
        files: how many there are.
        total_bytes: their size.
        is_new: False if the repository had all of it already, so that there was nothing to commit.
        pull_request: its address, if one was opened.
    """

    repo_id: str
    url: str
    commit: str
    files: int
    total_bytes: int
    is_new: bool = True
    pull_request: str | None = None


def push_folder(
    folder: Path,
    destination: Destination,
    *,
    description: str = "",
    files: Sequence[PublishedFile] | None = None,
    api: HfApi | None = None,
) -> Publication:
    """Uploads the files of a folder in one commit and compares what the Hub then has with what the folder has.

    The repository is made if there is none. Hidden files and folders are left out. Files that the repository has
    besides (a licence, an image) stay as they are, but not other weights: a loader could prefer them to the new ones.
    What the Hub has already, of this push or an earlier one, is not uploaded again.

    Args:
        folder: a complete output folder.
        destination: where to.
        description: what the commit says below its first line.
        files: the folder's files, where their digests are known already.
        api: the client to use; by default one that reads the environment and the login cache.

    Raises:
        InputNotFound: the folder does not exist or holds no file.
        PublishFailed: the Hub refused, did not answer, or has something else than the folder afterwards.
    """
    check_name(destination.repo_id)
    retry = push_again(folder, destination)
    with connected(f"Publishing {folder} to {destination} failed.", retry=retry, api=api) as client:
        found = published_files(folder) if files is None else files
        upload = Upload(client, destination, [file.name for file in found])
        weights = [file for file in found if file.is_weights]
        for begin in range(0, len(weights), _AT_ONCE):
            upload.send(weights[begin : begin + _AT_ONCE])
        return upload.commit(found, description=description, source=str(folder), retry=retry)


def _raise_unless_answered(status: int | None, destination: Destination, page: str) -> None:
    """Raises `PublishFailed` where it is not known whether a pull request was opened."""
    if status is None or status >= 500:
        raise PublishFailed(
            f"The Hub did not confirm the commit of a pull request in {destination}.",
            why="The pull request may have been opened, or not.",
            next_step=f"Look for it at {redacted(page)} before you push again.",
        )


def push_again(folder: Path, destination: Destination) -> str:
    """What to do after a push that failed."""
    command = f"corda-convert push {shlex.quote(str(folder))} {destination.repo_id}{destination.options}"
    return f"The folder {folder} is complete; push it again with: {command}"


class Upload:
    """A publication in the making. Nothing of it is visible before its commit.

    On creation the repository and the branch are made, where there are none. The methods fail with the client's
    exceptions, `PublishFailed` beside them: they belong in a block of `connected`.
    """

    def __init__(self, client: HfApi, destination: Destination, names: Collection[str]) -> None:
        self.destination = destination
        self._client = client
        self._names = frozenset(names)
        self._additions: dict[str, CommitOperationAdd] = {}
        self._make_repository()
        self._head, self._before = self._take_branch()

    def send(self, files: Iterable[PublishedFile]) -> list[str]:
        """Uploads what the Hub lacks of these. Returns the names of those that it now keeps for the commit."""
        new = {file.name: self._addition(file) for file in files if not self._is_there(file)}
        if new:
            self._client.preupload_lfs_files(
                self.destination.repo_id,
                list(new.values()),
                revision=self.destination.revision,
                create_pr=self.destination.create_pr,
            )
        self._additions |= new
        # The client lets go of the content of what it has uploaded; a small text file waits for the commit instead.
        return [file.name for file in files if file.name not in new or new[file.name].path_or_fileobj == b""]

    def adopt(self, files: Sequence[PublishedFile]) -> list[PublishedFile]:
        """Takes up files that an earlier run has sent, and that are not here any more. Returns those that the Hub keeps."""
        from huggingface_hub import CommitOperationAdd, constants
        from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

        kept = [file for file in files if self._is_there(file)]
        asked = {
            file.sha256: UploadInfo(size=file.nbytes, sample=b"", sha256=bytes.fromhex(file.sha256))
            for file in files
            if file not in kept
        }
        if not asked:
            return kept
        answers = post_lfs_batch_info(
            asked.values(),
            self._client.token if isinstance(self._client.token, str) else None,
            constants.REPO_TYPE_MODEL,
            self.destination.repo_id,
            endpoint=self._client.endpoint,
        )[0]
        stored = {answer["oid"] for answer in answers if not answer.get("actions")}
        for file in files:
            if file.sha256 in asked and file.sha256 in stored:
                addition = CommitOperationAdd(file.name, b"")
                addition.upload_info = asked[file.sha256]
                addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True
                self._additions[file.name] = addition
                kept.append(file)
        return kept

    def commit(self, files: Sequence[PublishedFile], *, description: str, source: str, retry: str) -> Publication:
        """Commits all files at once, and compares what the Hub then has with them."""
        changed = [file.name for file in files if file.is_changed()]
        if changed:
            raise PublishFailed(
                f"{some(changed)} changed while it was uploaded.",
                why="Something else writes to the folder. Nothing of it was made visible.",
                next_step=retry,
            )
        for file in files:
            if file.name not in self._additions and not self._is_there(file):
                self._additions[file.name] = self._addition(file)
        commit, pull_request, revision = self._committed(files, description, retry)
        after = remote_files(self._client, self.destination.repo_id, revision)
        problems = differences(files, after, kept=self._before.keys())
        if problems:
            raise PublishFailed(
                f"What {self.destination.repo_id} has at commit {commit} is not what {source} has: {some(problems)}.",
                why="The upload was damaged, or the repository has rules (such as a .gitignore) that change it.",
                next_step=retry,
            )
        return Publication(
            repo_id=self.destination.repo_id,
            url=redacted(self._url()),
            commit=commit,
            files=len(files),
            total_bytes=sum(file.nbytes for file in files),
            is_new=bool(self._additions),
            pull_request=redacted(pull_request) if pull_request else None,
        )

    def _make_repository(self) -> None:
        where = self.destination
        if not where.create_pr or not self._client.repo_exists(where.repo_id):
            # Not asking for "private" leaves the choice to the account's or the organisation's own default.
            self._client.create_repo(where.repo_id, private=True if where.private else None, exist_ok=True)
        if where.private:
            check_private(where.repo_id, self._client)

    def _take_branch(self) -> tuple[str | None, dict[str, RepoFile]]:
        """The branch's head and files. A new branch begins with the default one's."""
        from huggingface_hub.errors import RevisionNotFoundError

        repo_id, branch = self.destination.repo_id, self.destination.revision
        try:
            head, is_new = self._client.model_info(repo_id, revision=branch).sha, False
        except RevisionNotFoundError:
            head, is_new = self._client.model_info(repo_id).sha, True
        before = remote_files(self._client, repo_id, head)
        check_other_weights(str(self.destination), before.keys() - self._names)
        if is_new and branch is not None:
            self._client.create_branch(repo_id, branch=branch, revision=head, exist_ok=True)
        return head, before

    def _is_there(self, file: PublishedFile) -> bool:
        stored = self._before.get(file.name)
        return stored is not None and file.is_stored_as(stored)

    def _addition(self, file: PublishedFile) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        if file.content is None:
            raise PublishFailed(
                f"{file.name} is neither here nor in {self.destination}.",
                why="The folder was made with --stream, which leaves the weights on the Hub only.",
                next_step="Run the command that made it again, without --stream or with --push-to this repository.",
            )
        addition = CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # else the client reads the file once more for it
        return addition

    def _committed(
        self, files: Sequence[PublishedFile], description: str, retry: str
    ) -> tuple[str, str | None, str | None]:
        """The commit with all additions, the pull request's address, and the revision to look at."""
        if not self._additions:
            return str(self._head), None, self._head
        attempt = 0
        while True:
            attempt += 1
            try:
                made = self._client.create_commit(
                    self.destination.repo_id,
                    list(self._additions.values()),
                    commit_message=self.destination.message or "Upload with corda-convert",
                    commit_description=description,
                    revision=self.destination.revision,
                    create_pr=self.destination.create_pr,
                    parent_commit=self._head,
                )
            except Exception as error:
                if not is_foreseen(error):
                    raise
                status = status_of(error)
                if status is not None and status < 500 and status not in (409, 412):
                    raise
                if self.destination.create_pr:
                    _raise_unless_answered(status, self.destination, self._url())
                    raise
                if (head := self._head_with(files)) is not None:  # it was made, and only the answer was lost
                    return head, None, head
                if status not in (409, 412) or attempt == COMMIT_ATTEMPTS:
                    raise
                self._follow(retry)
                time.sleep(COMMIT_PAUSE_SECONDS * attempt)
            else:
                return made.oid, made.pr_url, made.pr_revision or made.oid

    def _head_with(self, files: Sequence[PublishedFile]) -> str | None:
        """The branch's new head, if it has all the files as they are to be."""
        head = self._client.model_info(self.destination.repo_id, revision=self.destination.revision).sha
        if head is None or head == self._head:
            return None
        remote = remote_files(self._client, self.destination.repo_id, head)
        return None if differences(files, remote, kept=remote.keys()) else head

    def _follow(self, retry: str) -> None:
        """Takes the new head of the branch, unless what others committed touches the files to come."""
        head, now = self._take_branch()
        touched = changed_files(self._before, now) & self._names
        if touched:
            raise PublishFailed(
                f"Somebody else changed {some(sorted(touched))} in {self.destination} meanwhile.",
                why="Nothing of this folder was made visible.",
                next_step=retry,
            )
        self._head, self._before = head, now

    def _url(self) -> str:
        page = f"{self._client.endpoint}/{self.destination.repo_id}"
        return f"{page}/tree/{self.destination.revision}" if self.destination.revision else page
