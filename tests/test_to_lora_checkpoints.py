"""`to-lora --from-checkpoints`: the difference of a model and its fine-tune, against float64 and the fine-tune itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    HIDDEN,
    LINEARS,
    LLAMA_CONFIG,
    VOCABULARY,
    covariance_tensors,
    llama_tensors,
    random,
    read_json,
    write_checkpoint,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from corda_convert import RunOptions, ToLoraOptions, to_lora

Refusal = Callable[..., str]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use

IDS = torch.tensor([[1, 5, 9, 2, 30, 17, 3, 8, 26, 11]])
PREFIX = "base_model.model."


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(base: Path, adapter: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(load(base), str(adapter)))


def tuned(tensors: dict[str, torch.Tensor], names: list[str], rank: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors with a change of that rank, or a full one, in some of them."""
    changed = dict(tensors)
    for place, name in enumerate(names):
        shape = tensors[name].shape
        change = random(*shape, seed=900 + place)
        if rank is not None:
            change = random(shape[0], rank, seed=900 + place) @ random(rank, shape[1], seed=950 + place)
        changed[name] = tensors[name] + 0.1 * change
    return changed


def models(
    folder: Path,
    names: list[str],
    rank: int | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    **config: Any,
) -> tuple[Path, Path]:
    tensors = llama_tensors() if tensors is None else tensors
    config = LLAMA_CONFIG | config
    base = write_checkpoint(folder / "base", tensors, shards=2, config=config)
    return base, write_checkpoint(folder / "tuned", tuned(tensors, names, rank), shards=3, config=config)


ALL = [f"{name}.weight" for name in LINEARS]


