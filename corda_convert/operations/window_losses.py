"""The loss of every scored token of windows of text, one block of the model at a time."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.corpus.windows import Window
from corda_convert.errors import NotFinite, UnsupportedInput
from corda_convert.streaming.architecture import Architecture
from corda_convert.streaming.stream import Batch, LayerStream, make_batches
from corda_convert.streaming.whole import run_whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROWS = 256
"""Tokens whose logits are held in float32 at a time."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The sum of the scored tokens' losses in nats, and how many there are."""

    total: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.total / self.tokens


def window_losses(
    architecture: Architecture,
    windows: Sequence[Window],
    *,
    device: torch.device,
    batch_tokens: int,
    offload: Path | None = None,
    whole_model: bool = False,
    progress: bool = False,
) -> Losses:
    """Runs the windows through the model, block after block, and sums `−log p` of what they score, as transformers does.

    Windows of equal length are run together up to `batch_tokens`. `offload` is a folder for the hidden states; with
    `whole_model` there are none, and all of the model is on the device. Raises `UnsupportedInput` for a model that does not
    predict the next token, and `NotFinite`.
    """
    from tqdm import tqdm

    check_is_causal(architecture.model)
    batches = make_batches([window.token_ids for window in windows], batch_tokens)
    totals = [0.0] * len(windows)
    if whole_model:
        _score_whole(architecture, batches, windows, totals, device)
        return _summed(windows, totals)
    stream = LayerStream(architecture, batches, device=device, offload=offload)
    try:
        count = len(stream.blocks.modules)
        with tqdm(
            total=count + 1, unit=" blocks", disable=None if progress else True, file=sys.stderr, leave=False
        ) as bar:
            stream.embed()
            for index in range(count):
                stream.run_block(index)
                bar.update()
            for place, batch in enumerate(batches):
                _score(stream.logits(place), batch, windows, totals)
            bar.update()
    finally:
        stream.close()
    return _summed(windows, totals)


def _summed(windows: Sequence[Window], totals: Sequence[float]) -> Losses:
    return Losses(math.fsum(totals), sum(window.scored for window in windows))


def _score_whole(
    architecture: Architecture,
    batches: Sequence[Batch],
    windows: Sequence[Window],
    totals: list[float],
    device: torch.device,
) -> None:
    """Scores each batch with the logits that the whole model's forward gives."""
    given: list[Tensor] = []
    handle = architecture.model.register_forward_hook(lambda _module, _inputs, output: given.append(output.logits))
    try:
        run_whole(architecture, batches, device, lambda place: _score(given.pop(), batches[place], windows, totals))
    finally:
        handle.remove()


def check_is_causal(model: Any) -> None:
    """Raises `UnsupportedInput` for a model whose output is not logits of the next token."""
    kind = type(model).__name__
    if (
        model.get_output_embeddings() is None
        or "MaskedLM" in kind
        or getattr(model.config, "is_encoder_decoder", False)
    ):
        raise UnsupportedInput(
            f"{kind} does not predict the next token from those before it, so it has no perplexity.",
            next_step="Give a causal language model, such as LlamaForCausalLM.",
        )


def _score(logits: Tensor, batch: Batch, windows: Sequence[Window], totals: list[float]) -> None:
    import torch

    for row, number in enumerate(batch.numbers):
        length, scored = batch.input_ids.shape[1], windows[number].scored
        labels = batch.input_ids[row].to(logits.device)
        for begin in range(length - scored, length, ROWS):
            end = min(begin + ROWS, length)
            losses = torch.nn.functional.cross_entropy(
                logits[row, begin - 1 : end - 1].float(), labels[begin:end], reduction="none"
            )
            totals[number] += float(losses.double().sum())
        if not math.isfinite(totals[number]):
            raise NotFinite(
                f"The loss of window {number} is NaN or Inf.",
                why="Logits are: the model is damaged, or its numbers leave the range of the dtype.",
                next_step="Try --dtype float32, or bfloat16 instead of float16.",
            )
