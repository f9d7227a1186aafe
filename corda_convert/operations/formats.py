"""In which format the merged weights are written: safetensors, or one file of torch's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.torch_archive import SUFFIXES
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.production import as_one_archive
from corda_convert.output.model_card import Card
from corda_convert.plan.model import OutputFileSpec

WeightFormat = Literal["safetensors", "pth"]


@dataclass(frozen=True, slots=True)
class Formatted:
    """The files to write, and what goes with their format.

    Attributes:
        files: see `OutputFileSpec`.
        index_metadata: the index's, where there is one.
        card: with a snippet that loads the files.
    """

    files: tuple[OutputFileSpec, ...]
    index_metadata: Mapping[str, Any] | None
    card: Card


def in_format(
    files: tuple[OutputFileSpec, ...], checkpoint: Checkpoint, card: Card, wanted: WeightFormat | None
) -> Formatted:
    """The safetensors files, or one `.pth` in their place: by default for a model that is one `.pth` itself, under its name.

    Raises `UnsupportedInput` for another format.
    """
    if wanted not in (None, *get_args(WeightFormat)):
        raise UnsupportedInput(
            f"Unknown format {wanted!r}.", next_step=f"Choose one of {', '.join(get_args(WeightFormat))}."
        )
    root = checkpoint.root
    is_pth = root.is_file() and root.suffix in SUFFIXES
    if wanted == "pth" or (wanted is None and is_pth):
        name = root.name if is_pth else f"{root.stem if root.is_file() else 'model'}.pth"
        return Formatted(as_one_archive(files, name), None, _loaded_by_hand(card, _TORCH_SNIPPET, name))
    if checkpoint.config is None and len(files) == 1:
        card = _loaded_by_hand(card, _SAFETENSORS_SNIPPET, files[0].name)
    return Formatted(files, checkpoint.index_metadata, card)


def _loaded_by_hand(card: Card, snippet: str, name: str) -> Card:
    return replace(card, snippet=snippet.format(name=json.dumps(name, ensure_ascii=False)), library_name="pytorch")


_TORCH_SNIPPET = 'import torch\n\nweights = torch.load({name}, map_location="cpu", weights_only=True)'
_SAFETENSORS_SNIPPET = "from safetensors.torch import load_file\n\nweights = load_file({name})"
