"""In which format the merged weights are written: safetensors, or one file of torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.torch_archive import SUFFIXES
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
    """The safetensors files, or one `.pth` in their place: by default for a model that is one `.pth` itself, under its name."""
    is_pth = checkpoint.root.is_file() and checkpoint.root.suffix in SUFFIXES
    if (wanted or ("pth" if is_pth else "safetensors")) == "pth":
        name = f"{checkpoint.root.stem}.pth" if checkpoint.root.is_file() else "model.pth"
        return Formatted(as_one_archive(files, name), None, _loaded_by_hand(card, _TORCH_SNIPPET.format(name=name)))
    if is_pth:
        card = _loaded_by_hand(card, _SAFETENSORS_SNIPPET.format(name=files[0].name))
    return Formatted(files, checkpoint.index_metadata, card)


def _loaded_by_hand(card: Card, snippet: str) -> Card:
    return replace(card, snippet=snippet, library_name="pytorch")


_TORCH_SNIPPET = 'import torch\n\nweights = torch.load("{name}", map_location="cpu", weights_only=True)'
_SAFETENSORS_SNIPPET = 'from safetensors.torch import load_file\n\nweights = load_file("{name}")'
