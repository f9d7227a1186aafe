"""`to-lora` of adapters: beside PEFT's own conversions, and judged in float64 by the change that PEFT loads."""

from __future__ import annotations

import hashlib
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    HIDDEN,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    UP,
    llama_tensors,
    lora_config,
    lora_tensors,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_json,
    write_lora,
    write_miss,
)
from conftest import Ran
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from corda_convert import (
    DecomposeOptions,
    MergeOptions,
    RunOptions,
    ToLoraOptions,
    VerifyOptions,
    decompose,
    merge,
    to_lora,
    verify,
)
from corda_convert.adapters import read_adapter
from corda_convert.operations.adapter_facts import facts_of
from corda_convert.operations.server_rules import SERVERS, Server
from corda_convert.operations.servers import check

Refusal = Callable[..., str]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:.*path_initial_model_for_weight_conversion"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
]

NAMES = sorted({name.rpartition(".")[2] for name in LINEARS})
WEIGHTS = "adapter_model.safetensors"
IDS = torch.tensor([[1, 5, 9, 2, 30, 17, 3, 8, 26, 11]])


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(base: Path, *adapters: Path) -> PeftModel:
    model = PeftModel.from_pretrained(load(base), str(adapters[0]))
    for place, adapter in enumerate(adapters[1:]):
        model.load_adapter(str(adapter), adapter_name=f"other{place}")
    return model


def logits(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module in float64, with the scaling that PEFT computes from the config."""
    found = {}
    for name, module in adapted(base, adapter).named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = (getattr(module, f"lora_{side}")["default"].weight.double() for side in "AB")
            found[name.removeprefix("base_model.model.")] = (module.scaling["default"] * B @ A).detach()
        elif hasattr(module, "miss_block"):
            weight = module.get_base_layer().weight.data.double()
            found[name.removeprefix("base_model.model.")] = _miss_delta(module, weight)
    return found


def _miss_delta(module: Any, weight: torch.Tensor) -> torch.Tensor:
    """By the definition of MiSS (formats.md): in float64, which PEFT does not compute in."""
    block = module.miss_block["default"].detach().double()
    if block.dim() == 3:
        r = block.shape[-1]
        rows = [
            torch.cat([part @ block[place] + block[place] for part in band.split(r, dim=1)], dim=1)
            for place, band in enumerate(weight.split(r, dim=0))
        ]
        return torch.cat(rows)
    block = block.repeat(1, weight.shape[0] // block.shape[1])
    return block.T[:, torch.arange(weight.shape[1]) % block.shape[0]]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model")


def trained_by_peft(base: Path, folder: Path, **options: Any) -> tuple[Path, Path, Path]:
    """A residual training as PEFT's documentation has it: initial adapter, trained adapter, and PEFT's own conversion,
    where it can do it. The residual is saved, too, beside them.
    """
    torch.manual_seed(0)
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
    initial, trained, converted = folder / "first_init", folder / "trained", folder / "converted"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(initial)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * max(float(parameter.data.std()), 0.1) * torch.randn_like(parameter)
            assert torch.isfinite(parameter).all(), name
    model.save_pretrained(trained)
    shutil.copytree(initial, folder / "copy" / "first_init")
    refused = options.get("use_rslora") and options.get("rank_pattern")
    refused = refused or options.get("lora_bias") or options.get("bias", "none") != "none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not refused:
            model.save_pretrained(
                converted, path_initial_model_for_weight_conversion=str(folder / "copy" / "first_init")
            )
        model.peft_config["default"].init_lora_weights = True
        model.unload().save_pretrained(folder / "residual")
    return initial, trained, converted


PATTERNS = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 5}}


@pytest.mark.parametrize("method", ["pissa", "olora"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, PATTERNS], ids=["plain", "rslora", "patterns"])
def test_a_residual_adapter_is_converted_as_peft_does_it(
    base: Path, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"], **options}
    initial, trained, converted = trained_by_peft(base, tmp_path, init_lora_weights=method, **config)
    run = ToLoraOptions(base=str(base))
    to_lora(trained, init=initial, output=tmp_path / "out", options=run)
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", converted))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    configs = [read_json(folder / "adapter_config.json") for folder in (tmp_path / "out", converted)]
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"):
        assert configs[0][key] == configs[1][key], key
    assert configs[0]["base_model_name_or_path"] == str(base)


def test_the_converted_lora_on_the_base_is_the_trained_adapter_on_its_residual(base: Path, tmp_path: Path) -> None:
    """With modules_to_save and trained tokens, which PEFT's own conversion loses."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"]}
    config |= {"modules_to_save": ["lm_head"], "trainable_token_indices": {"embed_tokens": [5, 17]}}
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="olora", **config)
    for name, options in {"exact": {}, "whole": {"energy": 1.0}, "uniform": {"uniform": True, "rank": 8}}.items():
        to_lora(trained, init=initial, output=tmp_path / name, options=ToLoraOptions(base=str(base), **options))
    expected = logits(adapted(tmp_path / "residual", trained))
    assert float((logits(load(base)) - expected).abs().max()) > 0.5
    for name in ("exact", "whole", "uniform"):
        assert float((logits(adapted(base, tmp_path / name)) - expected).abs().max()) <= 1e-4, name


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 4 LoRA tensor")  # PEFT of its own lora_bias
def test_biases_of_lora_keep_their_scaling(base: Path, tmp_path: Path) -> None:
    biased = with_biases(tmp_path, base)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "lora_bias": True}
    initial, trained, _ = trained_by_peft(biased, tmp_path, init_lora_weights=True, **config)
    expected = logits(adapted(biased, trained))
    for name, options in {"exact": {}, "whole": {"energy": 1.0}}.items():
        to_lora(trained, init=initial, output=tmp_path / name, options=ToLoraOptions(as_is=True, **options))
        assert float((logits(adapted(biased, tmp_path / name)) - expected).abs().max()) <= 1e-4, name
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    own, scaled = (load_file(tmp_path / folder / "adapter_model.safetensors")[name] for folder in ("trained", "whole"))
    torch.testing.assert_close(scaled, own * 5 / 3, rtol=1e-6, atol=0)
    assert float(own.abs().max()) > 0


def with_biases(folder: Path, base: Path) -> Path:
    """The base as a model with biases in its attention and MLP."""
    tensors = load_file(base / "model.safetensors")
    biases = {
        name.removesuffix("weight") + "bias": random(tensor.shape[0], seed=place)
        for place, (name, tensor) in enumerate(tensors.items())
        if "_proj" in name
    }
    config = read_json(base / "config.json") | {"attention_bias": True, "mlp_bias": True}
    return write_checkpoint(folder / "biased", tensors | biases, config=config)


