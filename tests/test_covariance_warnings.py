"""Warnings of covariances that had too little text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from building import random
from hypothesis import given
from hypothesis import strategies as st

from corda_convert.operations.covariance_warnings import TOKENS_PER_INPUT, covariance_warnings


def entry(side: int = 64, rank: int | None = None, *, module: str = "a", **facts: Any) -> dict[str, Any]:
    found = {"side": side, "rank": side if rank is None else rank, "condition": 50.0, "samples": None, "tokens": None}
    return {"name": f"{module}.weight", "module": module, "covariance": {**found, **facts}}


def test_enough_text_gives_no_warning() -> None:
    plain = [{"name": "norm.weight", "action": "copied"}, {"name": "b.weight", "covariance": None}]
    assert covariance_warnings([]) == ()
    assert covariance_warnings([*plain, entry(), entry(tokens=640), entry(tokens=10**9, samples=3)]) == ()


def test_a_deficient_covariance_is_named_with_its_numbers() -> None:
    entries = [entry(), entry(rank=60, module="b", condition=2e17, tokens=9000, samples=12), entry(rank=63, module="c")]
    assert covariance_warnings(entries) == (
        "The covariances of 2 of 3 modules are rank-deficient; the worst is that of b, of rank 60 for 64 inputs (condition "
        "2e+17), from 9,000 tokens of 12 samples. In directions that no token took, the decomposition goes by the weights "
        "alone. Collect 640 tokens or more of varied text.",
    )


def test_fewer_tokens_than_inputs_are_a_deficiency_whatever_the_numbers_seem_to_be() -> None:
    (warning,) = covariance_warnings([entry(tokens=30)])
    assert "of a, of rank 30 for 64 inputs (condition 5e+01), from 30 tokens." in warning


def test_few_tokens_are_told_for_the_module_that_had_the_fewest() -> None:
    entries = [entry(tokens=639, module="b"), entry(side=256, tokens=400, module="c", samples=2), entry(tokens=640)]
    assert covariance_warnings(entries) == (
        "Few tokens went into the covariances of 2 of 3 modules: 1.6 for each input of c, which has 256, from 400 tokens of "
        "2 samples. The smallest directions are then mostly chance. Collect 10 or more for each input.",
    )


@pytest.mark.parametrize("collected", [{"samples": "3", "tokens": "40"}, {"samples": 3, "tokens": 40}], ids=str)
def test_counts_of_the_whole_file_stand_in_for_those_of_a_module(collected: dict[str, Any]) -> None:
    (warning,) = covariance_warnings([entry()], collected)
    assert "of rank 40 for 64 inputs (condition 5e+01), from 40 tokens of 3 samples." in warning
    assert covariance_warnings([entry(tokens=1000)], collected) == ()


@pytest.mark.parametrize("tokens", ["many", "", None, True, 3.5, "9" * 5000], ids=repr)
def test_counts_that_are_none_are_left_out(tokens: object) -> None:
    (warning,) = covariance_warnings([entry(rank=3)], {"tokens": tokens})
    assert "of rank 3 for 64 inputs (condition 5e+01). In" in warning


@given(st.integers(1, 60), st.integers(1, 24))
def test_the_rank_of_a_covariance_is_at_most_its_tokens(tokens: int, side: int) -> None:
    """What the certainty rests on, and that the warning tells just these."""
    samples = random(tokens, side, seed=tokens + side).double()
    rank = int(torch.linalg.matrix_rank(samples.T @ samples))
    assert rank <= tokens
    warnings = covariance_warnings([entry(side, tokens=tokens)])
    assert [("rank-deficient" in warning) for warning in warnings] == (
        [] if tokens >= TOKENS_PER_INPUT * side else [tokens < side]
    )


def test_the_least_tokens_give_the_eigenvalues_that_are_promised() -> None:
    """The bounds of Marchenko and Pastur at 10 tokens for each input, in a sample of 1000 inputs."""
    side = 1000
    samples = random(TOKENS_PER_INPUT * side, side, seed=1)
    eigenvalues = torch.linalg.eigvalsh(samples.T @ samples / samples.shape[0])
    assert float(eigenvalues[0]) == pytest.approx(0.47, abs=0.03)
    assert float(eigenvalues[-1]) == pytest.approx(1.73, abs=0.03)
