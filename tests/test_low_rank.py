"""The algebra of lower ranks, against float64 SVDs of the matrices that it never forms."""

import pytest
import torch
from building import random

from corda_convert.linalg import low_rank
from corda_convert.linalg.threads import Team

CPU = torch.device("cpu")


def spectrum_of(d_out: int, d_in: int, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with about these singular values."""
    U = torch.linalg.qr(random(d_out, len(values), seed=seed).double()).Q
    V = torch.linalg.qr(random(d_in, len(values), seed=seed + 1).double()).Q
    return (U * values @ V.T).float()


@pytest.mark.parametrize("n", [1, 4, 9, 40])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_core_has_the_singular_values_of_the_product(n: int, weighted: bool) -> None:
    """More factors than inputs or outputs, too."""
    left, right, x = random(20, n).double(), random(n, 12, seed=1).double(), random(50, 12, seed=2).double()
    root = torch.linalg.cholesky(x.T @ x) if weighted else torch.eye(12, dtype=torch.float64)
    with Team(CPU) as team:
        found = low_rank.core_of(team, left, right, x.T @ x if weighted else None)
        expected = torch.linalg.svdvals(left @ right @ root)
        torch.testing.assert_close(found.spectrum()[: min(n, 12)], expected[: min(n, 12)], rtol=1e-6, atol=1e-9)
        for rank in range(1, min(n, 12) + 1):
            best = low_rank.reduced(found, rank)
            assert best.lora_A.shape == (rank, 12)
            missed = float(((left @ right - best.lora_B @ best.lora_A) @ root).norm())
            assert missed == pytest.approx(float(expected[rank:].norm()), rel=1e-6, abs=1e-5 if weighted else 1e-10)
            sizes = torch.linalg.vector_norm(best.lora_A, dim=1), torch.linalg.vector_norm(best.lora_B, dim=0)
            torch.testing.assert_close(*sizes)


def test_the_norm_of_what_nearly_cancels_is_kept() -> None:
    A, B = random(8, 60, seed=3).double(), random(50, 8, seed=4).double()
    other = B + 1e-9 * random(50, 8, seed=5).double()
    with Team(CPU) as team:
        found = low_rank.product_norm(team, torch.cat([B, -other], dim=1), torch.cat([A, A]))
    assert found == pytest.approx(float(((B - other) @ A).norm()), rel=1e-4)


def test_a_large_matrix_is_taken_by_lanczos_with_a_certificate() -> None:
    values = torch.logspace(0, -3, 600, dtype=torch.float64)
    matrix = spectrum_of(600, 700, values)
    with Team(CPU) as team:
        found = low_rank.extracted(team, matrix, 24)
    assert found.solver == "block-lanczos"
    assert found.certificate["holds"]
    exact = torch.linalg.svdvals(matrix.double())
    missed = float((matrix.double() - found.lora_B @ found.lora_A).norm())
    assert missed == pytest.approx(float(exact[24:].norm()), rel=1e-6)
    assert (found.error, found.norm) == (pytest.approx(missed, rel=1e-9), pytest.approx(float(exact.norm()), rel=1e-9))
    assert (found.weighted_error, found.weighted_norm) == (None, None)


@pytest.mark.parametrize(("share", "most"), [(0.2, 700), (0.95, 700), (1.0, 700), (0.999, 40)])
def test_the_rank_of_an_energy_is_found_by_trying_more_and_more(share: float, most: int) -> None:
    """Over 64, the first try, and at a cap."""
    matrix = spectrum_of(600, 700, torch.linspace(1, 0.5, 150, dtype=torch.float64))
    squares = torch.linalg.svdvals(matrix.double()).square()
    with Team(CPU) as team:
        found = low_rank.energy_rank(team, matrix, share, None, most)
    kept = float(squares[:found].sum() / squares.sum())
    if found < min(most, 600):
        assert kept >= share * (1 - 1e-9) > float(squares[: found - 1].sum() / squares.sum())
    assert found <= most
    assert (found == 40) == (most == 40)


def test_the_same_bits_from_any_number_of_threads() -> None:
    matrix = spectrum_of(600, 700, torch.logspace(0, -2, 500, dtype=torch.float64))
    left, right, x = random(300, 24).double(), random(24, 400, seed=1).double(), random(90, 400, seed=2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with Team(CPU) as team:
                core = low_rank.core_of(team, left, right, x.T @ x)
                best, dense = low_rank.reduced(core, 5), low_rank.extracted(team, matrix, 16)
            results.append((best.lora_A, best.lora_B, dense.lora_A, dense.lora_B))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_nothing_has_no_rank_and_no_direction() -> None:
    zero = torch.zeros(7, 9)
    covariance = torch.eye(9)
    with Team(CPU) as team:
        assert low_rank.energy_rank(team, zero, 0.9, None, 5) == 0
        found = low_rank.extracted(team, zero, 2, covariance)
        core = low_rank.core_of(team, torch.zeros(7, 3).double(), random(3, 9).double(), covariance)
        best = low_rank.reduced(core, 2)
    assert (found.error, found.weighted_error) == (0.0, 0.0)
    assert not bool(found.lora_B.any())
    assert not bool((best.lora_B @ best.lora_A).any())
    assert bool(torch.isfinite(best.lora_A).all())
    assert low_rank.rank_for_energy(core.spectrum(), 0.9) == 0
