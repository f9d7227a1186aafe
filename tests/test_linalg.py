"""Subspaces, factors and LoRA algebra against float64 SVDs, on spectra that are hard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from corda_convert.linalg import blocks, covariance, lora
from corda_convert.linalg.subspace import (
    End,
    balanced_factors,
    fix_signs,
    left_subspace,
    residual,
    subspace_distance,
)

SHAPES = [(48, 48), (40, 96), (96, 40), (7, 64), (64, 7)]


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def matrix(shape: tuple[int, int], spectrum: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, V = orthonormal(shape[0], len(spectrum), generator), orthonormal(shape[1], len(spectrum), generator)
    return (U * spectrum) @ V.T


def spectra(size: int) -> dict[str, Tensor]:
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    outliers = steps**-0.5
    outliers[:2] = torch.tensor([1e4, 3e3], dtype=torch.float64)
    return {
        "power law": steps**-1.0,
        "massive outliers": outliers,
        "clustered": torch.where(steps <= size // 2, 1.0, 0.1) + 1e-3 / steps,
        "condition 1e5": torch.logspace(0, -5, size, dtype=torch.float64),
    }


@pytest.mark.parametrize("name", ["power law", "massive outliers", "clustered", "condition 1e5"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_the_subspace_is_that_of_a_float64_svd(shape: tuple[int, int], name: str, end: End) -> None:
    size = min(shape)
    rank = max(1, size // 6)
    M = matrix(shape, spectra(size)[name])
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    expected, values = (U[:, :rank], S[:rank]) if end == "top" else (U[:, -rank:], S[-rank:])
    found = left_subspace(M, rank=rank, end=end)
    gap = float(S[rank - 1] ** 2 - S[rank] ** 2) if end == "top" else float(S[-rank - 1] ** 2 - S[-rank] ** 2)
    bound = 100 * size * torch.finfo(torch.float64).eps * float(S[0]) ** 2 / gap  # Davis–Kahan for the Gram matrix
    assert subspace_distance(found.U, expected) <= max(bound, 1e-12)
    assert found.orthonormality <= 1e-12
    assert found.residual <= 1e-13 * size
    assert torch.allclose(found.singular_values, values, rtol=1e-6, atol=1e-12 * float(S[0]))
    assert torch.allclose(found.spectrum, S, rtol=1e-4, atol=1e-7 * float(S[0]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_projection_and_residual_give_the_weight_back(shape: tuple[int, int], end: End) -> None:
    weight = matrix(shape, spectra(min(shape))["power law"], seed=1)
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(200, shape[1], generator=generator, dtype=torch.float64)
    context = inputs.T @ inputs
    damping = covariance.relative_damping(context, 0.01)
    found = left_subspace(covariance.weighted(weight, context, damping), rank=3, end=end)
    for scaling in (1.0, 0.5, 3.7):
        factors = balanced_factors(weight, found, scaling=scaling)
        product = scaling * factors.lora_B.double() @ factors.lora_A.double()
        expected = found.U @ (found.U.T @ weight)
        assert float((product - expected).norm() / expected.norm()) <= 1e-6
        assert float((residual(weight, factors, scaling=scaling) + product - weight).norm() / weight.norm()) <= 1e-15
        norms_A = factors.lora_A.double() @ (context + damping.amount * torch.eye(shape[1], dtype=torch.float64))
        norms_B = factors.lora_B.double().norm(dim=0)
        assert torch.allclose(norms_A.norm(dim=1), norms_B, rtol=1e-5)  # Σ^½ on both sides, in the metric of C


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_of_the_paper_gives_the_same_projection(shape: tuple[int, int]) -> None:
    """CorDA takes U Σ Vᵀ C⁻¹ with an inverse; the projection U Uᵀ W needs none and is the same."""
    weight = matrix(shape, spectra(min(shape))["power law"], seed=3)
    context = torch.eye(shape[1], dtype=torch.float64) + 0.3 * torch.ones(shape[1], shape[1], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight @ context, full_matrices=False)
    paper = (U[:, :4] * S[:4]) @ Vh[:4] @ torch.linalg.inv(context)
    found = left_subspace(weight @ context, rank=4, end="top")
    assert torch.allclose(found.U @ (found.U.T @ weight), paper, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_zero_singular_values_give_finite_factors(shape: tuple[int, int], end: End, true_rank: int) -> None:
    spectrum = torch.zeros(min(shape), dtype=torch.float64)
    spectrum[:true_rank] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)[:true_rank]
    weight = matrix(shape, spectrum, seed=4) if true_rank else torch.zeros(shape, dtype=torch.float64)
    found = left_subspace(weight, rank=5, end=end)
    factors = balanced_factors(weight, found, scaling=1.0)
    for factor in (factors.lora_A, factors.lora_B):
        assert bool(torch.isfinite(factor).all())
    assert bool(torch.isfinite(found.U).all())
    left = residual(weight, factors, scaling=1.0)
    together = left + factors.lora_B.double() @ factors.lora_A.double()
    assert torch.allclose(together, weight, atol=1e-14)
    if end == "top":
        assert float(left.norm()) <= 1e-6 * max(float(weight.norm()), 1.0)


def test_a_rank_deficient_covariance_without_damping_drops_dead_components() -> None:
    """u with uᵀWC = 0 and uᵀW ≠ 0: dividing by the zero singular value would give Inf."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    sample = torch.randn(3, 32, generator=generator, dtype=torch.float64)
    context = sample.T @ sample
    damping = covariance.relative_damping(context, 0.0)
    found = left_subspace(covariance.weighted(weight, context, damping), rank=8, end="bottom")
    factors = balanced_factors(weight, found, scaling=1.0)
    assert factors.zero_components > 0
    assert bool(torch.isfinite(factors.lora_A).all())
    assert float(factors.lora_A.abs().max()) < 1e9


