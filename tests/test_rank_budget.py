"""Ranks from a budget: against every possible choice in small cases, and end to end beside PEFT and a float64 SVD."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    COVARIANCES,
    LINEARS,
    MODEL,
    UP,
    covariance_tensors,
    files_below,
    llama_tensors,
    read_json,
    weight_files,
    write_checkpoint,
    write_covariances,
)
from conftest import Ran, assert_no_leftovers
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from corda_convert import DecomposeOptions, Outcome, RunOptions, decompose
from corda_convert.linalg.allocation import Components, allocate, uniform_rank
from corda_convert.operations.decomposition import DecomposeTransform
from corda_convert.output import journal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

Command = Callable[..., Ran]
Refusal = Callable[..., str]

# The choice by itself

SHARES = st.lists(st.integers(0, 1000), min_size=1, max_size=4)


@st.composite
def layers(draw: st.DrawFn, *, largest_first: bool) -> list[Components]:
    found = []
    for _ in range(draw(st.integers(1, 4))):
        shares = sorted(draw(SHARES), reverse=largest_first)
        least = draw(st.integers(0, min(2, len(shares))))
        found.append(Components([share / 1024 for share in shares], cost=draw(st.integers(1, 9)), least=least))
    return found


def every_choice(spectra: Sequence[Components]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(each.least, len(each.shares) + 1) for each in spectra))


def spent(spectra: Sequence[Components], counts: Sequence[int]) -> int:
    return sum(each.cost * count for each, count in zip(spectra, counts, strict=True))


def taken(spectra: Sequence[Components], counts: Sequence[int]) -> float:
    """The sum of shares, exact for multiples of 1/1024."""
    return sum(sum(each.shares[:count]) for each, count in zip(spectra, counts, strict=True))


def next_cost(spectra: Sequence[Components], counts: Sequence[int]) -> list[int]:
    """What one more component of each layer costs that has one."""
    return [each.cost for each, count in zip(spectra, counts, strict=True) if count < len(each.shares)]


@given(layers(largest_first=True), st.integers(0, 60))
def test_the_largest_are_the_best_choice_up_to_one_component(spectra: list[Components], more: int) -> None:
    budget = spent(spectra, [each.least for each in spectra]) + more
    counts = allocate(spectra, budget, end="top")
    best = max(taken(spectra, choice) for choice in every_choice(spectra) if spent(spectra, choice) <= budget)
    missed = [each.shares[count] for each, count in zip(spectra, counts, strict=True) if count < len(each.shares)]
    largest = max((each.shares[each.least] for each in spectra if each.least < len(each.shares)), default=0.0)
    assert all(each.least <= count <= len(each.shares) for each, count in zip(spectra, counts, strict=True))
    assert best - (largest if missed else 0.0) <= taken(spectra, counts) <= best
    assert spent(spectra, counts) <= budget
    assert all(cost > budget - spent(spectra, counts) for cost in next_cost(spectra, counts))


@given(layers(largest_first=True), st.integers(0, 60))
def test_no_other_choice_of_as_many_parameters_takes_more(spectra: list[Components], more: int) -> None:
    """Where all components cost the same there is no last one that does not fit."""
    alike = [Components(each.shares, 5, each.least) for each in spectra]
    budget = spent(alike, [each.least for each in alike]) + more
    counts = allocate(alike, budget, end="top")
    choices = [choice for choice in every_choice(alike) if spent(alike, choice) <= budget]
    assert taken(alike, counts) == max(taken(alike, choice) for choice in choices)
    assert spent(alike, counts) == max(spent(alike, choice) for choice in choices)


@given(layers(largest_first=False), st.integers(0, 60))
def test_the_smallest_take_as_little_as_can_be_for_what_is_spent(spectra: list[Components], more: int) -> None:
    alike = [Components(each.shares, 5, each.least) for each in spectra]
    budget = spent(alike, [each.least for each in alike]) + more
    counts = allocate(alike, budget, end="bottom")
    choices = [choice for choice in every_choice(alike) if spent(alike, choice) <= budget]
    assert spent(alike, counts) == max(spent(alike, choice) for choice in choices)
    same = [choice for choice in choices if spent(alike, choice) == spent(alike, counts)]
    assert taken(alike, counts) == min(taken(alike, choice) for choice in same)


def test_what_counts_is_the_share_of_each_parameter() -> None:
    """A component of 0.3 for 3 parameters comes after one of 0.2 for 1, and before one of 0.05 for 1."""
    dear, cheap = Components([0.3, 0.1], 3), Components([0.2, 0.05, 0.04], 1)
    assert [allocate([dear, cheap], budget, end="top") for budget in (1, 4, 5)] == [[0, 1], [1, 1], [1, 2]]
    dear, cheap = Components([0.1, 0.3], 3), Components([0.04, 0.05, 0.2], 1)
    assert [allocate([dear, cheap], budget, end="bottom") for budget in (3, 5, 8)] == [[1, 0], [1, 2], [2, 2]]


def test_what_is_too_dear_leaves_the_rest_to_others() -> None:
    assert allocate([Components([0.9, 0.8], 10), Components([0.01] * 9, 2)], 15, end="top") == [1, 2]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 500))
def test_the_uniform_rank_is_the_largest_that_is_paid(shapes: list[tuple[int, int]], budget: int) -> None:
    def cost(rank: int) -> int:
        return sum(min(rank, d_out, d_in) * (d_out + d_in) for d_out, d_in in shapes)

    rank = uniform_rank(shapes, budget)
    assert cost(rank) <= budget
    assert cost(rank + 1) > budget or rank == max(min(shape) for shape in shapes)


# End to end

COST = {module: sum(shape) for module, shape in LINEARS.items()}
EVERYWHERE = sum(COST.values())
"""What rank 1 in every layer of the tiny Llama costs."""

BUDGET = 3 * EVERYWHERE + 100


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny Llama with layers of different spectra."""
    tensors = llama_tensors()
    for place, module in enumerate(LINEARS):
        U, S, Vh = torch.linalg.svd(tensors[f"{module}.weight"], full_matrices=False)
        decay = torch.arange(1, len(S) + 1) ** (-0.2 * (place % 7))
        tensors[f"{module}.weight"] = (U * (S * decay)) @ Vh
    return write_checkpoint(tmp_path / "model", tensors, shards=2)


