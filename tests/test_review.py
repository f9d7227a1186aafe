"""Silent errors that a review found: each of these once gave a wrong model, or none, without a word."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    VOCABULARY,
    llama_tensors,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_lora,
)
from safetensors.torch import load_file

Refusal = Callable[..., str]
Command = Callable[..., Any]


@pytest.fixture
def residual(tmp_path: Path, done: Command) -> Path:
    model = write_checkpoint(tmp_path / "model")
    arguments = ("--method", "svd", "--mode", "ipm", "--rank", 4, "-o", tmp_path / "residual")
    done("decompose", model, *arguments)
    return tmp_path / "residual"


def trained_from(init: Path, folder: Path, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """The initial adapter after a little training, as far as its numbers go."""
    tensors = {
        name: (tensor + 0.05 * tensor.std() * random(*tensor.shape, seed=place)).to(dtype)
        for place, (name, tensor) in enumerate(load_file(init / "adapter_model.safetensors").items())
    }
    return write_adapter(folder, tensors, read_json(init / "adapter_config.json") | config)


def product(adapter: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    key = f"base_model.model.{module}"
    return adapter[f"{key}.lora_B.weight"].double() @ adapter[f"{key}.lora_A.weight"].double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_trained_in_16_bits_do_not_round_their_initial_ones(
    done: Command, residual: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """What `B₀A₀` loses by rounding stays in the converted LoRA: a fifth of ΔW, once."""
    init = residual / "corda_init"
    adapter = trained_from(init, tmp_path / "adapter", dtype)
    done("to-lora", adapter, "--init", init, "-o", tmp_path / "lora")
    before, after, converted = (
        load_file(folder / "adapter_model.safetensors") for folder in (init, adapter, tmp_path / "lora")
    )
    for module in LINEARS:
        exact = product(after, module) - product(before, module)
        assert float((product(converted, module) - exact).norm() / exact.norm()) < 1e-6


def test_a_scaling_baked_into_16_bit_factors_is_not_rounded(done: Command, residual: Path, tmp_path: Path) -> None:
    config = {"use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 4}}
    init = trained_from(residual / "corda_init", tmp_path / "first_init", torch.bfloat16, **config)
    adapter = trained_from(init, tmp_path / "adapter", torch.bfloat16, **config)
    done("to-lora", adapter, "--init", init, "-o", tmp_path / "lora")
    before, after, converted = (
        load_file(folder / "adapter_model.safetensors") for folder in (init, adapter, tmp_path / "lora")
    )
    for module in LINEARS:
        exact = 1.5 * (product(after, module) - product(before, module))
        assert float((product(converted, module) - exact).norm() / exact.norm()) < 1e-6


def test_a_converted_lora_is_not_merged_onto_the_residual(refusal: Refusal, done: Command, tmp_path: Path) -> None:
    done("to-lora", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init", "-o", tmp_path / "lora")
    message = refusal("merge", RESIDUAL, "--adapter", tmp_path / "lora")
    assert message.startswith("residual is a residual, and lora was not trained beside it: at model.layers.0.")
    assert message.endswith("converted to an ordinary LoRA for it.\nMerge it into the base model.")


def test_a_plain_lora_of_another_rank_is_not_merged_onto_a_residual(
    refusal: Refusal, residual: Path, tmp_path: Path
) -> None:
    message = refusal("merge", residual, "--adapter", write_lora(tmp_path / "lora", rank=2))
    assert "it has rank 2, corda_init has 4." in message


def test_the_initial_adapter_of_other_covariances_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    """Two decompositions of one model are no strangers to each other: some modules correlate by chance or by nature."""
    residual = tmp_path / "other"
    trained = load_file(ADAPTERS / "corda" / "adapter_model.safetensors")
    related = {
        name: 0.3 * tensor + tensor.std() * random(*tensor.shape, seed=place)
        for place, (name, tensor) in enumerate(trained.items())
    }
    write_adapter(residual, related, read_json(RESIDUAL / "corda_init" / "adapter_config.json"))
    for arguments in (("merge", MODEL, "--adapter", ADAPTERS / "corda"), ("to-lora", ADAPTERS / "corda")):
        message = refusal(*arguments, "--init", residual)
        assert message.startswith("corda was not trained from the initial adapter other: ")


def test_initial_factors_that_are_no_projection_merge_with_as_is(
    refusal: Refusal, done: Command, tmp_path: Path
) -> None:
    """LoRA-GA's factors come from gradients: they tell nothing of the weights."""
    shapes = {f"model.layers.{layer}.self_attn.{name}_proj": (256, 256) for layer in range(2) for name in "qkvo"}
    sizes = {"hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 256}
    tensors = {
        name: random(*(256 if size != VOCABULARY else size for size in tensor.shape), seed=place)
        for place, (name, tensor) in enumerate(llama_tensors().items())
    }
    model = write_checkpoint(tmp_path / "model", tensors, config=LLAMA_CONFIG | sizes)
    init = write_lora(tmp_path / "ga_init", shapes, seed=7)
    adapter = trained_from(init, tmp_path / "adapter", init_lora_weights="lora_ga")
    arguments = ("merge", model, "--adapter", adapter, "--init", init)
    assert refusal(*arguments).endswith(
        "If the initial factors are no projection of the weights (LoRA-GA), say --as-is."
    )
    done(*arguments, "--as-is", "-o", tmp_path / "out")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (init, adapter))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for module in shapes:
        expected = tensors[f"{module}.weight"] + 2 * (product(after, module) - product(before, module))
        assert torch.allclose(merged[f"{module}.weight"].double(), expected, atol=1e-4)
