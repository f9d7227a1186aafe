"""Whether a push could succeed, asked before any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from corda_convert.errors import PublishFailed
from corda_convert.hub.client import connected, redacted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from corda_convert.hub.publishing import Destination


def check_access(destination: Destination, *, api: HfApi | None = None) -> None:
    """Refuses what would make a later push fail, in a few requests and without changing anything on the Hub.

    Args:
        destination: where the push will go.
        api: the client to use; by default one that reads the environment and the login cache.

    Raises:
        PublishFailed: the name is not one, there is no token, the Hub does not accept it or does not answer, the token
            cannot write to the namespace, or the repository is public although a private one is asked for.
    """
    repo_id = destination.repo_id
    check_name(repo_id)
    with connected(f"The Hub cannot be used to publish {repo_id}.", api=api) as client:
        _check_account(destination, client.whoami())
        if destination.private and client.repo_exists(repo_id):
            check_private(repo_id, client)


def check_name(repo_id: str) -> None:
    """Refuses what is not NAMESPACE/NAME: without the namespace, where it goes would depend on who is logged in."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in an __all__

    reason = "It needs a namespace (a user or an organisation), a name, and ASCII characters only."
    try:
        validate_repo_id(repo_id)
        if "/" in repo_id and repo_id.isascii():
            return
    except HFValidationError as error:
        reason = redacted(str(error))
    raise PublishFailed(
        f"'{redacted(repo_id)}' does not name a repository on the Hub.",
        why=reason,
        next_step="Name it as NAMESPACE/NAME, for example alice/my-model.",
    )


def _check_account(destination: Destination, account: Mapping[str, Any]) -> None:
    """Refuses a token that is known to be unable to write to the namespace; what cannot be known is let through.

    A pull request may be opened in anybody's repository.
    """
    repo_id = destination.repo_id
    namespace = repo_id.split("/")[0]
    role = ((account.get("auth") or {}).get("accessToken") or {}).get("role")
    names = [account.get("name"), *(organisation.get("name") for organisation in account.get("orgs", []))]
    if role == "read":
        what, why = f"The token of {names[0]} cannot publish {repo_id}.", "It is a token that may only read."
    elif role == "write" and namespace not in names and not destination.create_pr:
        what = f"The account {names[0]} cannot publish {repo_id}."
        why = f"'{namespace}' is neither the account nor one of its organisations: {', '.join(map(str, names))}."
    else:
        return
    raise PublishFailed(what, why=why, next_step="Log in with a token that may write there: hf auth login")


def check_private(repo_id: str, client: HfApi) -> None:
    """`PublishFailed` for a repository that is public."""
    if not client.model_info(repo_id).private:
        raise PublishFailed(
            f"{repo_id} exists and is public, but a private repository was asked for.",
            why="Whatever is published there can be read by everyone. No file was uploaded.",
            next_step="Make it private in its settings on the Hub, or choose another name.",
        )
