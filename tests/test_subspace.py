"""Subspaces and factors of every solver against float64 SVDs, on spectra that are hard."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from corda_convert.linalg import covariance, lora, subspace
from corda_convert.linalg.panels import Cholesky, ShiftedFactors, cholesky_qr2, gram, times, transposed_times
from corda_convert.linalg.projection import Factors, balanced_factors, write_residual
from corda_convert.linalg.subspace import End, Solver, Subspace, fix_signs, left_subspace, subspace_distance
from corda_convert.linalg.threads import Team
from corda_convert.linalg.weighted_matrix import WeightedMatrix
from corda_convert.linalg.weighting import (
    CovarianceWeighting,
    DiagonalWeighting,
    NoWeighting,
    RootWeighting,
    Weighting,
    root_weighting,
)

CPU = torch.device("cpu")
SHAPES = [(240, 240), (200, 330), (330, 200), (7, 64), (64, 7)]
SPECTRA = ["power law", "massive outliers", "clustered", "rank-deficient", "condition 1e5", "condition 1e10", "flat"]
EPS = torch.finfo(torch.float64).eps


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def matrix(shape: tuple[int, int], spectrum: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    U, V = orthonormal(shape[0], len(spectrum), generator), orthonormal(shape[1], len(spectrum), generator)
    return (U * spectrum) @ V.T


def spectrum(name: str, size: int) -> Tensor:
    steps = torch.arange(1, size + 1, dtype=torch.float64)
    if name == "massive outliers":
        values = steps**-0.5
        values[:2] = torch.tensor([1e4, 3e3], dtype=torch.float64)
        return values
    if name == "rank-deficient":
        return torch.where(steps <= size // 2, steps**-1.0, 0.0)
    return {
        "power law": steps**-1.0,
        "clustered": torch.where(steps <= size // 2, 1.0, 0.1) + 1e-3 / steps,
        "condition 1e5": torch.logspace(0, -5, size, dtype=torch.float64),
        "condition 1e10": torch.logspace(0, -10, size, dtype=torch.float64),
        "flat": 1.0 - 0.3 * steps / size,
    }[name]


def solved(M: Tensor, rank: int, end: End, solver: Solver = "auto", T: Weighting | None = None) -> Subspace:
    with Team(CPU) as team:
        return left_subspace(team, WeightedMatrix(M, T or NoWeighting()), rank=rank, end=end, solver=solver)


def residual(weight: Tensor, factors: Factors, scaling: float = 1.0) -> Tensor:
    out = torch.empty_like(weight)
    with Team(CPU) as team:
        write_residual(team, weight, factors, scaling=scaling, out=out)
    return out


def gap_bound(S: Tensor, rank: int, end: End) -> float:
    """How far rounding of M by `size · eps · σ_max` may turn the subspace: Wedin's theorem."""
    cut = rank if end == "top" else len(S) - rank
    gap = float(S[cut - 1] - S[cut])
    return 20 * len(S) * EPS * float(S[0]) / gap if gap > 0 else float("inf")


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("solver", ["auto", "dense", "krylov"])
def test_the_subspace_is_that_of_a_float64_svd(shape: tuple[int, int], name: str, end: End, solver: Solver) -> None:
    size = min(shape)
    rank = max(1, size // 20)
    M = matrix(shape, spectrum(name, size))
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    expected, values = (U[:, :rank], S[:rank]) if end == "top" else (U[:, -rank:], S[-rank:])
    found = solved(M, rank, end, solver)
    assert found.is_certified
    assert found.orthonormality <= 1e-12
    error = subspace_distance(found.U, expected)
    if end == "bottom" and name == "rank-deficient":
        assert float(found.singular_values.max()) <= 1e-12  # any vectors of the null space are right
    else:
        assert error <= max(gap_bound(S, rank, end), 1e-4 if found.solver != "dense-eigh" else 1e-7)
        assert found.angle is not None
        assert error <= 2 * found.angle + 1e-9
    assert torch.allclose(found.singular_values, values, rtol=1e-6, atol=1e-12 * float(S[0]))
    assert found.largest == pytest.approx(float(S[0]), rel=1e-2)
    if found.neighbour is not None:
        beside = S[rank] if end == "top" else S[-rank - 1]
        assert found.neighbour == pytest.approx(float(beside), rel=1e-2, abs=1e-12)
    exact = float(S.square().sum())
    assert found.energy == pytest.approx(exact, rel=0.1 if found.energy_is_estimated else 1e-9)


@pytest.mark.parametrize(
    ("name", "end", "solver"),
    [
        ("power law", "top", "block-lanczos"),
        ("massive outliers", "top", "block-lanczos"),
        ("power law", "bottom", "shift-invert-lanczos"),
        ("massive outliers", "bottom", "shift-invert-lanczos"),
        ("flat", "bottom", "shift-invert-lanczos"),
        ("condition 1e10", "bottom", "inverse-lanczos-qr"),
    ],
)
def test_each_solver_gets_there_on_its_own_ground(name: str, end: End, solver: str) -> None:
    found = solved(matrix((600, 640), spectrum(name, 600)), 24, end)
    assert found.solver == solver
    if solver != "inverse-lanczos-qr":
        assert found.fallback_from == ()


def test_what_is_not_certified_is_done_again_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal singular values no solver can tell which are wanted; a Lanczos that is cut short does not get there."""
    monkeypatch.setattr(subspace, "_block", lambda rank: 1)
    monkeypatch.setattr(subspace, "MOST_PER_RANK", 2)
    monkeypatch.setattr(subspace, "LEAST_BASIS", 0)
    M = matrix((600, 600), spectrum("flat", 600))
    found = solved(M, 24, "top")
    assert (found.solver, found.fallback_from) == ("dense-eigh", ("block-lanczos",))
    U, _, _ = torch.linalg.svd(M)
    assert subspace_distance(found.U, U[:, :24]) <= 1e-9


@pytest.mark.parametrize("count", [20, 40])
def test_equal_singular_values_beyond_a_block_are_not_missed(count: int) -> None:
    """Lanczos sees as many of them as its block has columns, 8 here, and then takes what comes after them."""
    values = torch.arange(1, 601, dtype=torch.float64).rsqrt() * 0.5 * math.sqrt(count)
    values[:count] = 1.0
    found = solved(matrix((600, 600), values), 24, "top")
    assert found.is_certified
    assert torch.allclose(found.singular_values, values[:24], rtol=1e-6)


@pytest.mark.parametrize("dead", [10, 20, 30])
@pytest.mark.parametrize("shape", [(600, 600), (560, 600)])
def test_rows_of_zeros_are_all_at_the_bottom(shape: tuple[int, int], dead: int) -> None:
    """Against the inverse of nearly nothing, the inverses of all other singular values are rounding."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    weight[:: shape[0] // dead][:dead] = 0.0
    found = solved(weight, 24, "bottom", T=CovarianceWeighting(context(600), 0.01))
    exact = torch.linalg.svdvals(weight @ (context(600).double() + 0.01 * torch.eye(600, dtype=torch.float64)))[-24:]
    assert found.is_certified
    assert torch.allclose(found.singular_values, exact, rtol=1e-6, atol=1e-12 * found.largest)


@pytest.mark.parametrize("outlier", [1e5, 1e6, 1e7])
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("shape", [(600, 600), (560, 700), (700, 560)])
def test_outliers_need_no_dense_solver(shape: tuple[int, int], end: End, outlier: float) -> None:
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64).rsqrt()
    values[:3] = outlier * torch.tensor([1.0, 0.7, 0.5], dtype=torch.float64)
    M = matrix(shape, values)
    found = solved(M, 24, end)
    U, S, _ = torch.linalg.svd(M, full_matrices=False)
    assert found.is_certified
    assert found.steps is not None
    assert found.angle is not None
    assert subspace_distance(found.U, U[:, :24] if end == "top" else U[:, -24:]) <= max(found.angle, 1e-5)
    assert torch.allclose(found.singular_values, S[:24] if end == "top" else S[-24:], rtol=1e-7)


