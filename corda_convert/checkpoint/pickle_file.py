"""Files of `torch.save` that hold a dict of tensors, mapped and never unpickled beyond plain tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.checkpoint.tensors import TensorSpec, dtype_name
from corda_convert.errors import InputNotFound, MalformedFile

if TYPE_CHECKING:
    import torch


class PickleFile:
    """A dict of tensors written by `torch.save`, memory-mapped. Implements `TensorFile`.

    Loaded with `weights_only=True`, so no code in the file runs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors = _load(path)
        self.specs = {
            name: TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
            for name, tensor in self._tensors.items()
        }

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        import torch

        if not len(view):
            return
        tensor = self._tensors[name].contiguous().view(-1)
        source = tensor.view(torch.uint8)[begin : begin + len(view)]
        torch.frombuffer(view, dtype=torch.uint8).copy_(source)

    def close(self) -> None:
        self._tensors = {}


def _load(path: Path) -> dict[str, torch.Tensor]:
    import torch

    if not path.is_file():
        raise InputNotFound(f"No such file: {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on damaged bytes the unpickler raises anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise MalformedFile(
            f"{path} is not a file of plain tensors that can be loaded safely: {reason}",
            why="It is truncated, of the old pickle format, or holds Python objects, which could run code.",
            next_step="Save it again as a plain dict of tensors, or as safetensors.",
        ) from None
    if not isinstance(loaded, dict):
        raise MalformedFile(f"{path} holds a {type(loaded).__name__}, not a dict of tensors.")
    strangers = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if strangers:
        raise MalformedFile(f"{path} holds values that are not tensors: {', '.join(strangers[:5])}.")
    odd = [str(name) for name, value in loaded.items() if not _is_plain(value)]
    if odd:
        raise MalformedFile(
            f"{path} holds tensors that are sparse, quantized or of an unknown dtype: {', '.join(odd[:5])}."
        )
    return {str(name): value.detach() for name, value in loaded.items()}


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return False
    try:
        dtype_name(tensor.dtype)
    except KeyError:
        return False
    return True
