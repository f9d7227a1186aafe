"""Folding into block-fp8 weights that stay fp8: what changes is quantized again, everything else keeps its bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, lcm, sqrt
from typing import TYPE_CHECKING

from corda_convert.checkpoint.dequantized import DEFAULT_BLOCK, DequantizedFile
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.layout import matrix_shape
from corda_convert.checkpoint.stored_weights import Fp8Weight, StoredWeight
from corda_convert.checkpoint.tensors import TensorRef, torch_dtype
from corda_convert.errors import CordaConvertError, NotFinite, UnsupportedInput, raise_problems
from corda_convert.operations.transforms import CastTransform, FoldTransform
from corda_convert.plan.model import Facts, Produced, Session, Transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_CODES, _SCALES = "stored codes", "stored scales"


def requantized(touched: Mapping[str, Sequence[Produced]], readable: Checkpoint) -> dict[str, tuple[Produced, ...]]:
    """What takes the place of each touched tensor, and of its scales, in the quantized checkpoint.

    `touched` is for `readable`, the dequantized checkpoint; weights that are not quantized are taken as they are. Raises
    `UnsupportedInput`, several problems together.
    """
    problems: list[CordaConvertError] = []
    result: dict[str, tuple[Produced, ...]] = {}
    for name, produced in touched.items():
        file = readable.tensors[name].file
        weight = file.weights.get(name) if isinstance(file, DequantizedFile) else None
        if weight is None:
            result[name] = tuple(produced)
            continue
        problem = _problem(weight, produced)
        if problem is not None or not isinstance(weight, Fp8Weight):
            problems += [problem] if problem else []
            continue
        transform = RequantizeTransform(_fold(produced[0].transform), weight)
        result[name] = (Produced(weight.weight.spec, transform),)
        result[weight.scale.name] = (Produced(weight.scale.spec, transform, rows_each=weight.block[0]),)
    raise_problems(problems)
    return result


def _problem(weight: StoredWeight, produced: Sequence[Produced]) -> CordaConvertError | None:
    """What keeps a weight from being quantized again block of rows by block of rows."""
    name = weight.spec.name
    next_step = "Leave out --requantize."
    if not isinstance(weight, Fp8Weight):
        return UnsupportedInput(f"{name} is stored as mxfp4: --requantize is for fp8.", next_step=next_step)
    if not isinstance(produced[0].transform, FoldTransform | CastTransform):
        return UnsupportedInput(
            f"{name} needs the initial factors of the training made again: --requantize is not for these.",
            next_step="Give them with --init, or leave out --requantize.",
        )
    if [each.spec.shape for each in produced] != [weight.spec.shape]:
        return UnsupportedInput(
            f"{name} would get another shape, or a tensor beside it: --requantize is for weights that keep their shape.",
            next_step=next_step,
        )
    *stack, rows, columns = weight.weight.shape
    has_one_scale = weight.block == (rows, columns) and (rows > DEFAULT_BLOCK[0] or columns > DEFAULT_BLOCK[1])
    if has_one_scale:
        return UnsupportedInput(
            f"{name} has one scale for a whole matrix {(rows, columns)}: --requantize is for fp8 in blocks.",
            next_step=next_step,
        )
    if stack and rows % weight.block[0]:
        return UnsupportedInput(
            f"{name} {weight.weight.shape} is a stack of matrices that blocks of {weight.block[0]} rows do not divide: "
            "--requantize is not for these.",
            next_step=next_step,
        )
    return None


def _fold(transform: Transform) -> FoldTransform:
    """The transform with its result in float32; a tensor that only takes the place of another folds nothing."""
    if isinstance(transform, FoldTransform):
        return replace(transform, dtype="F32")
    assert isinstance(transform, CastTransform)  # noqa: S101 - an edit is one or the other
    return FoldTransform(transform.source.reshaped(matrix_shape(transform.source.shape)), (), "F32")


@dataclass(frozen=True, slots=True)
class RequantizeTransform:
    """Folds into an fp8 weight as `fold` says, and quantizes the blocks that changed; others keep their bits.

    Yields the weight and, one row for each row of blocks, its scales.
    """

    fold: FoldTransform
    weight: Fp8Weight

    action = "requantized"

    @property
    def whole(self) -> Mapping[str, TensorRef]:
        return {**self.fold.whole, _SCALES: self.weight.scale.reshaped(self.grid)}

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {**self.fold.streamed, _CODES: self.weight.weight.reshaped(self.fold.weight.spec.shape)}

    def needed(self, begin: int, end: int) -> Mapping[str, TensorRef]:
        return self.fold.needed(begin, end)

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across the stored matrix."""
        rows, columns = self.fold.weight.shape
        return -(-rows // self.weight.block[0]), -(-columns // self.weight.block[1])

    @property
    def row_quantum(self) -> int:
        return lcm(self.fold.row_quantum, self.weight.block[0])

    def workspace_bytes(self, rows: int) -> int:
        """The fold's, the folded rows, and six copies on the way to codes and back."""
        return self.fold.workspace_bytes(rows) + 28 * (rows + self.weight.block[0]) * self.fold.weight.shape[1]

    def begin(self, device: torch.device) -> Session:
        import torch

        computing = device if device.type == "cuda" else torch.device("cpu")  # the others have no float8
        return _RequantizeSession(self, computing, self.fold.begin(computing))


@dataclass(slots=True)
class _RequantizeSession:
    transform: RequantizeTransform
    device: torch.device
    fold: Session
    scales: Tensor | None = None
    requantized: list[tuple[int, float]] = field(default_factory=list)

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        self.scales = operands[_SCALES].to(self.device, copy=True)
        self.fold.prepare({name: tensor for name, tensor in operands.items() if name != _SCALES})

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        import torch

        from corda_convert.linalg.fp8 import as_blocks, dequantize_blocks, quantize_blocks

        assert self.scales is not None  # noqa: S101 - set by `prepare`
        weight, block = self.transform.weight, self.transform.weight.block
        codes = inputs[_CODES].to(self.device)
        first = first_row // block[0]
        scales = self.scales[first : first + -(-codes.shape[0] // block[0])]
        folded = torch.empty(codes.shape, device=self.device)
        self.fold.step(
            first_row, {name: tensor for name, tensor in inputs.items() if name != _CODES}, {"folded": folded}
        )
        changed = as_blocks(dequantize_blocks(codes, scales, block) != folded, block).any(3).any(1)
        new_codes, new_scales = quantize_blocks(folded, block, torch_dtype(weight.scale.spec.dtype))
        if not bool(torch.isfinite(new_scales.float()).all()):
            raise NotFinite(f"{weight.scale.name} would hold scales outside the range of {weight.scale.spec.dtype}.")
        everywhere = changed.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        new_codes = _choose(everywhere[: codes.shape[0], : codes.shape[1]], new_codes, codes)
        new_scales = _choose(changed, new_scales, scales)
        outputs[weight.weight.name].copy_(new_codes)
        outputs[weight.scale.name].copy_(new_scales)
        loss = dequantize_blocks(new_codes, new_scales, block).sub_(folded)
        self.requantized.append((int(changed.sum()), float(torch.linalg.vector_norm(loss)) ** 2))

    def facts(self) -> Facts:
        blocks, losses = zip(*self.requantized, strict=True) if self.requantized else ((), ())
        down, across = self.transform.grid
        return {
            **self.fold.facts(),
            "rounding_norm": sqrt(fsum(losses)),
            "blocks": down * across,
            "requantized_blocks": sum(blocks),
        }


def _choose(mask: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The first tensor's elements where the mask is set, else the second's, bit by bit: float8 has no `where`."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return torch.where(mask, first.view(bits), second.view(bits)).view(first.dtype)
