"""A model's parameters at run time, read from the checkpoint: each when it is needed, in the dtype of the computation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.layout import matrix_shape
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, read_tensor, torch_dtype
from corda_convert.errors import UnsupportedInput, some
from corda_convert.streaming.architecture import Architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Fills modules of a model that was built on the meta device, and empties them again.

    Stacked, joined and transposed tensors are put together as transformers does on loading.
    """

    architecture: Architecture
    device: torch.device

    def check(self, module_name: str, module: Any) -> None:
        """Raises `UnsupportedInput` for parameters of a module, and of those in it, that the checkpoint does not have."""
        names = [f"{module_name}.{name}" if module_name else name for name in module.state_dict()]
        missing = [name for name in names if self._target(name) is None]
        if missing:
            structure = self.architecture.names.structure
            reasons = {} if structure is None else structure.unsupported
            raise UnsupportedInput(
                f"{len(missing)} parameters of {self.architecture.names.checkpoint.name} are not on disk in a form that can be "
                f"loaded: {some(missing)}.",
                why=next(
                    iter(reasons.values()), "The files are not complete, or of another model than config.json says."
                ),
            )

    def fill(self, module_name: str, module: Any) -> None:
        """Loads what this module itself owns, and computes its buffers that no checkpoint holds."""
        import torch

        computed = False
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_meta:
                continue
            full = f"{module_name}.{name}" if module_name else name
            if name in module._non_persistent_buffers_set or (name in module._buffers and self._target(full) is None):
                module._buffers[name] = torch.empty_like(tensor, device=self.device)
                computed = True
                continue
            value = self._load(full, tensor)
            value._is_hf_initialized = True  # type: ignore[attr-defined]
            if name in module._buffers:
                module._buffers[name] = value
            else:
                parameter = torch.nn.Parameter(value, requires_grad=False)
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                module._parameters[name] = parameter
        if computed:
            self._compute_buffers(module)

    def fill_all(self, module_name: str, module: Any) -> None:
        """Loads a module and all that is in it."""
        for name, part in module.named_modules(prefix=module_name):
            self.fill(name, part)

    def empty(self, module: Any) -> None:
        """Lets go of the parameters of a module and of all that is in it. Computed buffers stay."""
        import torch

        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                part._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            for name, buffer in part.named_buffers(recurse=False):
                if name not in part._non_persistent_buffers_set and getattr(buffer, "_is_hf_initialized", False):
                    part._buffers[name] = buffer.to("meta")

    def nbytes(self, module: Any) -> int:
        """What a module takes when it is filled."""
        return sum(
            self._dtype_of(name, tensor).itemsize * tensor.numel() for name, tensor in module.state_dict().items()
        )

    def _target(self, name: str) -> Target | None:
        target = self.architecture.names.target(name)
        return target if target is not None and target.name == name else None

    def _dtype_of(self, name: str, tensor: Tensor) -> torch.dtype:
        """As transformers loads it: floating-point numbers in the computation's dtype, but for what the class keeps."""
        import torch

        if not tensor.is_floating_point():
            return tensor.dtype
        model, dtype = self.architecture.model, self.architecture.dtype
        kept: list[str] = []
        if dtype == torch.float16:
            kept += getattr(model, "_keep_in_fp32_modules", None) or ()
        if dtype in (torch.float16, torch.bfloat16):
            kept += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        if any(re.search(rf"(?:^|\.){pattern.replace('*', '.*')}(?:\.|$)", name) for pattern in kept):
            return torch.float32
        return dtype

    def _load(self, name: str, tensor: Tensor) -> Tensor:
        """The parameter on the device. Raises `UnsupportedInput` where the checkpoint does not have it in that shape."""
        import torch

        target = self._target(name)
        if target is None:
            raise UnsupportedInput(
                f"{name} of the model is not in {self.architecture.names.checkpoint.name}.",
                why="The files are not complete, or of another model than config.json says.",
            )
        if target.shape != tuple(tensor.shape):
            raise UnsupportedInput(
                f"{name} is {target.shape} on disk; the model expects {tuple(tensor.shape)}.",
                why="The files are of another model than config.json says.",
            )
        tensors = self.architecture.names.checkpoint.tensors
        odd = [
            ref for place in target.places if (ref := tensors[place.tensor_name]).spec.dtype not in COMPUTABLE_DTYPES
        ]
        if odd and tensor.is_floating_point():
            raise UnsupportedInput(
                f"{odd[0].name} is stored as {odd[0].spec.dtype}: the model is quantized.",
                next_step="Give the unquantized model.",
            )
        dtype = self._dtype_of(name, tensor)
        if target.is_plain:
            ref = tensors[target.tensor_name]
            return read_tensor(ref).to(self.device, dtype)
        whole = torch.empty(target.shape, dtype=torch_dtype(tensors[target.tensor_name].spec.dtype))
        is_stack = target.is_stack
        matrix = whole if is_stack else whole.view(matrix_shape(target.shape))
        for place in target.places:
            piece = place.piece
            stored = tensors[place.tensor_name].reshaped(place.layout.matrix)
            rows = read_tensor(stored.rows(piece.row, piece.row + piece.rows))
            part = matrix[piece.expert] if is_stack else matrix
            part[piece.first : piece.first + piece.count] = rows.T if piece.transposed else rows
        return whole.to(self.device, dtype)

    def _compute_buffers(self, module: Any) -> None:
        """As `from_pretrained` computes what no checkpoint holds, such as rotary frequencies."""
        import torch

        owner = self.architecture.model
        for candidate in owner.modules():  # the innermost model around the module knows how
            is_model = hasattr(candidate, "_init_weights") and hasattr(candidate, "config")
            if is_model and any(part is module for part in candidate.modules()):
                owner = candidate
        with torch.no_grad():
            owner._init_weights(module)


def names_of(modules: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """Each module's path by its identity."""
    return {id(module): name for name, module in modules}