@pytest.fixture
def covariances(tmp_path: Path) -> Path:
    return write_covariances(tmp_path / "covariances.safetensors")


def spread(model: Path, output: Path, covariances: Path | None = None, **options: Any) -> Outcome:
    chosen = {"mode": "ipm", "method": "svd", "rank_budget": BUDGET} | options
    return decompose(model, output=output, options=DecomposeOptions(**chosen), covariances=covariances)


def expected_ranks(
    model: Path, contexts: Mapping[str, Tensor], *, mode: str, budget: int, least: int = 1, most: int | None = None
) -> dict[str, int]:
    """By a float64 SVD of every layer and one sorted list of all components."""
    most = 2 * (budget // EVERYWHERE) if most is None else most
    weights = {name: t for path in model.glob("*.safetensors") for name, t in load_file(path).items()}
    listed = []
    for place, module in enumerate(LINEARS):
        T = contexts.get(module)
        W = weights[f"{module}.weight"].double()
        squares = torch.linalg.svdvals(W if T is None else W @ T).square()
        shares = squares / squares.sum()
        ordered = shares if mode == "ipm" else shares.flip(0)
        sign = -1 if mode == "ipm" else 1
        listed += [
            (sign * float(share) / COST[module], place, module) for share in ordered[least : min(most, len(shares))]
        ]
    ranks = dict.fromkeys(LINEARS, least)
    left = budget - least * EVERYWHERE
    for _, _, module in sorted(listed):
        if COST[module] <= left:
            ranks[module] += 1
            left -= COST[module]
    return ranks


def damped() -> dict[str, Tensor]:
    """CorDA's `C + λI`."""
    return {
        module: C.double() + 0.01 * C.double().diagonal().mean() * torch.eye(len(C), dtype=torch.float64)
        for module, C in covariance_tensors().items()
    }


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def beside(residual: Path) -> PeftModel:
    loaded = AutoModelForCausalLM.from_pretrained(residual)
    return PeftModel.from_pretrained(loaded, residual, subfolder="corda_init", is_trainable=True).eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=torch.arange(3, 23)[None]).logits


