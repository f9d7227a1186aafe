"""Silent errors that a review found: each of these once gave a wrong model, or none, without a word."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    HIDDEN,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    VOCABULARY,
    covariance_tensors,
    llama_tensors,
    lora_config,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_covariances,
    write_lora,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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


@pytest.mark.parametrize("place", ["file", "unknown architecture"])
@pytest.mark.parametrize("change", ["lora", "replacement"])
def test_an_embedding_that_may_be_tied_is_left_alone(
    refusal: Refusal, done: Command, tmp_path: Path, place: str, change: str
) -> None:
    config = LLAMA_CONFIG | {"model_type": "mystery", "architectures": ["Mystery"], "tie_word_embeddings": True}
    tensors = llama_tensors()
    head = tensors.pop("lm_head.weight")
    key = "base_model.model.model.embed_tokens"
    factors = {f"{key}.lora_embedding_A": random(4, VOCABULARY), f"{key}.lora_embedding_B": random(HIDDEN, 4)}
    saved = {f"{key}.weight": random(VOCABULARY, HIDDEN)}
    adapter = write_adapter(
        tmp_path / "adapter",
        factors if change == "lora" else saved,
        lora_config(modules_to_save=None if change == "lora" else ["embed_tokens"]),
    )
    tied = write_checkpoint(tmp_path / "tied", tensors, config=config)
    message = refusal("merge", tied / "model.safetensors" if place == "file" else tied, "--adapter", adapter)
    assert "it is not known whether the head shares this embedding" in message
    untied = write_checkpoint(tmp_path / "untied", tensors | {"lm_head.weight": head}, config=config)
    done("merge", untied, "--adapter", adapter, "-o", tmp_path / "out")
    said = write_checkpoint(tmp_path / "said", tensors, config=config | {"tie_word_embeddings": False})
    done("merge", said, "--adapter", adapter, "-o", tmp_path / "out_said")


def test_of_a_single_file_and_an_index_the_one_that_transformers_loads_is_read(done: Command, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    current = llama_tensors(seed=50)
    save_file(current, model / "model.safetensors", {"format": "pt"})
    done("merge", model, "--adapter", write_lora(tmp_path / "lora"), "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(model).state_dict()
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"], loaded["model.embed_tokens.weight"])
    assert torch.equal(loaded["model.embed_tokens.weight"], current["model.embed_tokens.weight"])
    left = read_json(tmp_path / "out" / "corda_convert.json")["not_carried_over"]
    assert left == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_more_shards_than_a_process_may_open_files(done: Command, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=len(llama_tensors()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = [os.open(model, os.O_RDONLY) for _ in range(200)]  # as a program that imports this one may have
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(others) + 21, hard))  # no lower number is free
        done("merge", model, "--adapter", write_lora(tmp_path / "lora"), "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in others:
            os.close(descriptor)


def test_a_weight_without_rows_is_folded(done: Command, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    model = write_checkpoint(tmp_path / "model", llama_tensors() | {f"{module}.weight": torch.empty(0, HIDDEN)})
    done("merge", model, "--adapter", write_lora(tmp_path / "lora", {module: (0, HIDDEN)}), "-o", tmp_path / "out")


def test_covariances_past_the_range_of_float64_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    huge = {name: tensor.double() * 1e160 for name, tensor in covariance_tensors().items()}
    covariances = write_covariances(tmp_path / "covs.safetensors", huge)
    arguments = ("--mode", "ipm", "--rank", 4, "--damp", 0.01)
    message = refusal("decompose", model, "--cov", covariances, *arguments)
    assert message.startswith("The singular vectors of model.layers.0.")


@pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_loads_the_initial_adapter_of_a_classifier(done: Command, tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    tensors["score.weight"] = random(2, HIDDEN)
    config = LLAMA_CONFIG | {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    model = write_checkpoint(tmp_path / "model", tensors, config=config)
    arguments = ("--method", "svd", "--mode", "ipm", "--rank", 4, "--target", "q_proj", "-o", tmp_path / "out")
    done("decompose", model, *arguments)
    ids = torch.arange(1, 9)[None]
    base = AutoModelForSequenceClassification.from_pretrained(model).eval()
    residual = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    together = PeftModel.from_pretrained(residual, str(tmp_path / "out"), subfolder="corda_init").eval()
    with torch.no_grad():
        assert torch.allclose(together(ids).logits, base(ids).logits, atol=1e-5)


def test_modules_to_save_match_the_end_of_a_name_as_in_peft(done: Command, tmp_path: Path) -> None:
    """PEFT's `endswith` takes `norm` for every layer norm, too."""
    norms = [name for name in llama_tensors() if name.endswith("norm.weight")]
    assert "model.layers.0.input_layernorm.weight" in norms
    saved = {f"base_model.model.{name}": random(HIDDEN, seed=place) for place, name in enumerate(norms)}
    adapter = write_adapter(tmp_path / "adapter", saved, lora_config(modules_to_save=["norm"]))
    done("merge", write_checkpoint(tmp_path / "model"), "--adapter", adapter, "-o", tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(merged[name], saved[f"base_model.model.{name}"]) for name in norms)


