"""Embeddings and heads that share one tensor, and vocabularies that training resized.

The oracle is the adapter model itself, unmerged: PEFT adds both changes to the shared tensor when it merges.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import lora_config, write_adapter, write_checkpoint, write_lora
from families import DECODER, tiny
from peft import LoraConfig, PeftConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from corda_convert import MergeOptions, RunOptions, merge
from corda_convert.errors import CordaConvertError
from corda_convert.linalg.fp8 import quantize_blocks

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


def trained(base: Path, folder: Path, config: PeftConfig, *, resize: int | None = None, **saving: Any) -> torch.Tensor:
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


@pytest.mark.parametrize(
    ("options", "saving"),
    [
        ({"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, {}),
        ({"target_modules": ["lm_head"], "ensure_weight_tying": True}, {"save_embedding_layers": False}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}),
        ({"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
    ],
    ids=["LoRA", "LoRA of the head", "saved", "only saved along"],
)
def test_what_is_done_alike_to_both_is_done_once_and_stays_tied(
    options: dict[str, Any], saving: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, lora_alpha=6, **options), **saving)
    outcome = merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert tensors(output).keys() == tensors(base).keys()
    assert config_of(output) == config_of(base)
    assert "untied" not in outcome.receipt
    assert outcome.warnings == ()


def test_the_head_stands_behind_the_embedding_under_its_name_on_disk_and_the_config_says_so(tmp_path: Path) -> None:
    """Gemma 3's multimodal checkpoints name the language model otherwise than the class."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("gemma3").save_pretrained(base, max_shard_size="20KB")
    trained(base, adapter, LoraConfig(r=4, **targets("gemma3", "head")), save_embedding_layers=False)
    outcome = merge(base, adapter=adapter, output=output)
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    (head,) = index.keys() - tensors(base).keys()
    assert head == "lm_head.weight" or head == "language_model.lm_head.weight"
    (embedding,) = [name for name in index if name.endswith("embed_tokens.weight")]
    assert index[head] == index[embedding]
    entries = [entry["name"] for entry in outcome.receipt["tensors"]]
    assert entries[entries.index(embedding) + 1] == head
    assert torch.equal(tensors(output)[embedding], tensors(base)[embedding])
    config = config_of(output)
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False
    assert outcome.receipt["untied"] == [
        {
            "parameters": ["model.language_model.embed_tokens.weight", "lm_head.weight"],
            "written": [head],
            "config_changed": True,
        }
    ]
    (warning,) = outcome.warnings
    assert warning == (
        "lm_head.weight and model.language_model.embed_tokens.weight share one tensor in the base, and are not alike with "
        f'the adapter; written in addition: {head}. config.json says "tie_word_embeddings": false.'
    )


def test_a_class_that_ties_whatever_the_config_says_keeps_its_config(tmp_path: Path) -> None:
    """`tie_word_embeddings: false` tells T5 of its version 1.1, which does not scale what goes into the head."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("t5").double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("t5", "head")))
    outcome = merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert config_of(output) == config_of(base)
    assert tensors(output).keys() - tensors(base).keys() == {"lm_head.weight"}
    assert "older versions drop one of them" in outcome.warnings[0]


@pytest.mark.parametrize("case", ["embedding", "head"])
def test_a_tied_base_that_stores_both_is_read_as_transformers_reads_it(case: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").double().save_pretrained(base)
    stored = tensors(base)
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    expected = trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", case)), save_embedding_layers=False)
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert config_of(output)["tie_word_embeddings"] is False


def test_a_head_that_differs_on_disk_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    """T5 version 1.1 is stored so; its config says `tie_word_embeddings: false`, and its class ties all the same."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("t5").double().save_pretrained(base)
    stored = tensors(base)
    save_file({**stored, "lm_head.weight": stored["shared.weight"] + 1}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(config_of(base) | {"tie_word_embeddings": False}))
    options = {"target_modules": ["lm_head", "q"]}
    expected = trained(base, adapter, LoraConfig(r=4, **options), save_embedding_layers=False)
    outcome = merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert tensors(output).keys() == {*stored, "lm_head.weight"}
    assert config_of(output) == config_of(base)
    assert "untied" not in outcome.receipt


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_output_has_config_and_tensors_of_that_dtype(dtype: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "saved embedding")))
    merge(base, adapter=adapter, output=output, run=RunOptions(dtype=dtype))
    assert {str(tensor.dtype) for tensor in tensors(output).values()} == {f"torch.{dtype}"}
    config = config_of(output)
    assert (config["dtype"], config["tie_word_embeddings"]) == (dtype, False)
    assert torch.equal(
        tensors(output)["lm_head.weight"].float(),
        tensors(base)["model.embed_tokens.weight"].to(getattr(torch, dtype)).float(),
    )
    assert distance(output, expected) < 0.1