def test_trained_biases_are_carried(base: Path, tmp_path: Path) -> None:
    biased = with_biases(tmp_path, base)
    config = {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}
    initial, trained, _ = trained_by_peft(biased, tmp_path, init_lora_weights="olora", **config)
    to_lora(trained, init=initial, output=tmp_path / "out", options=ToLoraOptions(base=str(biased)))
    expected = logits(adapted(tmp_path / "residual", trained))
    assert float((logits(adapted(biased, tmp_path / "out")) - expected).abs().max()) <= 1e-4


def test_rslora_with_patterns_has_its_scaling_baked_in(base: Path, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"], "use_rslora": True}
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="olora", **config, **PATTERNS)
    outcome = to_lora(trained, init=initial, output=tmp_path / "out", options=ToLoraOptions(base=str(base)))
    assert outcome.receipt["scaling_baked_in"]
    expected = logits(adapted(tmp_path / "residual", trained))
    assert float((logits(adapted(base, tmp_path / "out")) - expected).abs().max()) <= 1e-4


# Belonging


def test_an_initial_adapter_of_another_base_is_refused_with_its_share(
    refusal: Refusal, base: Path, tmp_path: Path
) -> None:
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="olora", r=4, target_modules=["q_proj"])
    other = write_checkpoint(tmp_path / "other", {
        name: random(*tensor.shape, seed=1000 + place)
        for place, (name, tensor) in enumerate(load_file(base / "model.safetensors").items())
    })  # fmt: skip
    message = refusal("to-lora", trained, "--init", initial, "--base", other)
    assert message.startswith("other is not the model that first_init was taken from: the initial factors make up ")
    to_lora(trained, init=initial, output=tmp_path / "out", options=ToLoraOptions(base=str(other), as_is=True))


@pytest.mark.parametrize("operation", ["merge", "to-lora"])
def test_what_all_modules_have_wrong_is_one_problem(refusal: Refusal, tmp_path: Path, operation: str) -> None:
    initial = Path(shutil.copytree(RESIDUAL / "corda_init", tmp_path / "init"))
    config = read_json(initial / "adapter_config.json")
    write_json(initial / "adapter_config.json", config | {"lora_alpha": 4, "alpha_pattern": {"q_proj": 2}})
    adapter = ADAPTERS / "corda"
    given = ("merge", MODEL, "--adapter", adapter) if operation == "merge" else ("to-lora", adapter)
    lines = [line for line in refusal(*given, "--init", initial).splitlines() if "they must agree" in line]
    assert [line.partition(": ")[2] for line in lines] == [
        "the adapter scales by 1, the initial adapter by 0.5; they must agree.",
        "the adapter scales by 1, the initial adapter by 0.25; they must agree.",
    ]
    assert "and 31 more: " in lines[0] and "and 1 more: " in lines[1]


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_trained_adapter_given_as_the_initial_one_is_refused(
    refusal: Refusal, base: Path, tmp_path: Path, method: str
) -> None:
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights=method, r=4, target_modules=["q_proj"])
    message = refusal("to-lora", initial, "--init", trained)
    assert message.startswith(
        "first_init and trained are the wrong way round: the columns of lora_B are orthogonal in "
    )
    assert message.endswith("Give first_init with --init, and trained as the adapter.")
    to_lora(initial, init=trained, output=tmp_path / "out", options=ToLoraOptions(as_is=True))


def test_an_untrained_adapter_is_told_to_be_one(base: Path, tmp_path: Path) -> None:
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="olora", r=4, target_modules=["q_proj"])
    shutil.copytree(initial, tmp_path / "copy of it")
    options = ToLoraOptions(base=str(base))
    outcome = to_lora(tmp_path / "copy of it", init=initial, output=tmp_path / "none", options=options)
    assert outcome.warnings == (
        "copy of it holds the numbers of first_init, so what was learned is zero. If it was trained, one of the two is the "
        "wrong one.",
    )
    assert to_lora(trained, init=initial, output=tmp_path / "out", options=options).warnings == ()


