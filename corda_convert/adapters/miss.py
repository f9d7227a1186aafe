"""MiSS and its predecessor Bone: one block tensor for each module, in three modes, Linear only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from corda_convert.adapters.factors import Adapter, Additive, Block, Layout, RowFold, UsualChange
from corda_convert.adapters.replacements import split_replacements
from corda_convert.adapters.source import CONFIG_FILE, AdapterSource, integer
from corda_convert.checkpoint.names import Target
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorRef
from corda_convert.errors import AdapterMismatch, CordaConvertError, MalformedFile, UnsupportedInput, raise_problems

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Mode = Literal["balance", "mini", "bat", "input-bat"]

_BLOCK = re.compile(r"^(?P<module>.+)\.(?:miss|bone)_block$")


@dataclass(frozen=True, slots=True)
class BlockFactors(UsualChange):
    """The block of one module: (r, d_out) for balance, (r, mini_r) for mini, (d_out / r, r, r) for PEFT's bat, and
    (d_in / r, r, r) for RWKV-PEFT's bat, which is the mode `input-bat`.
    """

    module_name: str
    block: TensorRef
    mode: Mode
    kind: str

    @property
    def rank(self) -> int:
        return self.block.shape[-1] if self.depends_on_weight else self.block.shape[0]

    @property
    def depends_on_weight(self) -> bool:
        """Whether the change is another one for another weight."""
        return self.mode in ("bat", "input-bat")

    def parameters(self, known: Sequence[str]) -> tuple[str, ...]:
        return (f"{self.module_name}.weight",)

    def fit(self, target: Target) -> Layout:
        if len(target.shape) != 2 or target.kind not in ("linear", None):
            what = target.kind or str(target.shape)
            raise UnsupportedInput(f"{self.module_name}: {self.kind} adapts Linear layers only; this is {what}.")
        if any(place.piece.transposed or place.piece.first % self._quantum for place in target.places):
            raise UnsupportedInput(
                f"{self.module_name}: the model changes {target.tensor_name} on loading in a way that a {self.mode} "
                "block cannot follow."
            )
        d_out, d_in = target.shape
        r, shape = self.rank, self.block.shape
        fits = {
            "balance": r <= d_in and shape == (r, d_out),
            "mini": r <= d_in and 0 < shape[-1] <= d_out and d_out % shape[-1] == 0,
            "bat": d_in % r == 0 and d_out % r == 0 and shape == (d_out // r, r, r),
            "input-bat": d_in % r == 0 and d_out % r == 0 and shape == (d_in // r, r, r),
        }[self.mode]
        if not fits:
            raise AdapterMismatch(
                f"Adapter does not fit {self.module_name}: the weight is ({d_out}, {d_in}), "
                f"its {self.mode} block is {shape}."
            )
        return "out_in"

    def operands(self, block: Block) -> Mapping[str, TensorRef]:
        return {"block": self.block}

    @property
    def _quantum(self) -> int:
        return self.rank if self.depends_on_weight else 1

    def row_quantum(self, block: Block) -> int:
        return self._quantum

    def begin(self, block: Block, whole: Mapping[str, Tensor], dtype: torch.dtype, scale: float) -> RowFold:
        own = whole["block"] if scale == 1.0 else whole["block"] * scale
        return _BlockFold(self.mode, own, block.outputs[0])

    def describe(self) -> dict[str, object]:
        return {"kind": self.kind, "mode": self.mode, "rank": self.rank}


@dataclass(frozen=True, slots=True)
class _BlockFold(Additive):
    """Rows are outputs, the first of them number `offset` of the whole weight."""

    mode: Mode
    block: Tensor
    offset: int

    def fold(self, rows: Tensor, first: int, streamed: Mapping[str, Tensor]) -> float:
        from corda_convert.linalg import blocks

        folds = {
            "balance": blocks.fold_balance,
            "mini": blocks.fold_mini,
            "bat": blocks.fold_bat,
            "input-bat": blocks.fold_input_bat,
        }
        return folds[self.mode](rows, self.block, self.offset + first)


class BlockFormat:
    """`peft_type: MISS`, and `BONE`, which PEFT dropped after 0.18: the same tensors under another name."""

    peft_types = ("MISS", "BONE")

    def parse(self, source: AdapterSource) -> Adapter:
        kind = source.peft_type.lower()
        mode = _mode(source)
        rank = integer(source.config, "r", 64)
        problems: list[CordaConvertError] = []
        modules: list[BlockFactors] = []
        rest: dict[str, TensorRef] = {}
        for key, ref in source.tensors.items():
            match = _BLOCK.match(key)
            if match is None:
                rest[key] = ref
                continue
            factors = BlockFactors(match["module"], ref, mode, kind)
            problem = _shape_problem(source, factors, rank)
            if any(factors.module_name == other.module_name for other in modules):
                problem = MalformedFile(f"{source.name} has two blocks for {factors.module_name}.")
            if problem is None:
                modules.append(factors)
            else:
                problems.append(problem)
        replacements, leftovers = split_replacements(source, rest)
        raise_problems([*problems, *leftovers])
        return Adapter(source, kind, "plain", tuple(modules), replacements)


def _mode(source: AdapterSource) -> Mode:
    init = source.config.get("init_weights", True)
    if isinstance(init, bool):
        return "balance"
    if init == "bat" or (init == "mini" and source.peft_type == "MISS"):
        return "bat" if init == "bat" else "mini"
    raise UnsupportedInput(f"{source.name}: {CONFIG_FILE} has init_weights {init!r}, which is no known mode.")


def _shape_problem(source: AdapterSource, factors: BlockFactors, rank: int) -> CordaConvertError | None:
    ref = factors.block
    expected = 3 if factors.mode == "bat" else 2
    if ref.spec.dtype not in COMPUTABLE_DTYPES:
        return UnsupportedInput(f"{source.name}: the block of {factors.module_name} has the dtype {ref.spec.dtype}.")
    if len(ref.shape) != expected or 0 in ref.shape:
        return AdapterMismatch(
            f"{source.name}: the block of {factors.module_name} is {ref.shape}; {CONFIG_FILE} says "
            f"{factors.mode}, which has {expected} dimensions."
        )
    mini_r = source.config.get("mini_r")
    if factors.rank != rank or (factors.mode == "mini" and ref.shape[1] != mini_r):
        says = f"r {rank}" + (f", mini_r {mini_r}" if factors.mode == "mini" else "")
        return AdapterMismatch(
            f"{source.name}: the block of {factors.module_name} is {ref.shape}; {CONFIG_FILE} says {says}."
        )
    return None
