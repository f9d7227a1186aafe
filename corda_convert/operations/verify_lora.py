"""A converted LoRA against what it was converted from: `s·B·A` of the output beside `ΔW`, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.lora import LoraScaling
from corda_convert.adapters.source import PEFT_PREFIX
from corda_convert.checkpoint.tensors import TensorRef, read_rows, read_tensor, torch_dtype
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.lora_blocks import BatChange
from corda_convert.operations.lora_dense import Difference
from corda_convert.operations.lora_modules import Carried, LoraModule, LoraSource
from corda_convert.operations.verify_fold import bat
from corda_convert.operations.verify_ulps import UNIT, Checked, Exact, Measured, measure, measure_bits
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from torch import Tensor


SUBSPACE_ERROR = 1e-4
"""Of `‖ΔW‖`: singular vectors of a dense change come from a solver whose certificate allows about as much."""


@dataclass(frozen=True, slots=True)
class ConvertedLora:
    """A LoRA and its source.

    Attributes:
        source: what was to be put together.
        stored: the output's tensors by name.
        scalings: of the output's config.
        facts: of the receipt, by tensor.
        is_baked: whether scalings went into the tensors.
        is_weighted: whether the outputs' error was made least, not that of the weights.
    """

    source: LoraSource
    stored: Mapping[str, TensorRef]
    scalings: LoraScaling
    facts: Mapping[str, Mapping[str, Any]]
    is_baked: bool
    is_weighted: bool

    @property
    def modules(self) -> dict[str, LoraModule]:
        """By the name of the tensor that has the facts."""
        return {f"{PEFT_PREFIX}{module.names[0]}": module for module in self.source.modules}

    @property
    def carried(self) -> dict[str, Carried]:
        return {each.name: each for each in self.source.carried}

    @property
    def expected(self) -> set[str]:
        """The names of all tensors."""
        factors = {f"{PEFT_PREFIX}{name}" for module in self.source.modules for name in module.names}
        return factors | set(self.carried)

    def check(self, name: str, kind: str) -> Checked:
        """Measures the module whose lora_A has this name, or the tensor that was carried along."""
        if name in self.carried:
            return self._check_carried(self.carried[name], kind)
        return self._check_module(name, self.modules[name], kind)

    def _check_carried(self, carried: Carried, kind: str) -> Checked:
        import torch

        ref = self.stored[carried.name]
        stored, source = read_tensor(ref), read_tensor(carried.ref)
        if carried.others:
            terms = torch.stack([read_tensor(part).double() * factor for part, factor in carried.parts])
            exact = Exact(terms.sum(0), terms.abs().sum(0), 4 * len(terms) * UNIT["F64"])
            return Checked(carried.name, kind, "exact", measure(stored, exact, ref.spec.dtype))
        if not self.is_baked or carried.factor == 1.0:
            expected = source.to(torch_dtype(ref.spec.dtype)).reshape(stored.shape)
            return Checked(carried.name, kind, "bits", measure_bits(stored, expected))
        values = source.double().reshape(stored.shape) * carried.factor
        return Checked(carried.name, kind, "exact", measure(stored, Exact(values, values.abs(), 0.0), ref.spec.dtype))

    def _check_module(self, name: str, module: LoraModule, kind: str) -> Checked:
        if not module.is_named:
            raise UnsupportedInput(f"{module.key}: which parameter it is for is not known without --against.")
        refs = [self.stored[f"{PEFT_PREFIX}{each}"] for each in module.names]
        scaling, facts = self.scalings.scaling_of(module.pattern_name), self.facts[name]
        A, B = (read_tensor(ref).double() for ref in refs)
        product = _Product(A.reshape(len(A), -1), B.reshape(len(B), -1), scaling, module.experts)
        if module.dense is None and kind == "concatenated":
            return Checked(module.key, kind, "exact", _same_product(product, module, refs[1].spec.dtype))
        noise = 8 * UNIT[refs[1].spec.dtype]
        found = _distance(product, module)
        wrong = _reduced(module, found, facts, self._best(module, product.rank), noise)
        if wrong is None and "recovered" not in facts:
            wrong = self._projection(product, module, found[1], noise)
        figures = {"relative_error": found[0] / found[1] if found[1] else 0.0}
        return Checked(module.key, kind, "exact", Measured(), figures, wrong)

    def _projection(self, product: _Product, module: LoraModule, norm: float, noise: float) -> str | None:
        """Why the factors are not those of `U Uᵀ ΔW`, with U of ΔW's own singular vectors where only the weights count."""
        for expert in range(module.experts):
            left, right = product.factors(expert)
            across, along = _projected(module, expert, _basis(left), _basis(right.T))
            width = noise * norm * sqrt(max(module.rank, product.rank, 1))
            if float((across - (_basis(left).T @ left) @ right).norm()) > width:
                return "s·B·A is no projection of ΔW on the columns of lora_B"
            most = max(width, SUBSPACE_ERROR * norm) if module.dense is not None else width
            if not self.is_weighted and float((along - left @ (right @ _basis(right.T))).norm()) > most:
                return "the rows of lora_A are no singular vectors of ΔW"
        return None

    def _best(self, module: LoraModule, rank: int) -> float | None:
        """The least error that factors of this rank can have, where only the weights count."""
        if self.is_weighted or module.dense is not None:
            return None
        return sqrt(sum(_rest(module, expert, rank) for expert in range(module.experts)))