def test_a_residual_is_no_base_to_convert_for(refusal: Refusal) -> None:
    message = refusal("to-lora", ADAPTERS / "corda", "--base", RESIDUAL, "--rank", 2)
    assert message.startswith(
        "residual is a residual (it has its initial adapter with it); a LoRA is converted for the base"
    )


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("start", ["init", "residual", "no base"])
def test_a_head_whose_residual_the_adapter_brings_along_is_the_trained_one(
    base: Path, tmp_path: Path, start: str
) -> None:
    """PEFT saves the weight of a head with factors, which beside a residual is the residual's."""
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]}
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="pissa", **config)
    brought = "base_model.model.lm_head.base_layer.weight"
    assert brought in load_file(trained / "adapter_model.safetensors")
    (tmp_path / "copy" / "first_init").rename(tmp_path / "start")
    initials = {"init": initial, "residual": None, "no base": initial}[start]
    options = ToLoraOptions(
        base="someone/base" if start == "no base" else str(base),
        residual=tmp_path / "residual" if start == "residual" else None,
    )
    outcome = to_lora(trained, init=initials, output=tmp_path / "out", options=options)
    expected = logits(adapted(tmp_path / "residual", trained))
    assert float((logits(adapted(base, tmp_path / "out")) - expected).abs().max()) <= 1e-4
    is_brought = brought in load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert (
        is_brought == (start == "no base") == any("brings along the weight of lm_head" in w for w in outcome.warnings)
    )
    if start == "init":
        merge(base, adapter=trained, output=tmp_path / "merged", options=MergeOptions(init=initial))
        assert float((logits(load(tmp_path / "merged")) - expected).abs().max()) <= 1e-4


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("start", ["init", "residual"])
def test_a_head_that_was_trained_as_a_whole_too_stays_brought_along(base: Path, tmp_path: Path, start: str) -> None:
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "lm_head"]}
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="pissa", **config)
    (tmp_path / "copy" / "first_init").rename(tmp_path / "start")
    tensors = load_file(trained / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.1 * random(32, HIDDEN)
    write_adapter(trained, tensors, read_json(trained / "adapter_config.json"))
    given = {"residual": tmp_path / "residual"} if start == "residual" else {}
    to_lora(
        trained,
        init=initial if start == "init" else None,
        output=tmp_path / "out",
        options=ToLoraOptions(base=str(base), **given),
    )
    expected = logits(adapted(tmp_path / "residual", trained))
    assert float((logits(adapted(base, tmp_path / "out")) - expected).abs().max()) <= 1e-4


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_that_is_the_bases_is_left_out_for_servers(base: Path, tmp_path: Path) -> None:
    config = {"r": 3, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": "gaussian"}
    _, trained, _ = trained_by_peft(base, tmp_path, **config)
    to_lora(trained, output=tmp_path / "out", options=ToLoraOptions(base=str(base), server="vllm"))
    exact, actual = deltas(base, trained), deltas(base, tmp_path / "out")
    assert max(error(actual[name], exact[name]) for name in exact) <= 1e-6
    assert not [name for name in load_file(tmp_path / "out" / "adapter_model.safetensors") if "lora_" not in name]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_a_head_that_is_tied_is_warned_of(tmp_path: Path) -> None:
    """PEFT takes PiSSA's factors out of the shared tensor, so that the embedding lacks them, too."""
    tied = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    base = write_checkpoint(tmp_path / "tied", tied, config=LLAMA_CONFIG | {"tie_word_embeddings": True})
    warned = []
    for targets in (["lm_head", "q_proj"], ["q_proj"]):
        folder = tmp_path / targets[0]
        initial, trained, _ = trained_by_peft(base, folder, init_lora_weights="pissa", r=2, target_modules=targets)
        factors = {name: tensor for name, tensor in load_file(trained / WEIGHTS).items() if "lora_" in name}
        bare = write_adapter(folder / "bare", factors, read_json(trained / "adapter_config.json"))
        made = {
            "lora": to_lora(trained, init=initial, output=folder / "lora", options=ToLoraOptions(base=str(base))),
            "bare": merge(base, adapter=bare, output=folder / "merged bare", options=MergeOptions(init=initial)),
            "with the head": merge(base, adapter=trained, output=folder / "merged", options=MergeOptions(init=initial)),
        }
        models = [adapted(base, folder / "lora"), load(folder / "merged bare"), load(folder / "merged")]
        expected = logits(adapted(folder / "residual", trained))
        for model, (name, outcome) in zip(models, made.items(), strict=True):
            told = [
                text for text in outcome.warnings if text.startswith("lm_head shares its weight with model.embed_tok")
            ]
            warned.append((name, float((logits(model) - expected).abs().max()) > 0.1, len(told)))
    assert warned == [
        *[("lora", True, 1), ("bare", True, 1), ("with the head", False, 0)],
        *[("lora", False, 0), ("bare", False, 0), ("with the head", False, 0)],
    ]


def test_as_is_takes_an_initial_adapter_of_another_training(refusal: Refusal, tmp_path: Path) -> None:
    one, two = write_lora(tmp_path / "one", seed=1), write_lora(tmp_path / "two", seed=2)
    assert "the rows of lora_A point elsewhere (median cosine" in refusal("to-lora", one, "--init", two)
    to_lora(one, init=two, output=tmp_path / "out", options=ToLoraOptions(as_is=True))


def test_a_residual_adapter_without_its_start_is_refused(refusal: Refusal, base: Path, tmp_path: Path) -> None:
    initial, trained, _ = trained_by_peft(base, tmp_path, init_lora_weights="olora", r=4, target_modules=["q_proj"])
    assert "its B·A repeats" in refusal("to-lora", trained, "--base", base, "--rank", 2)
    write_json(
        trained / "adapter_config.json", read_json(initial / "adapter_config.json") | {"init_lora_weights": "olora"}
    )
    message = refusal("to-lora", trained, "--rank", 2)
    assert message.startswith("trained was trained beside a residual: its config says init_lora_weights='olora'.")
    assert "say --as-is." in message


def test_files_of_rwkv_peft_are_merged_and_not_converted(refusal: Refusal, tmp_path: Path) -> None:
    file = tmp_path / "rwkv-0.pth"
    torch.save({"blocks.0.att.key.lora_A": random(2, 8), "blocks.0.att.key.lora_B": random(8, 2)}, file)
    message = refusal("to-lora", file)
    assert message.startswith(f"{file} is a file of RWKV-PEFT, which can be merged, but not converted.\n")
    assert f"\ncorda-convert merge BASE.pth --adapter {file} -o OUT, for LoRA with --alpha ALPHA" in message


def test_a_plain_lora_alone_is_no_work(refusal: Refusal, tmp_path: Path) -> None:
    assert refusal("to-lora", write_lora(tmp_path / "lora")).startswith("lora is an ordinary LoRA already.")


# Rank


def facts(receipt: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {entry["module"]: entry for entry in receipt["tensors"] if "relative_error" in entry}


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_lower_rank_is_the_best_one_and_its_error_is_told(base: Path, tmp_path: Path, rank: int) -> None:
    initial, trained, converted = trained_by_peft(
        base, tmp_path, init_lora_weights="olora", r=4, lora_alpha=6, target_modules=["q_proj", "up_proj", "down_proj"]
    )
    options = ToLoraOptions(base=str(base), rank=rank)
    outcome = to_lora(trained, init=initial, output=tmp_path / "out", options=options)
    exact, actual, told = deltas(base, converted), deltas(base, tmp_path / "out"), facts(outcome.receipt)
    assert exact.keys() == actual.keys() == told.keys()
    for name, change in exact.items():
        best = float(torch.linalg.svdvals(change)[rank:].norm())
        missed = float((actual[name] - change).norm())
        assert missed == pytest.approx(best, rel=1e-6)
        assert told[name]["error"] == pytest.approx(missed, rel=1e-9)
        assert told[name]["relative_error"] == pytest.approx(missed / float(change.norm()), rel=1e-9)
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == rank


@pytest.mark.parametrize("seen", [None, 5], ids=["full", "rank-deficient"])
def test_weighted_by_covariances_the_outputs_error_is_the_least(base: Path, tmp_path: Path, seen: int | None) -> None:
    adapter = write_lora(tmp_path / "lora", rank=6, target_modules=NAMES)
    samples = {name: random(seen or 64, d_in, seed=place) for place, (name, (_, d_in)) in enumerate(LINEARS.items())}
    scales = {name: torch.logspace(0, -2, x.shape[1]) for name, x in samples.items()}
    matrices = {name: (x * scales[name]).T @ (x * scales[name]) for name, x in samples.items()}
    save_file(matrices, tmp_path / "covs.safetensors")
    plain = to_lora(adapter, output=tmp_path / "plain", options=ToLoraOptions(rank=2))
    options = ToLoraOptions(rank=2, weight_by=tmp_path / "covs.safetensors")
    outcome = to_lora(adapter, output=tmp_path / "weighted", options=options)
    exact, actual, unweighted = (
        deltas(base, folder) for folder in (adapter, tmp_path / "weighted", tmp_path / "plain")
    )
    told = facts(outcome.receipt)
    for name, change in exact.items():
        values, vectors = torch.linalg.eigh(matrices[name].double())
        root = vectors * values.clamp(min=0).sqrt()
        best = float(torch.linalg.svdvals(change @ root)[2:].norm())
        missed = float(((actual[name] - change) @ root).norm())
        assert missed == pytest.approx(best, rel=1e-4)
        assert missed <= float(((unweighted[name] - change) @ root).norm())
        assert told[name]["output_error"] == pytest.approx(missed, rel=1e-4)
        assert told[name]["error"] == pytest.approx(float((actual[name] - change).norm()), rel=1e-7)
        assert told[name]["error"] >= facts(plain.receipt)[name]["error"] * (1 - 1e-9)


@pytest.mark.parametrize("options", [("--rank", 2), ("--energy", 0.9)])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda x: (x.T @ x).tril(),
            "What is given as the covariance of model.layers.0.self_attn.q_proj is none: it is not",
        ),
        (
            lambda x: -x.T @ x,
            "What is given as the covariance of model.layers.0.self_attn.q_proj is none: it has negative",
        ),
        (
            lambda x: 0 * x.T @ x,
            "The covariance of model.layers.0.self_attn.q_proj is zero: no sample reached this layer.",
        ),
    ],
    ids=["triangle", "negative", "zero"],
)
def test_what_is_no_covariance_does_not_weight(
    refusal: Refusal, tmp_path: Path, options: tuple[object, ...], made: Any, message: str
) -> None:
    first = dict(list(LINEARS.items())[:1])
    save_file({name: made(random(64, d_in)) for name, (_, d_in) in first.items()}, tmp_path / "covs.safetensors")
    adapter = write_lora(tmp_path / "lora", first)
    assert refusal("to-lora", adapter, *options, "--weight-by", tmp_path / "covs.safetensors").startswith(message)


