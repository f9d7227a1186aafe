"""What must be refused: status 1, one message that says what, why and what next, and nothing written."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    FIXTURES,
    HIDDEN,
    INNER,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    UP,
    covariance,
    covariance_tensors,
    files_below,
    llama_tensors,
    lora_config,
    lora_tensors,
    random,
    read_json,
    safetensors_bytes,
    write_adapter,
    write_checkpoint,
    write_covariances,
    write_json,
    write_lora,
    write_miss,
)
from conftest import Ran, assert_no_leftovers, checked_refusal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from corda_convert import CordaConvertError, DecomposeOptions, MergeOptions, decompose, merge
from corda_convert.adapters import read_adapter
from corda_convert.checkpoint.covariances import read_covariances
from corda_convert.checkpoint.folder import read_checkpoint

Refusal = Callable[..., str]
Command = Callable[..., Ran]

FETCH_AGAIN = "Get the file again from where it came, and compare its size."
DAMAGED_TRAINING = "The training diverged, or the file is damaged."
EARLIER = "Use an earlier checkpoint of the training."
NAN = float("nan")
A_OF_UP, B_OF_UP = (f"base_model.model.{UP}.lora_{side}.weight" for side in "AB")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora")


@pytest.fixture
def covariances(tmp_path: Path) -> Path:
    return write_covariances(tmp_path / "covariances.safetensors")


@pytest.fixture(scope="module")
def own_residuals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Our decompose's output of the fixture model, by mode."""
    folder = tmp_path_factory.mktemp("residuals")
    for mode in ("kpm", "ipm"):
        options = DecomposeOptions(mode=mode, rank=8)  # type: ignore[arg-type]
        decompose(MODEL, output=folder / mode, options=options, covariances=COVARIANCES)
    return {mode: folder / mode for mode in ("kpm", "ipm")}


def with_tensor(tensors: dict[str, torch.Tensor], name: str, at: tuple[int, ...], value: float) -> dict[str, Any]:
    changed = tensors[name].clone()
    changed[at] = value
    return {**tensors, name: changed}


def decompose_arguments(model: Path, covariances: Path, *, rank: int = 4) -> tuple[object, ...]:
    return "decompose", model, "--cov", covariances, "--mode", "kpm", "--rank", rank


# Adapters of other models


def test_an_adapter_of_other_shapes_is_refused_with_both_shapes_and_the_base_that_its_config_names(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    other = write_lora(tmp_path / "other", {UP: (INNER, 32)}, base_model_name_or_path="someone/other")
    assert refusal("merge", model, "--adapter", other) == (
        f"Adapter does not fit {UP}: the weight is ({INNER}, {HIDDEN}), lora_B gives {INNER} rows and lora_A 32 columns.\n"
        'adapter_config.json names the base model "someone/other". Merge into that one.'
    )


def test_every_module_that_does_not_fit_is_listed_in_one_message(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    modules = {"model.layers.0.mlp.up_proj": (99, HIDDEN), UP: (INNER, 99), "model.layers.9.mlp.up_proj": (4, 4)}
    message = refusal("merge", model, "--adapter", write_lora(tmp_path / "other", modules))
    assert message.startswith("3 problems, nothing was written:\n\n")
    assert "1 of 3 adapted modules find no weight in model: model.layers.9.mlp.up_proj." in message
    assert (
        f"Adapter does not fit model.layers.0.mlp.up_proj: the weight is ({INNER}, {HIDDEN}), lora_B gives 99"
        in message
    )
    assert f"Adapter does not fit {UP}: the weight is ({INNER}, {HIDDEN})" in message


def test_an_adapter_of_other_names_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    other = write_lora(tmp_path / "other", {"transformer.h.0.attn.c_attn": (48, 16), "transformer.h.1.c_fc": (64, 16)})
    assert refusal("merge", model, "--adapter", other) == (
        "2 of 2 adapted modules find no weight in model: transformer.h.0.attn.c_attn, transformer.h.1.c_fc.\n"
        "The adapter was trained on another model."
    )


def test_a_miss_block_of_another_width_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    other = write_miss(tmp_path / "other", {UP: (INNER + 1, HIDDEN)})
    assert refusal("merge", model, "--adapter", other) == (
        f"Adapter does not fit {UP}: the weight is ({INNER}, {HIDDEN}), its balance block is (4, {INNER + 1})."
    )


def test_modules_to_save_of_another_shape_are_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.lm_head.weight": random(32, HIDDEN + 1)}
    adapter = write_adapter(tmp_path / "saved", tensors, lora_config(modules_to_save=["lm_head"]))
    assert refusal("merge", model, "--adapter", adapter) == (
        "saved replaces lm_head.weight (32, 16) with a tensor of shape (32, 17).\n"
        "Shapes change with the vocabulary's size alone."
    )


def test_modules_to_save_that_the_model_lacks_are_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.score.weight": random(2, HIDDEN)}
    adapter = write_adapter(tmp_path / "saved", tensors, lora_config(modules_to_save=["score"]))
    assert refusal("merge", model, "--adapter", adapter) == (
        "saved replaces score.weight, which model (LlamaForCausalLM) lacks.\n"
        "The training added it to the model, for the task CAUSAL_LM.\n"
        "Load the base with the class that was trained (such as AutoModelForSequenceClassification, with its num_labels), "
        "save it with save_pretrained, and merge into that."
    )


# Covariances


def test_all_missing_covariances_are_listed(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    tensors = covariance_tensors()
    for name in (UP, "model.layers.0.self_attn.q_proj"):
        del tensors[name]
    some = write_covariances(tmp_path / "some.safetensors", tensors)
    assert refusal(*decompose_arguments(model, some)) == (
        f"No covariance for 2 of {len(LINEARS)} modules: model.layers.0.self_attn.q_proj, {UP}.\n"
        "Collect them too, or choose the modules that have one with --target."
    )


def test_covariances_of_another_model_are_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    other = write_covariances(tmp_path / "other.pt", {"transformer.h.0.c_fc": covariance(16)})
    message = refusal(*decompose_arguments(model, other), "--target", "down_proj")
    assert message == (
        "No covariance for 2 of 2 modules: model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj.\n"
        "The covariances are of another model, or were collected for other targets.\n"
        "Collect them too, or choose the modules that have one with --target."
    )


def test_a_covariance_of_the_wrong_shape_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    wrong = write_covariances(tmp_path / "wrong.safetensors", {**covariance_tensors(), UP: covariance(INNER)})
    assert refusal(*decompose_arguments(model, wrong)) == (
        f"The covariance of {UP} is ({INNER}, {INNER}); its weight is ({INNER}, {HIDDEN}), so ({HIDDEN}, {HIDDEN}) was "
        "expected.\nThe covariances are of another model.\nCollect covariances with this model."
    )


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_covariance_that_is_not_square_is_refused(refusal: Refusal, model: Path, tmp_path: Path, suffix: str) -> None:
    wrong = write_covariances(tmp_path / f"wrong.{suffix}", {**covariance_tensors(), UP: random(HIDDEN, INNER)})
    assert refusal(*decompose_arguments(model, wrong)) == (
        f"{wrong} holds tensors that are no covariances: {UP} F32 ({HIDDEN}, {INNER}).\n"
        "A covariance is a square matrix of floating-point numbers, one for each layer input.\n"
        "Give the file that PEFT's covariance_file or corda-convert collect wrote."
    )


def test_nan_in_a_covariance_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    tensors = with_tensor(covariance_tensors(), UP, (3, 4), NAN)
    wrong = write_covariances(tmp_path / "wrong.safetensors", tensors)
    assert refusal(*decompose_arguments(model, wrong)) == (
        f"{UP} in {wrong} holds NaN or Inf.\nThe calibration ran over a float16 range, or the file is damaged."
    )


def test_a_covariance_of_zeros_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    wrong = write_covariances(tmp_path / "wrong.pt", {**covariance_tensors(), UP: torch.zeros(HIDDEN, HIDDEN)})
    assert refusal(*decompose_arguments(model, wrong)).startswith(
        f"The covariance of {UP} is zero on average: no sample reached this layer."
    )


def test_aliases_to_nowhere_are_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    metadata = {"aliases": json.dumps({UP: "model.layers.1.mlp.gone"})}
    wrong = write_covariances(tmp_path / "wrong.safetensors", metadata=metadata)
    assert refusal(*decompose_arguments(model, wrong)) == (
        f"{wrong}: aliases name covariances that are not there: {UP} → model.layers.1.mlp.gone."
    )


def test_decompose_without_covariances_says_how_to_go_on(refusal: Refusal, model: Path) -> None:
    assert refusal("decompose", model, "--mode", "kpm", "--rank", 4) == (
        "Method corda needs covariances.\n"
        "Give them with --cov FILE, or take the plain SVD of the weights with --method svd."
    )


def test_a_rank_that_is_too_large_is_refused_for_every_module_together_with_other_problems(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    tensors = {**covariance_tensors(), UP: covariance(INNER)}
    del tensors["model.layers.0.self_attn.k_proj"]
    wrong = write_covariances(tmp_path / "wrong.safetensors", tensors)
    message = refusal(*decompose_arguments(model, wrong, rank=9))
    narrow = [module for module, shape in LINEARS.items() if min(shape) < 9]
    assert len(narrow) == 4
    assert message.startswith(f"{len(narrow) + 2} problems, nothing was written:\n\n")
    for module in narrow:
        assert f"Rank 9 is above what {module} has: its weight is (8, {HIDDEN}), rank 8 at most." in message
    assert f"The covariance of {UP} is" in message
    assert "No covariance for 1 of 14 modules: model.layers.0.self_attn.k_proj." in message


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--alpha", "nan", "Alpha is nan, a positive number was expected."),
        ("--alpha", "-2", "Alpha is -2.0, a positive number was expected."),
        ("--damp", "inf", "The damping is inf, a number from 0 on was expected."),
    ],
)
def test_numbers_that_make_no_sense_are_refused(
    refusal: Refusal, model: Path, covariances: Path, option: str, value: str, message: str
) -> None:
    assert refusal(*decompose_arguments(model, covariances), option, value) == message


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "qkv_proj",
            "--target 'qkv_proj' matches no Linear layer.\n"
            "The layers end in: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
        ),
        ("(", "--target '(' is no name and no regular expression: missing ), unterminated subpattern at position 0."),
        (
            "embed_tokens",
            "--target 'embed_tokens' matches no Linear layer.\n"
            "model.embed_tokens.weight is of another kind; only Linear layers and experts are decomposed.\n"
            "The layers end in: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
        ),
    ],
)
def test_targets_that_match_nothing_are_refused(
    refusal: Refusal, model: Path, covariances: Path, target: str, message: str
) -> None:
    assert refusal(*decompose_arguments(model, covariances), "--target", target) == message