def test_side_files_of_an_untied_model_stay_as_they_are(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").save_pretrained(base)
    (base / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "head")))
    merge(base, adapter=adapter, output=output)
    for name in ("generation_config.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    changed = {key for key, value in config_of(output).items() if config_of(base).get(key) != value}
    assert changed == {"tie_word_embeddings"}


def test_the_summary_says_what_is_untied(done: Any, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama_tied").save_pretrained(base)
    trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "head")))
    ran = done("merge", base, "--adapter", adapter, "-o", tmp_path / "out")
    assert "  untied   model.embed_tokens.weight, lm_head.weight\n" in ran.out
    assert "share one tensor in the base" in ran.err


@pytest.mark.parametrize(
    ("options", "saving"),
    [
        ({"target_modules": ["q_proj"]}, {"save_embedding_layers": True}),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"save_embedding_layers": True}),
    ],
    ids=["saved along", "modules to save", "LoRA on both"],
)
@pytest.mark.parametrize(("family", "size"), [("llama", 69), ("llama_tied", 60), ("gemma3", 69)])
def test_a_resized_vocabulary_goes_into_weights_and_config(
    family: str, size: int, options: dict[str, Any], saving: dict[str, Any], tmp_path: Path
) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of(family).double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **options), resize=size, **saving)
    outcome = merge(base, adapter=adapter, output=output)
    assert expected.shape[-1] == size
    assert distance(output, expected) <= 1e-9
    assert outcome.receipt["vocabulary"] == {"before": 64, "after": size}
    config = config_of(output)
    assert config.get("text_config", config)["vocab_size"] == size
    assert any("has no tokenizer with it" in warning for warning in outcome.warnings)