@dataclass(frozen=True, slots=True)
class _Product:
    """`s·B·A`, of each expert of a stack, as PEFT lays their factors out."""

    A: Tensor
    B: Tensor
    scaling: float
    experts: int

    @property
    def rank(self) -> int:
        return len(self.A) // self.experts

    def factors(self, expert: int) -> tuple[Tensor, Tensor]:
        """B with the scaling, and A."""
        rows = slice(expert * self.rank, (expert + 1) * self.rank)
        return self.scaling * self.B[:, expert :: self.experts], self.A[rows]


def _summands(module: LoraModule, expert: int) -> tuple[Tensor, Tensor]:
    """All of a module's factors side by side, B with the scalings."""
    import torch

    lefts, rights = [], []
    for summand in module.summands:
        A, B = read_tensor(summand.lora_A).double(), read_tensor(summand.lora_B).double()
        rank = len(A) // module.experts
        rights.append(A.reshape(len(A), -1)[expert * rank : (expert + 1) * rank])
        lefts.append(B.reshape(len(B), -1)[:, expert :: module.experts] * (summand.factor * module.scaling))
    if not lefts:
        return torch.zeros(module.shape[0], 0).double(), torch.zeros(0, module.shape[1]).double()
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _same_product(product: _Product, module: LoraModule, dtype: str) -> Measured:
    """Entry by entry: only the rounding of the factors may be between them."""
    measured = Measured()
    for expert in range(module.experts):
        (left, right), (own_left, own_right) = _summands(module, expert), product.factors(expert)
        loss = 2.01 * UNIT[dtype] + UNIT["F64"] * (8 + 4 * len(right))
        for begin, end in row_blocks(module.shape):
            rows = slice(begin, end)
            sizes = left[rows].abs() @ right.abs()
            exact = Exact(left[rows] @ right, sizes, loss, roundings=0)
            measured.add(measure(own_left[rows] @ own_right, exact, dtype))
    return measured


def _distance(product: _Product, module: LoraModule) -> tuple[float, float]:
    """`‖s·B·A − ΔW‖` and `‖ΔW‖`."""
    error, norm = 0.0, 0.0
    for expert in range(module.experts):
        left, right = product.factors(expert)
        for rows, columns, change in _changes(module, expert):
            norm += float(change.square().sum())
            error += float((left[rows] @ right[:, columns] - change).square().sum())
    return sqrt(error), sqrt(norm)


def _changes(module: LoraModule, expert: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of ΔW (outputs, inputs)."""
    left, right = _summands(module, expert)
    for rows, columns, dense in _dense(module):
        change = left[rows] @ right[:, columns]
        yield rows, columns, change if dense is None else change + dense


def _dense(module: LoraModule) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Blocks of ΔW (outputs, inputs), each with the change that no factors are known of."""
    dense, everything = module.dense, slice(None)
    if dense is None:
        for begin, end in row_blocks(module.shape):
            yield slice(begin, end), everything, None
    elif isinstance(dense, Difference):
        for begin, end in row_blocks(dense.after.shape):
            own = read_rows(dense.after, begin, end).double() - read_rows(dense.before, begin, end).double()
            is_plain = dense.layout == "out_in"
            yield (slice(begin, end), everything, own) if is_plain else (everything, slice(begin, end), own.T)
    elif isinstance(dense, BatChange) and dense.layout == "out_in":
        block = read_tensor(dense.block).double()
        for begin, end in row_blocks(dense.weight.shape, block.shape[-1]):
            rows = read_rows(dense.weight, begin, end).double()
            yield slice(begin, end), everything, bat(block, rows, begin, by_outputs=True)[0]
    else:
        raise UnsupportedInput(f"{module.key}: how its change comes about has no formula here.")


def _rest(module: LoraModule, expert: int, rank: int) -> float:
    """The squares of the singular values of ΔW beyond `rank`, from the triangles of its factors."""
    import torch

    left, right = _summands(module, expert)
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T
    return float(torch.linalg.svdvals(core)[rank:].square().sum())


def _basis(matrix: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix, of which some may be zero."""
    import torch

    columns = matrix[:, matrix.norm(dim=0) > 0]
    basis: Tensor = torch.linalg.qr(columns / columns.norm(dim=0)).Q
    return basis


def _projected(module: LoraModule, expert: int, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """`Lᵀ ΔW` and `ΔW R`."""
    import torch

    across = torch.zeros(left.shape[1], module.shape[1], dtype=torch.float64)
    along = torch.zeros(module.shape[0], right.shape[1], dtype=torch.float64)
    for rows, columns, change in _changes(module, expert):
        across[:, columns] += left[rows].T @ change
        along[rows] += change @ right[columns]
    return across, along


def _reduced(
    module: LoraModule, found: tuple[float, float], facts: Mapping[str, Any], best: float | None, noise: float
) -> str | None:
    """Why the error of a lower rank is not the one that the receipt tells, or not the least."""
    error, norm = found
    recovered = facts.get("recovered")
    told, lost = _number(facts.get("error")), _number(recovered.get("error") if isinstance(recovered, dict) else 0.0)
    slack = noise * norm * sqrt(max(module.rank, 1))
    if told is None or lost is None:
        return "the receipt tells no error"
    if error > (told + lost) * 1.001 + slack or (not lost and error < told * 0.999 - slack):
        return f"‖s·B·A − ΔW‖ is {error:.6g}, the receipt says {told + lost:.6g}"
    if best is not None and error > best * 1.001 + slack:
        return f"‖s·B·A − ΔW‖ is {error:.6g}; factors of this rank can have {best:.6g}"
    return None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
