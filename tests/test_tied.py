"""Embeddings and heads that share one tensor, and vocabularies that training resized.

The oracle is the adapter model itself, unmerged: PEFT adds both changes to the shared tensor when it merges.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import DECODER, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

from corda_convert import merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
]

IDS = torch.arange(3, 23)[None]


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "gemma3_text":
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**DECODER, head_dim=8)).eval()
    if family == "qwen2":
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**DECODER, tie_word_embeddings=True)).eval()
    model = tiny(family)
    for parameter in model.parameters():  # norms and biases are not all alike, the embeddings not tiny
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model: Any) -> torch.Tensor:
    inputs: dict[str, torch.Tensor] = {"input_ids": IDS}
    kind = model.config.model_type
    if kind == "t5":
        inputs["decoder_input_ids"] = IDS + 5
    if kind == "whisper":
        generator = torch.Generator().manual_seed(3)
        features = torch.randn(1, 8, 32, generator=generator, dtype=model.dtype)
        inputs = {"input_features": features, "decoder_input_ids": IDS[:, :8]}
    if kind in ("gemma3",):
        inputs["token_type_ids"] = torch.zeros_like(IDS)
    with torch.no_grad():
        return model.eval()(**inputs).logits.double()


def trained(base: Path, folder: Path, config: LoraConfig, *, resize: int | None = None, **saving: Any) -> torch.Tensor:
    """Saves an adapter with random weights, and gives the logits of the reloaded adapter model."""
    model_class = type_of(base)
    model = load(base)
    if resize is not None:
        model.resize_token_embeddings(resize)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in {id(p): p for p in adapted.parameters() if p.requires_grad}.values():
        parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder, **saving)
    again = model_class.from_pretrained(base)
    if resize is not None:
        again.resize_token_embeddings(resize)
    return logits(PeftModel.from_pretrained(again, str(folder)).double())


def distance(folder: Path, expected: torch.Tensor) -> float:
    return float((logits(load(folder)) - expected).abs().max())


def type_of(folder: Path) -> Any:
    return getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])


def load(folder: Path) -> Any:
    model, info = type_of(folder).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


INPUTS = {
    "llama_tied": "embed_tokens", "gemma3_text": "embed_tokens", "gemma3": "embed_tokens", "qwen2": "embed_tokens",
    "gpt2": "wte", "t5": "embed_tokens", "bert_masked": "word_embeddings", "whisper": "embed_tokens",
}  # fmt: skip
HEADS = {"whisper": "proj_out", "bert_masked": "cls.predictions.decoder"}
LINEARS = {
    "gpt2": "c_attn", "t5": "q", "bert_masked": "query",
}  # fmt: skip


def targets(family: str, case: str) -> dict[str, Any]:
    embedding, head = INPUTS[family], HEADS.get(family, "lm_head")
    linear = LINEARS.get(family, "q_proj")
    return {
        "embedding": {"target_modules": [embedding, linear]},
        "head": {"target_modules": [head, linear]},
        "both": {"target_modules": [embedding, head]},
        "saved embedding": {"target_modules": [linear], "modules_to_save": [embedding]},
        "saved head": {"target_modules": [linear], "modules_to_save": [head]},
        "both saved": {"target_modules": [linear], "modules_to_save": [embedding, head]},
    }[case]


CASES = ("embedding", "head", "both", "saved embedding", "saved head", "both saved")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", INPUTS)
def test_the_merged_model_computes_what_the_adapter_model_did(family: str, case: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of(family).double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, lora_alpha=6, **targets(family, case)))
    outcome = merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert distance(base, expected) > 1e-2
    assert outcome.receipt["untied"], "nothing says that the tensor was split"
