"""What folding must give, from the definitions, in float64: none of the code that folds is called.

Which change falls on which rows is what the plan says; what it does there is computed here again, plainly.
"""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from corda_convert.adapters.bias import LoraBias
from corda_convert.adapters.dora import DoraFactors
from corda_convert.adapters.experts import ParameterFactors
from corda_convert.adapters.factors import Block, ParameterChange
from corda_convert.adapters.lora import LoraFactors
from corda_convert.adapters.miss import BlockFactors
from corda_convert.adapters.tokens import TokenRows
from corda_convert.checkpoint.tensors import read_rows, read_tensor, torch_dtype
from corda_convert.operations.transforms import FoldTransform, PlacedChange
from corda_convert.operations.verify_ulps import UNIT, Exact
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

MOST_HELD = 8
"""So many changes keep their factors in float64 between blocks of rows."""

_KNOWN = (LoraFactors, DoraFactors, ParameterFactors, BlockFactors, LoraBias, TokenRows)


def is_known(transform: FoldTransform) -> bool:
    """Whether every change has a formula here."""
    return all(isinstance(placed.change, _KNOWN) for placed in transform.changes)


class FoldedExactly:
    """The rows that a folding must give, block by block."""

    def __init__(self, transform: FoldTransform) -> None:
        self.transform = transform
        self._factors: dict[int, dict[str, Tensor]] = {}
        self._norms: dict[int, Tensor] = {}

    def blocks(self) -> Iterator[tuple[int, int, Exact]]:
        """First row, end, and what stands between them."""
        for begin, end in row_blocks(self.transform.weight.shape, self.transform.row_quantum):
            yield begin, end, self._rows(begin, end)

    def _rows(self, begin: int, end: int) -> Exact:
        values, sizes = self._changed(begin, end, len(self.transform.changes))
        return Exact(values, sizes, self._loss(), self._roundings())

    def _loss(self) -> float:
        """Share of the terms' sizes that the precision of the computation may lose: n roundings of one sum of n terms."""
        is_double = self.transform.compute_dtype == "F64"
        terms = 8 + 2 * sum(_terms(placed.change, self.transform) for placed in self.transform.changes)
        by_way = (
            UNIT["F32"] if is_double and self.transform.dtype in ("F16", "BF16") else 0.0
        )  # torch converts by float32
        return UNIT["F64" if is_double else "F32"] * terms + by_way

    def _roundings(self) -> int:
        if self.transform.rounding == "nearest":
            return 1
        return 1 + sum(2 if placed.change.rounds_delta else 1 for placed in self.transform.changes)

    def _changed(self, begin: int, end: int, count: int) -> tuple[Tensor, Tensor]:
        """Rows with the first `count` changes, and the magnitudes of their terms added up."""
        stored = read_rows(self.transform.weight, begin, end)
        if self.transform.rounding == "peft" and self.transform.model_dtype is not None:
            stored = stored.to(torch_dtype(self.transform.model_dtype))
        values = stored.double()
        sizes = values.abs()
        for place, placed in enumerate(self.transform.changes[:count]):
            first, stop = max(placed.row, begin), min(placed.row + placed.rows, end)
            if first < stop:
                own = slice(first - begin, stop - begin)
                part = values[own], sizes[own]
                values[own], sizes[own] = self._apply(place, placed, part, first - placed.row)
        return values, sizes

    def _apply(
        self, place: int, placed: PlacedChange, rows: tuple[Tensor, Tensor], first: int
    ) -> tuple[Tensor, Tensor]:
        change = placed.change
        factors = self._factors_of(place, placed)
        if isinstance(change, DoraFactors):
            values, sizes = _added(rows, _low_rank(factors, placed.block, change.lora.scaling, first, len(rows[0])))
            norms = self._norms_of(place, placed, values)
            ratio = _magnitudes(factors["magnitude"], placed.block, first, len(values)) / norms
            return values * ratio, sizes * ratio.abs()
        if isinstance(change, LoraFactors | ParameterFactors):
            scaling = change.scaling * placed.scale
            return _added(rows, _low_rank(factors, placed.block, scaling, first, len(rows[0])))
        if isinstance(change, BlockFactors):
            delta, sizes = _blocked(change, factors["block"] * placed.scale, rows[0], placed.block.outputs[0] + first)
            return rows[0] + delta, rows[1] + sizes
        if isinstance(change, LoraBias):
            begin = placed.block.outputs[0] + first
            bias = change.scaling * placed.scale * factors["bias"][begin : begin + len(rows[0]), None]
            return rows[0] + bias, rows[1] + bias.abs()
        if isinstance(change, TokenRows):
            return _replaced(change, factors["rows"], rows, placed.block.outputs[0] + first)
        raise TypeError(type(change))

    def _factors_of(self, place: int, placed: PlacedChange) -> dict[str, Tensor]:
        if place not in self._factors:
            while len(self._factors) >= MOST_HELD:
                del self._factors[next(iter(self._factors))]
            self._factors[place] = {
                name: tensor.double() for name, tensor in _read(placed.change, placed.block).items()
            }
        return self._factors[place]

    def _norms_of(self, place: int, placed: PlacedChange, values: Tensor) -> Tensor:
        """DoRA's norms of what goes to each output: of the rows themselves, or of columns, which go across all rows."""
        if placed.block.layout == "out_in":
            return values.square().sum(dim=1, keepdim=True).sqrt()
        if place not in self._norms:
            factors, squares = self._factors_of(place, placed), values.new_zeros(values.shape[1])
            assert isinstance(placed.change, DoraFactors)  # noqa: S101 - only it has norms
            for begin, end in row_blocks(self.transform.weight.shape, self.transform.row_quantum):
                before = self._changed(begin, end, place)
                delta = _low_rank(factors, placed.block, placed.change.lora.scaling, begin - placed.row, end - begin)
                squares = squares + _added(before, delta)[0].square().sum(dim=0)
            self._norms[place] = squares.sqrt()
        return self._norms[place]


