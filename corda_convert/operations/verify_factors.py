"""The initial factors of `decompose`, judged by what they must be: orthonormal, a projection, singular vectors.

All in float64 and by streaming W and C in blocks of rows; no code that decomposes is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.adapters.factors import Layout
from corda_convert.checkpoint.tensors import TensorRef, read_rows, read_tensor
from corda_convert.operations.verify_ulps import UNIT, Checked, Exact, Measured, measure
from corda_convert.plan.packing import row_blocks

if TYPE_CHECKING:
    from torch import Tensor

ORTHONORMAL_UNITS = 8
"""Cosines between columns of B may differ from 0 by so many roundings of its dtype."""

MOST_RESIDUAL = 1e-5
"""Of `‖M Mᵀ u − σ² u‖`, relative to the largest σ²."""

SPECTRUM_SIDE = 1024
"""Up to so many outputs all singular values are computed, to see whether the right ones were taken."""

POWER_STEPS = 6


@dataclass(frozen=True, slots=True)
class Context:
    """What a method multiplies a weight with, `M = W T`: the square of T, applied to rows.

    Attributes:
        method: corda, svd, asvd or svd-llm.
        matrix: C, (d_in, d_in), or mean absolute inputs, (d_in,); None for svd.
        amount: what is added to the diagonal of C.
        exponent: asvd's.
    """

    method: str
    matrix: TensorRef | None = None
    amount: float = 0.0
    exponent: float = 0.5

    def squared(self, rows: Tensor) -> Tensor:
        """`X T Tᵀ` for X (k, d_in)."""
        if self.matrix is None:
            return rows
        if self.method == "asvd":
            return rows * read_tensor(self.matrix).double() ** (2 * self.exponent)
        once = self._times(rows)
        return once if self.method == "svd-llm" else self._times(once)

    def _times(self, rows: Tensor) -> Tensor:
        assert self.matrix is not None  # noqa: S101 - asked above
        product = self.amount * rows
        for begin, end in row_blocks(self.matrix.shape):
            product = product + rows[:, begin:end] @ read_rows(self.matrix, begin, end).double()
        return product


@dataclass(frozen=True, slots=True)
class Factored:
    """The factors of one module, and the weight that they are of.

    `weight` is None where it does not lie on disk as one matrix.
    """

    module_name: str
    lora_A: TensorRef
    lora_B: TensorRef
    scaling: float
    weight: TensorRef | None = None
    layout: Layout = "out_in"
    experts: int = 1
    context: Context | None = None
    mode: str = "ipm"

    def projected(self, left: Tensor) -> tuple[Tensor, Tensor]:
        """`Uᵀ W` for U (d_out, k), and the magnitudes of its terms."""
        import torch

        if self.layout == "in_out":
            blocks = [(rows @ left, rows.abs() @ left.abs()) for _, rows in self._rows()]
            return torch.cat([each for each, _ in blocks]).T, torch.cat([each for _, each in blocks]).T
        assert self.weight is not None  # noqa: S101 - asked for before
        product = torch.zeros(left.shape[1], self.weight.shape[1], dtype=torch.float64)
        sizes = torch.zeros_like(product)
        for begin, rows in self._rows():
            own = left[begin : begin + len(rows)].T
            product += own @ rows
            sizes += own.abs() @ rows.abs()
        return product, sizes

    def times(self, rows: Tensor) -> Tensor:
        """`W X` for X (k, d_in) given by rows: (d_out, k)."""
        import torch

        if self.layout == "out_in":
            return torch.cat([own @ rows.T for _, own in self._rows()])
        assert self.weight is not None  # noqa: S101 - asked for before
        product = torch.zeros(self.weight.shape[1], len(rows), dtype=torch.float64)
        for begin, own in self._rows():
            product += own.T @ rows[:, begin : begin + len(own)].T
        return product

    def _rows(self) -> Iterator[tuple[int, Tensor]]:
        assert self.weight is not None  # noqa: S101 - asked for before
        for begin, end in row_blocks(self.weight.shape):
            yield begin, read_rows(self.weight, begin, end).double()


def check_factors(factored: Factored) -> Checked:
    """Measures the factors of one module."""
    figures: dict[str, float] = {}
    problems: list[str] = []
    measured = Measured()
    A, B = read_tensor(factored.lora_A).double(), read_tensor(factored.lora_B).double()
    A, B = A.reshape(len(A), -1), B.reshape(len(B), -1)
    unit = UNIT[factored.lora_B.spec.dtype]
    for expert in range(factored.experts):
        left, size = _normalized(B[:, expert :: factored.experts])
        cosine = _largest_cosine(left)
        figures["orthonormality"] = max(figures.get("orthonormality", 0.0), cosine)
        if not cosine <= ORTHONORMAL_UNITS * unit:
            problems.append(f"columns of lora_B are not orthogonal (a cosine of {cosine:.1e})")
    if factored.weight is not None:
        projection, sizes = factored.projected(left)
        kept = A[size > 0] * (factored.scaling * size[size > 0])[:, None]
        loss = 8 * max(unit, UNIT[factored.lora_A.spec.dtype])
        measured = measure(kept, Exact(projection, sizes, loss, roundings=0), factored.lora_A.spec.dtype)
        if not measured.is_right:
            problems.append("s·B·A is no projection of the weight")
        if factored.context is not None and left.shape[1]:
            certificate = _certify(factored, left, projection)
            figures |= certificate.figures
            problems += certificate.problems
    wrong = "; ".join(dict.fromkeys(problems)) or None
    return Checked(factored.module_name, "factors", "exact", measured, figures, wrong)


def _normalized(columns: Tensor) -> tuple[Tensor, Tensor]:
    """U of `B = U Σ^½`, without components that are zero, and the columns' norms."""
    size = columns.norm(dim=0)
    return columns[:, size > 0] / size[size > 0], size