def assert_same_function(model: nn.Module, base: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert float((logits(model) - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("method", ["corda", "svd"])
def test_the_ranks_are_those_of_a_float64_svd_and_peft_loads_them(
    model: Path, covariances: Path, tmp_path: Path, method: str, mode: str
) -> None:
    given = covariances if method == "corda" else None
    outcome = spread(model, tmp_path / "out", given, method=method, mode=mode)
    expected = expected_ranks(model, damped() if method == "corda" else {}, mode=mode, budget=BUDGET)
    assert outcome.receipt["rank_budget"]["ranks"] == expected
    assert len(set(expected.values())) > 2
    together = beside(tmp_path / "out")
    layers = layers_of(together)
    assert {name: layer.r["default"] for name, layer in layers.items()} == expected
    assert {layer.scaling["default"] for layer in layers.values()} == {1.0}
    trained = sum(parameter.numel() for parameter in together.parameters() if parameter.requires_grad)
    assert trained == outcome.receipt["rank_budget"]["spent"]
    assert BUDGET - max(COST.values()) < trained <= BUDGET
    assert_same_function(together, model)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_the_budget_takes_more_than_equal_ranks_for_the_task_and_less_of_the_knowledge(
    model: Path, tmp_path: Path, mode: str
) -> None:
    outcome = spread(model, tmp_path / "out", mode=mode, rank_budget=3 * EVERYWHERE)
    evenly = decompose(model, output=tmp_path / "even", options=DecomposeOptions(mode=mode, rank=3, method="svd"))
    ours, even = (
        sum(entry["taken_share"] for entry in each.receipt["tensors"] if "taken_share" in entry) / len(LINEARS)
        for each in (outcome, evenly)
    )
    assert (ours > 1.02 * even) if mode == "ipm" else (ours < 0.5 * even)
    assert outcome.receipt["rank_budget"]["mean_share"] == pytest.approx(ours, rel=1e-9)
    assert outcome.receipt["rank_budget"]["mean_share_uniform"] == pytest.approx(even, rel=1e-9)


def test_the_bytes_are_those_of_the_same_ranks_given_by_hand(model: Path, covariances: Path, tmp_path: Path) -> None:
    spread(model, tmp_path / "out", covariances, method="corda", mode="kpm")
    config = read_json(tmp_path / "out" / "corda_init" / "adapter_config.json")
    by_hand = DecomposeOptions(mode="kpm", rank=config["r"], rank_pattern=config["rank_pattern"])
    decompose(model, output=tmp_path / "hand", options=by_hand, covariances=covariances)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "hand")
    written = read_json(tmp_path / "hand" / "corda_init" / "adapter_config.json")
    assert config | {"base_model_name_or_path": None} == written | {"base_model_name_or_path": None}


SCALINGS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "alpha": ({"alpha": 6}, lambda rank: 6 / 3),
    "rslora": ({"rslora": True}, lambda rank: rank**0.5),
    "rslora with alpha": ({"rslora": True, "alpha": 5}, lambda rank: 5 / rank**0.5),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_each_layer_has_the_scaling_that_was_asked_for(model: Path, tmp_path: Path, name: str) -> None:
    options, scaling = SCALINGS[name]
    outcome = spread(model, tmp_path / "out", **options)
    together = beside(tmp_path / "out")
    found = {module: layer.scaling["default"] for module, layer in layers_of(together).items()}
    ranks = outcome.receipt["rank_budget"]["ranks"]
    assert outcome.receipt["rank_budget"]["uniform_rank"] == 3
    assert found == {module: pytest.approx(scaling(rank), rel=1e-12) for module, rank in ranks.items()}
    assert_same_function(together, model)


def test_an_alpha_pattern_stands_as_it_is(model: Path, tmp_path: Path) -> None:
    outcome = spread(model, tmp_path / "out", alpha=6, alpha_pattern={"up_proj": 5.0})
    layers = layers_of(beside(tmp_path / "out"))
    assert layers[UP].scaling["default"] == 5 / outcome.receipt["rank_budget"]["ranks"][UP]
    others = [layer.scaling["default"] for module, layer in layers.items() if not module.endswith("up_proj")]
    assert others == [pytest.approx(2, rel=1e-12)] * 12


def test_layers_may_be_left_as_they_are(done: Command, model: Path, tmp_path: Path) -> None:
    ran = done(
        *("decompose", model, "--method", "svd", "--mode", "kpm", "--rank-budget", EVERYWHERE, "--rank-min", 0),
        *("--rank-max", 5, "-o", tmp_path / "out"),
    )
    budget = read_json(tmp_path / "out" / "corda_convert.json")["rank_budget"]
    assert budget["ranks"] == expected_ranks(model, {}, mode="kpm", budget=EVERYWHERE, least=0, most=5)
    left = [module for module, rank in budget["ranks"].items() if rank == 0]
    assert left
    assert f"Note: {len(left)} modules get no rank out of the budget and stay as they are: {left[0]}, " in ran.err
    together = beside(tmp_path / "out")
    assert set(layers_of(together)) == set(LINEARS) - set(left)
    before, after = (
        {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
        for folder in (model, tmp_path / "out")
    )
    same = {module for module in LINEARS if torch.equal(before[f"{module}.weight"], after[f"{module}.weight"])}
    assert same == set(left)
    assert_same_function(together, model)


def test_the_bounds_hold(model: Path, tmp_path: Path) -> None:
    outcome = spread(model, tmp_path / "out", rank_min=2, rank_max=5)
    ranks = outcome.receipt["rank_budget"]["ranks"]
    assert ranks == expected_ranks(model, {}, mode="ipm", budget=BUDGET, least=2, most=5)
    assert (min(ranks.values()), max(ranks.values())) == (2, 5)


def test_the_adapter_alone_is_the_same(model: Path, tmp_path: Path) -> None:
    spread(model, tmp_path / "out")
    spread(model, tmp_path / "init", residual=False)
    together = files_below(tmp_path / "out" / "corda_init")
    assert files_below(tmp_path / "init")["adapter_model.safetensors"] == together["adapter_model.safetensors"]


def test_the_command_line_takes_thousands_and_tells_what_the_budget_does(done: Command, tmp_path: Path) -> None:
    ran = done(
        *("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank-budget", "60.5k"),
        *("--dtype", "float32", "-o", tmp_path / "out"),
    )
    assert "Decomposed model (corda, kpm, 60,500 parameters)" in ran.out
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    assert "(corda, kpm, 60,500 parameters)" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    budget = receipt["rank_budget"]
    assert f"budget   60,500 parameters, rank {budget['uniform_rank']} everywhere; spent {budget['spent']:,}" in ran.out
    tensors = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    assert sum(prod(tensor.shape) for tensor in tensors.values()) == budget["spent"] <= 60_500
    assert budget["spent"] > 60_000
    assert budget["mean_share"] < budget["mean_share_uniform"]
    assert_same_function(beside(tmp_path / "out"), MODEL)


def test_lanczos_finds_the_same_shares_up_to_its_estimate_of_the_rest(tmp_path: Path) -> None:
    options = {"method": "svd", "rank_budget": 60_000, "targets": ("q_proj", "up_proj")}
    exact, estimated = (
        spread(MODEL, tmp_path / solver, solver=solver, **options).receipt for solver in ("dense", "krylov")
    )
    solvers = {entry["solver"] for entry in estimated["tensors"] if "solver" in entry}
    assert "block-lanczos" in solvers
    assert estimated["rank_budget"]["mean_share"] == pytest.approx(exact["rank_budget"]["mean_share"], rel=0.02)
    differences = [
        abs(rank - exact["rank_budget"]["ranks"][module]) for module, rank in estimated["rank_budget"]["ranks"].items()
    ]
    assert max(differences) <= 1


def test_zero_components_are_told_of(model: Path, tmp_path: Path) -> None:
    tensors = {name: t for path in model.glob("*.safetensors") for name, t in load_file(path).items()}
    tensors[f"{UP}.weight"][:, 3:] = 0
    write_checkpoint(tmp_path / "deficient", tensors)
    outcome = spread(tmp_path / "deficient", tmp_path / "out", mode="kpm")
    assert [warning for warning in outcome.warnings if "are zero; such ones do not learn" in warning]
    zeros = sum(entry.get("zero_components", 0) for entry in outcome.receipt["tensors"])
    assert f"{zeros} of the " in outcome.warnings[0]


def test_singular_values_below_float64s_resolution_have_no_share() -> None:
    from corda_convert.operations.rank_budget import _shares

    facts = {"singular_values": {"largest": 8.0}, "taken_share": 0.5}
    assert _shares([3.0, 1.0, 1.7e-15], facts, "kpm") == [0.0, pytest.approx(0.05), pytest.approx(0.45)]
    assert _shares([2.0, 1.8e-15], facts, "ipm") == [pytest.approx(0.5), pytest.approx(0.5 * 0.9e-15**2)]
    assert _shares([0.0, 0.0], {"singular_values": {"largest": 0.0}, "taken_share": 0.0}, "ipm") == [0.0, 0.0]


def test_several_processes_find_the_ranks_that_one_does(done: Command, tmp_path: Path) -> None:
    arguments = ("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank-budget", "60k")
    done(*arguments, "-o", tmp_path / "one")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "corda_convert")
    command = [sys.executable, *launcher, *map(str, arguments), "-o", str(tmp_path / "two")]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=alone)
    assert ran.returncode == 0, ran.stderr
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "two")
    one, two = (read_json(tmp_path / name / "corda_convert.json") for name in ("one", "two"))
    assert one["rank_budget"] == two["rank_budget"]