def test_directions_that_the_covariance_does_not_see_are_taken_by_the_plain_error(base: Path, tmp_path: Path) -> None:
    """With two samples a weighted rank-4 result is exact on them after 2; the rest must not be wasted."""
    adapter = write_lora(
        tmp_path / "lora", {UP: LINEARS[UP]}, rank=6, target_modules=["up_proj"], layers_to_transform=[1]
    )
    x = random(2, HIDDEN)
    save_file({UP: x.T @ x}, tmp_path / "covs.safetensors")
    options = ToLoraOptions(rank=4, weight_by=tmp_path / "covs.safetensors")
    to_lora(adapter, output=tmp_path / "out", options=options)
    (exact,), (actual,) = (deltas(base, folder).values() for folder in (adapter, tmp_path / "out"))
    assert error(actual @ x.double().T, exact @ x.double().T) <= 1e-5
    outputs = torch.linalg.qr(exact @ x.double().T).Q
    rest = exact - outputs @ outputs.T @ exact
    assert float((actual - exact).norm()) == pytest.approx(float(torch.linalg.svdvals(rest)[2:].norm()), rel=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999, 1.0])
def test_energy_chooses_the_smallest_rank_that_keeps_it(base: Path, tmp_path: Path, share: float) -> None:
    adapter = write_lora(tmp_path / "lora", rank=6, target_modules=NAMES)
    to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(energy=share))
    actual = deltas(base, tmp_path / "out")
    ranks = set()
    for name, change in deltas(base, adapter).items():
        squares = torch.linalg.svdvals(change)[:6].square()
        kept = squares.cumsum(0) / squares.sum()
        expected = int((kept < share * (1 - 1e-12)).sum()) + 1
        stored = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"base_model.model.{name}.lora_A.weight"]
        assert stored.shape[0] == expected
        ranks.add(expected)
        assert 1 - error(actual[name], change) ** 2 >= share - 1e-9
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert bool(config["rank_pattern"]) == (len(ranks) > 1)
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_uniform_is_one_rank_without_patterns(base: Path, tmp_path: Path) -> None:
    patterns = {
        "rank_pattern": {"down_proj": 2, "q_proj": 7},
        "target_modules": NAMES,
    }
    tensors = {}
    for name, (d_out, d_in) in LINEARS.items():
        rank = {"down_proj": 2, "q_proj": 7}.get(name.rpartition(".")[2], 4)
        tensors |= lora_tensors({name: (d_out, d_in)}, rank=rank)
    adapter = write_adapter(tmp_path / "lora", tensors, lora_config(4, **patterns))
    for name, options in {"exact": {}, "energy": {"energy": 0.8}, "rank": {"rank": 9}, "less": {"rank": 3}}.items():
        to_lora(adapter, output=tmp_path / name, options=ToLoraOptions(uniform=True, **options))
        config = read_json(tmp_path / name / "adapter_config.json")
        stored = load_file(tmp_path / name / "adapter_model.safetensors")
        found = {tensor.shape[0] for key, tensor in stored.items() if "lora_A" in key}
        assert found == {config["r"]} == {config["lora_alpha"]}, name
        assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert read_json(tmp_path / "exact" / "adapter_config.json")["r"] == 7
    assert read_json(tmp_path / "rank" / "adapter_config.json")["r"] == 9
    exact = deltas(base, adapter)
    for folder in ("exact", "rank"):
        found = deltas(base, tmp_path / folder)
        assert max(error(found[name], exact[name]) for name in exact) <= 1e-6
    least = min(1 - error(found, exact[name]) ** 2 for name, found in deltas(base, tmp_path / "energy").items())
    assert least >= 0.8 - 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--energy", "1.5"), None),
        (("--weight-by", COVARIANCES), "--weight-by says what a lower rank must keep, and no rank is chosen."),
        (("--rank", 2, "--weight-by", COVARIANCES), "The covariance of model.layers.0.self_attn.q_proj is (96, 96);"),
    ],
)
def test_options_that_say_nothing_are_refused(
    command: Callable[..., Ran], tmp_path: Path, arguments: tuple[object, ...], message: str | None
) -> None:
    adapter = write_lora(tmp_path / "lora")
    ran = command("to-lora", adapter, *arguments, "-o", tmp_path / "out")
    assert ran.status == (2 if message is None else 1)
    assert message is None or message in ran.err
    assert not (tmp_path / "out").exists()


