"""The client of the Hub while it is used: what it fails with becomes our error, and no secret leaves it."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from corda_convert.errors import PublishFailed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG_IN = "Log in with: hf auth login"

ANSWER_SECONDS = 300.0
"""So long a server may say nothing before it is given up; the client by itself waits for ever."""

_TOKEN = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9.-]{10,}")
_USER_INFO = re.compile(r"(\w+://)[^/\s'\"@]*@")
_SIGNATURE = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]*")  # upload addresses authorise whoever holds them
_CLIENT_PACKAGES = {"huggingface_hub", "httpx", "httpx2", "hf_xet"}
_HTTP_PACKAGES = {"httpx", "httpx2"}


@contextmanager
def connected(what: str, *, retry: str | None = None, api: HfApi | None = None) -> Iterator[HfApi]:
    """A client for the block, which neither waits for ever nor shows a secret, and fails as `translated_errors` says."""
    with translated_errors(what, retry=retry, api=api), _redacting_logs(api):
        client = _client(api)
        with _impatient():
            yield client


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
        if not is_foreseen(error):
            raise
        cause = _telling(error)
        steps = [*_advice(cause), *([retry] if retry else [])]
        failure = PublishFailed(what, why=redacted(_reason(cause), api), next_step="\n".join(steps))
        raise failure from None  # the client's own text may hold a token, and a traceback would show it


def is_foreseen(error: BaseException) -> bool:
    """Whether the client, the network or the disk failed, and not this program."""
    # By package and not by class: the client's HTTP library, and with it the base of its errors, differs by version.
    package = type(error).__module__.partition(".")[0]
    return package in _CLIENT_PACKAGES or isinstance(error, (OSError, ValueError, RuntimeError))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the server answered with, if it did."""
    status = getattr(getattr(_telling(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def redacted(text: str, api: HfApi | None = None) -> str:
    """The text without tokens, without the user info of addresses, and without the signatures of upload addresses."""
    for secret in sorted(_secrets(api), key=len, reverse=True):
        text = text.replace(secret, "hf_***")
    return _SIGNATURE.sub(r"\1", _USER_INFO.sub(r"\1", _TOKEN.sub("hf_***", text)))


def _secrets(api: HfApi | None) -> set[str]:
    """What the client may send to prove who it is: tokens, and the password in HF_ENDPOINT."""
    from huggingface_hub import constants, get_token

    found = {os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    if api is not None and isinstance(api.token, str):
        found.add(api.token)
    with suppress(OSError, ValueError):
        found.add(get_token())
    with suppress(ValueError):
        password = urlsplit(constants.ENDPOINT).password
        found |= {password, unquote(password)} if password else set()
    return {secret.strip() for secret in found if secret and secret.strip()}


def _telling(error: BaseException) -> BaseException:
    """The failure itself where the client wraps it: its upload threads raise `RuntimeError` from the real one."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("For more information check:")]
    return "\n".join(line for line in lines if line) or type(error).__name__


def _advice(error: BaseException) -> Iterable[str]:
    """What to do about a failure, by its kind."""
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    status = status_of(error)
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
    elif status == 429:
        yield "The Hub was asked too often; wait some minutes."
    elif status is not None and status >= 500:
        yield "The Hub itself has a problem; try again later."
    elif type(error).__module__.partition(".")[0] in _HTTP_PACKAGES:
        yield "Check the connection, the proxy settings and HF_ENDPOINT."


def _client(api: HfApi | None) -> HfApi:
    from huggingface_hub import HfApi

    return api if api is not None else HfApi(library_name="corda-convert")


@contextmanager
def _impatient() -> Iterator[None]:
    """Gives the client's connection a limit for answers, where it has none."""
    from huggingface_hub import get_session

    session = get_session()
    before = session.timeout
    if before.read is None:
        session.timeout = ANSWER_SECONDS
    try:
        yield
    finally:
        session.timeout = before


class _Redacting(logging.Filter):
    """Takes the secrets out of what the client logs: it names upload addresses with their signatures."""

    def __init__(self, api: HfApi | None) -> None:
        super().__init__()
        self._api = api

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), self._api), None
        return True


@contextmanager
def _redacting_logs(api: HfApi | None) -> Iterator[None]:
    import huggingface_hub.utils.logging  # noqa: F401 - it makes the handlers

    redacting = _Redacting(api)
    handlers = list(logging.getLogger("huggingface_hub").handlers)
    for handler in handlers:
        handler.addFilter(redacting)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(redacting)
