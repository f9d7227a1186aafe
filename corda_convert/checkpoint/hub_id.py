"""Names of models and adapters on the Hub, and where a folder of the Hub's cache came from.

`OWNER/NAME[@REVISION][/SUBFOLDER]`, as huggingface_hub's file system writes it. A slash in a revision is written `%2F`, but
for `refs/pr/N` and `refs/convert/NAME`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/@]+))?"
    r"(?:/(?P<inside>[^@]+?))?/?",
    re.ASCII,
)
_SNAPSHOTS = "snapshots"


@dataclass(frozen=True, slots=True)
class HubId:
    """A folder or file on the Hub.

    Attributes:
        repo_id: `owner/name`.
        revision: branch, tag or commit, where one is asked for.
        inside: path of the folder or file in the repository; empty for the whole of it.
    """

    repo_id: str
    revision: str | None = None
    inside: str = ""

    @property
    def name(self) -> str:
        """Without the revision, as configs and cards name it."""
        return f"{self.repo_id}/{self.inside}" if self.inside else self.repo_id

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}" + (f"/{self.inside}" if self.inside else "")


def parse_hub_id(text: str) -> HubId | None:
    """The Hub id that a text may be, or None. Whether there is such a repository is another question."""
    match = _HUB_ID.fullmatch(text)
    if match is None:
        return None
    inside = match["inside"] or ""
    parts = [*match["repo"].split("/"), *inside.split("/")]
    if any(part in (".", "..") or "\0" in part or "\\" in part for part in parts) or ".." in match["repo"]:
        return None
    return HubId(match["repo"], unquote(match["revision"]) if match["revision"] else None, inside)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a path in the Hub's cache is of (`models--owner--name/snapshots/COMMIT/…`)."""

    repo_id: str
    commit: str
    inside: str

    @property
    def name(self) -> str:
        return f"{self.repo_id}/{self.inside}" if self.inside else self.repo_id


def snapshot_of(path: Path) -> Snapshot | None:
    """Where a path in the Hub's cache came from; None for any other path."""
    parts = path.absolute().parts  # not resolved: files there are links
    for place in range(len(parts) - 2, 0, -1):
        cache = parts[place - 1]
        if parts[place] == _SNAPSHOTS and cache.startswith("models--"):
            repo_id = cache.removeprefix("models--").replace("--", "/", 1)
            return Snapshot(repo_id, parts[place + 1], "/".join(parts[place + 2 :]))
    return None