# Several


def test_several_adapters_become_their_weighted_sum(base: Path, tmp_path: Path) -> None:
    one = write_lora(tmp_path / "one", seed=1, target_modules=NAMES)
    some = {name: shape for name, shape in LINEARS.items() if "q_proj" in name}
    two = write_lora(tmp_path / "two", some, rank=3, seed=2, use_rslora=True)
    for name, options in {"sum": {}, "small": {"rank": 4}}.items():
        given = ToLoraOptions(scales=(0.5, -2), **options)
        to_lora([one, two], output=tmp_path / name, options=given)
    first, second, total = (deltas(base, folder) for folder in (one, two, tmp_path / "sum"))
    for name, change in first.items():
        expected = 0.5 * change - 2 * second.get(name, torch.zeros_like(change))
        assert error(total[name], expected) <= 1e-6
        best = float(torch.linalg.svdvals(expected)[4:].norm())
        missed = float((deltas(base, tmp_path / "small")[name] - expected).norm())
        assert missed == pytest.approx(best, rel=1e-6, abs=1e-5)


def test_residual_adapters_and_plain_ones_are_added(base: Path, tmp_path: Path) -> None:
    initial, trained, converted = trained_by_peft(
        base, tmp_path, init_lora_weights="olora", r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"]
    )
    plain = write_lora(tmp_path / "plain", {UP: LINEARS[UP]}, target_modules=["up_proj"], layers_to_transform=[1])
    options = ToLoraOptions(base=str(base), scales=(1, 0.25))
    to_lora([trained, plain], init=initial, output=tmp_path / "out", options=options)
    first, second, total = (deltas(base, folder) for folder in (converted, plain, tmp_path / "out"))
    assert total.keys() == first.keys()
    for name, change in first.items():
        expected = change + 0.25 * second.get(name, torch.zeros_like(change))
        assert error(total[name], expected) <= 1e-6


def biased_lora(folder: Path, modules: dict[str, tuple[int, int]], *, rank: int, seed: int, **config: Any) -> Path:
    """A LoRA with biases of lora_B."""
    biases = {
        f"base_model.model.{name}.lora_B.bias": random(shape[0], seed=seed + 50 + place)
        for place, (name, shape) in enumerate(modules.items())
    }
    tensors = lora_tensors(modules, rank=rank, seed=seed) | biases
    return write_adapter(folder, tensors, lora_config(rank, lora_bias=True, **config))


def sum_of_changes(base: Path, *scaled: tuple[Path, float]) -> torch.Tensor:
    """Logits of the base with what PEFT's modules compute, so many times each, added to their outputs."""
    model, loaded = load(base), [(adapted(base, folder), scale) for folder, scale in scaled]
    for other, scale in loaded:
        for name, module in other.named_modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                A, B, times = module.lora_A["default"], module.lora_B["default"], scale * module.scaling["default"]
                plain = model.get_submodule(name.removeprefix("base_model.model."))
                plain.register_forward_hook(lambda _, given, out, A=A, B=B, times=times: out + times * B(A(given[0])))
    return logits(model)


@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor")  # PEFT of its own lora_bias
def test_biases_of_lora_are_added_up(base: Path, tmp_path: Path) -> None:
    """Of adapters with and without them, on overlapping modules: those of neither get zeros, which PEFT wants to find."""
    biased = with_biases(tmp_path, base)
    own = {name: shape for name, shape in LINEARS.items() if "q_proj" in name or "up_proj" in name}
    one = biased_lora(tmp_path / "one", own, rank=3, seed=1, lora_alpha=5, target_modules=["q_proj", "up_proj"])
    other = {name: shape for name, shape in LINEARS.items() if "q_proj" in name}
    two = biased_lora(tmp_path / "two", other, rank=2, seed=2, use_rslora=True)
    plain = write_lora(tmp_path / "plain", seed=3, target_modules=NAMES)
    expected = sum_of_changes(biased, (plain, 0.25), (one, -0.5), (two, 0.75))
    assert float((logits(load(biased)) - expected).abs().max()) > 0.5
    for name, options in {"exact": {}, "uniform": {"uniform": True}, "based": {"base": str(biased)}}.items():
        given = ToLoraOptions(scales=(0.25, -0.5, 0.75), **options)
        to_lora([plain, one, two], output=tmp_path / name, options=given)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert sum(key.endswith("lora_B.bias") for key in tensors) == len(LINEARS)
        assert read_json(tmp_path / name / "adapter_config.json")["lora_bias"]
        assert float((logits(adapted(biased, tmp_path / name)) - expected).abs().max()) <= 1e-4, name