@pytest.mark.parametrize("family", ["t5", "gpt2", "bert_masked", "whisper", "qwen2"])
def test_a_resized_vocabulary_of_other_families_stays_tied(family: str, tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of(family).double().save_pretrained(base)
    options = LoraConfig(r=4, target_modules=[LINEARS.get(family, "q_proj")])
    expected = trained(base, adapter, options, resize=69, save_embedding_layers=True)
    outcome = merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert outcome.receipt["vocabulary"] == {"before": 64, "after": 69}
    assert "untied" not in outcome.receipt
    assert tensors(output).keys() == tensors(base).keys()


def test_a_tied_head_with_lora_alone_brings_the_resized_embedding_along(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, target_modules=["lm_head"]), resize=69)
    outcome = merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert outcome.receipt["vocabulary"] == {"before": 64, "after": 69}
    assert config_of(output)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("module", "resized", "kept"),
    [("embed_tokens", "model.embed_tokens", "lm_head"), ("lm_head", "lm_head", "model.embed_tokens")],
)
def test_of_a_resized_model_both_embedding_and_head_are_needed(
    module: str, resized: str, kept: str, tmp_path: Path
) -> None:
    """PEFT saves of both only what LoRA is on."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama").save_pretrained(base)
    trained(base, adapter, LoraConfig(r=4, target_modules=["q_proj", module]), resize=69)
    with pytest.raises(CordaConvertError) as refused:
        merge(base, adapter=adapter, output=tmp_path / "out")
    assert str(refused.value) == (
        f"The adapter resizes the vocabulary with {resized}.weight, but not all that goes with it: "
        f"{kept}.weight is (64, 32), (69, 32) is needed.\n"
        "Training resized the model's embeddings, and the adapter holds only some of what that changed.\n"
        "Save the adapter again with save_embedding_layers=True, or merge into the resized base model."
    )


def test_the_bias_of_a_head_that_was_resized_must_come_along(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("bert_masked").save_pretrained(base)
    options = LoraConfig(r=4, target_modules=["query"])
    trained(base, adapter, options, resize=69, save_embedding_layers=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in saved.items() if "predictions" not in name}
    assert "base_model.model.bert.embeddings.word_embeddings.weight" in kept
    save_file(kept, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CordaConvertError, match=r"cls\.predictions\.bias is \(64,\), \(69,\) is needed"):
        merge(base, adapter=adapter, output=tmp_path / "out")


def test_adapters_that_resize_differently_are_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama").save_pretrained(base)
    trained(base, adapter, LoraConfig(r=4, target_modules=["q_proj"]), resize=69, save_embedding_layers=True)
    saved = load_file(adapter / "adapter_model.safetensors")
    saved["base_model.model.lm_head.weight"] = saved["base_model.model.lm_head.weight"][:66].clone()
    save_file(saved, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CordaConvertError, match=r"lm_head\.weight 64 → 66, model\.embed_tokens\.weight 64 → 69"):
        merge(base, adapter=adapter, output=tmp_path / "out")


def resized_adapter(base: Path, adapter: Path) -> None:
    trained(base, adapter, LoraConfig(r=4, target_modules=["k_proj"]), resize=69, save_embedding_layers=True)


@pytest.mark.parametrize(("highest", "warned"), [(68, False), (69, True)])
def test_a_tokenizer_that_knows_more_tokens_than_the_vocabulary_is_named(
    highest: int, warned: bool, tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama").save_pretrained(base)
    resized_adapter(base, adapter)
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": highest, "content": "<x>"}]}
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = merge(base, adapter=adapter, output=tmp_path / "out")
    assert outcome.warnings == (
        (f"adapter: its tokenizer has token {highest}, the vocabulary has 69 rows.",) if warned else ()
    )
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == tokenizer


def test_the_summary_says_the_vocabularys_sizes(done: Any, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama").save_pretrained(base)
    resized_adapter(base, adapter)
    assert "  vocab    64 → 69\n" in done("merge", base, "--adapter", adapter, "-o", tmp_path / "out", "--dry-run").out
    assert "  vocab    64 → 69\n" in done("merge", base, "--adapter", adapter, "-o", tmp_path / "out").out


def unknown(base: Path, **changes: Any) -> None:
    """Makes the base one of an architecture that transformers does not know."""
    config = config_of(base) | {"model_type": "mystery", "architectures": ["Mystery"]} | changes
    (base / "config.json").write_text(json.dumps(config))


def test_without_the_models_class_all_tensors_of_the_vocabularys_size_must_come(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama").save_pretrained(base)
    resized_adapter(base, adapter)
    unknown(base)
    outcome = merge(base, adapter=adapter, output=tmp_path / "out")
    assert config_of(tmp_path / "out")["vocab_size"] == 69
    assert outcome.receipt["vocabulary"] == {"before": 64, "after": 69}
    saved = load_file(adapter / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensors(tmp_path / "out")[name], saved[f"base_model.model.{name}"])
    del saved["base_model.model.lm_head.weight"]
    save_file(saved, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CordaConvertError, match=r"lm_head\.weight would keep 64 rows, 69 are needed"):
        merge(base, adapter=adapter, output=tmp_path / "other")


def test_what_peft_keeps_below_a_saved_embedding_goes_to_the_head(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").double().save_pretrained(base)
    options = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    expected = trained(base, adapter, options, resize=69)
    saved = load_file(adapter / "adapter_model.safetensors")
    below = saved["base_model.model.model.embed_tokens.original_module.weight"]
    del saved["base_model.model.lm_head.weight"]
    save_file(saved, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge(base, adapter=adapter, output=output)
    assert torch.equal(tensors(output)["lm_head.weight"], below)
    assert distance(output, expected) <= 1e-9


TOKENS: dict[str, tuple[str, dict[str, Any], int]] = {
    "of the embedding": ("llama_tied", {"trainable_token_indices": [1, 5, 63]}, 0),
    "of both alike": ("llama_tied", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}}, 0),
    "of both": ("llama_tied", {"trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2, 5]}}, 1),
    "of the head": ("llama_tied", {"trainable_token_indices": {"lm_head": [5, 6]}}, 1),
    "with LoRA on the head": ("llama_tied", {"target_modules": ["lm_head"], "trainable_token_indices": [5, 6]}, 1),
    "T5": ("t5", {"trainable_token_indices": [4, 5, 6], "target_modules": ["q"]}, 0),
    "T5's encoder": ("t5", {"trainable_token_indices": {"encoder.embed_tokens": [4, 5]}, "target_modules": ["q"]}, 1),
    "untied": ("llama", {"trainable_token_indices": [1, 5, 63]}, 0),
    "GPT-2": ("gpt2", {"trainable_token_indices": {"wte": [3, 4]}, "target_modules": ["c_attn"]}, 0),
}


@pytest.mark.parametrize("case", TOKENS)
def test_trainable_tokens_are_tied_as_peft_ties_them(case: str, tmp_path: Path) -> None:
    family, options, added = TOKENS[case]
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of(family).double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **{"target_modules": ["q_proj"], **options}))
    merge(base, adapter=adapter, output=output)
    assert distance(base, expected) > 1e-2
    assert distance(output, expected) <= 1e-9
    assert len(tensors(output)) - len(tensors(base)) == added


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_new_tokens_of_a_resized_vocabulary_are_merged(family: str, tmp_path: Path) -> None:
    """New tokens are added, and only they are trained: PEFT saves the resized embeddings beside their rows."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of(family).double().save_pretrained(base)
    options = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[64, 65, 66])
    expected = trained(base, adapter, options, resize=67)
    outcome = merge(base, adapter=adapter, output=output)
    assert outcome.receipt["vocabulary"] == {"before": 64, "after": 67}
    assert distance(output, expected) <= 1e-9
    assert tensors(output).keys() == tensors(base).keys()


