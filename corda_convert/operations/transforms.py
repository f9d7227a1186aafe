"""The transforms that need no method of their own: folding an adapter, casting, replacing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import fsum, isfinite, lcm, prod, sqrt
from typing import TYPE_CHECKING, Literal

from corda_convert.adapters.factors import Block, ParameterChange, RowFold
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, read_rows, torch_dtype
from corda_convert.errors import CordaConvertError, NotFinite
from corda_convert.plan.model import Facts, Session
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Rounding = Literal["nearest", "peft"]
"""`nearest` rounds once, at the end. `peft` gives PEFT's bits where PEFT rounds the delta first (embeddings)."""


def _bytes(elements: int, dtype: str = "F32") -> int:
    return elements * DTYPE_BITS[dtype] // 8


@dataclass(frozen=True, slots=True)
class PlacedChange:
    """A change of a parameter, or of one block of it, in the rows of a stored tensor that hold that block.

    Attributes:
        change: what the adapter does.
        block: which part of the parameter's matrix the rows hold.
        row: the first of those rows in the stored matrix.
        rows: how many they are.
        scale: the change is taken so many times.
    """

    change: ParameterChange
    block: Block
    row: int
    rows: int
    scale: float = 1.0


@dataclass(frozen=True)
class FoldTransform:
    """Folds changes into one stored tensor, in their order, block of rows by block of rows, and rounds once.

    Attributes:
        weight: the stored tensor, seen as a matrix.
        changes: what is folded.
        dtype: the output's.
        rounding: see `Rounding`.
        precision: dtype of the computation, F64 at least where weight or output have it.
        model_dtype: dtype of the model's own tensor, where the adapter brings along another in its place.
    """

    weight: TensorRef
    changes: tuple[PlacedChange, ...]
    dtype: str
    rounding: Rounding = "nearest"
    precision: Literal["F32", "F64"] = "F32"
    model_dtype: str | None = None

    action = "folded"

    @cached_property
    def operands(self) -> tuple[Mapping[str, str], ...]:
        """For each change its operands' names here; tensors that several changes share have one name."""
        return tuple(
            {name: _operand_name(ref) for name, ref in placed.change.operands(placed.block).items()}
            for placed in self.changes
        )

    @cached_property
    def refs(self) -> Mapping[str, TensorRef]:
        """Every operand but the weight, by its name here."""
        return {
            _operand_name(ref): ref for placed in self.changes for ref in placed.change.operands(placed.block).values()
        }

    @cached_property
    def _streamed_names(self) -> frozenset[str]:
        """Operands that are read with the rows: those of changes that go through all of them."""
        streamed: set[str] = set()
        whole: set[str] = set()
        for placed, names in zip(self.changes, self.operands, strict=True):
            covers = (placed.row, placed.rows) == (0, self.weight.shape[0])
            streams = placed.change.streams(placed.block) if covers else frozenset()
            for name, own in names.items():
                (streamed if name in streams else whole).add(own)
        return frozenset(streamed - whole)

    @cached_property
    def by_rows(self) -> frozenset[int]:
        """Places of the changes whose operands are read with the rows that they are for.

        A tensor may hold a stack of matrices, each with operands of its own: together they may be large.
        """
        rows = (0, self.weight.shape[0])
        return frozenset(
            place
            for place, placed in enumerate(self.changes)
            if placed.block.expert is not None and (placed.row, placed.rows) != rows
        )

    def needed(self, begin: int, end: int) -> Mapping[str, TensorRef]:
        return {
            own: self.refs[own]
            for place in self.by_rows
            if self.changes[place].row < end and begin < self.changes[place].row + self.changes[place].rows
            for own in self.operands[place].values()
        }

    @cached_property
    def whole(self) -> Mapping[str, TensorRef]:
        by_rows = {own for place in self.by_rows for own in self.operands[place].values()}
        return {
            name: ref for name, ref in self.refs.items() if name not in self._streamed_names and name not in by_rows
        }

    @cached_property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {"weight": self.weight, **{name: self.refs[name] for name in self.refs if name in self._streamed_names}}

    @property
    def row_quantum(self) -> int:
        return lcm(*(placed.change.row_quantum(placed.block) for placed in self.changes))

    @property
    def compute_dtype(self) -> str:
        return "F64" if "F64" in (self.weight.spec.dtype, self.dtype, self.precision) else "F32"

    @property
    def is_sum(self) -> bool:
        """Whether several changes may fall on one row, so that their norms do not add up."""
        ranges = sorted((placed.row, placed.row + placed.rows) for placed in self.changes)
        return any(begin < end for (_, end), (begin, _) in pairwise(ranges))

    def workspace_bytes(self, rows: int) -> int:
        """Four or five copies of the rows, the operands twice, as prepared and on their way there, and what reading takes."""
        block = rows * self.weight.shape[1]
        operands = sum(ref.spec.elements for ref in self.whole.values()) + self._most_needed(rows)
        streamed = sum(rows * prod(ref.shape[1:]) for name, ref in self.streamed.items() if name != "weight")
        reading: dict[object, int] = {}
        for ref in (self.weight, *self.refs.values()):
            path, needed = ref.file.path, getattr(ref.file, "reading_bytes", 0)
            reading[path] = max(needed, reading.get(path, 0))
        elements = (5 if self.is_sum else 4) * block + 2 * operands + 2 * streamed
        return sum(reading.values()) + _bytes(elements, self.compute_dtype)

    def _most_needed(self, rows: int) -> int:
        """Elements of the operands that so many rows need at most."""
        changes = [self.changes[place] for place in self.by_rows]
        matrices = rows // min((placed.rows for placed in changes), default=1) + 2
        elements = (
            sum(self.refs[own].spec.elements for own in self.operands[place].values()) for place in self.by_rows
        )
        return sum(sorted(elements)[-matrices:])

    def begin(self, device: torch.device) -> Session:
        return _FoldSession(self, device)