@pytest.mark.parametrize("size", [20, 60, 80])
def test_a_direction_that_a_weighting_hides_is_not_lost(size: int) -> None:
    """The weight's own bottom, a hidden one, is not that of its product with the weighting."""
    hidden, plain = kahan(size, 1.3), torch.eye(8, dtype=torch.float64)
    W = orthonormal(2 * (size + 8), size + 8, torch.Generator().manual_seed(size)) @ torch.block_diag(hidden, plain)
    scale = torch.ones(size + 8, dtype=torch.float64)
    weakest = torch.linalg.svdvals(hidden)[-1]
    scale[size:] = weakest * torch.linspace(2, 9, 8, dtype=torch.float64)
    U, singular_values, _ = torch.linalg.svd(W * scale, full_matrices=False)
    with Team(CPU) as team:
        found = left_subspace(team, WeightedMatrix(W, DiagonalWeighting(scale)), rank=3, end="bottom")
    assert found.is_certified
    assert subspace_distance(found.U, U[:, -3:]) < 1e-4
    assert torch.allclose(found.singular_values, singular_values[-3:], rtol=1e-6, atol=0)


def kahan(size: int, angle: float) -> Tensor:
    """Kahan's triangle, whose diagonal hides how ill-conditioned it is (Higham, Accuracy and Stability, 8.3)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    rows = sine ** torch.arange(size, dtype=torch.float64)
    return rows[:, None] * (torch.eye(size, dtype=torch.float64) - cosine * torch.ones(size, size).double().triu(1))


@pytest.mark.parametrize(("size", "angle", "factors"), [(20, 1.3, 1), (30, 1.3, 2), (60, 1.3, 2), (100, 1.4, 2)])
@pytest.mark.parametrize("solver", ["auto", "krylov"])
def test_a_tall_weight_that_hides_its_condition_is_taken_apart_with_more_care(
    size: int, angle: float, factors: int, solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    careful = []
    basis = subspace._orthonormal_basis
    monkeypatch.setattr(subspace, "_orthonormal_basis", lambda *given: (careful.append(1), basis(*given))[1])
    W = orthonormal(3 * size, size, torch.Generator().manual_seed(size)) @ kahan(size, angle)
    U, singular_values, _ = torch.linalg.svd(W, full_matrices=False)
    with Team(CPU) as team:
        assert (subspace._triangle(team, W) is None) == (factors == 2)
        found = left_subspace(team, WeightedMatrix(W, NoWeighting()), rank=4, end="bottom", solver=solver)
    assert len(careful) == factors - 1
    assert found.is_certified
    assert subspace_distance(found.U, U[:, -4:]) < 1e-4
    assert torch.allclose(found.singular_values, singular_values[-4:], rtol=1e-8, atol=0)
    assert found.orthonormality < 1e-13


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_lanczos_gets_to_the_edge_of_a_random_matrix(rank: int) -> None:
    M = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    found = solved(M, rank, "top")
    assert (found.solver, found.fallback_from) == ("block-lanczos", ())


@pytest.mark.parametrize("entry", [0.0, 2.0])
def test_lanczos_goes_on_where_the_operator_leaves_nothing(entry: float) -> None:
    weight = torch.zeros(600, 640)
    weight[3, 4] = entry
    found = solved(weight, 16, "top")
    assert (found.solver, found.fallback_from) == ("block-lanczos", ())
    assert torch.allclose(found.singular_values[0], torch.tensor(entry, dtype=torch.float64))
    assert float(found.singular_values[1:].max()) <= 1e-12


@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("solver", ["dense", "krylov"])
@pytest.mark.parametrize("name", ["power law", "massive outliers", "condition 1e10", "rank-deficient"])
def test_other_devices_take_whole_matrices_and_two_cholesky_factorizations(name: str, end: End, solver: Solver) -> None:
    """The same functions that run there, on the memory of a CPU."""
    values = spectrum(name, 300)
    values[:2] *= 1e3 if name == "massive outliers" else 1.0
    M = matrix((300, 340), values)
    with Team(CPU) as team:
        team.is_cpu = False
        found = left_subspace(team, WeightedMatrix(M, NoWeighting()), rank=12, end=end, solver=solver)
    S = torch.linalg.svdvals(M)
    assert found.is_certified
    wanted = S[:12] if end == "top" else S[-12:]
    assert torch.allclose(found.singular_values, wanted, rtol=1e-3, atol=1e-13 * float(S[0]))


@pytest.mark.parametrize("scale", [1e-170, 1e-100, 1e100, 1e160])
@pytest.mark.parametrize("side", [40, 600])
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_numbers_whose_fourth_powers_are_out_of_range_are_refused(scale: float, side: int, end: End) -> None:
    M = scale * torch.randn(side, side, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with pytest.raises(torch.linalg.LinAlgError):
        solved(M, 4, end)


def context(d_in: int, samples: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    scales = torch.logspace(0, -2, d_in)
    scales[:2] = 30.0
    inputs = torch.randn(samples, d_in, generator=generator) * scales
    return inputs.T @ inputs / samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(240, 240), (200, 330), (330, 200)])
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("solver", ["dense", "krylov"])
@pytest.mark.parametrize("method", ["corda", "asvd", "svd-llm"])
def test_every_weighting_gives_the_left_singular_vectors_of_its_product(
    method: str, solver: Solver, end: End, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    W = matrix(shape, spectrum("power law", min(shape)), seed=1).to(dtype)
    C = context(shape[1]).to(dtype)
    C = (C + C.T) / 2
    values, vectors = torch.linalg.eigh(C.double())
    C = (vectors * values.clamp(min=1e-4)) @ vectors.T  # rounding to bf16 may have left negative ones
    C = (C + C.T) / 2
    scale = C.diagonal().sqrt()
    with Team(CPU) as team:
        T: Weighting
        if method == "corda":
            T, exact = CovarianceWeighting(C, 0.1), C + 0.1 * torch.eye(shape[1], dtype=torch.float64)
        elif method == "asvd":
            T, exact = DiagonalWeighting(scale), torch.diag(scale)
        else:
            T, shift = root_weighting(team, C)
            assert shift == 0.0
            exact = vectors * values.clamp(min=1e-4).sqrt() @ vectors.T
        found = left_subspace(team, WeightedMatrix(W, T), rank=12, end=end, solver=solver)
    U, S, _ = torch.linalg.svd(W.double() @ exact, full_matrices=False)
    expected = U[:, :12] if end == "top" else U[:, -12:]
    assert subspace_distance(found.U, expected) <= max(gap_bound(S, 12, end), 1e-5)
    assert torch.allclose(found.singular_values, S[:12] if end == "top" else S[-12:], rtol=1e-5)
    assert torch.allclose(found.projected, W.double().T @ found.U, atol=1e-12)


def test_the_root_of_a_singular_covariance_is_shifted_by_less_than_float32_can_tell() -> None:
    C = context(64, samples=10)
    with Team(CPU) as team:
        root, shift = root_weighting(team, C)
    assert 0 < shift <= 1e-5 * float(C.diagonal().max())
    assert torch.allclose(root.L @ root.L.T, C.double(), atol=2 * shift)
    with Team(CPU) as team, pytest.raises(torch.linalg.LinAlgError):
        root_weighting(team, torch.full((4, 4), float("nan")))
    with Team(CPU) as team, pytest.raises(torch.linalg.LinAlgError):
        root_weighting(team, C - torch.eye(64) * C.diagonal().max())


def test_the_same_bits_come_from_any_number_of_threads() -> None:
    W = matrix((700, 620), spectrum("power law", 620)).bfloat16()
    C = context(620)

    def run(threads: int, end: End, solver: Solver) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with Team(CPU) as team:
                T = CovarianceWeighting(C, 0.01)
                found = left_subspace(team, WeightedMatrix(W, T), rank=16, end=end, solver=solver)
                factors = balanced_factors(found, scaling=1.0)
                out = torch.empty_like(W)
                norms = write_residual(team, W, factors, scaling=1.0, out=out)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        return [factors.lora_A, factors.lora_B, out, torch.tensor([norms.weight, norms.delta, norms.rounding])]

    ends: tuple[End, ...] = ("top", "bottom")
    solvers: tuple[Solver, ...] = ("dense", "krylov")
    for end, solver in product(ends, solvers):
        one, *others = (run(threads, end, solver) for threads in (1, 2, 3))
        assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("n", [5, 300, 1100])
def test_panels_multiply_and_factor_as_whole_matrices_do(n: int) -> None:
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(n + 30, n, generator=generator)
    X, Z = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (n, n + 30))
    with Team(CPU) as team:
        assert torch.allclose(times(team, A, X), A.double() @ X, rtol=1e-12, atol=1e-10)
        assert torch.allclose(transposed_times(team, A, Z), A.double().T @ Z, rtol=1e-12, atol=1e-10)
        G = gram(team, A.double())
        assert torch.equal(G, G.T)
        assert torch.allclose(G, A.double().T @ A.double(), rtol=1e-12, atol=1e-10)
        factor = Cholesky.of(team, G.clone())
        assert factor is not None
        assert torch.allclose(factor.lower() @ factor.lower().T, G, rtol=1e-11, atol=1e-9)
        assert torch.allclose(G @ factor.solve(X), X, atol=1e-7)
        assert Cholesky.of(team, G - 2 * G.diagonal().max() * torch.eye(n, dtype=G.dtype)) is None


@pytest.mark.parametrize("n", [5, 300, 1100])
def test_one_matrix_has_a_factor_for_each_shift_in_turn(n: int) -> None:
    generator = torch.Generator().manual_seed(4)
    A = torch.randn(n + 30, n, generator=generator, dtype=torch.float64)
    X = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    with Team(CPU) as team:
        G = gram(team, A)
        smallest = float(torch.linalg.eigvalsh(G)[0])
        factors = ShiftedFactors(team, G.clone())
        for shift in (0.0, 0.9 * smallest, 2 * float(G.diagonal().max()), 1.01 * smallest, 0.5 * smallest, 0.0):
            shifted = G - shift * torch.eye(n, dtype=G.dtype)
            factor = factors.factor(shift)
            assert (factor is None) == (shift > smallest)
            if factor is not None:
                assert torch.allclose(factor.lower() @ factor.lower().T, shifted, rtol=1e-11, atol=1e-9)
                assert torch.allclose(shifted @ factor.solve(X), X, atol=1e-7)
        assert factor is not None
        before = factor.solve(X)
        factor.take_upper()
        assert torch.allclose(factor.solve(X), before, rtol=1e-9, atol=1e-12)
        assert torch.allclose(G @ factor.solve(X), X, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_weighting_gives_the_products_of_its_matrix(dtype: torch.dtype) -> None:
    d_out, d_in = 300, 530
    generator = torch.Generator().manual_seed(4)
    W, X = torch.randn(d_out, d_in, generator=generator).to(dtype), torch.randn(d_in, 7, generator=generator).double()
    C = context(d_in).to(dtype)
    scale, L = torch.rand(d_in, generator=generator).double(), C.double().tril()
    identity = torch.eye(d_in, dtype=torch.float64)
    weightings: list[tuple[Weighting, Tensor]] = [
        (NoWeighting(), identity),
        (DiagonalWeighting(scale), scale.diag()),
        (CovarianceWeighting(C, 0.25), C.double() + 0.25 * identity),
        (RootWeighting(L), L),
    ]
    with Team(CPU) as team:
        for weighting, T in weightings:
            for found, expected in (
                (weighting.times(team, X), T @ X),
                (weighting.transposed_times(team, X), T.T @ X),
                (weighting.product(team, W), W.double() @ T),
                (weighting.product(team, W.T.contiguous().T), W.double() @ T),
            ):
                assert found.dtype == torch.float64
                assert torch.allclose(found, expected, rtol=1e-12, atol=1e-10)
    assert torch.equal(C, context(d_in).to(dtype))  # damping is not left in it


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_projection_and_residual_give_the_weight_back(shape: tuple[int, int], end: End) -> None:
    weight = matrix(shape, spectrum("power law", min(shape)), seed=1)
    C = context(shape[1]).double()
    found = solved(weight, 3, end, T=CovarianceWeighting(C, 0.01))
    for scaling in (1.0, 0.5, 3.7):
        factors = balanced_factors(found, scaling=scaling)
        product = scaling * factors.lora_B.double() @ factors.lora_A.double()
        expected = found.U @ (found.U.T @ weight)
        assert float((product - expected).norm() / expected.norm()) <= 1e-6
        assert float((residual(weight, factors, scaling) + product - weight).norm() / weight.norm()) <= 1e-15
        norms_A = factors.lora_A.double() @ (C + 0.01 * torch.eye(shape[1], dtype=torch.float64))
        norms_B = factors.lora_B.double().norm(dim=0)
        assert torch.allclose(norms_A.norm(dim=1), norms_B, rtol=1e-5)  # Σ^½ on both sides, in the metric of C


def test_the_norms_of_a_residual_are_those_of_what_was_written() -> None:
    weight = matrix((300, 200), spectrum("power law", 200), seed=1).bfloat16()
    factors = balanced_factors(solved(weight, 8, "top"), scaling=1.0)
    out = torch.empty_like(weight)
    with Team(CPU) as team:
        norms = write_residual(team, weight, factors, scaling=1.0, out=out)
    delta = factors.lora_B.double() @ factors.lora_A.double()
    exact = weight.double() - delta
    assert torch.equal(out, exact.bfloat16())
    assert norms.weight == pytest.approx(float(weight.double().square().sum()))
    assert norms.delta == pytest.approx(float(delta.square().sum()))
    assert norms.rounding == pytest.approx(float((exact - out.double()).square().sum()))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_of_the_paper_gives_the_same_projection(shape: tuple[int, int]) -> None:
    """CorDA takes U Σ Vᵀ C⁻¹ with an inverse; the projection U Uᵀ W needs none and is the same."""
    weight = matrix(shape, spectrum("power law", min(shape)), seed=3)
    C = torch.eye(shape[1], dtype=torch.float64) + 0.3 * torch.ones(shape[1], shape[1], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight @ C, full_matrices=False)
    paper = (U[:, :4] * S[:4]) @ Vh[:4] @ torch.linalg.inv(C)
    found = solved(weight, 4, "top", T=CovarianceWeighting(C, 0.0))
    assert torch.allclose(found.U @ (found.U.T @ weight), paper, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
@pytest.mark.parametrize("true_rank", [0, 1, 3])
@pytest.mark.parametrize("solver", ["auto", "krylov"])
def test_zero_singular_values_give_finite_factors(
    shape: tuple[int, int], end: End, true_rank: int, solver: Solver
) -> None:
    values = torch.zeros(min(shape), dtype=torch.float64)
    values[:true_rank] = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)[:true_rank]
    weight = matrix(shape, values, seed=4) if true_rank else torch.zeros(shape, dtype=torch.float64)
    found = solved(weight, 5, end, solver)
    factors = balanced_factors(found, scaling=1.0)
    for factor in (factors.lora_A, factors.lora_B, found.U):
        assert bool(torch.isfinite(factor).all())
    assert found.orthonormality <= 1e-9
    left = residual(weight, factors)
    together = left + factors.lora_B.double() @ factors.lora_A.double()
    assert torch.allclose(together, weight, atol=1e-14)
    if end == "top":
        assert float(left.norm()) <= 1e-6 * max(float(weight.norm()), 1.0)


def test_a_rank_deficient_covariance_without_damping_drops_dead_components() -> None:
    """u with uᵀWC = 0 and uᵀW ≠ 0: dividing by the zero singular value would give Inf."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(32, 32, generator=generator, dtype=torch.float64)
    sample = torch.randn(3, 32, generator=generator, dtype=torch.float64)
    found = solved(weight, 8, "bottom", T=CovarianceWeighting(sample.T @ sample, 0.0))
    factors = balanced_factors(found, scaling=1.0)
    assert factors.zero_components > 0
    assert bool(torch.isfinite(factors.lora_A).all())
    assert float(factors.lora_A.abs().max()) < 1e9