@pytest.mark.parametrize("indices", [[1, 5], [63]])
def test_an_adapter_of_trainable_tokens_alone_stays_tied(indices: list[int], tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").double().save_pretrained(base)
    expected = trained(base, adapter, TrainableTokensConfig(token_indices=indices, target_modules=["embed_tokens"]))
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert tensors(output).keys() == tensors(base).keys()


def fused(tmp_path: Path, family: str, parameter: str) -> tuple[Path, Path, torch.Tensor]:
    """A model with fused experts, an adapter that replaces one fused parameter, and what takes its place."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = model_of(family)
    model.save_pretrained(base)
    new = torch.randn(model.get_parameter(parameter).shape, generator=torch.Generator().manual_seed(5))
    module = parameter.rpartition(".")[0]
    own = {f"{module}.{name}": tensor.detach() for name, tensor in model.get_submodule(module).named_parameters()}
    saved = {f"base_model.model.{name}": tensor for name, tensor in {**own, parameter: new}.items()}
    write_adapter(adapter, saved, lora_config(modules_to_save=[module], target_modules=[]))
    return base, adapter, new


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe"])
def test_a_replaced_stack_of_experts_goes_to_the_tensors_that_hold_it(family: str, name: str, tmp_path: Path) -> None:
    block = "block_sparse_moe" if family == "granitemoe" else "mlp"
    parameter = f"model.layers.1.{block}.experts.{name}"
    base, adapter, new = fused(tmp_path, family, parameter)
    merge(base, adapter=adapter, output=tmp_path / "out")
    before, after = (dict(load(folder).state_dict()) for folder in (base, tmp_path / "out"))
    assert torch.equal(after.pop(parameter), new)
    assert not torch.equal(before.pop(parameter), new)
    assert all(torch.equal(after[other], before[other]) for other in before)


def test_a_replaced_parameter_that_lies_transposed_on_disk_is_refused_by_name(tmp_path: Path) -> None:
    experts = "model.language_model.layers.1.mlp.experts"
    base, adapter, _ = fused(tmp_path, "qwen3_vl_moe", f"{experts}.down_proj")
    stored = {
        key: tensor.transpose(1, 2).contiguous() if ".experts." in key else tensor
        for key, tensor in tensors(base).items()
    }
    save_file(stored, base / "model.safetensors", {"format": "pt"})
    load(base)  # as the first checkpoints of this family have it
    with pytest.raises(CordaConvertError) as refused:
        merge(base, adapter=adapter, output=tmp_path / "out")
    for name in (f"{experts}.gate_up_proj", f"{experts}.down_proj"):
        assert f"adapter replaces {name}, which lies on disk in 1 tensors or transposed: {name}." in str(refused.value)


def test_two_adapters_that_make_an_embedding_differ_are_folded_into_each(tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    model_of("llama_tied").double().save_pretrained(base)
    for name, module in (("one", "embed_tokens"), ("two", "lm_head")):
        options = LoraConfig(r=4, target_modules=[module])
        trained(base, tmp_path / name, options, save_embedding_layers=False)
    model = PeftModel.from_pretrained(load(base), str(tmp_path / "one"), adapter_name="one")
    model.load_adapter(str(tmp_path / "two"), adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    expected = logits(model.double())
    merge(base, adapter=[tmp_path / "one", tmp_path / "two"], output=output)
    assert distance(output, expected) <= 1e-9


def test_float32_logits_are_those_of_the_adapter_model(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "both")))
    merge(base, adapter=adapter, output=output)
    assert float((logits(load(output).double()) - expected).abs().max()) <= 2e-6


def test_a_pickled_base_that_holds_both_names_of_one_tensor_is_untied(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = model_of("llama_tied").double()
    model.save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "both")))
    (base / "model.safetensors").unlink()
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert config_of(output)["tie_word_embeddings"] is False


def test_an_embedding_that_is_saved_under_its_own_name_lies_below_its_lora(tmp_path: Path) -> None:
    """So PEFT named it while its layers were Linear and Embedding themselves."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama").double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "both")), resize=69)
    saved = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(".base_layer.", "."): tensor for name, tensor in saved.items()}
    assert renamed.keys() != saved.keys()
    save_file(renamed, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9


def test_a_module_to_save_that_has_lora_too_is_refused(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama").save_pretrained(base)
    trained(base, adapter, LoraConfig(r=4, target_modules=["lm_head"]), save_embedding_layers=False)
    saved = load_file(adapter / "adapter_model.safetensors")
    saved["base_model.model.lm_head.weight"] = tensors(base)["lm_head.weight"]
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["lm_head"]}
    write_adapter(adapter, saved, config)
    with pytest.raises(CordaConvertError, match=r"replaces lm_head\.weight, and changes it in another way too"):
        merge(base, adapter=adapter, output=tmp_path / "out")


@pytest.mark.parametrize("key", ["lm_head.lora_B.weight", "lm_head.base_layer.weight"])
def test_nan_in_what_makes_a_tensor_of_its_own_is_refused(key: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model_of("llama_tied").save_pretrained(base)
    trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "head")), resize=69)
    saved = load_file(adapter / "adapter_model.safetensors")
    saved[f"base_model.model.{key}"][68, 0] = torch.nan
    save_file(saved, adapter / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CordaConvertError, match=rf"{re.escape(key)} in .* holds NaN or Inf"):
        merge(base, adapter=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_resized_vocabulary_is_cast_with_the_rest(tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("llama_tied").save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("llama_tied", "both")), resize=69)
    merge(base, adapter=adapter, output=output, run=RunOptions(dtype="bfloat16"))
    assert {tensor.dtype for tensor in tensors(output).values()} == {torch.bfloat16}
    config = config_of(output)
    assert (config["dtype"], config["vocab_size"], config["tie_word_embeddings"]) == ("bfloat16", 69, False)
    assert distance(output, expected) < 0.5
    assert expected.abs().max() > 5


