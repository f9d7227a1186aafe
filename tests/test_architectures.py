"""Layers that store their weights transposed, embeddings, and other families than Llama, against PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from corda_convert import DecomposeOptions, MergeOptions, RunOptions, decompose, merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32))
    if family == "opt":
        return OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=64,
                max_position_embeddings=32,
                word_embed_proj_dim=32,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=64,
            tie_word_embeddings=False,
        )
    )


def trained_adapter(model: PreTrainedModel, config: LoraConfig, folder: Path, save_embeddings: object = False) -> Path:
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return folder


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


def differing(output: Path, expected: dict[str, torch.Tensor], prefix: str = "") -> list[str]:
    actual = load_file(output / "model.safetensors")
    assert actual
    return [name for name, tensor in actual.items() if not torch.equal(tensor, expected[prefix + name])]


GPT2_TARGETS = ["c_attn", "c_proj", "c_fc"]  # attn.c_proj is square: only the module's type tells its orientation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_lora_on_conv1d_gives_the_bits_of_peft(dtype: torch.dtype, prefix: str, tmp_path: Path) -> None:
    base = tmp_path / "gpt2"
    tiny("gpt2").to(dtype).save_pretrained(base)
    if not prefix:  # as the first GPT-2 checkpoints were saved
        tensors = load_file(base / "model.safetensors")
        save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, base / "model.safetensors")
    config = LoraConfig(r=4, lora_alpha=6, target_modules=GPT2_TARGETS, fan_in_fan_out=True, use_rslora=True)
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "adapter")
    merge(base, adapter=adapter, output=tmp_path / "out")
    assert differing(tmp_path / "out", peft_merged(base, adapter, dtype), "" if prefix else "transformer.") == []


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_lora_on_linear_gives_the_bits_of_peft(family: str, tmp_path: Path) -> None:
    base = tmp_path / family
    tiny(family).to(torch.bfloat16).save_pretrained(base)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "k_proj", "v_proj"], rank_pattern={"k_proj": 2})
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "adapter")
    merge(base, adapter=adapter, output=tmp_path / "out")
    assert differing(tmp_path / "out", peft_merged(base, adapter, torch.bfloat16)) == []


def test_lora_on_an_embedding_rounds_once_or_as_peft_does(tmp_path: Path) -> None:
    base = tmp_path / "llama"
    tiny("llama").to(torch.bfloat16).save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"])
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "adapter")
    expected = peft_merged(base, adapter, torch.bfloat16)
    merge(base, adapter=adapter, output=tmp_path / "peft", options=MergeOptions(rounding="peft"))
    assert differing(tmp_path / "peft", expected) == []
    merge(base, adapter=adapter, output=tmp_path / "nearest")
    assert differing(tmp_path / "nearest", expected) == ["model.embed_tokens.weight"]

    name = "model.embed_tokens.weight"
    factors = load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    exact = load_file(base / "model.safetensors")[name].double() + 1.5 * (B @ A).T
    once, twice = (load_file(tmp_path / rounding / "model.safetensors")[name] for rounding in ("nearest", "peft"))
    assert float((once.double() - exact).norm()) < float((twice.double() - exact).norm())
    assert float((once == exact.to(torch.bfloat16)).double().mean()) > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("save_embeddings", ["auto", True, False])
def test_embeddings_that_peft_saves_along_take_the_place_of_the_models(
    save_embeddings: object, dtype: torch.dtype, tmp_path: Path
) -> None:
    """PEFT's default saves the whole weight of an adapted embedding or head beside its factors."""
    base = tmp_path / "llama"
    tiny("llama").to(torch.bfloat16).save_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "lm_head", "q_proj"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if save_embeddings:
        model.lm_head.weight.data += 0.4321  # trained elsewhere, then saved along
    adapter = trained_adapter(model, config, tmp_path / "adapter", save_embeddings)
    saved = load_file(adapter / "adapter_model.safetensors")
    assert ("base_model.model.lm_head.base_layer.weight" in saved) == bool(save_embeddings)
    merge(base, adapter=adapter, output=tmp_path / "out", options=MergeOptions(rounding="peft"))
    assert differing(tmp_path / "out", peft_merged(base, adapter, torch.bfloat16)) == []