# NaN


@pytest.mark.parametrize("name", [A_OF_UP, B_OF_UP])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_nan_in_a_lora_factor_is_refused_by_name(
    refusal: Refusal, model: Path, tmp_path: Path, name: str, value: float
) -> None:
    adapter = write_adapter(tmp_path / "diverged", with_tensor(lora_tensors(), name, (1, 2), value), lora_config())
    assert refusal("merge", model, "--adapter", adapter) == (
        f"{name} in {adapter / 'adapter_model.safetensors'} holds NaN or Inf.\n{DAMAGED_TRAINING}\n{EARLIER}"
    )


@pytest.mark.parametrize("mode", ["balance", "bat", "mini"])
def test_nan_in_a_miss_block_is_refused_by_name(refusal: Refusal, tmp_path: Path, mode: str) -> None:
    model = write_checkpoint(tmp_path / "model")
    shape = {"balance": (4, INNER), "bat": (INNER // 4, 4, 4), "mini": (4, 2)}[mode]
    name = f"base_model.model.{UP}.miss_block"
    block = random(*shape)
    block.view(-1)[-1] = NAN
    config = {"peft_type": "MISS", "r": 4, "mini_r": 2, "init_weights": True if mode == "balance" else mode}
    adapter = write_adapter(tmp_path / "diverged", {name: block}, config)
    assert refusal("merge", model, "--adapter", adapter) == (
        f"{name} in {adapter / 'adapter_model.safetensors'} holds NaN or Inf.\n{DAMAGED_TRAINING}\n{EARLIER}"
    )


def test_nan_in_a_replacing_tensor_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    head = random(32, HIDDEN)
    head[31, 15] = NAN
    tensors = {**lora_tensors(), "base_model.model.lm_head.weight": head}
    adapter = write_adapter(tmp_path / "diverged", tensors, lora_config(modules_to_save=["lm_head"]))
    assert refusal("merge", model, "--adapter", adapter) == (
        f"base_model.model.lm_head.weight in {adapter / 'adapter_model.safetensors'} holds NaN or Inf.\n"
        "The training diverged."
    )


def test_nan_in_a_weight_that_is_folded_is_refused(refusal: Refusal, lora: Path, tmp_path: Path) -> None:
    tensors = with_tensor(llama_tensors(), f"{UP}.weight", (INNER - 1, 0), NAN)
    model = write_checkpoint(tmp_path / "broken", tensors)
    assert refusal("merge", model, "--adapter", lora) == (
        f"{UP}.weight in {model / 'model.safetensors'} holds NaN or Inf.\nThe model is damaged.\nGet it again."
    )


def test_nan_in_a_weight_that_is_decomposed_is_refused(refusal: Refusal, covariances: Path, tmp_path: Path) -> None:
    tensors = with_tensor(llama_tensors(), f"{UP}.weight", (0, 0), NAN)
    model = write_checkpoint(tmp_path / "broken", tensors)
    message = refusal(*decompose_arguments(model, covariances))
    assert message == f"{UP}.weight in {model / 'model.safetensors'} holds NaN or Inf."


def test_nan_in_a_weight_that_is_only_copied_is_no_business_of_ours(done: Command, tmp_path: Path) -> None:
    tensors = with_tensor(llama_tensors(), "model.norm.weight", (0,), NAN)
    model = write_checkpoint(tmp_path / "model", tensors)
    done("merge", model, "--adapter", write_lora(tmp_path / "lora", {UP: LINEARS[UP]}), "-o", tmp_path / "out")


@pytest.mark.parametrize("side", ["adapter", "init"])
def test_nan_is_refused_when_factors_are_joined(refusal: Refusal, tmp_path: Path, side: str) -> None:
    folders = {"adapter": lora_tensors(), "init": lora_tensors()}
    folders[side] = with_tensor(folders[side], B_OF_UP, (0, 0), NAN)
    adapter, init = (write_adapter(tmp_path / name, tensors, lora_config()) for name, tensors in folders.items())
    assert refusal("to-lora", adapter, "--init", init) == (
        f"{B_OF_UP} in {tmp_path / side / 'adapter_model.safetensors'} holds NaN or Inf.\n{DAMAGED_TRAINING}\n{EARLIER}"
    )


# Overflow


def test_values_outside_float16_are_refused_when_a_weight_is_folded(
    refusal: Refusal, lora: Path, tmp_path: Path
) -> None:
    tensors = with_tensor(llama_tensors(), f"{UP}.weight", (0, 0), 1e6)
    model = write_checkpoint(tmp_path / "large", tensors)
    assert refusal("merge", model, "--adapter", lora, "--dtype", "float16") == (
        f"{UP}.weight holds values outside the range of F16.\nChoose --dtype bfloat16 or float32."
    )


def test_values_outside_float16_are_refused_when_a_weight_is_cast(refusal: Refusal, tmp_path: Path) -> None:
    tensors = with_tensor(llama_tensors(), "model.norm.weight", (5,), -1e6)
    model = write_checkpoint(tmp_path / "large", tensors)
    adapter = write_lora(tmp_path / "lora", {UP: LINEARS[UP]})
    assert refusal("merge", model, "--adapter", adapter, "--dtype", "float16") == (
        "model.norm.weight holds values outside the range of F16.\nChoose --dtype bfloat16 or float32."
    )


def test_values_outside_float16_are_refused_in_a_residual(refusal: Refusal, covariances: Path, tmp_path: Path) -> None:
    tensors = with_tensor(llama_tensors(), f"{UP}.weight", (0, 0), 1e6)
    model = write_checkpoint(tmp_path / "large", tensors)
    assert refusal(*decompose_arguments(model, covariances), "--dtype", "float16") == (
        f"The residual of {UP}.weight is outside the range of torch.float16.\nChoose --dtype bfloat16 or float32."
    )


# Shards and their index


def test_a_shard_cut_in_its_header_is_refused(refusal: Refusal, model: Path, lora: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    assert refusal("merge", model, "--adapter", lora) == (
        f"{shard} is truncated: 100 bytes do not hold its header.\n"
        f"The download or copy was cut off, or this is no safetensors file.\n{FETCH_AGAIN}"
    )


def test_a_shard_cut_in_its_data_is_refused(refusal: Refusal, lora: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    shard = model / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert refusal("merge", model, "--adapter", lora) == (
        f"{shard} is truncated: its header describes {len(whole):,} bytes, the file has {len(whole) - 1:,}.\n"
        f"The download or copy was cut off.\n{FETCH_AGAIN}"
    )


def test_a_shard_with_bytes_behind_its_data_is_refused(refusal: Refusal, model: Path, lora: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes() + b"x")
    size = shard.stat().st_size
    assert refusal("merge", model, "--adapter", lora) == (
        f"{shard} is too long: its header describes {size - 1:,} bytes, the file has {size:,}.\n{FETCH_AGAIN}"
    )


def test_all_missing_shards_are_listed(refusal: Refusal, lora: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=3)
    index = model / "model.safetensors.index.json"
    counts = {}
    for number in (1, 3):
        name = f"model-{number:05}-of-00003.safetensors"
        (model / name).unlink()
        counts[name] = list(read_json(index)["weight_map"].values()).count(name)
    problems = [
        f"{index} names the shard {name} for {count} tensors, but there is no such file.\n"
        "The download or copy is incomplete.\nGet the missing shard."
        for name, count in counts.items()
    ]
    message = refusal("merge", model, "--adapter", lora)
    assert message == "\n\n".join(["2 problems, nothing was written:", *problems])


@pytest.mark.parametrize(
    "shard_name",
    [
        "../model.safetensors",
        "{outside}",
        "sub/model.safetensors",
        "sub/../../x.safetensors",
        "..\\x.safetensors",
        ".",
        "",
    ],
)
def test_an_index_that_names_a_path_is_refused(
    refusal: Refusal, model: Path, lora: Path, tmp_path: Path, shard_name: str
) -> None:
    outside = tmp_path / "x.safetensors"
    (model / "model.safetensors").rename(outside)
    (model / "sub").mkdir()
    for copy in (tmp_path / "model.safetensors", model / "sub" / "model.safetensors"):
        copy.write_bytes(outside.read_bytes())
    shard_name = shard_name.replace("{outside}", str(outside))
    index = model / "model.safetensors.index.json"
    write_json(index, {"weight_map": dict.fromkeys(llama_tensors(), shard_name)})
    assert refusal("merge", model, "--adapter", lora) == (
        f"{index} names the shard {shard_name!r}, which is no safetensors file of this folder.\n"
        "An index may only name safetensors files beside it.\n"
        "Do not trust this checkpoint before you know who wrote its index."
    )


@pytest.mark.parametrize("shard_name", ["x\0.safetensors", 300 * "x", 7, None])
def test_an_index_with_an_impossible_shard_name_is_refused(
    refusal: Refusal, model: Path, lora: Path, shard_name: object
) -> None:
    (model / "model.safetensors").rename(model / "shard.safetensors")
    write_json(model / "model.safetensors.index.json", {"weight_map": dict.fromkeys(llama_tensors(), shard_name)})
    message = refusal("merge", model, "--adapter", lora)
    assert "model.safetensors.index.json names the shard " in message


@pytest.mark.parametrize("shard_name", ["README.md", "corda_convert.json", "config.json"])
def test_an_index_may_not_take_the_name_of_another_output_file_for_a_shard(
    refusal: Refusal, model: Path, lora: Path, shard_name: str
) -> None:
    (model / "model.safetensors").rename(model / shard_name)
    if shard_name == "config.json":
        lora = write_lora(lora, {UP: LINEARS[UP]})
    write_json(model / "model.safetensors.index.json", {"weight_map": dict.fromkeys(llama_tensors(), shard_name)})
    message = refusal("merge", model, "--adapter", lora)
    if shard_name != "config.json":  # that one is already no JSON
        assert f"names the shard {shard_name!r}, which is no safetensors file of this folder." in message


def test_tensors_that_only_the_index_or_only_a_shard_has_are_both_listed(
    refusal: Refusal, lora: Path, tmp_path: Path
) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    index = model / "model.safetensors.index.json"
    content = read_json(index)
    del content["weight_map"]["model.norm.weight"]
    content["weight_map"]["model.rotary.inv_freq"] = "model-00001-of-00002.safetensors"
    write_json(index, content)
    assert refusal("merge", model, "--adapter", lora) == (
        "2 problems, nothing was written:\n\n"
        f"{index} names 1 tensors that its shards lack: model.rotary.inv_freq.\n\n"
        f"{index} does not name 1 tensors of its shards: model.norm.weight."
    )


def test_a_tensor_that_stands_in_two_shards_is_refused(refusal: Refusal, lora: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = write_checkpoint(tmp_path / "model", shards=2)
    tensors = {name: tensor for name, tensor in llama_tensors().items() if "layers.0" in name or "embed" in name}
    first = model / "model-00001-of-00002.safetensors"
    names = [n for n, f in read_json(model / "model.safetensors.index.json")["weight_map"].items() if f == first.name]
    everything = llama_tensors()
    save_file({name: everything[name] for name in [*names, "model.norm.weight"]}, first)
    assert tensors
    assert refusal("merge", model, "--adapter", lora) == f"1 tensors of {model} stand in two shards."


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"weight_map": []}', b'{"weight_map": {}}', b"{}"])
def test_an_index_that_is_none_is_refused(refusal: Refusal, model: Path, lora: Path, content: bytes) -> None:
    (model / "model.safetensors").rename(model / "shard.safetensors")
    (model / "model.safetensors.index.json").write_bytes(content)
    assert "model.safetensors.index.json" in refusal("merge", model, "--adapter", lora)


# Headers

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

BROKEN_HEADERS = {
    "duplicate keys": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],'
                       '"data_offsets":[0,8]}}', "has no valid safetensors header: a name stands twice."),
    "overlap": ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, "the bytes of b begin at 4, where 8 was expected"),
    "the same bytes": ({"a": F32, "b": F32}, "the bytes of b begin at 0, where 8 was expected"),
    "hole": ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, "tensors overlap or leave a hole."),
    "huge size": ({"a": {**F32, "shape": [2**60], "data_offsets": [0, 2**62 - 1]}}, "its offsets span"),
    "huge and consistent": ({"a": {**F32, "shape": [2**59], "data_offsets": [0, 2**61]}}, "is truncated"),
    "a size of many digits": ({"a": {**F32, "shape": [2**61] * 400}}, "its offsets span"),
    "an offset of many digits": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,' + "9" * 5000 + "]}}", "header"),
    "negative size": ({"a": {**F32, "shape": [-2]}}, "has the invalid shape [-2]."),
    "negative offset": ({"a": {**F32, "data_offsets": [-8, 0]}}, "has the invalid data_offsets [-8, 0]."),
    "backward offsets": ({"a": {**F32, "data_offsets": [8, 0]}}, "but its offsets span -8."),
    "a size that is true": ({"a": {**F32, "shape": [True, 2]}}, "has the invalid shape [True, 2]."),
    "a size that is 2.0": ({"a": {**F32, "shape": [2.0]}}, "has the invalid shape [2.0]."),
    "unknown dtype": ({"a": {**F32, "dtype": "F99"}}, "a has the unknown dtype 'F99'."),
    "a dtype that is a list": ({"a": {**F32, "dtype": ["F32"]}}, "a has the unknown dtype ['F32']."),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "a has the unknown dtype None."),
    "no object": ({"a": 7}, "the header's entry for a is not an object."),
    "half a character in a name": ('{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "header"),
    "half a character in the metadata": (
        '{"__metadata__":{"a":"\\udfff"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "header"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": F32}, "__metadata__ must map strings to strings."),
    "not JSON": (b"{'a': 1}", "has no valid safetensors header"),
    "not UTF-8": (b'{"\xff": 1}', "has no valid safetensors header"),
    "a list": ("[]", "has no valid safetensors header: it is not a JSON object."),
    "deep": ("[" * 100_000, "has no valid safetensors header"),
    "empty": (b"", "has no valid safetensors header"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN_HEADERS)
def test_a_broken_header_is_refused(refusal: Refusal, model: Path, lora: Path, kind: str) -> None:
    header, expected = BROKEN_HEADERS[kind]
    shard = model / "model.safetensors"
    shard.write_bytes(safetensors_bytes(header, bytes(8)))
    message = refusal("merge", model, "--adapter", lora)
    assert message.startswith(str(shard))
    assert expected in message


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(refusal: Refusal, model: Path, lora: Path, length: int) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(length.to_bytes(8, "little") + shard.read_bytes()[8:])
    assert "do not hold its header" in refusal("merge", model, "--adapter", lora)


# Folders of the wrong kind


def test_an_adapter_given_as_the_model_is_refused(refusal: Refusal, lora: Path) -> None:
    assert refusal("merge", lora, "--adapter", lora) == (
        f"{lora} holds an adapter, not a model.\nGive the model's folder, and this one as --adapter."
    )


def test_shards_without_their_index_are_refused(refusal: Refusal, lora: Path, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    (model / "model.safetensors.index.json").unlink()
    assert refusal("merge", model, "--adapter", lora) == (
        f"{model} has no model.safetensors.index.json and no model.safetensors, but "
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors.\n"
        "Without an index it is not known which files make up the model.\n"
        "Give the one file itself, or restore the index."
    )


def test_a_folder_without_weights_is_refused(refusal: Refusal, model: Path, lora: Path) -> None:
    (model / "model.safetensors").unlink()
    message = refusal("merge", model, "--adapter", lora)
    assert message == f"{model} holds no weights: no safetensors, and no pytorch_model.bin.\nGive a model's folder."


def test_an_adapter_without_a_config_is_refused(refusal: Refusal, model: Path, lora: Path) -> None:
    (lora / "adapter_config.json").unlink()
    assert refusal("merge", model, "--adapter", lora) == (
        f"{lora} holds no adapter_config.json, so it is no adapter of PEFT.\n"
        "Give the folder that PEFT's save_pretrained wrote."
    )


def test_an_adapter_without_weights_is_refused(refusal: Refusal, model: Path, lora: Path) -> None:
    (lora / "adapter_model.safetensors").unlink()
    assert refusal("merge", model, "--adapter", lora) == (
        f"{lora} holds neither adapter_model.safetensors nor adapter_model.bin.\nSave the adapter again."
    )


def test_an_adapter_without_tensors_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    empty = write_adapter(tmp_path / "empty", {}, lora_config())
    assert refusal("merge", model, "--adapter", empty) == (
        f"{empty / 'adapter_model.safetensors'} holds no tensors.\nSave the adapter again."
    )


@pytest.mark.parametrize("what", ["model", "adapter", "initial adapter"])
def test_a_path_that_is_not_there_is_refused(
    refusal: Refusal, model: Path, lora: Path, tmp_path: Path, what: str
) -> None:
    paths = {"model": model, "adapter": lora, "initial adapter": lora, what: tmp_path / "gone"}
    message = refusal("merge", paths["model"], "--adapter", paths["adapter"], "--init", paths["initial adapter"])
    assert message == f"No such {what}: {tmp_path / 'gone'}\nCheck the path."


# Adapters that are not understood, or contradict themselves


def test_an_unknown_peft_type_is_refused_with_the_known_ones(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "ia3", {"x.ia3_l": random(4, 1)}, {"peft_type": "IA3"})
    assert refusal("merge", model, "--adapter", adapter) == (
        f"{adapter}: adapter_config.json has peft_type 'IA3', which this version cannot fold.\n"
        "It knows LORA, MISS, BONE, TRAINABLE_TOKENS.\n"
        "Merge it with PEFT's merge_and_unload, if PEFT can merge this kind."
    )


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("use_qalora", True, "QALoRA"),
        ("layer_replication", [[0, 2]], "layer replication"),
        ("loftq_config", {"loftq_bits": 4}, "LoftQ"),
    ],
)
def test_kinds_of_lora_that_are_not_folded_are_refused_by_name(
    refusal: Refusal, model: Path, tmp_path: Path, option: str, value: object, what: str
) -> None:
    adapter = write_lora(tmp_path / "special", **{option: value})
    assert refusal("merge", model, "--adapter", adapter) == (
        f"special uses {what} ({option} in adapter_config.json), which this version does not fold.\n"
        "Merge it with PEFT's merge_and_unload for now."
    )


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_no_module_matches_is_refused(
    refusal: Refusal, model: Path, tmp_path: Path, pattern: str
) -> None:
    adapter = write_lora(tmp_path / "lora", **{pattern: {"qkv_proj": 2}})
    assert refusal("merge", model, "--adapter", adapter) == (
        "adapter_config.json: no adapted module matches the rank or alpha pattern qkv_proj.\n"
        "The patterns and the weights are not of one adapter, or a name was mistyped in training.\n"
        "Correct or remove the pattern in the config."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "adapter_config.json: r is 0, a positive integer was expected."),
        ({"r": "8"}, "adapter_config.json: r is '8', a positive integer was expected."),
        ({"lora_alpha": NAN}, "adapter_config.json: lora_alpha is nan, a number was expected."),
        ({"lora_alpha": True}, "adapter_config.json: lora_alpha is True, a number was expected."),
        ({"lora_alpha": 10**400}, None),
        ({"rank_pattern": [1]}, "adapter_config.json: rank_pattern and alpha_pattern must be objects."),
        ({"rank_pattern": {"(": 4}}, None),
        ({"modules_to_save": 7}, None),
        ({"peft_type": ["LORA"]}, None),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    refusal: Refusal, model: Path, tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    tensors = {**lora_tensors(), "base_model.model.lm_head.weight": random(32, HIDDEN)}
    adapter = write_adapter(tmp_path / "lora", tensors, lora_config(**{"modules_to_save": ["lm_head"], **changes}))
    found = refusal("merge", model, "--adapter", adapter)
    assert message is None or found == message


@pytest.mark.parametrize("content", [b"", b"[]", b'{"peft_type": ', b"\xff\xfe"])
def test_a_config_that_is_no_json_object_is_refused(refusal: Refusal, model: Path, lora: Path, content: bytes) -> None:
    (lora / "adapter_config.json").write_bytes(content)
    assert refusal("merge", model, "--adapter", lora).startswith(f"{lora / 'adapter_config.json'} is not ")


@pytest.mark.parametrize("name", [300 * "x", "a\0b", "a/" * 3000])
def test_an_impossible_base_name_in_the_config_does_no_harm(
    done: Command, model: Path, tmp_path: Path, name: str
) -> None:
    adapter = write_lora(tmp_path / "lora", base_model_name_or_path=name, corda_config={"corda_method": "kpm"})
    ran = done("merge", model, "--adapter", adapter, "--as-is", "-o", tmp_path / "out")
    assert "Traceback" not in ran.err
    adapter = write_lora(tmp_path / "lora", base_model_name_or_path=name)
    done("merge", model, "--adapter", adapter, "-o", tmp_path / "out2")


def test_a_tensor_of_an_unknown_kind_is_refused_rather_than_dropped(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    tensors = {**lora_tensors(), f"base_model.model.{UP}.lora_of_another_kind": random(INNER)}
    adapter = write_adapter(tmp_path / "lora", tensors, lora_config())
    assert refusal("merge", model, "--adapter", adapter) == (
        f"lora: 1 tensors are of no kind that this version folds: {UP}.lora_of_another_kind.\n"
        "Nothing of an adapter is dropped silently."
    )


def test_two_tensors_for_one_place_are_refused_rather_than_one_dropped(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    tensors = {**lora_tensors(), f"base_model.model.{UP}.lora_embedding_A": random(4, HIDDEN, seed=1)}
    refusal("merge", model, "--adapter", write_adapter(tmp_path / "a", tensors, lora_config()))
    tensors = {**lora_tensors(), f"base_model.model.{UP}.lora_A.default.weight": random(4, HIDDEN, seed=1)}
    refusal("merge", model, "--adapter", write_adapter(tmp_path / "b", tensors, lora_config()))
    blocks = {f"base_model.model.{UP}.{kind}_block": random(4, INNER) for kind in ("miss", "bone")}
    config = {"peft_type": "MISS", "r": 4}
    refusal("merge", model, "--adapter", write_adapter(tmp_path / "c", blocks, config))


def test_a_module_that_is_both_adapted_and_replaced_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    tensors = {**lora_tensors(), f"base_model.model.{UP}.modules_to_save.weight": random(*LINEARS[UP])}
    adapter = write_adapter(tmp_path / "a", tensors, lora_config(modules_to_save=["up_proj"]))
    refusal("merge", model, "--adapter", adapter)


@pytest.mark.parametrize(("lost", "left"), [("B", "A"), ("A", "B")])
def test_half_a_pair_of_factors_is_refused(refusal: Refusal, model: Path, tmp_path: Path, lost: str, left: str) -> None:
    tensors = lora_tensors()
    del tensors[f"base_model.model.{UP}.lora_{lost}.weight"]
    assert refusal("merge", model, "--adapter", write_adapter(tmp_path / "lora", tensors, lora_config())) == (
        f"lora: {UP} has lora_{left} but no lora_{lost}.\nThe adapter file is incomplete."
    )


def test_a_rank_in_the_config_that_contradicts_the_tensors_is_refused(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "lora", lora_tensors({UP: LINEARS[UP]}, rank=4), lora_config(8))
    assert refusal("merge", model, "--adapter", adapter) == (
        f"lora: {UP} has lora_A (4, {HIDDEN}) and lora_B ({INNER}, 4); adapter_config.json says rank 8, so (8, d_in) and "
        "(d_out, 8) were expected.\nThe config and the weights are not of one adapter."
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [({"r": 8}, "r 8"), ({"init_weights": "bat"}, "bat, which has 3 dimensions"),
     ({"init_weights": "mini", "mini_r": 3}, "r 4, mini_r 3")],
)  # fmt: skip
def test_a_block_that_contradicts_the_config_is_refused(
    refusal: Refusal, model: Path, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    adapter = write_miss(tmp_path / "miss", {UP: LINEARS[UP]}, **config)
    assert refusal("merge", model, "--adapter", adapter) == (
        f"miss: the block of {UP} is (4, {INNER}); adapter_config.json says {says}."
    )


def test_an_unknown_block_mode_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    adapter = write_miss(tmp_path / "miss", init_weights="olora")
    message = "miss: adapter_config.json has init_weights 'olora', which is no known mode."
    assert refusal("merge", model, "--adapter", adapter) == message


@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantized_weight_is_neither_folded_nor_replaced_nor_decomposed(
    refusal: Refusal, lora: Path, covariances: Path, tmp_path: Path, stored: torch.dtype
) -> None:
    names = [f"{UP}.weight", "lm_head.weight"]
    tensors = {name: t.to(stored) if name in names else t for name, t in llama_tensors().items()}
    model = write_checkpoint(tmp_path / "quantized", tensors)
    assert "Merge into the unquantized base model." in refusal("merge", model, "--adapter", lora)
    assert "the model is quantized." in refusal(*decompose_arguments(model, covariances))
    replacing = {
        **lora_tensors({"model.layers.0.mlp.up_proj": LINEARS[UP]}),
        "base_model.model.lm_head.weight": random(32, HIDDEN),
    }
    adapter = write_adapter(tmp_path / "head", replacing, lora_config(modules_to_save=["lm_head"]))
    assert "lm_head.weight" in refusal("merge", model, "--adapter", adapter)


# Residuals, their adapters and initial adapters

ADDED_TWICE = (
    "Merged as it is, the part that the residual lacks would be added twice.\n"
    "Merge into the residual, or into the base with --init (the corda_init folder, or PEFT's CorDA cache_file) or "
    "--residual (the residual's folder). If you know that it belongs on this model as it is, say --as-is."
)


def test_a_trained_residual_adapter_is_not_merged_onto_the_base(
    refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)  # so that the residual that its config names is not found
    message = refusal("merge", MODEL, "--adapter", ADAPTERS / "corda")
    assert message.startswith("corda was trained beside a residual, and model is not that residual: its ")
    assert message.endswith(ADDED_TWICE)


def test_a_residual_adapter_that_lost_all_names_is_not_merged_onto_the_base(refusal: Refusal, tmp_path: Path) -> None:
    init = RESIDUAL / "corda_init"
    adapter = tmp_path / "nameless"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes((init / "adapter_model.safetensors").read_bytes())
    write_json(adapter / "adapter_config.json", lora_config(8, lora_alpha=8))
    message = refusal("merge", MODEL, "--adapter", adapter)
    assert message.startswith(
        "nameless was trained beside a residual, and model is not that residual: its B·A repeats "
    )
    assert message.endswith(ADDED_TWICE)


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_the_untrained_initial_adapter_of_our_decompose_is_not_merged_onto_the_base(
    refusal: Refusal, own_residuals: dict[str, Path], mode: str
) -> None:
    message = refusal("merge", MODEL, "--adapter", own_residuals[mode] / "corda_init")
    assert message == (
        "corda_init was trained beside a residual, and model is not that residual: its B·A repeats 100% of model's own "
        f"weight there.\n{ADDED_TWICE}"
    )


@pytest.mark.parametrize("method", ["pissa", "PISSA_niter_4", "olora", "corda"])
def test_an_adapter_whose_config_says_residual_is_not_merged_onto_the_base(
    refusal: Refusal, model: Path, tmp_path: Path, method: str
) -> None:
    adapter = write_lora(tmp_path / "lora", init_lora_weights=method)
    assert refusal("merge", model, "--adapter", adapter) == (
        "lora was trained beside a residual, and model is not that residual: its config says "
        f"init_lora_weights={method!r}.\n{ADDED_TWICE}"
    )


def test_init_together_with_our_residual_as_the_model_is_refused(
    refusal: Refusal, own_residuals: dict[str, Path]
) -> None:
    residual = own_residuals["kpm"]
    assert refusal("merge", residual, "--adapter", residual / "corda_init", "--init", residual / "corda_init") == (
        "kpm is a residual (it has its initial adapter with it), and --init is for merging into the base.\n"
        "Leave out --init, or give the base model."
    )


def test_init_together_with_a_residual_that_has_lost_its_initial_adapter_is_refused(
    refusal: Refusal, tmp_path: Path
) -> None:
    shutil.copytree(RESIDUAL, tmp_path / "residual", ignore=shutil.ignore_patterns("corda_init"))
    init = RESIDUAL / "corda_init"
    message = refusal("merge", tmp_path / "residual", "--adapter", ADAPTERS / "corda", "--init", init)
    assert message.startswith("residual is not the model that corda_init was taken from: the initial factors make up ")
    assert message.endswith(
        "of the weight in their own column space; on the base it is 100 %.\n"
        "MODEL is the residual already, or another model.\n"
        "Give the base model, or leave out --init if MODEL is the residual. If the initial factors are no projection of "
        "the weights (LoRA-GA), say --as-is."
    )


@pytest.mark.parametrize("other", ["lora", "ipm"])
def test_the_initial_adapter_of_another_training_is_refused(
    refusal: Refusal, own_residuals: dict[str, Path], tmp_path: Path, other: str
) -> None:
    init = tmp_path / "other_init"
    init.mkdir()
    source = ADAPTERS / "lora" if other == "lora" else own_residuals[other] / "corda_init"
    (init / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    (init / "adapter_config.json").write_bytes((ADAPTERS / "corda" / "adapter_config.json").read_bytes())
    for arguments in (("merge", MODEL, "--adapter", ADAPTERS / "corda"), ("to-lora", ADAPTERS / "corda")):
        message = refusal(*arguments, "--init", init)
        assert message.startswith(
            "corda was not trained from the initial adapter other_init: the rows of lora_A point elsewhere (median cosine "
        )
        assert message.endswith(
            "The initial adapter is of another training run.\n"
            "Give the corda_init folder that this training started from."
        )


def test_an_initial_adapter_of_other_shapes_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    modules = {UP: LINEARS[UP]}
    adapter, init = write_lora(tmp_path / "a", modules, rank=4), write_lora(tmp_path / "b", modules, rank=2)
    expected = (
        f"{UP}: the adapter has lora_A (4, {HIDDEN}), lora_B ({INNER}, 4), the initial adapter "
        f"(2, {HIDDEN}), ({INNER}, 2)."
    )
    assert refusal("merge", model, "--adapter", adapter, "--init", init) == expected
    assert refusal("to-lora", adapter, "--init", init) == expected


def test_an_initial_adapter_of_another_scaling_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    modules = {UP: LINEARS[UP]}
    adapter = write_lora(tmp_path / "a", modules, lora_alpha=8)
    init = write_lora(tmp_path / "b", modules, lora_alpha=4)
    expected = (
        f"{UP}: the adapter scales by 2, the initial adapter by 1; they must agree.\n"
        "Compare r, lora_alpha, use_rslora and the patterns of both configs."
    )
    assert refusal("merge", model, "--adapter", adapter, "--init", init) == expected
    assert refusal("to-lora", adapter, "--init", init) == expected


def test_an_initial_adapter_of_other_modules_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a")
    init = write_lora(tmp_path / "b", {module: shape for module, shape in LINEARS.items() if module != UP})
    assert refusal("merge", model, "--adapter", adapter, "--init", init) == (
        f"a and the initial adapter b do not have the same modules: {UP} stand in only one of them.\n"
        "The initial adapter is of another training run.\n"
        "Give the corda_init folder that the training started from as --init."
    )


def test_init_with_a_block_adapter_is_refused(refusal: Refusal, model: Path, lora: Path, tmp_path: Path) -> None:
    miss = write_miss(tmp_path / "miss")
    assert refusal("merge", model, "--adapter", miss, "--init", lora) == (
        "--init is for LoRA adapters trained beside a residual; miss is miss.\nLeave out --init."
    )
    assert refusal("to-lora", miss, "--init", lora) == (
        "miss is a miss adapter; --init is for LoRA adapters trained beside a residual.\nLeave out --init."
    )


def test_an_adapter_converted_with_itself_is_refused(refusal: Refusal, lora: Path) -> None:
    message = "The adapter and --init are the same folder: the result would be zero."
    assert refusal("to-lora", lora, "--init", lora) == message


def test_a_plain_lora_is_not_merged_onto_a_residual_of_our_decompose(
    refusal: Refusal, own_residuals: dict[str, Path]
) -> None:
    message = refusal("merge", own_residuals["kpm"], "--adapter", ADAPTERS / "lora")
    assert message.startswith("lora was not trained from the initial adapter corda_init: ")


@pytest.mark.parametrize("adapter", ["miss_balance", "lora_modules_to_save"])
def test_an_adapter_of_other_modules_is_not_merged_onto_a_residual_of_our_decompose(
    refusal: Refusal, own_residuals: dict[str, Path], adapter: str
) -> None:
    assert refusal("merge", own_residuals["ipm"], "--adapter", ADAPTERS / adapter) == (
        f"ipm is a residual, and {adapter} was not trained beside it: it adapts other modules than corda_init.\n"
        "It was trained on the base model.\nMerge it into the base model."
    )


def test_a_residual_is_not_decomposed_again(refusal: Refusal, own_residuals: dict[str, Path]) -> None:
    assert refusal(*decompose_arguments(own_residuals["kpm"], COVARIANCES)) == (
        "kpm is a residual already: it has its initial adapter with it.\nDecompose the base model."
    )


# The output


def test_a_folder_that_is_not_empty_is_not_touched_without_overwrite(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    write_json(output / "thesis.json", "do not lose")
    before = files_below(tmp_path)
    ran = command("merge", model, "--adapter", lora, "-o", output)
    assert (ran.status, ran.out, ran.err) == (
        1,
        "",
        f"Error: The output {output} exists and is not empty.\n"
        "Choose another folder with -o, or replace it with --overwrite.\n",
    )
    assert files_below(tmp_path) == before


def test_overwrite_does_not_replace_a_folder_that_is_not_ours(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    output = tmp_path / "mine"
    write_json(output / "thesis.json", "do not lose")
    before = files_below(tmp_path)
    ran = command("merge", model, "--adapter", lora, "-o", output, "--overwrite")
    assert (ran.status, ran.out, ran.err) == (
        1,
        "",
        f"Error: The output {output} was not made by corda-convert (it holds no corda_convert.json); --overwrite leaves it "
        "alone.\nRemove it yourself, or choose another folder with -o.\n",
    )
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("place", ["inside the model", "the model", "around the model", "inside the adapter", "a link"])
def test_an_output_inside_or_around_an_input_is_refused(command: Command, tmp_path: Path, place: str) -> None:
    model = write_checkpoint(tmp_path / "around" / "model")
    lora = write_lora(tmp_path / "lora")
    (tmp_path / "link").symlink_to(model)
    outputs = {
        "inside the model": model / "merged",
        "the model": model,
        "around the model": tmp_path / "around",
        "inside the adapter": lora / "deep" / "merged",
        "a link": tmp_path / "link" / "merged",
    }
    output = outputs[place]
    before = files_below(tmp_path)
    ran = command("merge", model, "--adapter", lora, "-o", output, "--overwrite")
    source = lora if place == "inside the adapter" else model
    assert (ran.status, ran.err) == (
        1,
        f"Error: The output {output} and the input {source} lie inside one another.\n"
        "Choose another output folder with -o.\n",
    )
    assert files_below(tmp_path) == before
    assert_no_leftovers(output.parent if output.parent.exists() else tmp_path)


def test_an_output_that_is_a_file_is_refused(command: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    output = tmp_path / "file"
    output.write_text("mine")
    ran = command("merge", model, "--adapter", lora, "-o", output, "--overwrite")
    assert (ran.status, ran.err) == (1, f"Error: The output {output} is a file.\nChoose a folder with -o.\n")
    assert output.read_text() == "mine"


def test_an_output_below_a_file_is_refused(command: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ran = command("merge", model, "--adapter", lora, "-o", tmp_path / "file" / "merged")
    assert ran.status == 1
    assert ran.err.startswith("Error: ")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_parent_folder_that_cannot_be_written_is_refused(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "read-only"
    parent.mkdir(mode=0o555)
    if os.access(parent, os.W_OK):
        pytest.skip("this user may write everywhere")
    ran = command("merge", model, "--adapter", lora, "-o", parent / "merged")
    assert (ran.status, ran.err) == (
        1,
        f"Error: The folder {parent} cannot be written.\nChoose another output with -o.\n",
    )


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:abc", ""])
def test_an_unknown_device_is_refused(refusal: Refusal, model: Path, lora: Path, device: str) -> None:
    assert refusal("merge", model, "--adapter", lora, "--device", device) == (
        f"Unknown device {device!r}.\nChoose auto, cpu, cuda, cuda:N or mps."
    )


def test_a_gpu_that_is_not_there_is_refused(refusal: Refusal, model: Path, lora: Path) -> None:
    count = torch.cuda.device_count()
    assert refusal("merge", model, "--adapter", lora, "--device", "cuda:99") == (
        f"There is no device cuda:99: torch sees {count} CUDA devices.\n"
        "Use --device cpu, or install a CUDA build of torch."
    )


def test_a_memory_budget_that_is_too_small_names_the_worst_step(
    refusal: Refusal, model: Path, covariances: Path
) -> None:
    message = refusal(*decompose_arguments(model, covariances), "--max-memory", "1MB")
    found = re.fullmatch(
        r"The run needs ([\d,.]+) MB, of which [\d,.]+ MB are the program itself; --max-memory allows 1.0 MB. "
        r"The worst step is model.layers.0.mlp.gate_proj.weight.\n"
        r"Allow --max-memory (\d+)MB.",
        message,
    )
    assert found, message
    assert int(found[2]) >= float(found[1].replace(",", ""))


# Pickles


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
@pytest.mark.parametrize("place", ["adapter", "covariances"])
def test_code_in_a_pickle_does_not_run(
    refusal: Refusal, model: Path, lora: Path, tmp_path: Path, writer: str, place: str
) -> None:
    target = tmp_path / "it-ran"
    file = tmp_path / "covariances.pt" if place == "covariances" else lora / "adapter_model.bin"
    content = {"x": random(2, 2), "bomb": Bomb(target)}
    if writer == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps({"bomb": Bomb(target)}))
    if place == "adapter":
        (lora / "adapter_model.safetensors").unlink()
        message = refusal("merge", model, "--adapter", lora)
    else:
        message = refusal(*decompose_arguments(model, file))
    assert message.startswith(f"{file} is not a file of plain tensors that can be loaded safely: ")
    assert message.endswith(
        "It is truncated, of the old pickle format, or holds Python objects, which could run code.\n"
        "Save it again as a plain dict of tensors, or as safetensors."
    )
    assert not target.exists()


def test_the_bomb_of_these_tests_does_go_off_where_pickles_are_trusted(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Bomb(tmp_path / "it-ran"))).close()
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"a": 1}, {"a": [torch.zeros(1)]}, torch.zeros(3), {"m": torch.zeros(2, 2, dtype=torch.complex128)},
     {"m": torch.zeros(2, 2).to_sparse()}, {}],
)  # fmt: skip
def test_a_pickle_that_is_no_dict_of_plain_tensors_is_refused(
    refusal: Refusal, model: Path, tmp_path: Path, content: object
) -> None:
    file = tmp_path / "odd.pt"
    torch.save(content, file)
    assert str(file) in refusal(*decompose_arguments(model, file))


@pytest.mark.parametrize("content", [b"", b"\x80", b"hello", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_bytes_that_are_no_pickle_are_refused(refusal: Refusal, model: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "odd.pt"
    file.write_bytes(content)
    assert str(file) in refusal(*decompose_arguments(model, file))


# As a program, and at random


@pytest.mark.parametrize("case", ["truncated shard", "wrong adapter", "wrong path"])
def test_the_program_refuses_without_a_traceback(model: Path, lora: Path, tmp_path: Path, case: str) -> None:
    if case == "truncated shard":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-5])
    adapter = {"wrong adapter": ADAPTERS / "lora", "wrong path": tmp_path / "gone"}.get(case, lora)
    output = tmp_path / "output"
    arguments = ["merge", str(model), "--adapter", str(adapter), "-o", str(output)]
    done = subprocess.run([sys.executable, "-m", "corda_convert", *arguments], capture_output=True, text=True)
    message = checked_refusal(Ran(done.returncode, done.stdout, done.stderr), output)
    assert {"truncated shard": "is truncated", "wrong adapter": "find no weight", "wrong path": "No such"}[
        case
    ] in message


def test_a_wrong_dtype_is_wrong_usage(command: Command, model: Path, lora: Path, tmp_path: Path) -> None:
    ran = command("merge", model, "--adapter", lora, "--dtype", "float8", "-o", tmp_path / "output")
    assert (ran.status, ran.out) == (2, "")
    assert "'float8' is not one of 'float32', 'bfloat16', 'float16'" in ran.err
    assert not (tmp_path / "output").exists()


DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, 10_000), st.just(0)),
    st.tuples(st.just("flip"), st.integers(0, 10_000), st.integers(1, 255)),
)


def damaged(content: bytes, damages: list[tuple[str, int, int]]) -> bytes:
    header = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for kind, place, mask in damages:
        if kind == "cut":
            changed = changed[: place % (len(content) + 1)]
        elif changed:
            changed[place % min(header, len(changed))] ^= mask
    return bytes(changed)


@given(st.lists(DAMAGE, min_size=1, max_size=4))
@example([("flip", 0, 1)])
@example([("flip", 5, 128), ("flip", 7, 255)])
@settings(max_examples=250)
def test_a_damaged_header_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, damages: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-headers"
    model = write_checkpoint(folder / "model", {f"{UP}.weight": random(*LINEARS[UP])}, config=None)
    lora = write_lora(folder / "lora", {UP: LINEARS[UP]})
    covariances = write_covariances(folder / "covariances.safetensors", {UP: covariance(HIDDEN)}, {"tokens": "1"})
    readers: dict[Path, Callable[[], object]] = {
        model / "model.safetensors": lambda: read_checkpoint(model),
        lora / "adapter_model.safetensors": lambda: read_adapter(lora),
        covariances: lambda: read_covariances(covariances),
    }
    for file, read in readers.items():
        file.write_bytes(damaged(file.read_bytes(), damages))
        try:
            read()
        except CordaConvertError as refused:
            assert str(refused)


@given(st.lists(DAMAGE, min_size=1, max_size=3))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_adapter_is_refused_or_merged_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, damages: list[tuple[str, int, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "damaged-adapters"
    model = write_checkpoint(folder / "model", {f"{UP}.weight": random(*LINEARS[UP])}, config=None)
    lora = write_lora(folder / "lora", {UP: LINEARS[UP]})
    file = lora / "adapter_model.safetensors"
    file.write_bytes(damaged(file.read_bytes(), damages))
    outputs = [path for path in folder.iterdir() if path.name.startswith("out")]
    output = folder / f"out{len(outputs)}"
    try:
        merge(model, adapter=lora, output=output, options=MergeOptions())
        assert (output / "corda_convert.json").is_file()
    except CordaConvertError as refused:
        assert str(refused)
        assert not output.exists()
    assert_no_leftovers(folder)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4), st.integers(0, 3000))
@settings(max_examples=150)
def test_a_damaged_pickle_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], kept: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.pt"
    write_covariances(file, {UP: covariance(4)})
    content = bytearray(file.read_bytes())
    for place, mask in flips:
        content[place % len(content)] ^= mask
    file.write_bytes(content if kept == 0 else content[: len(content) - kept % 50 if kept % 3 == 0 else None])
    try:
        read_covariances(file)
    except CordaConvertError as refused:
        assert str(refused)


def test_the_fixtures_of_these_tests_are_accepted(
    done: Command, model: Path, lora: Path, covariances: Path, tmp_path: Path
) -> None:
    """Otherwise every refusal above could be for another reason."""
    done("merge", model, "--adapter", lora, "-o", tmp_path / "merged")
    done("merge", model, "--adapter", write_miss(tmp_path / "miss"), "-o", tmp_path / "blocks")
    done(*decompose_arguments(model, covariances), "-o", tmp_path / "residual")
    done("merge", tmp_path / "residual", "--adapter", tmp_path / "residual" / "corda_init", "-o", tmp_path / "back")
    assert LLAMA_CONFIG["model_type"] == "llama"
    assert FIXTURES.is_dir()