def test_the_same_vectors_come_out_whatever_signs_went_in() -> None:
    generator = torch.Generator().manual_seed(6)
    U = orthonormal(20, 5, generator)
    flipped = U * torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.equal(fix_signs(U), fix_signs(flipped))
    assert bool((fix_signs(U).gather(0, fix_signs(U).abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_the_reference_damping_doubles_until_the_float32_inverse_is_good_and_gives_up() -> None:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(500, 16, generator=generator)
    good = covariance.reference_damping(inputs.T @ inputs / 500)
    assert good is not None
    assert good.factor == 0.01
    negative = -0.15 / 16 / (1 + 0.01 / 16)  # −0.01 of the mean: the first damping makes the matrix singular
    doubled = covariance.reference_damping(torch.diag(torch.tensor([1.0] * 15 + [negative])))
    assert doubled is not None
    assert doubled.factor == 0.02
    assert covariance.reference_damping(torch.full((4, 4), float("nan"))) is None


def test_the_difference_of_equal_factors_is_exactly_zero() -> None:
    A, B = torch.randn(4, 30), torch.randn(20, 4)
    right, left = lora.difference(A, B, A.clone(), B.clone())
    assert bool((lora.delta(right, left, 1.7) == 0).all())


def test_the_difference_keeps_digits_that_two_products_lose() -> None:
    torch.manual_seed(8)
    A0, B0 = torch.randn(8, 64), torch.randn(48, 8)
    A, B = A0 + 1e-4 * torch.randn(8, 64), B0 + 1e-4 * torch.randn(48, 8)
    exact = B.double() @ A.double() - B0.double() @ A0.double()
    right, left = lora.difference(A, B, A0, B0)
    ours = float((lora.delta(right, left, 1.0).double() - exact).norm() / exact.norm())
    naive = float(((B @ A - B0 @ A0).double() - exact).norm() / exact.norm())
    assert ours <= 1e-6
    assert ours < naive / 10


def test_the_share_of_the_weight_tells_initial_factors_from_ordinary_ones() -> None:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    factors = balanced_factors(weight, left_subspace(weight, rank=6, end="bottom"), scaling=2.0)
    left = residual(weight, factors, scaling=2.0)
    plain_A, plain_B = torch.randn(6, 48, generator=generator), torch.randn(64, 6, generator=generator)

    def share(matrix: Tensor, A: Tensor, B: Tensor) -> float:
        return lora.projection_share(B.T.double() @ B.double(), B.T.double() @ matrix, A.double())

    assert share(weight, factors.lora_A, factors.lora_B) > 0.999
    assert abs(share(left, factors.lora_A, factors.lora_B)) < 0.05
    assert abs(share(weight, plain_A, plain_B)) < 0.3
    assert share(weight, plain_A, torch.zeros(64, 6)) == 0.0


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(24, 32, 8), (24, 30, 8), (24, 8, 8), (24, 11, 4)])
@pytest.mark.parametrize("block_rows", [8, 24])
def test_blocks_fold_as_their_formulas_say(d_out: int, d_in: int, r: int, block_rows: int) -> None:
    torch.manual_seed(10)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    balance, mini = torch.randn(r, d_out, dtype=torch.float64), torch.randn(r, 6, dtype=torch.float64)
    for fold, block, columns in (
        (blocks.fold_balance, balance, lambda o: o),
        (blocks.fold_mini, mini, lambda o: o % 6),
    ):
        expected = weight.clone()
        for o in range(d_out):
            for i in range(d_in):
                expected[o, i] += block[i % r, columns(o)]
        actual, square = weight.clone(), 0.0
        for first in range(0, d_out, block_rows):
            square += fold(actual[first : first + block_rows], block, first)
        assert torch.allclose(actual, expected, atol=1e-14)
        assert square == pytest.approx(float((expected - weight).norm()) ** 2, rel=1e-9)


@pytest.mark.parametrize("block_rows", [4, 8, 24])
def test_bat_folds_as_its_formula_says(block_rows: int) -> None:
    torch.manual_seed(11)
    d_out, d_in, r = 24, 32, 4
    weight, block = torch.randn(d_out, d_in, dtype=torch.float64), torch.randn(d_out // r, r, r, dtype=torch.float64)
    expected = weight.clone()
    for i in range(d_out // r):
        for j in range(d_in // r):
            rows, columns = slice(i * r, i * r + r), slice(j * r, j * r + r)
            expected[rows, columns] += weight[rows, columns] @ block[i] + block[i]
    actual, square = weight.clone(), 0.0
    for first in range(0, d_out, block_rows):
        square += blocks.fold_bat(actual[first : first + block_rows], block, first)
    assert torch.allclose(actual, expected, atol=1e-13)
    assert square == pytest.approx(float((expected - weight).norm()) ** 2, rel=1e-9)
