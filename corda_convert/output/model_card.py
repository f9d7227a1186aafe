"""The model card: front matter that the Hub understands, a snippet that runs, and what the receipt says."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corda_convert.output.card_tables import layer_table, module_table
from corda_convert.output.licence import Licence

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
        licence: of the base model, where its folder states one.
    """

    what: str
    base_model: str
    relation: str
    library_name: str
    tags: tuple[str, ...]
    snippet: str
    licence: Licence = Licence()  # noqa: RUF009 - it has no state


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
        license=card.licence.license,
        license_name=card.licence.name,
        license_link=card.licence.link,
        tags=["corda-convert", *card.tags],
    )
    name = repo_id or folder_name
    snippet = card.snippet.replace('"{repo}"', json.dumps(name, ensure_ascii=False))
    tool = receipt["tool"]
    actions = ", ".join(f"{count} {action}" for action, count in receipt["summary"]["tensors"].items())
    made = f"`corda-convert {receipt['command']}` {tool['version']} with torch {tool['torch']}, Python {tool['python']}"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        card.what,
        f"## Loading\n\n```python\n{snippet}\n```",
        f"## How it was made\n\n{made}. Tensors: {actions}. "
        "`corda_convert.json` lists every tensor with what was done to it, and every file with its SHA-256.",
        _options_table(receipt["options"]),
        *_layers(receipt.get("tensors", ())),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _layers(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    by_module, by_layer = module_table(tensors), layer_table(tensors)
    if not by_module:
        return []
    parts = ["## Layers", by_module]
    if by_layer:
        parts.append(f"<details><summary>Each layer</summary>\n\n{by_layer}\n\n</details>")
    return parts


def _options_table(options: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in options.items() if value not in (None, [], False)]
    return "\n".join(["| option | value |", "|---|---|", *rows]) if rows else ""


def _cell(value: object) -> str:
    text = ", ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)
    return f"`{text}`".replace("|", "\\|")
