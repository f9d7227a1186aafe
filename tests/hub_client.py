"""The real client of this process, set to a Hub on loopback."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub, client_settings, running_hub
from huggingface_hub import constants

GETADDRINFO = socket.getaddrinfo


@contextmanager
def hub_for_this_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub, with the client of this process configured as `Hub.environment` configures that of a child."""
    with running_hub() as server:
        for name, value in client_settings(server.endpoint, home).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
        # The client read its environment when it was first imported, possibly by another test module.
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        for name, value in (("XET", True), ("TELEMETRY", True), ("PROGRESS_BARS", True), ("IMPLICIT_TOKEN", False)):
            monkeypatch.setattr(constants, f"HF_HUB_DISABLE_{name}", value)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket, "getaddrinfo", only_loopback)
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def only_loopback(host: str, *arguments: object, **keywords: object):
    """Fails the test, rather than the request, if the client of this process looks further than this machine."""
    assert host == "127.0.0.1", f"the client looked up {host}"
    return GETADDRINFO(host, *arguments, **keywords)