def _terms(change: ParameterChange, transform: FoldTransform) -> int:
    """How many numbers are added up for one of the result, about."""
    if isinstance(change, DoraFactors):
        return change.lora.rank * 2 + 32 + 2 * isqrt(max(transform.weight.shape))
    rank = getattr(change, "rank", 1)
    return int(rank) * 2


def _read(change: ParameterChange, block: Block) -> dict[str, Tensor]:
    """A change's tensors, those of one expert where it is for that."""
    if isinstance(change, DoraFactors):
        return {**_read(change.lora, block), "magnitude": read_tensor(change.magnitude)}
    if isinstance(change, LoraFactors):
        return {name: read_tensor(ref) for name, ref in change.tensors().items()}
    if isinstance(change, ParameterFactors):
        return _read_expert(change, block)
    if isinstance(change, BlockFactors):
        return {"block": read_tensor(change.block)}
    if isinstance(change, LoraBias):
        return {"bias": read_tensor(change.bias)}
    if isinstance(change, TokenRows):
        return {"rows": read_tensor(change.rows)}
    raise TypeError(type(change))


def _read_expert(change: ParameterFactors, block: Block) -> dict[str, Tensor]:
    """Expert e has rows e·r … of A, and of B every E-th column from e on."""
    expert, experts, rank = block.expert or 0, block.experts, change.rank
    read: dict[str, Tensor] = {}
    for prefix, factors in (("", change), ("initial_", change.initial)):
        if factors is not None:
            read[f"{prefix}lora_A"] = read_rows(factors.lora_A, expert * rank, (expert + 1) * rank)
            read[f"{prefix}lora_B"] = read_tensor(factors.lora_B)[:, expert::experts]
    return read


def _low_rank(factors: dict[str, Tensor], block: Block, scaling: float, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """`s·(BA − B₀A₀)` in rows `first …` of the block, and the magnitudes of its terms."""
    own = slice(first, first + rows)

    def cut(prefix: str) -> tuple[Tensor, Tensor]:
        left = factors[f"{prefix}lora_B"][slice(*block.outputs)]
        right = factors[f"{prefix}lora_A"][:, slice(*block.inputs)]
        return (left[own], right) if block.layout == "out_in" else (left, right[:, own])

    left, right = cut("")
    delta, size_left, size_right = left @ right, left.abs(), right.abs()
    if "initial_lora_A" in factors:
        left, right = cut("initial_")
        delta = delta - left @ right
        size_left, size_right = size_left + left.abs(), size_right + right.abs()
    sizes = abs(scaling) * (size_left @ size_right)
    delta = scaling * delta
    return (delta, sizes) if block.layout == "out_in" else (delta.T, sizes.T)


def _added(rows: tuple[Tensor, Tensor], change: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return rows[0] + change[0].reshape(rows[0].shape), rows[1] + change[1].reshape(rows[1].shape)


def _magnitudes(magnitude: Tensor, block: Block, first: int, rows: int) -> Tensor:
    """DoRA's norms as they multiply rows: one for each row, or one for each column."""
    own = magnitude.reshape(-1)[slice(*block.outputs)]
    return own[first : first + rows, None] if block.layout == "out_in" else own


def _blocked(change: BlockFactors, block: Tensor, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """MiSS and Bone on rows that are outputs `first …`, entry by entry (arXiv:2409.15371)."""
    import torch

    inputs = torch.arange(rows.shape[1])
    outputs = torch.arange(first, first + rows.shape[0])
    r = change.rank
    if not change.depends_on_weight:  # ΔW[o, i] = block[i mod r, o mod width]
        delta = block[inputs % r][:, outputs % block.shape[1]].T
        return delta, delta.abs()
    return bat(block, rows, first, by_outputs=change.mode == "bat")


def bat(block: Tensor, rows: Tensor, first: int, *, by_outputs: bool) -> tuple[Tensor, Tensor]:
    """The change that bat blocks make to rows that are outputs `first …`: `W_ij B + B`, and the magnitudes of its terms.

    B is the block of an output's group, for every group of inputs, or of an input's group.
    """
    import torch

    outputs = torch.arange(first, first + rows.shape[0])
    r = block.shape[-1]
    tiles = rows.reshape(rows.shape[0], rows.shape[1] // r, r)
    if by_outputs:
        own = block[outputs // r]
        delta = torch.einsum("ogk,okc->ogc", tiles, own) + own[torch.arange(len(outputs)), outputs % r][:, None]
        sizes = torch.einsum("ogk,okc->ogc", tiles.abs(), own.abs())
    else:
        delta = torch.einsum("ogk,gkc->ogc", tiles, block) + block[:, outputs % r].transpose(0, 1)
        sizes = torch.einsum("ogk,gkc->ogc", tiles.abs(), block.abs())
    return delta.reshape(rows.shape), (sizes + delta.abs()).reshape(rows.shape)


def _replaced(change: TokenRows, given: Tensor, rows: tuple[Tensor, Tensor], first: int) -> tuple[Tensor, Tensor]:
    values, sizes = rows[0].clone(), rows[1].clone()
    for place, index in enumerate(change.indices):
        if first <= index < first + len(values):
            values[index - first] = given[place]
            sizes[index - first] = given[place].abs()
    return values, sizes
