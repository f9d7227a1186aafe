"""The licence of a model, from the card or the config in its folder: what is made of the model is under it, too."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD_FILE = "README.md"
_MOST_BYTES = 1 << 16
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+_-]*")
_ADDRESS = re.compile(r"https?://\S+")


@dataclass(frozen=True, slots=True)
class Licence:
    """What a card's front matter says of it.

    Attributes:
        license: the Hub's identifier; `other` for one that it has none for.
        name: of that other one.
        link: where its text is: an address, or a file's name.
    """

    license: str | None = None
    name: str | None = None
    link: str | None = None

    def seen_from(self, base_id: str | None) -> Licence:
        """The same for a repository that lacks the base's files: a file's name becomes an address, or goes."""
        if self.link is None or _ADDRESS.fullmatch(self.link):
            return self
        link = None if base_id is None else f"https://huggingface.co/{base_id}/blob/main/{self.link}"
        return Licence(self.license, self.name, link)


def licence_of(folder: Path) -> Licence:
    """What the card in the folder says, else its config; nothing where neither does, or cannot be read."""
    card = _front_matter(folder / CARD_FILE)
    said = card.get("license") or _json(folder / "config.json").get("license")
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    if not isinstance(said, str) or not said.strip():
        return Licence()
    name, link = (_text(card.get(key)) for key in ("license_name", "license_link"))
    if _IDENTIFIER.fullmatch(said):
        return Licence(said, name, link)
    slug = re.sub(r"[^a-z0-9.+]+", "-", said.lower()).strip("-")
    return Licence("other", name or slug or None, link)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value and len(value) < 500 and "\n" not in value else None


def _front_matter(path: Path) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped,unused-ignore]  # comes with huggingface_hub

    try:
        with path.open("rb") as stream:
            found = _FRONT_MATTER.match(stream.read(_MOST_BYTES).decode("utf-8", errors="replace"))
        content = yaml.safe_load(found[1]) if found is not None else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