def test_a_sum_with_biases_of_lora_is_verified(tmp_path: Path) -> None:
    one, two = (biased_lora(tmp_path / name, LINEARS, rank=2, seed=seed) for name, seed in (("one", 1), ("two", 2)))
    to_lora([one, two], output=tmp_path / "out", options=ToLoraOptions(scales=(0.3, -2)))
    given = VerifyOptions(adapters=(one, two), sample=None)
    found = verify(tmp_path / "out", options=given)
    assert found.is_fine
    assert found.facts["recomputed"]["kinds"]["carried"]["checked"] == len(LINEARS)
    name, path = f"base_model.model.{UP}.lora_B.bias", tmp_path / "out" / "adapter_model.safetensors"
    wrong = load_file(path)
    wrong[name] *= 1 + 1e-5
    save_file(wrong, path, {"format": "pt"})
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    for entry in receipt["files"]:
        content = (tmp_path / "out" / entry["name"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(tmp_path / "out" / "corda_convert.json", receipt)
    assert [name in problem["what"] for problem in verify(tmp_path / "out", options=given).facts["problems"]] == [True]


def test_modules_that_have_no_bias_of_lora_are_not_added_to_such(refusal: Refusal, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": random(2, 32),
        "base_model.model.model.embed_tokens.lora_embedding_B": random(HIDDEN, 2, seed=1),
    }
    embedding = write_adapter(tmp_path / "embedding", tensors, lora_config(2, target_modules=["embed_tokens"]))
    biased = biased_lora(tmp_path / "biased", {UP: LINEARS[UP]}, rank=2, seed=1)
    assert refusal("to-lora", embedding, biased).startswith(
        "One adapter has biases of LoRA (lora_bias), and model.embed_tokens cannot have one."
    )


def test_what_two_adapters_replace_differently_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    folders = []
    for place in (1, 2):
        tensors = lora_tensors(seed=place) | {"base_model.model.lm_head.weight": random(32, HIDDEN, seed=place)}
        config = lora_config(modules_to_save=["lm_head"])
        folders.append(write_adapter(tmp_path / f"a{place}", tensors, config))
    assert refusal("to-lora", *folders).startswith(
        "Two adapters bring base_model.model.lm_head.weight along, and not the same."
    )


# Lost init


def test_a_lost_init_is_the_difference_of_base_and_residual(base: Path, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "down_proj"]}
    _, trained, converted = trained_by_peft(base, tmp_path, init_lora_weights="olora", **config)
    options = ToLoraOptions(base=str(base), residual=tmp_path / "residual")
    outcome = to_lora(trained, output=tmp_path / "out", options=options)
    exact, actual = deltas(base, converted), deltas(base, tmp_path / "out")
    assert max(error(actual[name], exact[name]) for name in exact) <= 1e-5
    residual, model = (load_file(folder / "model.safetensors") for folder in (tmp_path / "residual", base))
    for name, entry in facts(outcome.receipt).items():
        difference = residual[f"{name}.weight"].double() - model[f"{name}.weight"].double()
        lost = float(torch.linalg.svdvals(difference)[4:].norm())
        assert entry["recovered"]["error"] == pytest.approx(lost, rel=1e-3, abs=1e-6 * float(difference.norm()))
        assert entry["rank"] == 8
    to_lora(trained, output=tmp_path / "small", options=ToLoraOptions(**{**_fields(options), "rank": 3}))
    for name, change in deltas(base, tmp_path / "small").items():
        best = float(torch.linalg.svdvals(exact[name])[3:].norm())
        assert float((change - exact[name]).norm()) == pytest.approx(best, rel=1e-5)


def _fields(options: ToLoraOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__slots__}


def test_a_lost_init_of_a_bfloat16_residual_costs_its_rounding(tmp_path: Path) -> None:
    """The trained fixture: W_res was rounded to bfloat16, and the difference holds that rounding."""
    out = tmp_path / "out"
    residual = tmp_path / "residual"
    shutil.copytree(RESIDUAL, residual, ignore=shutil.ignore_patterns("corda_init"))
    outcome = to_lora(ADAPTERS / "corda", output=out, options=ToLoraOptions(base=str(MODEL), residual=residual))
    to_lora(
        ADAPTERS / "corda",
        init=RESIDUAL / "corda_init",
        output=tmp_path / "init",
        options=ToLoraOptions(base=str(MODEL)),
    )
    exact, actual, told = deltas(MODEL, tmp_path / "init"), deltas(MODEL, out), facts(outcome.receipt)
    for name, change in exact.items():
        assert float((actual[name] - change).norm()) <= 1.5 * told[name]["recovered"]["error"]
    assert "of ‖ΔW‖: s·B₀A₀ was taken" in _summary(outcome)


def _summary(outcome: Any) -> str:
    from corda_convert.output.summary import describe

    return describe(outcome.receipt, outcome.output)


def test_a_residual_of_another_training_is_refused(refusal: Refusal, base: Path, tmp_path: Path) -> None:
    for name, modules in (("one", ["q_proj", "up_proj"]), ("two", ["o_proj", "down_proj"])):
        trained_by_peft(base, tmp_path / name, init_lora_weights="olora", r=4, target_modules=modules)
    message = refusal(
        "to-lora", tmp_path / "one" / "trained", "--base", base, "--residual", tmp_path / "two" / "residual"
    )
    assert "was not trained beside residual" in message
    message = refusal("to-lora", tmp_path / "one" / "trained", "--residual", tmp_path / "one" / "residual")
    assert message.startswith("--residual needs the base model, too")


# Blocks


@pytest.mark.parametrize("kind", ["balance", "mini"])
def test_blocks_are_loras_without_a_loss(base: Path, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"target_modules": NAMES}
    if kind == "mini":
        adapter = write_adapter(
            tmp_path / "miss",
            {f"base_model.model.{name}.miss_block": random(5, 4, seed=n) for n, name in enumerate(LINEARS)},
            {"peft_type": "MISS", "r": 5, "mini_r": 4, "init_weights": "mini", **options},
        )
    else:
        adapter = write_miss(tmp_path / "miss", rank=5, **options)
    to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(base=str(base)))
    exact, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert exact.keys() == actual.keys()
    for name, change in exact.items():
        assert torch.equal(actual[name], change), name
    _, theirs = convert_to_lora(adapted(base, adapter), rank=5)
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("adapter", ["miss_balance", "miss_mini", "bone"])
def test_trained_blocks_give_the_logits_of_the_merged_model(adapter: str, tmp_path: Path) -> None:
    to_lora(ADAPTERS / adapter, output=tmp_path / "out", options=ToLoraOptions(base=str(MODEL)))
    merge(MODEL, adapter=ADAPTERS / adapter, output=tmp_path / "merged", run=RunOptions(dtype="float32"))
    ids = torch.arange(64)[None] + 7
    expected = logits(load(tmp_path / "merged"), ids)
    found = logits(adapted(MODEL, tmp_path / "out"), ids)
    assert float((logits(load(MODEL), ids) - expected).abs().max()) > 1
    assert float((found - expected).abs().max()) <= 2e-4


