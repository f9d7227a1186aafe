"""An output that is pushed after it was made: what in it goes by its folder's name goes by the repository's there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.checkpoint.folder import INITIAL_ADAPTER_FOLDER, RECEIPT_FILE, read_json
from corda_convert.errors import MalformedFile
from corda_convert.hub import PublishedFile, published_content
from corda_convert.output.licence import CARD_FILE
from corda_convert.output.receipt import encode_receipt
from corda_convert.output.side_files import json_file

_INITIAL_CONFIG = f"{INITIAL_ADAPTER_FOLDER}/{CONFIG_FILE}"


def named_for(
    repo_id: str, folder: Path, receipt: Mapping[str, Any], files: Sequence[PublishedFile]
) -> list[PublishedFile]:
    """The files as they are published: card, initial adapter and receipt name the repository, where they named the folder.

    The card's snippet and `base_model_name_or_path` of `corda_init` would lead nowhere else. The receipt that goes with them
    has their new digests, and `published_as`; the folder itself stays as it is. Raises `MalformedFile`.
    """
    contents = _renamed(repo_id, folder, {file.name for file in files})
    if not contents:
        return list(files)
    new = {name: published_content(name, content) for name, content in contents.items()}
    entries = [
        {**entry, "bytes": new[entry["name"]].nbytes, "sha256": new[entry["name"]].sha256}
        if entry["name"] in new
        else entry
        for entry in receipt["files"]
    ]
    try:
        text = encode_receipt({**receipt, "files": entries, "published_as": repo_id})
    except ValueError as error:
        raise MalformedFile(
            f"{folder / RECEIPT_FILE} is damaged: {error}.", next_step="Make the folder again."
        ) from None
    new[RECEIPT_FILE] = published_content(RECEIPT_FILE, text.encode("utf-8"))
    return [new.get(file.name, file) for file in files]


def _renamed(repo_id: str, folder: Path, names: set[str]) -> dict[str, bytes]:
    """The contents that name the folder, with the repository's name in its place."""
    found: dict[str, bytes] = {}
    if CARD_FILE in names:
        try:
            card = (folder / CARD_FILE).read_text("utf-8")
        except UnicodeDecodeError:
            raise MalformedFile(f"{folder / CARD_FILE} is no text.", next_step="Make the folder again.") from None
        name = next((line.removeprefix("# ") for line in card.splitlines() if line.startswith("# ")), repo_id)
        if name != repo_id:
            quoted, heading = json.dumps(name, ensure_ascii=False), f"\n# {name}\n"
            found[CARD_FILE] = (
                card.replace(heading, f"\n# {repo_id}\n", 1).replace(quoted, f'"{repo_id}"').encode("utf-8")
            )
    if _INITIAL_CONFIG in names:
        config = read_json(folder / _INITIAL_CONFIG)
        if config.get("base_model_name_or_path") != repo_id:
            found[_INITIAL_CONFIG] = (
                json_file(_INITIAL_CONFIG, {**config, "base_model_name_or_path": repo_id}).content or b""
            )
    return found