def test_rank_and_condition_of_a_covariance() -> None:
    assert covariance.rank_and_condition(context(40, samples=7)) == (7, None)
    rank, condition = covariance.rank_and_condition(torch.diag(torch.tensor([4.0, 2.0, 0.5])))
    assert (rank, condition) == (3, pytest.approx(8.0))


def test_the_same_vectors_come_out_whatever_signs_went_in() -> None:
    generator = torch.Generator().manual_seed(6)
    U = orthonormal(20, 5, generator)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    turned, signs = fix_signs(U)
    again, others = fix_signs(U * flips)
    assert torch.equal(turned, again)
    assert torch.equal(signs * flips, others)
    assert bool((turned.gather(0, turned.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_the_share_of_the_weight_tells_initial_factors_from_ordinary_ones() -> None:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(64, 48, generator=generator, dtype=torch.float64)
    factors = balanced_factors(solved(weight, 6, "bottom"), scaling=2.0)
    left = residual(weight, factors, scaling=2.0)
    plain_A, plain_B = torch.randn(6, 48, generator=generator), torch.randn(64, 6, generator=generator)

    def share(weight: Tensor, A: Tensor, B: Tensor) -> float:
        return lora.projection_share(B.T.double() @ B.double(), B.T.double() @ weight, A.double())

    assert share(weight, factors.lora_A, factors.lora_B) > 0.999
    assert abs(share(left, factors.lora_A, factors.lora_B)) < 0.05
    assert abs(share(weight, plain_A, plain_B)) < 0.3
    assert share(weight, plain_A, torch.zeros(64, 6)) == 0.0


@pytest.mark.parametrize("condition", [1.0, 1e4, 1e12])
def test_two_cholesky_factorizations_orthonormalize_or_say_that_they_cannot(condition: float) -> None:
    Z = matrix((300, 20), torch.logspace(0, -math.log10(condition), 20, dtype=torch.float64))
    found = cholesky_qr2(Z)
    if condition > 1e6:
        assert found is None
        return
    assert found is not None
    Q, R = found
    assert torch.allclose(Q.T @ Q, torch.eye(20, dtype=Q.dtype), atol=1e-14)
    assert torch.allclose(Q @ R, Z, atol=1e-14)
    assert torch.equal(R, R.triu())