def test_bat_is_the_best_lora_of_the_rank(tmp_path: Path) -> None:
    adapter = ADAPTERS / "miss_bat"
    outcome = to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(base=str(MODEL), rank=12))
    exact, actual, told = deltas(MODEL, adapter), deltas(MODEL, tmp_path / "out"), facts(outcome.receipt)
    _, theirs = convert_to_lora(adapted(MODEL, adapter), rank=12)
    for name, change in exact.items():
        best = float(torch.linalg.svdvals(change)[12:].norm())
        missed = float((actual[name] - change).norm())
        assert missed == pytest.approx(best, rel=1e-5)
        assert told[name]["error"] == pytest.approx(missed, rel=1e-5)
        A, B = (theirs[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert missed <= float((B @ A - change).norm()) * (1 + 1e-6)


def test_bat_blocks_scaled_and_in_sums_are_the_best_lora_of_the_rank(base: Path, tmp_path: Path) -> None:
    one, two = (
        write_adapter(
            tmp_path / f"bat{seed}",
            {f"base_model.model.{name}.miss_block": random(shape[0] // 4, 4, 4, seed=seed + n)
             for n, (name, shape) in enumerate(LINEARS.items())},
            {"peft_type": "MISS", "r": 4, "init_weights": "bat", "target_modules": NAMES},
        )
        for seed in (1, 100)
    )  # fmt: skip
    lora = write_lora(tmp_path / "lora", {UP: LINEARS[UP]}, target_modules=["up_proj"], layers_to_transform=[1])
    changes = [deltas(base, folder) for folder in (one, two, lora)]
    for scales, adapters in (((0.5,), [one]), ((-1.5, 1, 2), [one, two, lora]), ((2, 1), [lora, one])):
        taken = [changes[(one, two, lora).index(folder)] for folder in adapters]
        out = tmp_path / f"out{len(adapters)}"
        to_lora(adapters, output=out, options=ToLoraOptions(base=str(base), scales=scales, rank=5))
        for name, actual in deltas(base, out).items():
            exact = sum(scale * change[name] for scale, change in zip(scales, taken, strict=True) if name in change)
            best = float(torch.linalg.svdvals(exact)[5:].norm())
            assert float((actual - exact).norm()) == pytest.approx(best, rel=1e-5)


def test_bat_needs_a_rank_and_blocks_their_base(refusal: Refusal, base: Path, tmp_path: Path) -> None:
    assert "depends on the weight (bat) and has full rank" in refusal("to-lora", ADAPTERS / "miss_bat", "--base", MODEL)
    adapter = write_miss(tmp_path / "miss")
    assert "how many inputs its layers have stands in the base model alone" in refusal("to-lora", adapter)


def test_blocks_and_loras_are_added(base: Path, tmp_path: Path) -> None:
    miss, lora = (
        write_miss(tmp_path / "miss", target_modules=NAMES),
        write_lora(tmp_path / "lora", target_modules=NAMES),
    )
    to_lora([miss, lora], output=tmp_path / "out", options=ToLoraOptions(base=str(base), scales=(3, 1)))
    first, second, total = (deltas(base, folder) for folder in (miss, lora, tmp_path / "out"))
    assert max(error(total[name], 3 * first[name] + second[name]) for name in first) <= 1e-6


# In PEFT


def test_converted_adapters_add_remove_and_stack_on_one_base(base: Path, tmp_path: Path) -> None:
    """Two trainings, beside two residuals, and a plain LoRA: on the unmodified base they are independent of each other."""
    folders = []
    for place, method in enumerate(("olora", "pissa")):
        initial, trained, _ = trained_by_peft(
            base, tmp_path / method, init_lora_weights=method, r=4, target_modules=["q_proj", "up_proj"]
        )
        to_lora(trained, init=initial, output=tmp_path / f"lora{place}", options=ToLoraOptions(base=str(base)))
        folders.append(tmp_path / f"lora{place}")
    plain = write_lora(tmp_path / "plain", {UP: LINEARS[UP]}, target_modules=["up_proj"], layers_to_transform=[1])
    model = adapted(base, *folders, plain)
    alone = logits(load(base))
    model.base_model.set_adapter(["default", "other0", "other1"])
    parts = [deltas(base, folder) for folder in (*folders, plain)]
    weights = load_file(base / "model.safetensors")
    for part in parts:
        for name, change in part.items():
            weights[f"{name}.weight"] = (weights[f"{name}.weight"].double() + change).float()
    expected = logits(load(write_checkpoint(tmp_path / "summed", weights)))
    assert float((logits(model) - expected).abs().max()) <= 1e-4
    model.base_model.set_adapter("default")
    residual = logits(adapted(tmp_path / "olora" / "residual", tmp_path / "olora" / "trained"))
    assert float((logits(model) - residual).abs().max()) <= 1e-4
    model.delete_adapter("other0")
    model.delete_adapter("other1")
    with model.disable_adapter():
        assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model.unload()), alone)


def test_the_base_of_the_residuals_receipt_is_named(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--base" / "snapshots" / "abc"
    shutil.copytree(MODEL, snapshot)
    options = DecomposeOptions(mode="ipm", rank=2, method="svd")
    decompose(snapshot, output=tmp_path / "residual", options=options)
    initial = tmp_path / "residual" / "corda_init"
    tensors = {
        name: tensor + 0.01 * random(*tensor.shape, seed=place)
        for place, (name, tensor) in enumerate(load_file(initial / "adapter_model.safetensors").items())
    }
    trained = write_adapter(tmp_path / "trained", tensors, read_json(initial / "adapter_config.json"))
    outcome = to_lora(trained, init=initial, output=tmp_path / "out")
    assert read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == "someone/base"
    assert outcome.warnings == ()


def test_merging_with_init_and_converting_are_one_change(tmp_path: Path) -> None:
    to_lora(ADAPTERS / "corda", init=RESIDUAL / "corda_init", output=tmp_path / "lora")
    run = RunOptions(dtype="float32")
    options = MergeOptions(init=RESIDUAL / "corda_init")
    merge(MODEL, adapter=ADAPTERS / "corda", output=tmp_path / "merged", options=options, run=run)
    merged, base = (
        {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
        for folder in (tmp_path / "merged", MODEL)
    )
    found = deltas(MODEL, tmp_path / "lora")
    for name, change in found.items():
        weight = base[f"{name}.weight"].double() + change
        assert error(merged[f"{name}.weight"].double(), weight) <= 1e-6
    ids = torch.arange(64)[None] + 7
    difference = logits(adapted(MODEL, tmp_path / "lora"), ids) - logits(load(tmp_path / "merged"), ids)
    assert float(difference.abs().max()) <= 2e-4


# For a server


def serving(tmp_path: Path, **config: Any) -> Path:
    """A plain LoRA with two ranks and two alphas, and rsLoRA."""
    tensors = {}
    for name, shape in LINEARS.items():
        tensors |= lora_tensors({name: shape}, rank=2 if "q_proj" in name else 4)
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}, "use_rslora": True}
    return write_adapter(tmp_path / "lora", tensors, lora_config(4, **patterns, **{"target_modules": NAMES, **config}))


@pytest.mark.parametrize("server", SERVERS)
def test_for_a_server_what_it_does_not_take_is_mended_without_a_loss(
    base: Path, tmp_path: Path, server: Server
) -> None:
    names = "|".join(re.escape(name) for name in LINEARS)
    adapter = serving(tmp_path, target_modules=names)
    before = check(facts_of(read_adapter(adapter)), server)
    outcome = to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(server=server))
    assert not [finding for finding in check(facts_of(read_adapter(tmp_path / "out")), server) if finding.is_obstacle]
    assert any(finding.is_obstacle for finding in before) == (server != "peft")
    assert bool(outcome.receipt["served"]["mended"]) == (
        server in ("sglang", "llama.cpp")
    )  # a scaling of 1 does for vLLM
    assert outcome.receipt["served"]["command"]
    exact, actual = deltas(base, adapter), deltas(base, tmp_path / "out")
    assert exact.keys() == actual.keys()
    assert max(error(actual[name], exact[name]) for name in exact) <= 1e-6


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ("vllm", "vllm serve acme/7b --enable-lora --lora-modules 'a lora={}'"),
        ("sglang", "sglang serve --model-path acme/7b --enable-lora --lora-paths 'a lora={}'"),
        ("llama.cpp", "python convert_lora_to_gguf.py --base BASE --outfile adapter.gguf '{}'"),
        ("peft", 'PeftModel.from_pretrained(base, "{}")'),
    ],
)
def test_the_command_that_serves_the_result_names_it(
    done: Callable[..., Ran], tmp_path: Path, server: Server, expected: str
) -> None:
    """On the screen; the receipt has no path of the machine."""
    adapter, output = write_lora(tmp_path / "lora", base_model_name_or_path="acme/7b"), tmp_path / "a lora"
    planned = done("to-lora", adapter, "--for", server, "-o", output, "--dry-run").out
    ran = done("to-lora", adapter, "--for", server, "-o", output).out
    for printed in (planned, ran):
        assert f"  serve    {expected.format(output)}\n" in printed
    (command, *_) = read_json(output / "corda_convert.json")["served"]["command"]
    assert "ADAPTER" in command and str(tmp_path) not in command