def test_the_weights_of_a_residual_given_as_a_file_are_a_residual(
    refusal: Refusal, done: Command, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model")
    arguments = ("--method", "svd", "--mode", "ipm", "--rank", 4, "--target", "up_proj", "-o", tmp_path / "residual")
    done("decompose", model, *arguments)
    modules = {name: shape for name, shape in LINEARS.items() if name.endswith("up_proj")}
    adapter = write_lora(tmp_path / "lora", modules)
    message = refusal("merge", tmp_path / "residual" / "model.safetensors", "--adapter", adapter)
    assert message.startswith("lora was not trained from the initial adapter corda_init: ")


def test_parents_that_a_failed_run_made_are_removed_again(command: Command, tmp_path: Path) -> None:
    (tmp_path / "new" / "own").mkdir(parents=True)
    adapter = write_lora(tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    output = tmp_path / "new" / "own" / "deep" / "er" / "out"
    ran = command("merge", write_checkpoint(tmp_path / "model"), "--adapter", adapter, "-o", output)
    assert (ran.status, "holds NaN or Inf" in ran.err) == (1, True)
    assert list((tmp_path / "new" / "own").iterdir()) == []


def test_rounding_a_converted_adapter_to_16_bits_is_said_to_cost_more_than_it_seems(
    command: Command, tmp_path: Path
) -> None:
    arguments = ("to-lora", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init", "--base", "fixtures/model")
    rounded = command(*arguments, "--dtype", "bfloat16", "-o", tmp_path / "bf16")
    assert rounded.status == 0
    assert "The factors are rounded to bfloat16" in rounded.err
    assert "rounded" not in command(*arguments, "-o", tmp_path / "own").err


def test_a_full_device_is_said_in_words(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("corda_convert.operations.transforms.FoldTransform.begin", full)
    ran = command("merge", MODEL, "--adapter", ADAPTERS / "lora", "-o", tmp_path / "out")
    assert ran.status == 1
    assert ran.err.startswith("Error: Out of memory. CUDA out of memory")
    assert "--device cpu" in ran.err
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_not_cast(refusal: Refusal, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    config = read_json(model / "config.json") | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(config))
    message = refusal("merge", model, "--adapter", write_lora(tmp_path / "lora"), "--dtype", "float32")
    assert "is said to be quantized with fp8, but none of its tensors is" in message
    arguments = ("--method", "svd", "--mode", "ipm", "--rank", 4, "--dtype", "float32")
    assert "is quantized (quantization_config in its config.json)" in refusal("decompose", model, *arguments)


def test_nan_in_a_tensor_that_to_lora_carries_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    copies = []
    for name in ("trained", "init"):
        adapter = write_lora(tmp_path / name, modules_to_save=["lm_head"])
        file = adapter / "adapter_model.safetensors"
        head = {"base_model.model.lm_head.weight": torch.full((VOCABULARY, HIDDEN), float("nan"))}
        save_file({**load_file(file), **head}, file)
        copies.append(adapter)
    message = refusal("to-lora", copies[0], "--init", copies[1])
    assert message.startswith("base_model.model.lm_head.weight in ")
    assert "holds NaN or Inf." in message


def test_a_folder_whose_initial_adapter_is_no_lora_is_refused_in_words(refusal: Refusal, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    adapter = write_lora(tmp_path / "lora")
    modules = [name.removesuffix(".lora_A.weight") for name in load_file(adapter / "adapter_model.safetensors")]
    blocks = {f"{name}.miss_block": random(4, 8) for name in modules if not name.endswith(".lora_B.weight")}
    write_adapter(model / "miss_init", blocks, {"peft_type": "MISS", "r": 4, "init_weights": True})
    assert "was not trained beside it" in refusal("merge", model, "--adapter", adapter)


def snippet_results(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a card's snippet leaves when it is run beside its folder."""
    code = (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder.parent)
    results: dict[str, Any] = {}
    exec(code, results)
    return results


def test_the_snippet_of_a_card_loads_the_head_and_asks_for_no_tokenizer_that_is_not_there(
    done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LLAMA_CONFIG | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 2, "pad_token_id": 0}
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    score = random(2, HIDDEN, seed=77)
    model = write_checkpoint(tmp_path / "model", {**tensors, "score.weight": score}, config=config)
    done("merge", model, "--adapter", write_lora(tmp_path / "lora"), "-o", tmp_path / "out")
    results = snippet_results(tmp_path / "out", monkeypatch)
    assert torch.equal(results["model"].score.weight, score)
    assert not {"tokenizer", "processor"} & results.keys()


def test_the_snippet_of_a_card_loads_the_tokenizer_that_is_there(
    done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("merge", MODEL, "--adapter", ADAPTERS / "lora", "-o", tmp_path / "out")
    results = snippet_results(tmp_path / "out", monkeypatch)
    assert results["tokenizer"]("word")["input_ids"]
    assert type(results["model"]).__name__ == read_json(MODEL / "config.json")["architectures"][0]


def test_a_tokenizer_with_tokens_beyond_a_vocabulary_that_stays_is_named(done: Command, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "lora")
    for highest, warned in ((VOCABULARY - 1, False), (VOCABULARY, True)):
        (adapter / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": highest}}}))
        ran = done(
            "merge", write_checkpoint(tmp_path / f"m{highest}"), "--adapter", adapter, "-o", tmp_path / f"o{highest}"
        )
        assert (f"its tokenizer has token {highest}, the vocabulary has {VOCABULARY} rows" in ran.err) is warned


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_head_that_the_base_lacks_is_added_to_it_as_the_refusal_says(
    refusal: Refusal, done: Command, tmp_path: Path
) -> None:
    """A classifier trained on a language model: its base is one with a head of the same shape."""
    base = write_checkpoint(tmp_path / "base", config=LLAMA_CONFIG | {"pad_token_id": 0})
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    trained = get_peft_model(model, config).eval()
    trained.save_pretrained(tmp_path / "adapter")
    message = refusal("merge", base, "--adapter", tmp_path / "adapter")
    assert "replaces score.weight, which base (LlamaForCausalLM) lacks" in message
    assert "AutoModelForSequenceClassification" in message
    headed = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    headed.save_pretrained(tmp_path / "headed")
    done("merge", tmp_path / "headed", "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, trained(tokens).logits, rtol=0, atol=1e-5)


def test_an_adapter_that_peft_saved_in_a_folder_of_its_name_is_pointed_to(refusal: Refusal, tmp_path: Path) -> None:
    model, adapter = write_checkpoint(tmp_path / "model"), write_lora(tmp_path / "training" / "law")
    message = refusal("merge", model, "--adapter", tmp_path / "training")
    assert message.endswith(f"PEFT saved one in {adapter}: give that.")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_trained_tokens_go_into_a_head_that_differs_though_the_config_ties_it(done: Command, tmp_path: Path) -> None:
    """PEFT asks the config, not the values: in training the head has the embedding's trained rows."""
    base = write_checkpoint(tmp_path / "base", config=LLAMA_CONFIG | {"tie_word_embeddings": True})
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 5], init_lora_weights=False)
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "trainable_tokens" in name:
                parameter += random(*parameter.shape, seed=9)
    trained.save_pretrained(tmp_path / "adapter")
    done("merge", base, "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor([[3, 5, 7]])
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, trained(tokens).logits, rtol=1e-5, atol=1e-4)
    head, before = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (tmp_path / "out", base))
    assert (head != before).any(dim=1).nonzero().flatten().tolist() == [3, 5]


def test_a_head_of_which_nothing_but_the_config_speaks_is_missed(done: Command, tmp_path: Path) -> None:
    """A classifier's adapter on a language model, without its head."""
    base = write_checkpoint(tmp_path / "base")
    for saved, warned in ((["classifier", "score"], True), (None, False)):
        adapter = write_lora(tmp_path / f"lora{warned}", modules_to_save=saved)
        ran = done("merge", base, "--adapter", adapter, "-o", tmp_path / f"out{warned}")
        assert ("modules_to_save classifier, score, which neither its file nor base has" in ran.err) is warned
