"""The list of blocks that a model runs one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from corda_convert.errors import UnsupportedInput


@dataclass(frozen=True, slots=True)
class Blocks:
    """The decoder layers (of an encoder model its encoder layers), in the order of their use.

    Attributes:
        path: where their list stands, such as `model.layers`.
        modules: the layers.
    """

    path: str
    modules: tuple[Any, ...]

    def name(self, index: int) -> str:
        """`model.layers.3`."""
        return f"{self.path}.{index}"


def find_blocks(model: Any) -> Blocks:
    """The one outermost list of modules that has as many as the text model has layers.

    Raises `UnsupportedInput` where there is none, or several as in an encoder with a decoder.
    """
    from torch import nn

    text = model.config.get_text_config(decoder=True)
    count = getattr(text, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for module in decoder.modules()}
    lists: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        is_nested = any(name.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and id(module) in inside and len(module) == count and not is_nested:
            lists.append((name, module))
    is_seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    if len(lists) != 1 or is_seq2seq:
        found = "an encoder and a decoder" if is_seq2seq else f"{len(lists)} lists of {count} blocks"
        raise UnsupportedInput(
            f"{type(model).__name__} has {found}; one list of blocks that run one after the other was expected.",
            next_step="Run it with --whole-model, which holds all of it in memory.",
        )
    path, blocks = lists[0]
    return Blocks(path, tuple(blocks))