@pytest.mark.parametrize("weighted", [False, True])
def test_each_layer_gets_the_best_factors_of_its_difference(tmp_path: Path, weighted: bool) -> None:
    base, other = models(tmp_path, ALL)
    matrices = covariance_tensors()
    save_file(matrices, tmp_path / "covs.safetensors")
    options = ToLoraOptions(
        from_checkpoints=(base, other), rank=3, weight_by=tmp_path / "covs.safetensors" if weighted else None
    )
    outcome = to_lora(output=tmp_path / "out", options=options)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before, after = llama_tensors(), tuned(llama_tensors(), ALL)
    told = {entry["module"]: entry for entry in outcome.receipt["tensors"] if "relative_error" in entry}
    assert told.keys() == LINEARS.keys()
    for name in LINEARS:
        A, B = (stored[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
        change = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        root = torch.linalg.cholesky(matrices[name].double()) if weighted else torch.eye(change.shape[1]).double()
        best = float(torch.linalg.svdvals(change @ root)[3:].norm())
        missed = change - B @ A
        assert float((missed @ root).norm()) == pytest.approx(best, rel=1e-4)
        assert told[name]["error"] == pytest.approx(float(missed.norm()), rel=1e-5)
        if weighted:
            assert told[name]["output_error"] == pytest.approx(best, rel=1e-4)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert sorted(config["target_modules"]) == sorted({name.rpartition(".")[2] for name in LINEARS})
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, str(base))


def test_a_fine_tune_of_low_rank_is_found_again_with_all_else_that_it_changed(tmp_path: Path) -> None:
    """Two Linear layers, the head, a norm and the embedding changed; nothing else is touched."""
    linears = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"]
    base, low = models(tmp_path, linears, rank=2)
    whole = tuned(load_all(low), ["model.norm.weight", "model.embed_tokens.weight"])
    other = write_checkpoint(tmp_path / "whole", whole)
    outcome = to_lora(output=tmp_path / "out", options=ToLoraOptions(from_checkpoints=(base, other), rank=4))
    assert float((logits(load(base)) - logits(load(other))).abs().max()) > 1
    assert float((adapted(base, tmp_path / "out") - logits(load(other))).abs().max()) <= 1e-4
    assert {entry["action"] for entry in outcome.receipt["tensors"]} == {"extracted", "carried"}
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["modules_to_save"] == ["model.embed_tokens", "model.norm"]
    (warning,) = outcome.warnings
    assert warning.startswith("whole also changed model.embed_tokens, model.norm, which are no Linear layers")


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_energy_takes_the_smallest_rank_that_keeps_it(tmp_path: Path, share: float) -> None:
    base, other = models(tmp_path, ALL, rank=5)
    to_lora(output=tmp_path / "out", options=ToLoraOptions(from_checkpoints=(base, other), energy=share))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    before, after = llama_tensors(), tuned(llama_tensors(), ALL, rank=5)
    for name in LINEARS:
        squares = torch.linalg.svdvals(after[f"{name}.weight"].double() - before[f"{name}.weight"].double()).square()
        kept = squares.cumsum(0) / squares.sum()
        rank = stored[f"{PREFIX}{name}.lora_A.weight"].shape[0]
        assert kept[rank - 1] >= share * (1 - 1e-9)
        assert rank == 1 or kept[rank - 2] < share
    assert float((adapted(base, tmp_path / "out") - logits(load(other))).abs().max()) <= (1e-3 if share == 1 else 100)


def test_biases_of_linear_layers_are_brought_along(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors |= {
        f"model.layers.{n}.self_attn.{name}_proj.bias": random(8 if name in "kv" else HIDDEN, seed=n)
        for n in range(2)
        for name in "qkvo"
    }
    changed = ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"]
    changed += ["model.layers.1.self_attn.k_proj.bias"]
    base, other = models(tmp_path, changed, tensors=tensors, attention_bias=True)
    to_lora(output=tmp_path / "out", options=ToLoraOptions(from_checkpoints=(base, other), rank=16))
    assert read_json(tmp_path / "out" / "adapter_config.json")["bias"] == "all"
    assert float((adapted(base, tmp_path / "out") - logits(load(other))).abs().max()) <= 1e-4


def test_a_tied_embedding_is_brought_along_for_both(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    changed = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    base, other = models(tmp_path, changed, tensors=tensors, tie_word_embeddings=True)
    to_lora(output=tmp_path / "out", options=ToLoraOptions(from_checkpoints=(base, other), rank=16))
    assert read_json(tmp_path / "out" / "adapter_config.json")["modules_to_save"] == ["lm_head", "model.embed_tokens"]
    assert float((adapted(base, tmp_path / "out") - logits(load(other))).abs().max()) <= 1e-4


def test_transposed_layers_of_gpt_2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=VOCABULARY, n_positions=16)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        if "c_attn.weight" in name or "c_proj.weight" in name or "c_fc.bias" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    options = ToLoraOptions(from_checkpoints=(tmp_path / "base", tmp_path / "tuned"), rank=8)
    to_lora(output=tmp_path / "out", options=options)
    assert float((logits(model) - logits(load(tmp_path / "base"))).abs().max()) > 0.1
    assert float((adapted(tmp_path / "base", tmp_path / "out") - logits(model)).abs().max()) <= 1e-4


def test_other_dtypes_are_subtracted_as_they_are(tmp_path: Path) -> None:
    base, other = models(tmp_path, ALL[:2])
    half = write_checkpoint(tmp_path / "half", {name: tensor.bfloat16() for name, tensor in load_all(base).items()})
    run = RunOptions(dtype="bfloat16")
    options = ToLoraOptions(from_checkpoints=(half, other), rank=2)
    outcome = to_lora(output=tmp_path / "out", options=options, run=run)
    assert {entry["dtype"] for entry in outcome.receipt["tensors"]} == {"BF16"}
    assert outcome.receipt["extracted"]["modules"] == len(LINEARS) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base", "base", "--rank", 2), "base and base hold the same numbers: there is nothing to extract."),
        (("base", "tuned"), "The difference of two checkpoints has full rank."),
        (("base", "norms", "--rank", 2), "norms differs from base in no Linear layer, only in model.norm.weight."),
        (("base", "resized", "--rank", 2), "lm_head.weight is (32, 16) in base, (33, 16) in resized."),
        (
            ("base", "smaller", "--rank", 2),
            "base and smaller do not hold the same tensors: model.norm.weight stands in",
        ),
    ],
)
def test_pairs_that_make_no_lora_are_refused(
    refusal: Refusal, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    models(tmp_path, ALL)
    tensors = llama_tensors()
    write_checkpoint(tmp_path / "norms", tuned(tensors, ["model.norm.weight"]))
    write_checkpoint(tmp_path / "resized", tensors | {"lm_head.weight": random(VOCABULARY + 1, HIDDEN)})
    write_checkpoint(tmp_path / "smaller", {name: t for name, t in tensors.items() if name != "model.norm.weight"})
    before, after, *options = arguments
    found = refusal("to-lora", "--from-checkpoints", tmp_path / before, tmp_path / after, *options)
    assert message in found


def test_adapters_do_not_go_with_checkpoints(refusal: Refusal, tmp_path: Path) -> None:
    base, other = models(tmp_path, ALL)
    message = refusal("to-lora", tmp_path, "--from-checkpoints", base, other, "--rank", 2)
    assert message.startswith("--from-checkpoints goes with no adapter")


def test_covariances_under_the_names_of_the_model_without_its_head_are_found(tmp_path: Path) -> None:
    base, other = models(tmp_path, ALL)
    for name, matrices in {
        "full": covariance_tensors(),
        "short": {module.removeprefix("model."): matrix for module, matrix in covariance_tensors().items()},
    }.items():
        save_file(matrices, tmp_path / f"{name}.safetensors")
        options = ToLoraOptions(from_checkpoints=(base, other), rank=3, weight_by=tmp_path / f"{name}.safetensors")
        to_lora(output=tmp_path / name, options=options)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("full", "short")]
    assert files[0] == files[1]
