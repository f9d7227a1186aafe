"""The model card: front matter that the Hub understands, a snippet that runs, and what the receipt says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


@dataclass(frozen=True, slots=True)
class Card:
    """What a card says beside the receipt.

    Attributes:
        title: the first heading, after the repository's or folder's name.
        what: one or two sentences.
        base_model: name of the base; put into the front matter if it has the form of a Hub id.
        relation: `base_model_relation` of the Hub: finetune, adapter, quantized, merge.
        library_name: transformers or peft.
        tags: tags beside `corda-convert`.
        snippet: Python that loads the result, with `"{repo}"` where its name goes.
        license: the license's identifier, where the source states one.
    """

    what: str
    base_model: str
    relation: str
    library_name: str
    tags: tuple[str, ...]
    snippet: str
    license: str | None = None


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a Hub id, `owner/name`."""
    return bool(_HUB_ID.match(name)) and ".." not in name


def render_card(card: Card, receipt: Mapping[str, Any], *, repo_id: str | None, folder_name: str) -> str:
    """The text of `README.md`. The receipt may still lack its list of files."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=card.base_model if is_hub_id(card.base_model) else None,
        base_model_relation=card.relation if is_hub_id(card.base_model) else None,
        library_name=card.library_name,
        license=card.license,
        tags=["corda-convert", *card.tags],
    )
    name = repo_id or folder_name
    snippet = card.snippet.replace('"{repo}"', json.dumps(name, ensure_ascii=False))
    tool = receipt["tool"]
    actions = ", ".join(f"{count} {action}" for action, count in receipt["summary"]["tensors"].items())
    made = f"`corda-convert {receipt['command']}` {tool['version']} with torch {tool['torch']}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        card.what,
        f"## Loading\n\n```python\n{snippet}\n```",
        f"## How it was made\n\n{made}. Tensors: {actions}. "
        "`corda_convert.json` lists every tensor with what was done to it, and every file with its SHA-256.",
        _options_table(receipt["options"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _options_table(options: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in options.items() if value not in (None, [], False)]
    return "\n".join(["| option | value |", "|---|---|", *rows]) if rows else ""


def _cell(value: object) -> str:
    text = ", ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
    return f"`{text}`".replace("|", "\\|")
