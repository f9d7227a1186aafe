"""LoRA algebra, block adapters and damping against float64."""

from __future__ import annotations

import pytest
import torch

from corda_convert.linalg import blocks, covariance, lora


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