def _operand_name(ref: TensorRef) -> str:
    return f"{ref.file.path}:{ref.name}@{ref.begin}{ref.shape}"


PASS_ELEMENTS = 1 << 18
"""On a CPU a chunk is folded in passes of about this many elements, 1 MB in float32: what fits a core's own cache."""


@dataclass(slots=True)
class _FoldSession:
    transform: FoldTransform
    device: torch.device
    folds: dict[int, RowFold] = field(default_factory=dict)
    squares: list[tuple[float, float, float]] = field(default_factory=list)
    likeness: Tensor | None = None

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        import torch

        self.likeness = torch.empty(0, dtype=torch_dtype(self.transform.compute_dtype), device=self.device)
        whole = [place for place in range(len(self.transform.changes)) if place not in self.transform.by_rows]
        for place, fold in self._begun(whole, operands):
            if fold.needs_sweep:
                self._sweep(fold, place)
            self.folds[place] = fold

    def _begun(self, places: Sequence[int], operands: Mapping[str, Tensor]) -> Iterator[tuple[int, RowFold]]:
        """The folds of changes at these places, each with those of its operands that are there."""
        for name, tensor in operands.items():
            self._check_finite(name, tensor)
        dtype = torch_dtype(self.transform.compute_dtype)
        on_device = {name: tensor.to(self.device, dtype, copy=True) for name, tensor in operands.items()}
        for place in places:
            placed, names = self.transform.changes[place], self.transform.operands[place]
            own = {name: on_device[key] for name, key in names.items() if key in on_device}
            yield place, placed.change.begin(placed.block, own, dtype, placed.scale)

    def _sweep(self, fold: RowFold, place: int) -> None:
        """Shows a fold all of its rows as the changes before it leave them, a block at a time."""
        swept = self.transform.changes[place]
        for begin, end in row_blocks((swept.rows, self.transform.weight.shape[1]), self.transform.row_quantum):
            first, stop = swept.row + begin, swept.row + end
            inputs = {name: read_rows(ref, first, stop) for name, ref in self.transform.streamed.items()}
            streamed = self._on_device({name: tensor for name, tensor in inputs.items() if name != "weight"})
            rows = self._loaded(self._on_device({"weight": inputs["weight"]})["weight"])
            for earlier in range(place):
                self._fold(self.folds, earlier, rows, first, streamed)
            fold.sweep(rows, begin, self._operands_of(place, streamed))

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        (output,) = outputs.values()
        streamed = {name: tensor for name, tensor in inputs.items() if name in self.transform.streamed}
        needed = {name: tensor for name, tensor in inputs.items() if name not in streamed}
        here = [
            place for place in self.transform.by_rows if needed.keys() >= set(self.transform.operands[place].values())
        ]
        folds = {**self.folds, **dict(self._begun(here, needed))}
        for part in self._passes(inputs["weight"]):
            rows = {name: tensor[part] for name, tensor in streamed.items()}
            self._pass(folds, first_row + part.start, rows, output[part])

    def _passes(self, stored: Tensor) -> Iterator[slice]:
        rows = stored.shape[0]
        step = rows
        if self.device.type == "cpu":
            quantum = lcm(self.transform.row_quantum, 16)
            step = max(quantum, PASS_ELEMENTS // max(stored.shape[1], 1) // quantum * quantum)
        for begin in range(0, rows, step):
            yield slice(begin, min(begin + step, rows))

    def _pass(self, folds: Mapping[int, RowFold], first_row: int, inputs: Mapping[str, Tensor], output: Tensor) -> None:
        import torch

        from corda_convert.linalg.finite import is_finite

        stored = inputs["weight"]
        streamed = self._on_device({name: tensor for name, tensor in inputs.items() if name != "weight"})
        rows = self._loaded(self._copied("rows", stored))
        weight_square = _square(rows)
        rows, delta_square = self._folded(folds, rows, first_row, streamed)
        if not isfinite(delta_square) or not isfinite(weight_square):
            raise self._culprit(inputs)
        rounding_square = 0.0
        if delta_square == 0.0 and torch.equal(rows, self._copied("rounded", stored)):
            output.copy_(stored)  # bit for bit, the sign of zero included
        else:
            output.copy_(rows)
            if output.dtype != rows.dtype:
                rounding_square = _square(self._copied("rounded", output).sub_(rows))
        if not isfinite(rounding_square) or (output.dtype == torch.float16 and not is_finite(output)):
            raise _overflow(self.transform.weight.name, self.transform.dtype)
        self.squares.append((weight_square, delta_square, rounding_square))

    def _loaded(self, rows: Tensor) -> Tensor:
        """The rows as PEFT has them before it merges: a weight that comes with the adapter in the model's own dtype."""
        if self.transform.rounding == "nearest" or self.transform.model_dtype is None:
            return rows
        return rows.copy_(rows.to(torch_dtype(self.transform.model_dtype)))

    def _copied(self, name: str, tensor: Tensor) -> Tensor:
        """A copy on the device in the dtype of the computation, in a buffer of this thread."""
        from corda_convert.linalg.scratch import scratch

        assert self.likeness is not None  # noqa: S101 - set by `prepare`
        return scratch(name, tuple(tensor.shape), self.likeness).copy_(tensor)

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = torch_dtype(self.transform.compute_dtype)
        return {name: tensor.to(self.device, dtype) for name, tensor in tensors.items()}

    def _operands_of(self, place: int, streamed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: streamed[own] for name, own in self.transform.operands[place].items() if own in streamed}

    def _folded(
        self, folds: Mapping[int, RowFold], rows: Tensor, first_row: int, streamed: Mapping[str, Tensor]
    ) -> tuple[Tensor, float]:
        """The rows with every change, and the squared norm of what changed."""
        before = rows.clone() if self.transform.is_sum else None
        square = 0.0
        for place in range(len(self.transform.changes)):
            square += self._fold(folds, place, rows, first_row, streamed)
        if before is not None:
            square = _square(before.sub_(rows))
        return rows, square

    def _fold(
        self,
        folds: Mapping[int, RowFold],
        place: int,
        rows: Tensor,
        first_row: int,
        streamed: Mapping[str, Tensor],
    ) -> float:
        """Folds one change into those of the rows that it is for, in place."""
        placed = self.transform.changes[place]
        begin = max(placed.row - first_row, 0)
        end = min(placed.row + placed.rows - first_row, rows.shape[0])
        if begin >= end:
            return 0.0
        own, first = rows[begin:end], first_row + begin - placed.row
        operands = self._operands_of(place, streamed)
        if self.transform.rounding == "nearest":
            return folds[place].fold(own, first, operands)
        return self._fold_as_peft(folds[place], own, first, operands, rounds_delta=placed.change.rounds_delta)

    def _fold_as_peft(
        self, fold: RowFold, rows: Tensor, first: int, operands: Mapping[str, Tensor], *, rounds_delta: bool
    ) -> float:
        """Rounds to the stored dtype after each change, and where PEFT does so the change itself before."""
        import torch

        stored = torch_dtype(self.transform.model_dtype or self.transform.weight.spec.dtype)
        if not rounds_delta:
            square = fold.fold(rows, first, operands)
        else:
            change = torch.zeros_like(rows)
            square = fold.fold(change, first, operands)
            rows.copy_(rows.to(stored) + change.to(stored))
        if len(self.transform.changes) > 1:
            rows.copy_(rows.to(stored))
        return square

    def _check_finite(self, name: str, tensor: Tensor) -> None:
        from corda_convert.linalg.finite import is_finite

        if not is_finite(tensor):
            raise self._culprit({name: tensor})

    def _culprit(self, inputs: Mapping[str, Tensor]) -> CordaConvertError:
        from corda_convert.linalg.finite import is_finite

        for name, tensor in inputs.items():
            if not is_finite(tensor):
                ref = self.transform.weight if name == "weight" else self.transform.refs[name]
                return NotFinite(
                    f"{ref.name} in {ref.file.path} holds NaN or Inf.",
                    why="The training diverged, or the file is damaged."
                    if name != "weight"
                    else "The model is damaged.",
                    next_step="Use an earlier checkpoint of the training." if name != "weight" else "Get it again.",
                )
        return NotFinite(
            f"Folding into {self.transform.weight.name} overflows float32, although its inputs are finite.",
            why="The adapter's values or its scaling are far too large.",
        )

    def facts(self) -> Facts:
        # fsum is exact, so that the order in which the workers came does not show
        weight, delta, rounding = (
            sqrt(fsum(parts)) for parts in zip(*(self.squares or [(0.0, 0.0, 0.0)]), strict=True)
        )
        return {"changes": described(self.transform.changes), **norm_facts(weight, delta, rounding)}


def norm_facts(weight: float, delta: float, rounding: float) -> Facts:
    """For the receipt: Frobenius norms of a weight, its change and the rounding, and how they compare.

    `rounding_loss` near 1 tells that the output's dtype holds almost nothing of the change.
    """
    return {
        "weight_norm": weight,
        "delta_norm": delta,
        "rounding_norm": rounding,
        "relative_change": delta / weight if weight else None,
        "rounding_loss": rounding / delta if delta else 0.0,
    }


def described(changes: Sequence[PlacedChange]) -> list[Facts]:
    """Each change once, however many blocks of the tensor it falls on."""
    found: dict[tuple[int, float], Facts] = {}
    for placed in changes:
        facts = {"module": placed.change.module_name, **placed.change.describe()}
        if placed.scale != 1.0:
            facts["scale"] = placed.scale
        found.setdefault((id(placed.change), placed.scale), facts)
    return list(found.values())


def _square(tensor: Tensor) -> float:
    """The squared Frobenius norm; not finite if an entry is not."""
    from corda_convert.linalg.lora import square

    return square(tensor)


def _overflow(name: str, dtype: str) -> NotFinite:
    return NotFinite(
        f"{name} holds values outside the range of {dtype}.", next_step="Choose --dtype bfloat16 or float32."
    )


@dataclass(frozen=True, slots=True)
class CastTransform:
    """One tensor in another dtype (`cast`), or the adapter's own tensor: in place of the base's (`replaced`), or `carried`."""

    source: TensorRef
    dtype: str
    action: str = "cast"

    row_quantum = 1
    whole: Mapping[str, TensorRef] = field(default_factory=dict)

    @property
    def streamed(self) -> Mapping[str, TensorRef]:
        return {"source": self.source}

    def workspace_bytes(self, rows: int) -> int:
        return _bytes(rows * prod(self.source.shape[1:]))

    def begin(self, device: torch.device) -> Session:
        return _CastSession(self)


@dataclass(slots=True)
class _CastSession:
    transform: CastTransform

    def prepare(self, operands: Mapping[str, Tensor]) -> None:
        """There are none."""

    def step(self, first_row: int, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        from corda_convert.linalg.finite import is_finite

        (output,) = outputs.values()
        source = inputs["source"]
        output.copy_(source)
        if is_finite(output):
            return
        ref = self.transform.source
        if is_finite(source):
            raise _overflow(ref.name, self.transform.dtype)
        if self.transform.action != "cast":  # the base's own values are the base's business
            raise NotFinite(f"{ref.name} in {ref.file.path} holds NaN or Inf.", why="The training diverged.")

    def facts(self) -> Facts:
        return {"from": self.transform.source.spec.dtype}
