"""Parts of files on the Hub by range requests, and what the Hub's failures mean for who reads."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from corda_convert import hub
from corda_convert.checkpoint.hub_id import HubId
from corda_convert.errors import CordaConvertError, DownloadFailed, InputNotFound, PublishFailed

_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 60.0
_TIMEOUT_SECONDS = 30.0
_PASSING = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class RangeReader:
    """Reads parts of one file of a commit.

    Attributes:
        asked: what the user named, for messages.
        name: the file's path in the repository.
        commit: the commit's id.
        nbytes: the file's size, as the Hub states it.
        what: what the user's name is of, for messages.
    """

    asked: HubId
    name: str
    commit: str
    nbytes: int
    what: str

    def read(self, offset: int, nbytes: int, take: Callable[[bytes], None]) -> None:
        """Gives the bytes `offset … offset + nbytes` to `take`, piece by piece. A dropped connection is taken up again.

        Raises `DownloadFailed`, or what `take` raises.
        """
        done = 0
        wait = _FIRST_WAIT_SECONDS
        with reading_errors(self.asked, self.what):
            for attempt in range(_ATTEMPTS):
                before = done
                try:
                    for piece in self._pieces(offset + done, nbytes - done):
                        take(piece)
                        done += len(piece)
                    if done == nbytes:
                        return
                    failure: Exception = DownloadFailed(
                        f"{self.name} of {self.asked} ended at byte {offset + done:,} of {self.nbytes:,}.",
                        why="The Hub sent less than it said.",
                        next_step="Run the same command again.",
                    )
                except Exception as error:
                    if not _is_passing(error):
                        raise
                    failure = error
                if attempt + 1 == _ATTEMPTS and done == before:
                    raise failure
                time.sleep(min(_asked_wait(failure) or wait, _LONGEST_WAIT_SECONDS))
                wait = _FIRST_WAIT_SECONDS if done > before else wait * 2
            raise failure

    def _pieces(self, offset: int, nbytes: int) -> Iterator[bytes]:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self.asked.repo_id, self.name, revision=self.commit)
        headers = build_hf_headers(library_name="corda-convert")
        headers |= {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True
        ) as answer:
            if answer.status_code >= 400:
                answer.read()
            hf_raise_for_status(answer)
            if answer.status_code != 206 and offset:
                raise DownloadFailed(
                    f"The Hub does not give parts of {self.name} of {self.asked}.",
                    why="HF_ENDPOINT names a server that knows no range requests.",
                    next_step=f"Download it first:  hf download {self.asked.repo_id}",
                )
            left = nbytes
            for piece in answer.iter_bytes():
                yield piece[:left]
                left -= min(left, len(piece))
                if not left:
                    return


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _PASSING
    return _is_of_connection(error)


def _is_of_connection(error: BaseException) -> bool:
    """By package and not by class: the client's HTTP library differs by version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _asked_wait(error: Exception) -> float | None:
    """The seconds that the Hub asks to wait."""
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(headers.get("Retry-After")))
    return None


@contextlib.contextmanager
def reading_errors(asked: HubId, what: str) -> Iterator[None]:
    """Turns what goes wrong with the Hub into one of our errors, with what to do about it."""
    try:
        with hub.translated_errors(f"{asked} cannot be read from the Hub."):
            yield
    except PublishFailed as failure:
        cause = failure.__cause__ or failure.__context__
        raise _told(asked, what, failure, cause) from None  # the client's own text may hold a token


def _told(asked: HubId, what: str, failure: PublishFailed, cause: Any) -> CordaConvertError:
    from huggingface_hub import errors

    while type(cause) is errors.LocalEntryNotFoundError and cause.__cause__ is not None:
        cause = cause.__cause__  # the client says that the cache lacks it, too
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return DownloadFailed(
            f"{asked.repo_id} is gated: its owner wants to be asked for access.",
            why=failure.why,
            next_step="Ask for it on the repository's page on the Hub, then log in with: hf auth login",
        )
    if (isinstance(cause, errors.RepositoryNotFoundError) or status == 401) and not _is_bad_token(cause):
        return InputNotFound(
            f"No such {what}: {asked}",
            why="It is no path here, and the Hub has no repository of that name that you may see.",
            next_step="Check the path or the name. If the repository is private, log in with: hf auth login",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return InputNotFound(
            f"{asked.repo_id} has no revision {asked.revision}.",
            why=_revisions(asked.repo_id),
            next_step="Give one of its branches, tags or commits after the @, or leave it out.",
        )
    return DownloadFailed(failure.what, why=failure.why, next_step=_advice(asked, what, cause, status))


def _is_bad_token(cause: Any) -> bool:
    """Whether the Hub does not know the token; without one, it answers 401 for what is not there."""
    text = str(getattr(cause, "server_message", "") or "") + str(cause)
    return "Invalid credentials" in text or "invalid token" in text.lower()


def _advice(asked: HubId, what: str, cause: BaseException, status: int | None) -> str:
    if _is_bad_token(cause):
        return "Log in with: hf auth login"
    if status == 403:
        return "Use a token that may read it: hf auth login"
    if status == 429:
        return "Wait some minutes; with a token the Hub allows more requests: hf auth login"
    if status is not None and status >= 500:
        return "The Hub itself has a problem; try again later."
    if isinstance(cause, OSError) and not _is_of_connection(cause) and status is None:
        return "Look after the Hub's cache (HF_HOME): its disk, its rights."
    return (
        f"If {asked} is meant to be a {what} here, check the path. Else check the connection, the proxy settings and "
        "HF_ENDPOINT; HF_HUB_OFFLINE=1 takes what the cache has."
    )


def _revisions(repo_id: str) -> str | None:
    """The branches and tags that there are, if the Hub tells."""
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):
        refs = HfApi(library_name="corda-convert").list_repo_refs(repo_id)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        return f"It has {', '.join(names[:8])}{' and more' if len(names) > 8 else ''}."
    return None


@contextlib.contextmanager
def client_progress(*, shown: bool) -> Iterator[None]:
    """The client's own progress bars, shown or not, inside."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, but not in an __all__
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
