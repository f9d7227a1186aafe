"""A whole model on the device, for architectures whose blocks cannot be run one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from corda_convert.errors import CordaConvertError, UnsupportedInput
from corda_convert.streaming.architecture import Architecture
from corda_convert.streaming.stream import Batch
from corda_convert.streaming.weights import WeightSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def run_whole(
    architecture: Architecture, batches: Sequence[Batch], device: torch.device, after: Callable[[int], None]
) -> None:
    """Loads all weights, runs every batch, and calls `after` with its place. Raises `UnsupportedInput` where that fails.

    The decoder behind an encoder gets the same samples, shifted right by one token as the model's class does it for labels.
    """
    import torch

    model = architecture.model
    weights = WeightSource(architecture, device)
    weights.check("", model)
    weights.fill_all("", model)
    for level in (model.config, model.config.get_text_config()):
        level.use_cache = False
    for place, batch in enumerate(batches):
        try:
            with torch.no_grad():
                model(**_inputs(model, batch.input_ids.to(device)))
        except (CordaConvertError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise UnsupportedInput(
                f"{type(model).__name__} cannot be run on text alone: {(str(error) or repr(error)).splitlines()[0]}"
            ) from error
        after(place)
    weights.empty(model)


def _inputs(model: Any, input_ids: Tensor) -> dict[str, Tensor]:
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is None or not getattr(model.config, "is_encoder_decoder", False):
        return {"input_ids": input_ids}
    return {"input_ids": input_ids, "decoder_input_ids": shifted(labels=input_ids)}