def _largest_cosine(left: Tensor) -> float:
    gram = left.T @ left
    gram.fill_diagonal_(0.0)
    return float(gram.abs().max()) if gram.numel() else 0.0


@dataclass(frozen=True, slots=True)
class _Certificate:
    figures: Mapping[str, float]
    problems: tuple[str, ...]


def _certify(factored: Factored, left: Tensor, projection: Tensor) -> _Certificate:
    """Whether the columns are singular vectors of `M = W T`, and those of the right end."""
    import torch

    context = factored.context
    assert context is not None  # noqa: S101 - asked for before

    def gram(rows: Tensor) -> Tensor:
        """`M Mᵀ U`, of `Uᵀ W` given by rows."""
        return factored.times(context.squared(rows))

    image = gram(projection)
    values = (left * image).sum(dim=0)
    largest = max(float(values.max()), _largest_square(factored, gram, left))
    residual = float((image - left * values).norm(dim=0).max()) / largest if largest > 0 else 0.0
    figures = {"certificate": residual}
    problems = []
    if not residual <= MOST_RESIDUAL:
        problems.append(f"columns of lora_B are no singular vectors: ‖MMᵀu − σ²u‖ is {residual:.1e} of the largest σ²")
    if left.shape[0] <= SPECTRUM_SIDE:
        identity = torch.eye(left.shape[0], dtype=torch.float64)
        every = torch.linalg.eigvalsh(gram(factored.projected(identity)[0])).clamp(min=0).flip(0)
        every = every[: min(factored.lora_B.shape[0], projection.shape[1])]
        count = left.shape[1]
        wanted = float((every[:count] if factored.mode == "ipm" else every[-count:]).sum())
        excess = float(values.sum()) - wanted
        off = -excess if factored.mode == "ipm" else excess
        figures["wrong_end"] = max(off, 0.0) / largest if largest > 0 else 0.0
        if not off <= 1e-6 * wanted + 1e-10 * largest * count:
            problems.append(f"there are singular vectors further towards the wanted end ({factored.mode})")
    return _Certificate(figures, tuple(problems))


def _largest_square(factored: Factored, gram: Callable[[Tensor], Tensor], left: Tensor) -> float:
    """The largest σ², from below, by a few steps of power iteration."""
    import torch

    vector = torch.randn(left.shape[0], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(POWER_STEPS):
        vector = torch.linalg.qr(gram(factored.projected(vector)[0])).Q
    image: Any = gram(factored.projected(vector)[0])
    return float((vector * image).sum(dim=0).max())
