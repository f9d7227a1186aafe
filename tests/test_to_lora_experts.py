"""`to-lora` of LoRA on stacks of experts and other parameters, beside what PEFT makes of the trained adapter."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from building import read_json, write_json
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from corda_convert import DecomposeOptions, RunOptions, ToLoraOptions, decompose, to_lora

Refusal = Callable[..., str]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.tensor([[1, 5, 9, 2, 30, 17, 3, 8, 26, 11]])


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "base"
    tiny(request.param).save_pretrained(folder)
    return folder


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(base: Path, adapter: Path | None = None) -> Tensor:
    model = load(base)
    with torch.no_grad():
        return (model if adapter is None else PeftModel.from_pretrained(model, str(adapter)))(IDS).logits


def trained(base: Path, folder: Path, targets: Sequence[str] = EXPERTS, seed: int = 1, **options: Any) -> Path:
    """A LoRA on those parameters with random factors, saved by PEFT."""
    given = {"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": [*targets], **options}
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **given))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_pretrained(folder)
    return folder


def deltas(base: Path, adapter: Path) -> dict[str, Tensor]:
    """What PEFT adds to each expert of each stack, by the parameter's path: (E, d_out, d_in) in float64."""
    found = {}
    for name, module in PeftModel.from_pretrained(load(base), str(adapter)).named_modules():
        if isinstance(module, ParamWrapper):
            for side in "AB":
                getattr(module, f"lora_{side}").double()
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{path}.{module.parameter_name}"] = module.get_delta_weight("default").detach()
    assert found
    return found


def beside_its_residual(base: Path, folder: Path, seed: int = 3, **options: Any) -> tuple[Path, Path, Path]:
    """Residual and initial adapter of `decompose`, and a training of both stacks and of attention that began there."""
    given: dict[str, Any] = {"mode": "ipm", "method": "svd", "rank": 2, "alpha": 3.0, **options}
    targets = ("experts.gate_up_proj", "experts.down_proj", "q_proj")
    decompose(base, output=folder / "residual", options=DecomposeOptions(targets=targets, **given))
    initial = folder / "residual" / "corda_init"
    shutil.copytree(initial, folder / "trained")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(initial / WEIGHTS)
    for name, tensor in tensors.items():
        tensors[name] = tensor + 0.1 * tensor.abs().max() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "trained" / WEIGHTS, {"format": "pt"})
    return folder / "residual", initial, folder / "trained"


def only_experts(adapter: Path) -> None:
    """Leaves the layers out of an adapter that has both."""
    tensors = {name: tensor for name, tensor in load_file(adapter / WEIGHTS).items() if "experts" in name}
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})
    write_json(adapter / CONFIG, read_json(adapter / CONFIG) | {"target_modules": []})


@pytest.mark.parametrize("given", [{}, {"rslora": True}, {"rank_pattern": {"experts.down_proj": 3}}], ids=str)
def test_experts_trained_beside_a_residual_give_its_logits_on_the_base(
    base: Path, tmp_path: Path, given: dict[str, Any]
) -> None:
    residual, initial, adapter = beside_its_residual(base, tmp_path, **given)
    expected = logits(residual, adapter)
    assert float((logits(base) - expected).abs().max()) > 0.02 * float(expected.abs().max())
    for name, options in {
        "exact": ToLoraOptions(base=str(base)),
        "uniform": ToLoraOptions(base=str(base), uniform=True, rank=9),
        "reduced": ToLoraOptions(base=str(base), energy=1.0),
    }.items():
        to_lora(adapter, init=initial, output=tmp_path / name, options=options)
        found = logits(base, tmp_path / name)
        assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), name
    said = read_json(tmp_path / "exact" / CONFIG)
    assert said["target_parameters"] == read_json(adapter / CONFIG)["target_parameters"]
    assert (said["rank_pattern"] != {}) == ("rank_pattern" in given)
    assert {tensor.shape[0] % 9 for tensor in load_file(tmp_path / "uniform" / WEIGHTS).values()} & {0}


def test_an_initial_adapter_of_experts_needs_no_base(base: Path, tmp_path: Path) -> None:
    _, initial, adapter = beside_its_residual(base, tmp_path)
    to_lora(adapter, init=initial, output=tmp_path / "with", options=ToLoraOptions(base=str(base)))
    to_lora(adapter, init=initial, output=tmp_path / "without")
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "without" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_is_the_best_one_for_every_expert(base: Path, tmp_path: Path, rank: int) -> None:
    adapter = trained(base, tmp_path / "adapter", r=4)
    outcome = to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(base=str(base), rank=rank))
    exact, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    told = {entry["module"]: entry for entry in outcome.receipt["tensors"] if "relative_error" in entry}
    assert exact.keys() == actual.keys()
    assert len(told) == len(exact)
    sums = []
    for name, change in exact.items():
        missed = torch.linalg.matrix_norm(actual[name] - change)
        best = torch.linalg.svdvals(change)[:, rank:].norm(dim=1)
        torch.testing.assert_close(missed, best, rtol=1e-5, atol=1e-6)
        sums.append(float(missed.norm()))
    assert sorted(entry["error"] for entry in told.values()) == pytest.approx(sorted(sums), rel=1e-5)


def test_energy_is_kept_by_every_expert(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", r=4)
    to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(base=str(base), energy=0.8))
    exact, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    ranks = set()
    for name, change in exact.items():
        squares = torch.linalg.svdvals(change).square()
        kept = squares.cumsum(1) / squares.sum(1, keepdim=True)
        expected = int((kept < 0.8).sum(1).max()) + 1
        assert int(torch.linalg.matrix_rank(actual[name], rtol=1e-6).max()) == expected
        lost = (actual[name] - change).square().sum((1, 2)) / change.square().sum((1, 2))
        assert float(lost.max()) <= 0.2 + 1e-6
        ranks.add(expected)
    assert max(ranks) < 4