def test_a_whole_head_that_peft_saved_replaces_the_models(tmp_path: Path) -> None:
    base = tmp_path / "llama"
    tiny("llama").to(torch.bfloat16).save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.lm_head.weight.data += 0.5
    config = LoraConfig(r=4, target_modules=["q_proj"])
    adapter = trained_adapter(model, config, tmp_path / "adapter", True)
    outcome = merge(base, adapter=adapter, output=tmp_path / "out")
    assert outcome.receipt["summary"]["tensors"]["replaced"] == 2
    assert differing(tmp_path / "out", peft_merged(base, adapter, torch.bfloat16)) == []


def test_the_head_of_a_classifier_is_no_target(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")
    options = DecomposeOptions(mode="ipm", rank=2, method="svd")
    outcome = decompose(tmp_path / "base", output=tmp_path / "out", options=options)
    modules = {entry["module"] for entry in outcome.receipt["tensors"] if "module" in entry}
    assert len(modules) == 7
    assert "score" not in modules


def test_a_snapshot_of_the_hubs_cache_is_called_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--alice--tiny-llama" / "snapshots" / "0123abcd"
    tiny("llama").save_pretrained(folder)
    adapter = trained_adapter(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    text = (adapter / "adapter_config.json").read_text()
    named = text.replace('"base_model_name_or_path": null', '"base_model_name_or_path": "alice/tiny-llama"')
    (adapter / "adapter_config.json").write_text(named)
    outcome = merge(folder, adapter=adapter, output=tmp_path / "out")
    assert outcome.receipt["options"]["model"] == "alice/tiny-llama"
    assert outcome.warnings == ()
    assert "base_model: alice/tiny-llama" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_decompose_finds_the_linear_layers_and_peft_puts_them_together_again(
    family: str, mode: str, tmp_path: Path
) -> None:
    base = tmp_path / family
    model = tiny(family)
    model.save_pretrained(base)
    options = DecomposeOptions(mode=mode, rank=4, alpha=2, method="svd")
    outcome = decompose(base, output=tmp_path / "out", options=options)
    decomposed = {
        entry["module"] for entry in outcome.receipt["tensors"] if entry["action"] == "decomposed" and "module" in entry
    }
    kinds = {"gpt2": "Conv1D", "opt": "Linear", "llama": "Linear"}
    linears = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ == kinds[family] and "lm_head" not in name
    }
    assert decomposed == linears
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    together = PeftModel.from_pretrained(residual, str(tmp_path / "out"), subfolder="corda_init", is_trainable=True)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected, alone = model.eval()(ids).logits, residual.eval()(ids).logits
        assert float((together.eval()(ids).logits - expected).abs().max()) <= 1e-5
        with together.disable_adapter():
            alone = together(ids).logits
    assert float((alone - expected).abs().max()) > 1e-4


def test_the_result_of_cuda_is_that_of_the_cpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA here")
    base = tmp_path / "llama"
    tiny("llama").save_pretrained(base)
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"])
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "adapter")
    options = DecomposeOptions(mode="kpm", rank=4, method="svd")
    for device in ("cpu", "cuda"):
        merge(base, adapter=adapter, output=tmp_path / f"merged-{device}", run=RunOptions(device=device))
        decompose(base, output=tmp_path / f"residual-{device}", options=options, run=RunOptions(device=device))
    for kind in ("merged", "residual"):
        cpu, cuda = (load_file(tmp_path / f"{kind}-{device}" / "model.safetensors") for device in ("cpu", "cuda"))
        for name, tensor in cpu.items():
            assert torch.allclose(cuda[name], tensor, rtol=1e-5, atol=1e-6), name
