"""Warnings of covariances that had too little text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import COVARIANCES, MODEL, covariance_tensors, random, write_checkpoint, write_covariances
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st

from corda_convert.operations.covariance_warnings import TOKENS_PER_INPUT, covariance_warnings

DOWN = "model.layers.0.mlp.down_proj"


def entry(side: int = 64, rank: int | None = None, *, module: str = "a", **facts: Any) -> dict[str, Any]:
    found = {"side": side, "rank": side if rank is None else rank, "condition": 50.0, "samples": None, "tokens": None}
    return {"name": f"{module}.weight", "module": module, "covariance": {**found, **facts}}


def test_enough_text_gives_no_warning() -> None:
    plain = [{"name": "norm.weight", "action": "copied"}, {"name": "b.weight", "covariance": None}]
    assert covariance_warnings([]) == ()
    assert covariance_warnings([*plain, entry(), entry(tokens=640), entry(tokens=10**9, samples=3)]) == ()


def test_a_deficient_covariance_is_named_with_its_numbers() -> None:
    entries = [entry(), entry(rank=60, module="b", condition=2e17, tokens=90, samples=12), entry(rank=63, module="c")]
    assert covariance_warnings(entries) == (
        "The covariances of 2 of 3 modules are rank-deficient; the worst is that of b, of rank 60 for 64 inputs (condition "
        "2e+17), from 90 tokens of 12 samples. In the other directions the decomposition goes by the weights alone, or by "
        "float32's noise. Collect 640 tokens or more of varied text.",
    )


def test_more_text_is_not_asked_for_where_there_was_enough() -> None:
    assert covariance_warnings([entry(rank=32, condition=None, tokens=640)]) == ()
    (warning,) = covariance_warnings([entry(rank=31, condition=None, tokens=640)])
    assert warning.endswith(
        "of a, of rank 31 for 64 inputs, from 640 tokens. In the other directions the decomposition goes by the weights "
        "alone, or by float32's noise. Its tokens hardly vary there, or a few inputs are so large that float32 loses the "
        "others beside them."
    )


@pytest.mark.parametrize("tokens", [None, 640])
def test_a_rank_that_was_not_computed_is_no_deficiency(tokens: int | None) -> None:
    unknown = entry(tokens=tokens)
    unknown["covariance"] |= {"rank": None, "condition": None}
    assert covariance_warnings([unknown]) == ()


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
    assert "of rank 3 for 64 inputs (condition 5e+01). In the other" in warning


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


# In a run


def test_a_run_warns_of_covariances_with_too_little_text(done: Callable[..., Ran], tmp_path: Path) -> None:
    """By their numbers where the file says nothing, and by its tokens where the numbers look well."""
    tensors = covariance_tensors()
    few = random(3, 24, seed=9)
    model = write_checkpoint(tmp_path / "model")
    deficient = write_covariances(tmp_path / "deficient.pt", tensors | {DOWN: few.T @ few})
    arguments = ("decompose", model, "--mode", "kpm", "--rank", 2)
    ran = done(*arguments, "--cov", deficient, "-o", tmp_path / "a")
    assert (
        f"Note: The covariances of 1 of 14 modules are rank-deficient; the worst is that of {DOWN}, of rank 3 for 24 "
        in (ran.err)
    )
    short = write_covariances(tmp_path / "short.safetensors", tensors, {"tokens": "150", "samples": "4"})
    ran = done(*arguments, "--cov", short, "-o", tmp_path / "b", "--json")
    (warning,) = json.loads(ran.out)["warnings"]
    assert warning.startswith("Few tokens went into the covariances of 14 of 14 modules: 6.2 for each input of ")
    assert f"Note: {warning}" in ran.err


def test_the_fixtures_and_methods_without_covariances_are_not_warned_of(
    done: Callable[..., Ran], tmp_path: Path
) -> None:
    arguments = ("decompose", MODEL, "--mode", "kpm", "--rank", 4)
    for method in ("corda", "asvd", "svd-llm"):
        ran = done(*arguments, "--cov", COVARIANCES, "--method", method, "-o", tmp_path / method)
        assert "Note:" not in ran.err