def test_an_adapter_for_the_old_vocabulary_does_not_go_with_one_that_resizes_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model_of("llama_tied").save_pretrained(base)
    trained(base, tmp_path / "resized", LoraConfig(r=4, target_modules=["embed_tokens"]), resize=69)
    options = LoraConfig(r=4, target_modules=["lm_head"])
    trained(base, tmp_path / "old", options, save_embedding_layers=False)
    with pytest.raises(CordaConvertError) as refused:
        merge(base, adapter=[tmp_path / "resized", tmp_path / "old"], output=tmp_path / "out")
    assert str(refused.value) == (
        "lm_head: its change is for 64 rows, another adapter resizes lm_head.weight to 69.\n"
        "The adapters were trained with different vocabularies."
    )


def test_t5_with_tied_lora_computes_what_was_trained(tmp_path: Path) -> None:
    """PEFT ties its embeddings' LoRA in training, and not when it loads them: the reloaded adapter is another one."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("t5").double().save_pretrained(base)
    options = LoraConfig(r=4, target_modules=["shared", "lm_head"], ensure_weight_tying=True)
    adapted = get_peft_model(load(base), options).double()
    torch.manual_seed(1)
    for parameter in {id(p): p for p in adapted.parameters() if p.requires_grad}.values():
        parameter.data.normal_(std=0.3)
    adapted.save_pretrained(adapter)
    expected = logits(adapted)
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert tensors(output).keys() - tensors(base).keys() == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
    }


@pytest.mark.parametrize("requantize", [False, True])
def test_an_fp8_model_with_a_tied_head_is_untied(requantize: bool, tmp_path: Path) -> None:
    base, output = tmp_path / "base", tmp_path / "out"
    model_of("llama_tied").to(torch.bfloat16).save_pretrained(base)
    stored = tensors(base)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        codes, scales = quantize_blocks(stored[name].float(), (16, 16), torch.float32)
        stored |= {name: codes.contiguous(), f"{name}_scale_inv": scales}
    quantization = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    write_checkpoint(base, stored, config=config_of(base) | {"quantization_config": quantization})
    adapter = write_lora(tmp_path / "adapter", {"lm_head": (64, 32)}, rank=4)
    merge(base, adapter=adapter, output=output, options=MergeOptions(requantize=requantize))
    written, factors = tensors(output), load_file(adapter / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.lm_head.lora_{side}.weight"].double() for side in "AB")
    embedding = stored["model.embed_tokens.weight"]
    assert torch.equal(written["model.embed_tokens.weight"], embedding)
    assert torch.equal(written["lm_head.weight"], (embedding.double() + 2 * B @ A).to(torch.bfloat16))
    config = config_of(output)
    assert config["tie_word_embeddings"] is False
    assert ("quantization_config" in config) == requantize
    assert (written["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn) == requantize


def test_what_is_tied_inside_a_module_that_is_saved_whole_stays_so(tmp_path: Path) -> None:
    """BERT's head has its bias twice, under two names of one tensor; its decoder is the embedding."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("bert_masked").double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, target_modules=["query"], modules_to_save=["cls"]))
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert "cls.predictions.decoder.weight" in tensors(output)