def test_adapters_of_different_parameters_add_up(base: Path, tmp_path: Path) -> None:
    """PEFT names factors by the order of a module's parameters: those of the sum are named anew."""
    one = trained(base, tmp_path / "one", EXPERTS[:1], seed=1, target_modules=["q_proj"])
    two = trained(base, tmp_path / "two", EXPERTS[1:], seed=2, r=3, use_rslora=True)
    both = trained(base, tmp_path / "both", EXPERTS, seed=3)
    options = ToLoraOptions(base=str(base), scales=(0.5, -2, 1))
    to_lora([one, two, both], output=tmp_path / "out", options=options)
    first, second, third, total = (deltas(base, folder) for folder in (one, two, both, tmp_path / "out"))
    assert total.keys() == {*first, *second} == third.keys()
    for name, change in total.items():
        expected = third[name] + (0.5 * first[name] if name in first else -2 * second[name])
        torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-5)
    small = ToLoraOptions(base=str(base), scales=(0.5, -2, 1), rank=2)
    to_lora([two, one, both], output=tmp_path / "small", options=ToLoraOptions(base=str(base), rank=2))
    to_lora([one, two, both], output=tmp_path / "scaled", options=small)
    for name, change in deltas(base, tmp_path / "scaled").items():
        missed = torch.linalg.matrix_norm(change - total[name])
        best = torch.linalg.svdvals(total[name])[:, 2:].norm(dim=1)
        torch.testing.assert_close(missed, best, rtol=1e-4, atol=1e-5)


def test_adapters_of_the_same_parameters_add_up_without_the_base(base: Path, tmp_path: Path) -> None:
    one, two = (trained(base, tmp_path / str(seed), seed=seed) for seed in (1, 2))
    to_lora([one, two], output=tmp_path / "out", options=ToLoraOptions(scales=(2, 0.25)))
    first, second, total = (deltas(base, folder) for folder in (one, two, tmp_path / "out"))
    for name, change in total.items():
        torch.testing.assert_close(change, 2 * first[name] + 0.25 * second[name], rtol=1e-5, atol=1e-5)


def test_only_the_model_tells_whose_factors_are_whose(refusal: Refusal, base: Path, tmp_path: Path) -> None:
    one = trained(base, tmp_path / "one", EXPERTS[:1])
    two = trained(base, tmp_path / "two", EXPERTS[1:])
    assert "PEFT names their factors by the order in the model." in refusal("to-lora", one, two)
    both = trained(base, tmp_path / "both", rank_pattern={"experts.down_proj": 3})
    message = refusal("to-lora", both, "--rank", 1)
    assert "have ranks or scalings of their own, and only the model tells which factors are whose." in message
    assert "--base" in message


def test_what_goes_for_layers_only_is_refused_for_experts(refusal: Refusal, base: Path, tmp_path: Path) -> None:
    residual, initial, adapter = beside_its_residual(base, tmp_path)
    save_file({"q": torch.eye(2)}, tmp_path / "covs.safetensors")
    weighted = ("--rank", 2, "--weight-by", tmp_path / "covs.safetensors")
    assert "are stacks of experts or other parameters." in refusal("to-lora", adapter, "--init", initial, *weighted)
    shutil.move(initial, tmp_path / "first")
    message = refusal("to-lora", adapter, "--base", base, "--residual", residual)
    assert "initial factors of a parameter are not taken from the difference of two models." in message


def test_experts_trained_beside_a_residual_are_refused_without_their_start(
    refusal: Refusal, base: Path, tmp_path: Path
) -> None:
    residual, _, adapter = beside_its_residual(base, tmp_path)
    only_experts(adapter)
    config = read_json(adapter / CONFIG)
    for name in (str(residual), None):
        write_json(adapter / CONFIG, config | {"base_model_name_or_path": name})
        message = refusal("to-lora", adapter, "--rank", 2)
        assert message.startswith("trained was trained beside a residual: its ")


def test_a_converted_stack_can_be_converted_again(base: Path, tmp_path: Path) -> None:
    """Its two halves are alike, which tells it from an adapter that still needs its start."""
    _, initial, adapter = beside_its_residual(base, tmp_path)
    only_experts(initial)
    only_experts(adapter)
    to_lora(adapter, init=initial, output=tmp_path / "out", options=ToLoraOptions(base=str(base)))
    config = read_json(tmp_path / "out" / CONFIG) | {"corda_config": {"corda_method": "ipm"}}
    write_json(tmp_path / "out" / CONFIG, config)
    to_lora(tmp_path / "out", output=tmp_path / "again", run=RunOptions(dtype="float32"))
    first, second = deltas(base, tmp_path / "out"), deltas(base, tmp_path / "again")
    for name, change in first.items():
        torch.testing.assert_close(second[name], change, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("server", ["vllm", "sglang", "peft"])
def test_servers_that_may_take_experts_are_told_so(base: Path, tmp_path: Path, server: Any) -> None:
    adapter = trained(base, tmp_path / "adapter", rank_pattern={"experts.down_proj": 3})
    options = ToLoraOptions(base=str(base), server=server)
    outcome = to_lora(adapter, output=tmp_path / "out", options=options)
    assert any("experts" in text for text in outcome.receipt["served"]["depends"]) == (server != "peft")
    exact, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    for name, change in exact.items():
        torch.testing.assert_close(actual[name], change, rtol=1e-5, atol=1e-5)


def test_llama_cpp_takes_no_stacks(refusal: Refusal, base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter")
    assert "factors for stacks of experts" in refusal("to-lora", adapter, "--for", "llama.cpp")