def test_for_a_server_a_rank_above_all_that_it_takes_is_lowered(base: Path, tmp_path: Path) -> None:
    wide = {"model.layers.0.mlp.up_proj": LINEARS[UP]}
    adapter = write_lora(tmp_path / "lora", wide, rank=600, target_modules=["up_proj"], layers_to_transform=[0])
    outcome = to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(server="vllm"))
    assert outcome.receipt["served"]["mended"] == ["rank 600"]
    assert outcome.receipt["rank"] == 512
    (exact,), (actual,) = (deltas(base, folder).values() for folder in (adapter, tmp_path / "out"))
    assert error(actual, exact) <= 1e-6


def test_for_a_server_what_no_conversion_mends_is_refused(refusal: Refusal) -> None:
    message = refusal("to-lora", ADAPTERS / "lora_modules_to_save", "--for", "vllm")
    assert message.startswith("vllm does not take the result as it is: whole weights: ")
    assert message.endswith("Merge the adapter into the base instead, or convert without --for.")


# Other layers


def other_layers(seed: int) -> dict[str, torch.Tensor]:
    """Factors of a convolution, an embedding and a MultiheadAttention, as PEFT stores them."""
    shapes = {
        "conv.lora_A.weight": (4, 3, 2, 2), "conv.lora_B.weight": (6, 4, 1, 1),
        "embed.lora_embedding_A": (4, 30), "embed.lora_embedding_B": (8, 4),
        "attention.lora_A.weight": (4, 8), "attention.lora_B.weight": (24, 4),
        "attention.base_layer.out_proj.lora_A.weight": (4, 8), "attention.base_layer.out_proj.lora_B.weight": (8, 4),
    }  # fmt: skip
    return {f"base_model.model.{name}": random(*shape, seed=seed + n) for n, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"energy": 0.7}, {"uniform": True, "rank": 9}])
def test_convolutions_embeddings_and_attention_keep_their_keys_and_shapes(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    config = lora_config(4, target_modules=["conv", "embed", "attention"], lora_alpha=2)
    first = other_layers(70)
    moved = {name: tensor + 0.1 * random(*tensor.shape, seed=n) for n, (name, tensor) in enumerate(first.items())}
    initial, trained = write_adapter(tmp_path / "init", first, config), write_adapter(tmp_path / "a", moved, config)
    to_lora(trained, init=initial, output=tmp_path / "out", options=ToLoraOptions(**options))
    found, said = (
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
        read_json(tmp_path / "out" / "adapter_config.json"),
    )
    assert found.keys() == moved.keys()
    for name in [name for name in moved if "_A" in name]:
        other = name.replace("_A", "_B")
        A, B = found[name], found[other]
        r = A.shape[0]
        assert (A.shape[1:], B.shape[0], B.shape[1], B.shape[2:]) == (
            moved[name].shape[1:], moved[other].shape[0], r, moved[other].shape[2:],
        )  # fmt: skip
        change = 0.5 * (_matrix(moved[other]) @ _matrix(moved[name]) - _matrix(first[other]) @ _matrix(first[name]))
        module = name.removeprefix("base_model.model.").partition(".lora_")[0].removesuffix(".base_layer.out_proj")
        scaling = said["alpha_pattern"].get(module, said["lora_alpha"]) / said["rank_pattern"].get(module, said["r"])
        assert said["rank_pattern"].get(module, said["r"]) == r
        missed = float((scaling * _matrix(B) @ _matrix(A) - change).norm())
        values = torch.linalg.svdvals(change)
        best = float(values[r:].norm()) if "rank" in options or "energy" in options else 0.0
        assert missed == pytest.approx(best, rel=1e-5, abs=1e-5 * float(values[0]))
        assert missed**2 <= (1 - options.get("energy", 0)) * float(values.norm()) ** 2


def _matrix(factor: torch.Tensor) -> torch.Tensor:
    return factor.double().flatten(1)


def test_both_projections_of_an_attention_get_one_rank(tmp_path: Path) -> None:
    """PEFT has one rank for the two; the input projection, last in the file, needs less."""
    tensors = {name: tensor for name, tensor in other_layers(80).items() if "attention" in name}
    name = "base_model.model.attention.lora_B.weight"
    tensors[name] = tensors[name] * torch.tensor([1.0, 0.0, 0.0, 0.0])
    adapter = write_adapter(tmp_path / "lora", tensors, lora_config(4, target_modules=["attention"]))
    to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(energy=0.999))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.shape[0] for key, tensor in found.items() if "lora_A" in key} == {4}
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == 4
