"""Merging into the base what was trained beside a residual whose initial factors are lost: `W − (W − W_res) + s·B·A`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.tensors import TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, UnsupportedInput, raise_problems
from corda_convert.operations.edits import Edits
from corda_convert.operations.evidence import initial_adapter_of

_SIGNIFICAND_BITS = {"F64": 53, "F32": 24, "F16": 11, "BF16": 8}


@dataclass(frozen=True, slots=True)
class Residual:
    """The model that the adapter was trained beside."""

    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        return self.checkpoint.name

    def tensor(self, name: str) -> TensorRef:
        """Its tensor of this name. Raises `AdapterMismatch`."""
        if name not in self.checkpoint.tensors:
            raise AdapterMismatch(
                f"{self.name} has no {name}.",
                why="It is not the residual of this model.",
                next_step="Give the residual model that the training loaded.",
            )
        return self.checkpoint.tensors[name]


def read_residual(path: Path, model: Checkpoint) -> Residual | Path:
    """The residual, or the path of the initial adapter in it, which tells more. Raises one of our errors."""
    if initial_adapter_of(model.root) is not None:
        raise AdapterMismatch(
            f"{model.name} is a residual (it has its initial adapter with it), and --residual is for merging into the base.",
            next_step="Leave out --residual, or give the base model.",
        )
    initial = initial_adapter_of(path)
    return Residual(read_checkpoint(path)) if initial is None else initial


def fold_into_residual(edits: Edits, residual: Residual, model: Checkpoint) -> str:
    """Puts the residual's weights in the place of the model's where the adapter changes them: `W_res + s·B·A`.

    Returns a warning about what that means. Raises every problem together.
    """
    problems: list[CordaConvertError] = []
    dtypes: set[str] = set()
    count = 0
    for edit in edits.tensors.values():
        if not edit.changes:
            continue
        own, stored = residual.tensor(edit.source), model.spec(edit.source)
        if own.shape != stored.shape or own.spec.dtype not in _SIGNIFICAND_BITS:
            problems.append(
                AdapterMismatch(
                    f"{edit.source} is {own.spec.dtype} {own.shape} in {residual.name}, {stored.dtype} {stored.shape} in "
                    f"{model.name}.",
                    why="It is not the residual of this model.",
                )
            )
        elif edit.replacement is not None:
            problems.append(
                UnsupportedInput(
                    f"The adapter brings a weight along for {edit.source}, which --residual would give too.",
                    next_step="Merge into the residual itself.",
                )
            )
        edit.replacement = own
        dtypes.add(own.spec.dtype)
        count += 1
    raise_problems(problems)
    bits = min(_SIGNIFICAND_BITS[dtype] for dtype in dtypes)
    return (
        f"{count} weights were taken from {residual.name}, the rest from {model.name}: s·B₀A₀ is their difference. What "
        f"{residual.name} lost by rounding to {', '.join(sorted(dtypes))} stays lost, up to {2.0**-bits:.1g} of each entry; "
        "with --init it does not."
    )