def test_a_tied_head_is_found_by_its_older_name(tmp_path: Path) -> None:
    """Adapters that were trained with transformers 4 name Gemma 3's modules as its checkpoints do."""
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model_of("gemma3").double().save_pretrained(base)
    expected = trained(base, adapter, LoraConfig(r=4, **targets("gemma3", "both")), save_embedding_layers=False)
    saved = load_file(adapter / "adapter_model.safetensors")
    older = {
        name.replace("model.language_model.", "language_model.model.").replace(
            "model.lm_head", "model.language_model.lm_head"
        ): t
        for name, t in saved.items()
    }
    assert {name.split(".")[2] for name in older} == {"language_model"}
    save_file(older, adapter / "adapter_model.safetensors", {"format": "pt"})
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9


def test_an_adapter_that_was_trained_untied_keeps_both_of_its_weights(tmp_path: Path) -> None:
    base, untied, adapter, output = (tmp_path / name for name in ("base", "untied", "adapter", "out"))
    model_of("llama_tied").double().save_pretrained(base)
    stored = tensors(base)
    head = stored["model.embed_tokens.weight"] + 0.5
    config = config_of(base) | {"tie_word_embeddings": False}
    write_checkpoint(untied, stored | {"lm_head.weight": head}, config=config)
    expected = trained(untied, adapter, LoraConfig(r=4, **targets("llama_tied", "both")))
    merge(base, adapter=adapter, output=output)
    assert distance(output, expected) <= 1e-9
    assert config_of(output)["tie_word_embeddings"] is False


def test_two_adapters_that_bring_different_weights_for_one_tensor_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model_of("llama_tied").save_pretrained(base)
    for name, module in (("one", "embed_tokens"), ("two", "lm_head")):
        trained(base, tmp_path / name, LoraConfig(r=4, target_modules=[module]))
    both = [tmp_path / "one", tmp_path / "two"]
    merge(base, adapter=both, output=tmp_path / "out")
    saved = load_file(tmp_path / "two" / "adapter_model.safetensors")
    saved["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(saved, tmp_path / "two" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CordaConvertError, match=r"with other values than an adapter before it"):
        merge(base, adapter=both, output=tmp_path / "other")
