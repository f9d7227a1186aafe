"""Perplexity: against transformers' own loss on the whole model, PEFT's adapter models, and the usual sliding window."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from building import FIXTURES, MODEL, RESIDUAL
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from corda_convert.corpus import CorpusOptions
from corda_convert.corpus.windows import sliding_windows
from corda_convert.operations.perplexity import Perplexity, PerplexityOptions, perplexity

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

ENGLISH = FIXTURES / "data" / "english.eval.txt"
TASK = FIXTURES / "data" / "task.eval.jsonl"
TEMPLATE = "Question: {question} Answer: {answer}"
ADAPTERS = FIXTURES / "adapters"
FLOAT32 = PerplexityOptions(dtype="float32", device="cpu")


def task_records() -> list[str]:
    records = map(json.loads, TASK.read_text(encoding="utf-8").splitlines())
    return [TEMPLATE.format(**record) for record in records]


@torch.no_grad()
def sliding_loss(model: Any, ids: Sequence[int], window: int, stride: int) -> tuple[float, int]:
    """The customary loop: labels of what was scored before are masked, and the model computes its own loss."""
    total, count, done = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        inputs = torch.tensor([ids[begin:end]])
        labels = inputs.clone()
        labels[:, : -(end - done)] = -100
        scored = int((labels[:, 1:] != -100).sum())
        if scored:
            total += float(model(input_ids=inputs, labels=labels).loss) * scored
            count += scored
        done = end
        if end == len(ids):
            break
    return total, count


def check(found: Perplexity, total: float, count: int, *, tolerance: float = 1e-6) -> None:
    assert found.losses.tokens == found.facts["tokens"] == count
    assert found.facts["loss"] == pytest.approx(total / count, rel=tolerance)
    assert found.value == found.facts["perplexity"] == math.exp(found.facts["loss"])


def whole(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("window", "stride"), [(256, 256), (100, 100), (128, 32), (64, 1000)])
def test_the_loss_of_a_stream_is_that_of_transformers_in_sliding_windows(window: int, stride: int) -> None:
    stride = min(stride, window)
    ids = AutoTokenizer.from_pretrained(MODEL)(ENGLISH.read_text(encoding="utf-8"), verbose=False)["input_ids"][:1500]
    options = replace(FLOAT32, window=window, stride=stride, max_tokens=1500)
    found = perplexity(MODEL, CorpusOptions((ENGLISH,)), options)
    check(found, *sliding_loss(whole(MODEL), ids, window, stride))
    assert (found.facts["window"], found.facts["stride"], found.facts["text_tokens"]) == (window, stride, 7063)


def test_without_options_a_window_is_as_long_as_the_models_positions_and_none_overlap() -> None:
    ids = AutoTokenizer.from_pretrained(MODEL)(ENGLISH.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    found = perplexity(MODEL, CorpusOptions((ENGLISH,)), FLOAT32)
    check(found, *sliding_loss(whole(MODEL), ids, 256, 256))
    assert (found.facts["window"], found.facts["windows"], found.warnings) == (256, 28, ())


def losses_apart(model: Any, texts: Iterable[str]) -> tuple[float, int]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    sums = [sliding_loss(model, tokenizer(text)["input_ids"], 256, 256) for text in texts]
    return sum(total for total, _ in sums), sum(count for _, count in sums)


@pytest.mark.parametrize("name", ["lora", "lora_patterns", "lora_modules_to_save", "miss_balance", "miss_bat"])
def test_an_adapter_gives_the_loss_of_pefts_adapter_model(name: str) -> None:
    found = perplexity(
        MODEL, CorpusOptions((TASK,), (TEMPLATE,), pack=False), replace(FLOAT32, adapters=[ADAPTERS / name])
    )
    model = PeftModel.from_pretrained(whole(MODEL), ADAPTERS / name).eval()
    check(found, *losses_apart(model, task_records()), tolerance=2e-5)
    assert [adapter["name"] for adapter in found.facts["adapters"]] == [name]


def test_a_residual_adapter_is_measured_on_its_residual_and_with_its_beginning_on_the_base() -> None:
    corpus = CorpusOptions((TASK,), (TEMPLATE,), pack=False)
    trained = replace(FLOAT32, adapters=[ADAPTERS / "corda"])
    expected = losses_apart(PeftModel.from_pretrained(whole(RESIDUAL), ADAPTERS / "corda").eval(), task_records())
    check(perplexity(RESIDUAL, corpus, trained), *expected, tolerance=2e-5)
    on_base = perplexity(MODEL, corpus, replace(trained, init=[RESIDUAL / "corda_init"]))
    assert on_base.facts["loss"] == pytest.approx(expected[0] / expected[1], rel=2e-3)  # the residual was rounded


def test_the_computation_in_bfloat16_is_that_of_transformers(tmp_path: Path) -> None:
    ids = AutoTokenizer.from_pretrained(MODEL)(ENGLISH.read_text(encoding="utf-8"), verbose=False)["input_ids"][:600]
    found = perplexity(
        MODEL, CorpusOptions((ENGLISH,)), PerplexityOptions(device="cpu", max_tokens=600, batch_tokens=256)
    )
    check(found, *sliding_loss(whole(MODEL, torch.bfloat16), ids, 256, 256), tolerance=1e-3)
    assert found.facts["dtype"] == "bfloat16"
    offloaded = replace(FLOAT32, offload=tmp_path / "states", max_tokens=600)
    in_memory = perplexity(MODEL, CorpusOptions((ENGLISH,)), replace(FLOAT32, max_tokens=600))
    assert perplexity(MODEL, CorpusOptions((ENGLISH,)), offloaded).losses == in_memory.losses
    assert list((tmp_path / "states").iterdir()) == []


TINY: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_positions=64, n_embd=32, n_layer=2, n_head=2)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            max_position_embeddings=64,
        )
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    ),
}


@pytest.mark.parametrize("family", TINY)
def test_other_families_have_transformers_loss_too(family: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = save(TINY[family](), tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(MODEL)(ENGLISH.read_text(encoding="utf-8"), verbose=False)["input_ids"][:300]
    found = perplexity(folder, CorpusOptions((ENGLISH,)), replace(FLOAT32, stride=40, max_tokens=300))
    check(found, *sliding_loss(whole(folder), ids, 64, 40))


def test_the_whole_model_at_once_gives_the_same_loss(done: Callable[..., Ran]) -> None:
    arguments = ("perplexity", MODEL, "--data", ENGLISH, "--dtype", "float32", "--max-tokens", 700, "--device", "cpu")
    by_block, at_once = (json.loads(done(*arguments, "--json", *extra).out) for extra in ((), ("--whole-model",)))
    assert at_once["loss"] == pytest.approx(by_block["loss"], rel=1e-7)


def test_the_command_prints_a_summary_or_one_object(done: Callable[..., Ran]) -> None:
    arguments = (
        "perplexity",
        MODEL,
        "--data",
        ENGLISH,
        "--dtype",
        "float32",
        "--max-tokens",
        400,
        "--device",
        "cpu",
        "-q",
    )
    summary = done(*arguments, "--adapter", ADAPTERS / "lora").out
    assert summary.startswith("perplexity ")
    assert "model + lora, float32 on cpu" in summary
    assert "english.eval.txt: 398 tokens scored in 2 windows of up to 256 tokens" in summary
    facts = json.loads(done(*arguments, "--json", "--window", 4000).out)
    assert facts["format"] == "corda_convert.perplexity"
    assert facts["perplexity"] == math.exp(facts["loss"])
    assert (facts["window"], facts["truncation"]) == (256, None)
    assert "Windows are 256 tokens long, not 4000" in done(*arguments, "--json", "--window", 4000).err


def test_what_a_truncated_model_lacks_is_read_from_its_receipt(done: Callable[..., Ran], tmp_path: Path) -> None:
    out = tmp_path / "truncated"
    done("decompose", MODEL, "--method", "svd", "--truncate", 8, "-q", "-o", out)
    facts = json.loads(done("perplexity", out, "--data", ENGLISH, "--max-tokens", 100, "--json").out)
    assert facts["truncation"] == {"method": "svd", "discarded": 8}


@given(
    st.integers(0, 60).map(lambda length: list(range(length))),
    st.integers(2, 20).flatmap(lambda window: st.tuples(st.just(window), st.integers(1, window))),
)
def test_every_token_is_scored_once_but_for_the_first_of_what_nothing_overlaps(
    stream: list[int], form: tuple[int, int]
) -> None:
    window, stride = form
    windows = sliding_windows(stream, window, stride)
    scored = [token for each in windows for token in each.token_ids[len(each.token_ids) - each.scored :]]
    expected = [token for token in stream if token and (stride < window or token % window)]
    assert scored == expected
    assert all(0 < each.scored < len(each.token_ids) <= window for each in windows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Neither a file nor a preset is given as text"),
        (("--data", "none.txt"), "There is no file of text none.txt"),
        (("--data", ENGLISH, "--window", 8, "--stride", 9), "--stride 9 leaves out tokens between windows of 8"),
        (("--data", ENGLISH, "--window", 512, "--stride", 257), "The model has no more than 256 positions"),
        (("--data", ENGLISH, "--init", RESIDUAL), "--init goes with --adapter"),
        (("--data", ENGLISH, "--adapter", ADAPTERS / "corda"), "corda"),
        (
            ("--data", ENGLISH, "--max-tokens", 1),
            "7063 tokens, of which --max-tokens 1 are measured: there is none with",
        ),
        (("--data", TASK), "has no field text. It has: question, answer"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    arguments: tuple[Any, ...], message: str, command: Callable[..., Ran]
) -> None:
    ran = command("perplexity", MODEL, *arguments)
    assert (ran.status, ran.out) == (1, "")
    assert message in ran.err
    assert "Traceback" not in ran.err


def test_models_without_perplexity_tokenizer_or_blocks_are_refused(command: Callable[..., Ran], tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    masked = save(BertForMaskedLM(BertConfig(vocab_size=2048, **tiny)), tmp_path / "bert")
    assert "BertForMaskedLM does not predict the next token" in command("perplexity", masked, "--data", ENGLISH).err
    bare = tmp_path / "bare"
    TINY["gpt2"]().save_pretrained(bare)
    assert f"{bare} has no tokenizer that can be read" in command("perplexity", bare, "--data", ENGLISH).err


def test_numbers_out_of_range_are_named(command: Callable[..., Ran], tmp_path: Path) -> None:
    model = TINY["gpt2"]()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(math.inf)
    folder = save(model, tmp_path / "broken")
    ran = command("perplexity", folder, "--data", ENGLISH, "--max-tokens", 60)
    assert ran.status == 1
    assert "The loss of window 0 is NaN or Inf" in ran.err


def test_an_adapter_that_unties_the_head_is_to_be_merged_first(command: Callable[..., Ran], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    folder = save(TINY["gpt2"](), tmp_path / "model")
    adapted = get_peft_model(whole(folder), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ran = command("perplexity", folder, "--data", ENGLISH, "--adapter", tmp_path / "adapter")
    assert ran.status == 1
    assert "Merge it first" in ran.err


def test_a_tokenizer_with_more_words_than_the_model_is_refused(command: Callable[..., Ran], tmp_path: Path) -> None:
    folder = save(
        GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=64, n_embd=16, n_layer=1, n_head=2)), tmp_path / "model"
    )
    for arguments in (("perplexity", folder), ("collect", folder, "-o", tmp_path / "covs.safetensors")):
        ran = command(*arguments, "--data", ENGLISH)
        assert (ran.status, ran.out) == (1, "")
        assert "and the model's vocabulary ends at 299" in ran.err
    assert not (tmp_path / "covs.safetensors").exists()


def test_text_is_read_before_adapters_are_compared(command: Callable[..., Ran], tmp_path: Path) -> None:
    ran = command("perplexity", MODEL, "--adapter", ADAPTERS / "corda", "--data", TASK, "--field", "nothing")
    assert "has no field nothing" in ran.err