@pytest.mark.parametrize("number", [8, 14 + 12])
def test_an_interrupted_run_leaves_nothing_of_the_first_pass_and_goes_on_with_the_second(
    command: Command, done: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    arguments = ("decompose", model, "--method", "svd", "--mode", "ipm", "--rank-budget", BUDGET)
    done(*arguments, "-o", tmp_path / "undisturbed" / "out")
    begun: list[str] = []
    begin = DecomposeTransform.begin

    def press(transform: DecomposeTransform, device: Any) -> Any:
        begun.append(transform.module_name)
        if len(begun) == number:
            raise KeyboardInterrupt
        return begin(transform, device)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "COMMIT_BYTES", 1)
        patched.setattr(DecomposeTransform, "begin", press)
        ran = command(*arguments, "-o", tmp_path / "out")
    assert ran.status == 130
    is_first = number <= len(LINEARS)
    assert ran.err.strip().startswith(
        "Interrupted; nothing was written." if is_first else "Interrupted. Run the same command"
    )
    if is_first:
        assert_no_leftovers(tmp_path)
    done(*arguments, "-o", tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "undisturbed" / "out")
    resumed = read_json(tmp_path / "out" / "corda_convert.json")["run"].get("resumed", {"bytes": 0})
    assert (resumed["bytes"] > 0) == (not is_first)


