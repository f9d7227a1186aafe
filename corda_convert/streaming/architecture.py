"""The model's own class, built on the meta device: it knows how to call its layers, and holds no weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import AUTO_CLASSES, structure_of
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, torch_dtype
from corda_convert.errors import UnsupportedInput

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model without weights, and where each of its parameters lies on disk.

    Attributes:
        model: the transformers model, in evaluation mode, its parameters and buffers on the meta device.
        names: resolves its parameters.
        dtype: what it computes in.
    """

    model: Any
    names: NameMap
    dtype: torch.dtype


def build_architecture(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Architecture:
    """The class that `config.json` names, without weights. `dtype`: None for the checkpoint's own.

    Remote code runs only with `trust_remote_code`. Raises `UnsupportedInput` where there is no such class.
    """
    import transformers

    if not checkpoint.is_folder or checkpoint.config is None:
        raise UnsupportedInput(
            f"{checkpoint.name} has no config.json, so it cannot be run.", next_step="Give the model's whole folder."
        )
    computing = dtype or own_dtype(checkpoint)
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(
                str(checkpoint.root), trust_remote_code=trust_remote_code, local_files_only=True
            )
            if getattr(config, "quantization_config", None) is not None:
                del config.quantization_config  # weights are given plain
            model = _build(checkpoint, config, computing, trust_remote_code=trust_remote_code)
        except Exception as error:  # a model's class may raise anything
            raise UnsupportedInput(
                f"The model's class for {checkpoint.name} cannot be built: {_first_line(error)}",
                why=None if trust_remote_code else "No code that comes with a model is run unless that is allowed.",
                next_step=None if trust_remote_code else "If you trust its authors: --trust-remote-code.",
            ) from error
        names = NameMap(checkpoint, structure_of(model, checkpoint.tensors))
    return Architecture(model.eval(), names, computing)


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the config says the weights are, else the dtype of most of their bytes."""
    import torch

    config = checkpoint.config or {}
    text = config.get("text_config")
    for level in (config, text if isinstance(text, dict) else {}):
        named = getattr(torch, str(level.get("dtype") or level.get("torch_dtype")).removeprefix("torch."), None)
        if isinstance(named, torch.dtype) and named.is_floating_point:
            return named
    sizes = dict.fromkeys(COMPUTABLE_DTYPES, 0)
    for ref in checkpoint.tensors.values():
        if ref.spec.dtype in sizes:
            sizes[ref.spec.dtype] += ref.spec.nbytes
    return torch_dtype(max(sizes, key=lambda name: sizes[name]))


def _build(checkpoint: Checkpoint, config: Any, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            if trust_remote_code and getattr(config, "auto_map", None):
                return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
            return _model_class(checkpoint, config)(config)
    finally:
        torch.set_default_dtype(default)


def _model_class(checkpoint: Checkpoint, config: Any) -> Any:
    """The first of the config's `architectures`, else the class that an Auto class has for this kind of config."""
    import transformers

    named = next(iter((checkpoint.config or {}).get("architectures") or ()), None)
    found = getattr(transformers, str(named), None)
    if found is not None and hasattr(found, "_from_config"):
        return found
    for auto_name in AUTO_CLASSES:
        auto = getattr(getattr(transformers, auto_name, None), "_model_mapping", {}).get(type(config))
        if auto is not None:
            return auto[0] if isinstance(auto, (list, tuple)) else auto
    raise LookupError(f"transformers has no class {named}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' advice off the user's screen."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
