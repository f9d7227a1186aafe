"""Bone and MiSS blocks as the LoRA that they are: `ΔW[o, i] = block[i mod r, o]` is `blockᵀ [I_r I_r …]` cut to d_in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from corda_convert.adapters.factors import Layout
from corda_convert.adapters.miss import BlockFactors
from corda_convert.checkpoint.tensors import TensorFile, TensorRef, TensorSpec, read_tensor, torch_dtype
from corda_convert.operations.lora_modules import DenseChange, LoraModule, Summand
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.linalg.threads import Team


class MadeFile:
    """One tensor that is made when it is read, of a block or of nothing. Implements `TensorFile`."""

    def __init__(self, block: TensorRef, spec: TensorSpec) -> None:
        self.path: Path = block.file.path
        self.specs = {spec.name: spec}
        self.metadata: dict[str, str] = {}
        self._block = block
        self._file: TensorFile = block.file

    def make(self, first: int, last: int) -> Tensor:
        """Rows `first … last`."""
        raise NotImplementedError

    def read_into(self, name: str, begin: int, view: memoryview) -> None:
        import torch

        if len(view):
            row, end = self.specs[name].row_nbytes, begin + len(view)
            first, last = begin // row, -(-end // row)
            made = self.make(first, last).contiguous().reshape(-1).view(torch.uint8)
            torch.frombuffer(view, dtype=torch.uint8).copy_(made[begin - first * row : end - first * row])

    def close(self) -> None:
        self._file.close()


class _TiledIdentity(MadeFile):
    """`[I_r I_r …]` (r, d_in), the last one cut: a 1 where i mod r is the row."""

    def make(self, first: int, last: int) -> Tensor:
        import torch

        (spec,) = self.specs.values()
        r, d_in = spec.shape
        made = torch.zeros(last - first, d_in, dtype=torch_dtype(spec.dtype))
        for row in range(first, last):
            made[row - first, row::r] = 1
        return made


class _RepeatedBlock(MadeFile):
    """`blockᵀ` (d_out, r), of a mini block (r, mini_r) as often as d_out has it."""

    def make(self, first: int, last: int) -> Tensor:
        import torch

        block = read_tensor(self._block)
        return block[:, torch.arange(first, last) % block.shape[1]].T


def block_summand(factors: BlockFactors, shape: tuple[int, int]) -> Summand:
    """The factors of a balance or mini block for a weight (d_out, d_in): exact, of the block's rank.

    A's rows are zeros and ones. `ΔW` has no rank above r, and less where rows of the block depend on each other.
    """
    d_out, d_in = shape
    block, r = factors.block, factors.rank
    identity = TensorSpec(f"{block.name} inputs", block.spec.dtype, (r, d_in))
    repeated = TensorSpec(f"{block.name} outputs", block.spec.dtype, (d_out, r))
    return Summand(
        TensorRef(_TiledIdentity(block, identity), identity), TensorRef(_RepeatedBlock(block, repeated), repeated), 1.0
    )


@dataclass(frozen=True, slots=True)
class BatChange:
    """What a bat block makes of a weight, `W_ij B_i + B_i` in r×r blocks: a change that no factors are known of."""

    block: TensorRef
    weight: TensorRef
    layout: Layout

    @property
    def operands(self) -> Mapping[str, TensorRef]:
        return {"block": self.block, "weight": self.weight}

    @property
    def shape(self) -> tuple[int, int]:
        first, second = self.weight.shape
        return (first, second) if self.layout == "out_in" else (second, first)

    def matrix(self, team: Team, operands: Mapping[str, Tensor], device: torch.device) -> Tensor:
        import torch

        from corda_convert.linalg.blocks import fold_bat

        weight = operands["weight"].to(device)
        weight = weight if self.layout == "out_in" else weight.T
        block = operands["block"].to(device)
        change = torch.empty(weight.shape, dtype=torch.float32, device=device)

        def part(rows: tuple[int, int]) -> None:
            own = slice(*rows)
            before = weight[own].to(torch.float64, copy=True)
            after = before.clone()
            fold_bat(after, block, rows[0])
            change[own] = after - before

        team.all(part, row_blocks(self.shape, self.block.shape[-1]))
        return change


def block_module(
    factors: BlockFactors, shape: tuple[int, int], dense: DenseChange | None, scaling: float
) -> LoraModule:
    """The module of a block: exact factors, or for bat what its rank is chosen of."""
    summands = () if dense is not None else (block_summand(factors, shape),)
    name = factors.module_name
    return LoraModule(name, name, summands, scaling=scaling, dense=dense)