# Before any work


def no_first_pass(*_: object) -> None:
    raise AssertionError("the first pass has begun")


def test_a_dry_run_plans_equal_ranks_and_makes_no_pass(
    done: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corda_convert.operations.rank_budget.FirstPass.shares", no_first_pass)
    ran = done(
        *("decompose", model, "--method", "svd", "--mode", "ipm", "--rank-budget", BUDGET, "--dry-run"),
        *("-o", tmp_path / "out"),
    )
    assert ran.err.startswith("Note: Planned as if all ranks were equal; the first pass, which chooses them, needs ")
    assert f"  budget   {BUDGET:,} parameters, rank 3 everywhere\n" in ran.out
    assert not (tmp_path / "out").exists()
    outcome = decompose(
        model,
        output=tmp_path / "even",
        options=DecomposeOptions(mode="ipm", rank=3, method="svd"),
        run=RunOptions(dry_run=True),
    )
    assert f"  write    {outcome.plan.write_bytes / 1e3:,.1f} kB" in ran.out


def test_what_can_be_refused_before_the_first_pass_is(
    refusal: Refusal, command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corda_convert.operations.rank_budget.FirstPass.shares", no_first_pass)
    arguments = ("decompose", model, "--method", "svd", "--mode", "ipm", "--rank-budget", BUDGET)
    message = refusal(*arguments, "--max-memory", "1MB")
    assert re.search(r"The worst step is model\.layers\.\d\.\w+\.\w+_proj\.\n", message), "not of the first pass"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    ran = command(*arguments, "-o", tmp_path / "there")
    assert (ran.status, ran.err.partition(" exists")[0]) == (1, f"Error: The output {tmp_path / 'there'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--rank-budget", EVERYWHERE - 1),
            f"A budget of {EVERYWHERE - 1} parameters does not pay rank 1 in each of 14 modules: {EVERYWHERE}.\n"
            "Give more with --rank-budget, allow less with --rank-min, or choose fewer modules with --target.",
        ),
        (
            ("--rank-budget", 7, "--rank-min", 0),
            "A budget of 7 parameters does not pay one component: 24.\n"
            "Give more with --rank-budget, or choose fewer modules with --target.",
        ),
        (
            ("--rank-budget", 4 * EVERYWHERE, "--rank-max", 3),
            f"A budget of {4 * EVERYWHERE:,} parameters is more than rank 3 in each of 14 modules takes, or all that they "
            f"have: {3 * EVERYWHERE:,}.\nGive less with --rank-budget, or allow more with --rank-max.",
        ),
        (
            ("--rank-budget", "1G"),
            "A budget of 1,000,000,000 parameters is more than rank 32 in each of 14 modules takes, or all that they have: ",
        ),
        (
            ("--rank-budget", 9 * EVERYWHERE, "--rank-min", 9),
            "--rank-min 9 is above what model.layers.0.self_attn.k_proj, ",
        ),
    ],
)
def test_budgets_that_cannot_be_spent_are_refused(
    refusal: Refusal, model: Path, arguments: tuple[object, ...], message: str
) -> None:
    assert refusal("decompose", model, "--method", "svd", "--mode", "ipm", *arguments).startswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rank-budget", "9k"), "Missing option '--mode'."),
        (("--mode", "ipm", "--rank-budget", "9k", "--rank", 4), "--rank-budget chooses the ranks"),
        (("--mode", "ipm", "--rank-budget", "9k", "--rank-pattern", "q_proj=4"), "--rank-budget chooses the ranks"),
        (("--mode", "ipm", "--rank", 4, "--rank-min", 2), "--rank-min goes with --rank-budget."),
        (("--mode", "ipm", "--rank", 4, "--rank-max", 2), "--rank-max goes with --rank-budget."),
        (("--mode", "ipm", "--rank-budget", 900, "--rank-min", 3, "--rank-max", 2), "--rank-max is below --rank-min."),
        (("--truncate", 2, "--rank-budget", 900), "--truncate makes no adapter; leave out --rank-budget."),
        (("--mode", "ipm", "--rank-budget", "many"), "'many' is no number of parameters; write 20000000 or 20M"),
        (("--mode", "ipm", "--rank-budget", "0.1"), "'0.1' is no number of parameters; write 20000000 or 20M"),
        (
            ("--mode", "ipm", "--from-cache", "c.pt", "--rank-budget", 9),
            "--from-cache computes nothing; leave out --method, --rank-budget.",
        ),
    ],
)
def test_options_that_contradict_a_budget_are_wrong_usage(
    command: Command, model: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    ran = command("decompose", model, "--method", "svd", *arguments, "-o", tmp_path / "out")
    assert ran.status == 2
    assert message in ran.err.replace("\n", " ")
    assert_no_leftovers(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "rank_budget chooses the ranks, so it goes without rank and rank_pattern."),
        ({"rank_budget": 0}, "The budget is 0, at least 1 was expected."),
        ({"rank_min": -1}, "The least rank is -1, at least 0 was expected."),
        ({"rank_min": 4, "rank_max": 3}, "The largest rank is 3, at least 4 was expected."),
        ({"rank_budget": None, "rank": 2, "rank_max": 3}, "rank_min and rank_max are bounds of the ranks"),
        ({"mode": None, "truncate": 2}, "truncate writes a dense model, so it goes without rank_budget."),
    ],
)
def test_the_same_from_python(model: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    from corda_convert.errors import CordaConvertError

    with pytest.raises(CordaConvertError) as refused:
        spread(model, tmp_path / "out", **options)
    assert str(refused.value).startswith(message)
