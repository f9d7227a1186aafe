"""Every way to give the factors that a training began with: a folder, PEFT's cache, the residual, or the base alone."""

from __future__ import annotations

import shutil
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
    UP,
    llama_tensors,
    lora_config,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_json,
    write_lora,
)
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from corda_convert import DecomposeOptions, MergeOptions, RunOptions, decompose, merge, to_lora
from corda_convert.adapters import read_adapter
from corda_convert.adapters.cache import read_cache
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.tensors import read_rows, read_tensor
from corda_convert.linalg import initial as algebra
from corda_convert.operations.shares import difference_cosines

Refusal = Callable[..., str]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_COVARIANCES = MODEL.parent / "covariances" / "knowledge.peft.pt"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:.*path_initial_model_for_weight_conversion"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
    pytest.mark.filterwarnings("ignore:`init_lora_weights='corda'` does not allow"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT on GPT-2
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def differing(folder: Path, expected: dict[str, torch.Tensor]) -> list[str]:
    actual = weights(folder)
    assert actual.keys() <= expected.keys()
    return [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]


def train(model: PeftModel, amount: float = 0.02) -> None:
    """Moves every factor a little, as a training would."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += amount * parameter.std() * torch.randn(parameter.shape, generator=generator)


def save_base(folder: Path, dtype: torch.dtype) -> Path:
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).save_pretrained(folder)
    return folder


def trained_by_peft(base: Path, dtype: torch.dtype, adapter: Path, **config: Any) -> Path:
    """An adapter that PEFT initialized on the base, moved and saved as it is, without its initial factors."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    peft = get_peft_model(model, LoraConfig(r=6, lora_alpha=9, task_type="CAUSAL_LM", **config))
    train(peft)
    peft.save_pretrained(adapter)
    return adapter


def reloaded_and_merged(base: Path, dtype: torch.dtype, adapter: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return dict(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict())


# PiSSA and OLoRA from the base alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_unconverted_adapter_on_the_base_has_the_bits_of_peft(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", dtype)
    adapter = trained_by_peft(base, dtype, tmp_path / "adapter", init_lora_weights=method, target_modules=TARGETS)
    outcome = merge(base, adapter=adapter, output=tmp_path / "out")
    assert differing(tmp_path / "out", reloaded_and_merged(base, dtype, adapter)) == []
    assert outcome.warnings[-1].startswith(
        f"The initial {method} factors of adapter were made again from base in 42 mod"
    )
    entry = next(each for each in outcome.receipt["tensors"] if "up_proj" in each["name"])
    assert entry["reproduced"] == [{"method": method, "rank": 6}]
    before, after = weights(base)[entry["name"]].double(), weights(tmp_path / "out")[entry["name"]].double()
    assert entry["weight_norm"] == pytest.approx(float(before.norm()), rel=1e-5)
    assert entry["delta_norm"] == pytest.approx(float((after - before).norm()), rel=0.05)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"rank_pattern": {"up_proj": 3}}, {"use_dora": True}], ids=str
)
def test_pissa_with_other_options_has_the_bits_of_peft(options: dict[str, Any], tmp_path: Path) -> None:
    dtype = torch.bfloat16
    base = save_base(tmp_path / "base", dtype)
    config = {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj"], **options}
    adapter = trained_by_peft(base, dtype, tmp_path / "adapter", **config)
    merge(base, adapter=adapter, output=tmp_path / "out")
    assert differing(tmp_path / "out", reloaded_and_merged(base, dtype, adapter)) == []


def test_pissa_on_conv1d_and_a_plain_embedding_has_the_bits_of_peft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=32, tie_word_embeddings=False)
    base = tmp_path / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    adapter = trained_by_peft(
        base, torch.float32, tmp_path / "adapter",
        init_lora_weights="pissa", target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True,
    )  # fmt: skip
    merge(base, adapter=adapter, output=tmp_path / "out")
    expected = reloaded_and_merged(base, torch.float32, adapter)
    expected = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()} | expected
    assert differing(tmp_path / "out", expected) == []


def test_half_of_a_pissa_adapter_is_half_way_from_the_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    adapter = trained_by_peft(
        base, torch.float32, tmp_path / "adapter", init_lora_weights="pissa", target_modules=TARGETS
    )
    merge(base, adapter=adapter, output=tmp_path / "out", options=MergeOptions(scales=(0.5,)))
    before, after = weights(base), reloaded_and_merged(base, torch.float32, adapter)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, (before[name] + after[name]) / 2, rtol=0, atol=3e-7)


def test_two_pissa_adapters_are_added_to_one_base_in_any_order(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    adapters = [
        trained_by_peft(base, torch.float32, tmp_path / method, init_lora_weights=method, target_modules=["up_proj"])
        for method in ("pissa", "olora")
    ]
    merge(base, adapter=adapters, output=tmp_path / "out")
    merge(base, adapter=adapters[::-1], output=tmp_path / "reversed")
    before = weights(base)
    alone = [reloaded_and_merged(base, torch.float32, adapter) for adapter in adapters]
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, alone[0][name] + alone[1][name] - before[name], rtol=0, atol=1e-6)
    assert differing(tmp_path / "reversed", weights(tmp_path / "out")) == []


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_factors_that_are_made_again_are_those_of_a_float64_decomposition(shape: tuple[int, int]) -> None:
    weight = random(*shape).double()
    A, B = algebra.pissa(weight, 4, 1.5)
    U, S, Vh = torch.linalg.svd(weight)
    torch.testing.assert_close(1.5 * B @ A, U[:, :4] * S[:4] @ Vh[:4])
    torch.testing.assert_close(torch.linalg.vector_norm(B, dim=0), torch.linalg.vector_norm(A, dim=1))
    A, B = algebra.olora(weight, 4)
    torch.testing.assert_close(B.T @ weight, A)
    torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=torch.float64))


def test_memory_for_making_factors_again_is_planned(tmp_path: Path) -> None:
    """The weight, its residual, a delta, and what LAPACK takes: more than a merge that goes by rows."""
    base = save_base(tmp_path / "base", torch.float32)
    config = {"init_lora_weights": "pissa", "target_modules": ["up_proj"]}
    adapter = trained_by_peft(base, torch.float32, tmp_path / "adapter", **config)
    outcome = merge(base, adapter=adapter, output=tmp_path / "out", run=RunOptions(dry_run=True))
    d_out, d_in = weights(base)["model.layers.0.mlp.up_proj.weight"].shape
    assert outcome.plan.workspace_bytes > 4 * 8 * d_out * d_in
    assert outcome.plan.workers == 1


def test_olora_on_conv1d_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, vocab_size=32, tie_word_embeddings=False)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    weight = load_file(tmp_path / "base" / "model.safetensors")["transformer.h.0.attn.c_proj.weight"]
    Q, R = torch.linalg.qr(weight.T)
    tensors = {
        "base_model.model.transformer.h.0.attn.c_proj.lora_A.weight": R[:4].contiguous(),
        "base_model.model.transformer.h.0.attn.c_proj.lora_B.weight": Q[:, :4].contiguous(),
    }
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "init_lora_weights": "olora"}
    write_json(tmp_path / "adapter" / "adapter_config.json", config)
    assert refusal("merge", tmp_path / "base", "--adapter", tmp_path / "adapter") == (
        "transformer.h.0.attn.c_proj: its initial olora factors cannot be made again: PEFT decomposes the transposed "
        "weight of Conv1D there.\n"
        "Give the initial adapter of the training with --init, or the residual with --residual."
    )


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_factors_of_a_weight_that_peft_makes_none_from_are_asked_for(
    refusal: Refusal, method: str, tmp_path: Path
) -> None:
    module = "model.layers.0.mlp.up_proj"
    weight = random(*LINEARS[module])
    A, B = algebra.pissa(weight, 4, 2.0) if method == "pissa" else algebra.olora(weight, 4)
    tensors = {f"base_model.model.{module}.lora_A.weight": A.contiguous(),
               f"base_model.model.{module}.lora_B.weight": B.contiguous()}  # fmt: skip
    adapter = write_adapter(tmp_path / "adapter", tensors, lora_config(init_lora_weights=method))
    plain = llama_tensors() | {f"{module}.weight": weight.double()}
    model = write_checkpoint(tmp_path / "model", plain)
    asked = "Give the initial adapter of the training with --init, or the residual with --residual."
    assert refusal("merge", model, "--adapter", adapter) == (
        f"{module}: its initial {method} factors cannot be made again: PEFT makes none from float64 weights.\n{asked}"
    )
    scale = torch.ones(1, 1)
    quantized = plain | {
        f"{module}.weight": weight.to(torch.float8_e4m3fn), f"{module}.weight_scale_inv": scale
    }  # fmt: skip
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    model = write_checkpoint(tmp_path / "fp8", quantized, config=LLAMA_CONFIG | {"quantization_config": config})
    for options in ((), ("--requantize",)):
        assert refusal("merge", model, "--adapter", adapter, *options) == (
            f"{module}: its initial {method} factors cannot be made again: PEFT makes none from fp8 weights.\n{asked}"
        )


def test_initial_factors_of_parameters_are_taken_out(tmp_path: Path) -> None:
    modules = {name: LINEARS[name] for name in (UP, UP.replace("up_proj", "gate_proj"))}
    config = {"target_modules": ["up_proj"], "target_parameters": ["gate_proj.weight"], "peft_version": "0.21.2"}
    adapter = write_lora(tmp_path / "adapter", modules, **config)
    model = write_checkpoint(tmp_path / "model")
    merge(model, adapter=adapter, output=tmp_path / "out", options=MergeOptions(init=adapter, as_is=True))
    base, merged = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert all(torch.equal(merged[name], tensor) for name, tensor in base.items())
    merge(model, adapter=adapter, output=tmp_path / "plain", options=MergeOptions(as_is=True))
    added = load_file(tmp_path / "plain" / "model.safetensors")
    assert {name for name, tensor in base.items() if not torch.equal(added[name], tensor)} == {
        f"{name}.weight" for name in modules
    }


@pytest.mark.parametrize("method", ["pissa_niter_4", "corda", "lora_ga"])
def test_factors_that_do_not_follow_from_the_base_are_asked_for(refusal: Refusal, method: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    config = {"init_lora_weights": "pissa", "target_modules": ["up_proj"]}
    adapter = trained_by_peft(base, torch.float32, tmp_path / "adapter", **config)
    write_json(
        adapter / "adapter_config.json", read_json(adapter / "adapter_config.json") | {"init_lora_weights": method}
    )
    message = refusal("merge", base, "--adapter", adapter)
    assert message.startswith("adapter was trained beside a residual, and base is not that residual: ")
    assert (
        "Merge into the residual, or into the base with --init (the corda_init folder, or PEFT's CorDA cache_file) or "
        "--residual (the residual's folder)."
    ) in message


def test_pissa_on_a_model_that_it_was_not_taken_from_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", torch.float32)
    config = {"init_lora_weights": "pissa", "target_modules": ["up_proj"]}
    adapter = trained_by_peft(base, torch.float32, tmp_path / "adapter", **config)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    changed = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    message = refusal("merge", other, "--adapter", adapter)
    assert "its config says init_lora_weights='pissa'" in message


# PEFT's CorDA cache file


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CorDA training by PEFT in float32 with `cache_file`: base, cache.pt, init (before), adapter (after), merged."""
    folder = tmp_path_factory.mktemp("cached")
    base = save_base(folder / "base", torch.float32)
    corda = CordaConfig(
        corda_method="ipm", covariance_file=str(PEFT_COVARIANCES), cache_file=str(folder / "cache" / "cache.pt")
    )
    (folder / "cache").mkdir()
    config = LoraConfig(
        r=6, lora_alpha=9, init_lora_weights="corda", corda_config=corda, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    for _ in range(2):  # the first run writes the cache, the second reads it
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        preprocess_corda(model, config)
    peft = get_peft_model(model, config)
    peft.save_pretrained(folder / "init")
    train(peft)
    peft.save_pretrained(folder / "adapter")
    torch.save(dict(peft.merge_and_unload().state_dict()), folder / "merged.pt")
    return folder


def test_the_cache_gives_the_bits_of_the_initial_factors_of_peft(cached: Path) -> None:
    initial = read_cache(cached / "cache" / "cache.pt", read_adapter(cached / "adapter"))
    expected = load_file(cached / "init" / "adapter_model.safetensors")
    assert {f"base_model.model.{name}" for name in initial.source.tensors} == set(expected)
    for name, ref in initial.source.tensors.items():
        tensor = expected[f"base_model.model.{name}"]
        assert torch.equal(read_tensor(ref), tensor)
        assert torch.equal(read_rows(ref, 2, 5), tensor[2:5])


def test_a_merge_with_the_cache_is_the_merge_with_the_initial_adapter_and_near_that_of_peft(
    cached: Path, tmp_path: Path
) -> None:
    base, adapter = cached / "base", cached / "adapter"
    cache = cached / "cache" / "cache.pt"
    outcome = merge(base, adapter=adapter, output=tmp_path / "cache", options=MergeOptions(init=cache))
    merge(base, adapter=adapter, output=tmp_path / "init", options=MergeOptions(init=cached / "init"))
    assert differing(tmp_path / "cache", weights(tmp_path / "init")) == []
    expected = torch.load(cached / "merged.pt", weights_only=True)
    for name, tensor in weights(tmp_path / "cache").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    assert any(not torch.equal(tensor, weights(base)[name]) for name, tensor in weights(tmp_path / "cache").items())
    (used,) = [source for source in outcome.receipt["inputs"] if source["role"] == "init"]
    assert [file["name"] for file in used["files"]] == ["cache.pt"]
    assert outcome.receipt["options"]["init"] == ["cache.pt"]


def test_without_the_cache_such_an_adapter_is_refused(refusal: Refusal, cached: Path) -> None:
    assert "PEFT's CorDA cache_file" in refusal("merge", cached / "base", "--adapter", cached / "adapter")


def test_an_untrained_adapter_with_its_cache_gives_the_base_back(cached: Path, tmp_path: Path) -> None:
    options = MergeOptions(init=cached / "cache" / "cache.pt")
    merge(cached / "base", adapter=cached / "init", output=tmp_path / "out", options=options)
    assert differing(tmp_path / "out", weights(cached / "base")) == []


def test_a_covariance_file_is_no_cache(refusal: Refusal, cached: Path) -> None:
    message = refusal("merge", cached / "base", "--adapter", cached / "adapter", "--init", PEFT_COVARIANCES)
    assert message.startswith(f"{PEFT_COVARIANCES} is no CorDA cache of PEFT: model.layers.0.")
    assert message.endswith(
        "Such a file holds MODULE.eigens.S_WC, U_WC and V_WC for each module. A covariance file is another one.\n"
        "Give the file that PEFT wrote as corda_config.cache_file, or the folder of the initial adapter."
    )


def test_a_cache_of_other_modules_or_ranks_is_refused_with_all_of_them(
    refusal: Refusal, cached: Path, tmp_path: Path
) -> None:
    cache = torch.load(cached / "cache" / "cache.pt", weights_only=True)
    name = "model.layers.0.mlp.up_proj"
    rows = cache[f"{name}.eigens.U_WC"].shape[0]
    for part in "SUV":
        tensor = cache.pop(f"model.layers.1.mlp.up_proj.eigens.{part}_WC")
        cache[f"model.layers.9.mlp.up_proj.eigens.{part}_WC"] = tensor
    cache[f"{name}.eigens.S_WC"] = cache[f"{name}.eigens.S_WC"][:5].clone()
    torch.save(cache, tmp_path / "other.pt")
    message = refusal("merge", cached / "base", "--adapter", cached / "adapter", "--init", tmp_path / "other.pt")
    assert message.startswith("3 problems, nothing was written:")
    assert "other.pt has nothing for 1 of 42 modules that adapter adapts: model.layers.1.mlp.up_proj.\n" in message
    assert "other.pt has vectors for model.layers.9.mlp.up_proj, which adapter does not adapt.\n" in message
    columns = cache[f"{name}.eigens.V_WC"].shape[0]
    assert (
        f"other.pt: S, U, V of {name} are (5,), ({rows}, 6), ({columns}, 6); (6,), ({rows}, 6), ({columns}, 6) were expected."
    ) in message


def test_a_cache_with_nan_is_refused(refusal: Refusal, cached: Path, tmp_path: Path) -> None:
    cache = torch.load(cached / "cache" / "cache.pt", weights_only=True)
    cache["model.layers.3.mlp.down_proj.eigens.U_WC"][3, 1] = torch.nan
    torch.save(cache, tmp_path / "nan.pt")
    message = refusal(
        "merge", cached / "base", "--adapter", cached / "adapter", "--init", tmp_path / "nan.pt", "--as-is"
    )
    assert message.startswith(f"model.layers.3.mlp.down_proj.lora_B.weight in {tmp_path / 'nan.pt'} holds NaN or Inf.")


# The residual instead of the initial adapter


def residual_alone(target: Path) -> Path:
    shutil.copytree(RESIDUAL, target, ignore=shutil.ignore_patterns("corda_init"))
    return target


def test_a_merge_beside_the_residual_is_the_merge_into_it_with_the_side_files_of_the_base(tmp_path: Path) -> None:
    base, residual = tmp_path / "base", residual_alone(tmp_path / "residual")
    shutil.copytree(MODEL, base)
    (base / "notes.txt").write_text("of the base")
    options = MergeOptions(residual=residual)
    outcome = merge(base, adapter=ADAPTERS / "corda", output=tmp_path / "out", options=options)
    merge(RESIDUAL, adapter=ADAPTERS / "corda", output=tmp_path / "expected")
    assert differing(tmp_path / "out", weights(tmp_path / "expected")) == []
    assert (tmp_path / "out" / "notes.txt").read_text() == "of the base"
    assert outcome.warnings == (
        "42 weights were taken from residual, the rest from base: s·B₀A₀ is their difference. What residual lost by "
        "rounding to BF16 stays lost, up to 0.004 of each entry; with --init it does not.",
    )
    assert outcome.receipt["options"]["residual"] == "residual"
    assert [source["role"] for source in outcome.receipt["inputs"]] == ["model", "residual", "adapter"]


def test_a_residual_with_its_initial_adapter_stands_for_that(tmp_path: Path) -> None:
    merge(MODEL, adapter=ADAPTERS / "corda", output=tmp_path / "out", options=MergeOptions(residual=RESIDUAL))
    init = MergeOptions(init=RESIDUAL / "corda_init")
    merge(MODEL, adapter=ADAPTERS / "corda", output=tmp_path / "init", options=init)
    assert differing(tmp_path / "out", weights(tmp_path / "init")) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--adapter", ADAPTERS / "corda", "--residual", MODEL),
         "corda was not trained beside model: its B·A repeats "),
        (("--adapter", ADAPTERS / "lora", "--residual", "ALONE"),
         "lora was not trained beside residual: what the model has more than residual is not what its B·A began with"),
        (("--adapter", ADAPTERS / "corda", "--residual", RESIDUAL, "--init", RESIDUAL / "corda_init"),
         "--init and --residual tell the same.\nGive --init alone."),
        (("--adapter", ADAPTERS / "corda", "--residual", "ALONE", "--scale", "0.5"),
         "--residual without its initial adapter is for one LoRA adapter, taken once.\n"
         "The result is the residual with the adapter: what the residual lacks is in it once.\n"
         "Give the initial adapter of the training with --init."),
        (("--adapter", ADAPTERS / "corda", "--adapter", ADAPTERS / "lora", "--residual", "ALONE"),
         "--residual without its initial adapter is for one LoRA adapter, taken once."),
        (("--adapter", ADAPTERS / "miss_bat", "--residual", "ALONE"),
         "--residual without its initial adapter is for one LoRA adapter, taken once."),
    ],
)  # fmt: skip
def test_a_residual_that_does_not_fit_is_refused(
    refusal: Refusal, arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    alone = residual_alone(tmp_path / "residual")
    given = [alone if argument == "ALONE" else argument for argument in arguments]
    assert refusal("merge", MODEL, *given).startswith(message)


def test_a_residual_whose_difference_from_the_base_is_another_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    """Its weights have nothing to do with the adapter, like those of a residual; but the base less them neither."""
    alone = residual_alone(tmp_path / "residual")
    for path in alone.glob("model*.safetensors"):
        flipped = {name: tensor.flip(0).contiguous() for name, tensor in load_file(path).items()}
        save_file(flipped, path, {"format": "pt"})
    message = refusal("merge", MODEL, "--adapter", ADAPTERS / "corda", "--residual", alone)
    assert message.startswith(
        "corda was not trained beside residual: what the model has more than residual is not what its B·A began with (med"
    )
    assert message.endswith(
        "The residual, the base and the adapter are not of one training.\n"
        "Give the residual model that the training loaded."
    )


def test_a_residual_beside_a_residual_is_refused(refusal: Refusal) -> None:
    assert refusal("merge", RESIDUAL, "--adapter", ADAPTERS / "corda", "--residual", RESIDUAL) == (
        "residual is a residual (it has its initial adapter with it), and --residual is for merging into the base.\n"
        "Leave out --residual, or give the base model."
    )


def test_a_residual_of_other_tensors_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    alone = residual_alone(tmp_path / "residual")
    path = alone / "model-00001-of-00002.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, path, {"format": "pt"})
    rows, columns = weights(MODEL)[name].shape
    arguments = ("merge", MODEL, "--adapter", ADAPTERS / "corda", "--residual", alone, "--as-is")
    assert refusal(*arguments) == (
        f"{name} is BF16 ({rows - 1}, {columns}) in residual, BF16 ({rows}, {columns}) in model.\n"
        "It is not the residual of this model."
    )
    tensors["model.renamed"] = tensors.pop(name)
    save_file(tensors, path, {"format": "pt"})
    index = read_json(alone / "model.safetensors.index.json")
    index["weight_map"]["model.renamed"] = index["weight_map"].pop(name)
    write_json(alone / "model.safetensors.index.json", index)
    assert refusal(*arguments).startswith(f"residual has no {name}.\nIt is not the residual of this model.")


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_cosines_with_a_difference_are_those_of_float64(layout: str, tmp_path: Path) -> None:
    """At every third of 1000 inputs, where the weight is stored by its outputs; at the first 256 where by its inputs."""
    shape = (300, 1000)
    adapter = read_adapter(write_lora(tmp_path / "lora", {"up": shape}, rank=280))
    (factors,) = adapter.modules
    BA = read_tensor(factors.lora_B).double() @ read_tensor(factors.lora_A).double()
    first, second = random(*shape, seed=1) + BA.float() / 20, random(*shape, seed=2)
    inputs = slice(None, None, 3) if layout == "out_in" else slice(0, 256)
    difference = (first - second).double()[:, inputs]
    expected = float((difference * BA[:, inputs]).sum() / difference.norm() / BA[:, inputs].norm())
    stored = [tensor if layout == "out_in" else tensor.T.contiguous() for tensor in (first, second)]
    models = [
        read_checkpoint(write_checkpoint(tmp_path / str(place), {"up.weight": tensor}, config=None))
        for place, tensor in enumerate(stored)
    ]
    weights, others = ({"up": (model.tensors["up.weight"], layout)} for model in models)
    assert difference_cosines(adapter, weights, others) == [pytest.approx(expected, rel=1e-4)]
    assert difference_cosines(adapter, weights, weights) == [0.0]
    assert 0.3 < expected < 0.7


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_dora_trained_beside_a_residual_is_merged_into_the_base_with_its_initial_adapter(
    mode: str, tmp_path: Path
) -> None:
    """`V = W_res + s·BA` of DoRA is `W + s·(BA − B₀A₀)`: nearly what PEFT makes of the residual in float32."""
    run = RunOptions(dtype="float32")
    decompose(MODEL, output=tmp_path / "residual", options=DecomposeOptions(mode=mode, rank=4, method="svd"), run=run)
    init = tmp_path / "residual" / "corda_init"
    write_json(init / "adapter_config.json", read_json(init / "adapter_config.json") | {"use_dora": True})
    factors = load_file(init / "adapter_model.safetensors")
    residual = weights(tmp_path / "residual")
    for name in list(factors):
        if name.endswith("lora_B.weight"):
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.weight")
            whole = residual[f"{module}.weight"] + factors[name] @ factors[name.replace("lora_B", "lora_A")]
            factors[name.replace("lora_B.weight", "lora_magnitude_vector")] = whole.norm(dim=1)
    save_file(factors, init / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "residual", dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, str(init), is_trainable=True)
    train(peft)
    peft.save_pretrained(tmp_path / "adapter")
    merge(MODEL, adapter=tmp_path / "adapter", output=tmp_path / "out", options=MergeOptions(init=init), run=run)
    expected = dict(peft.merge_and_unload().state_dict())
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


# The residual from the base and the initial adapter


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
@pytest.mark.parametrize(("mode", "alpha"), [("kpm", None), ("ipm", 12)])
def test_subtracting_an_initial_adapter_gives_the_files_of_decompose(
    mode: str, alpha: float | None, dtype: str | None, tmp_path: Path
) -> None:
    run = RunOptions(dtype=dtype)
    options = DecomposeOptions(mode=mode, rank=8, method="svd", alpha=alpha)
    decompose(MODEL, output=tmp_path / "expected", options=options, run=run)
    init = tmp_path / "expected" / "corda_init"
    outcome = merge(MODEL, output=tmp_path / "out", options=MergeOptions(subtract=init), run=run)
    for path in (tmp_path / "expected").rglob("*"):
        if path.is_file() and path.name not in ("README.md", "corda_convert.json", "adapter_config.json"):
            assert (tmp_path / "out" / path.relative_to(tmp_path / "expected")).read_bytes() == path.read_bytes()
    config = read_json(tmp_path / "out" / "corda_init" / "adapter_config.json")
    assert config == read_json(init / "adapter_config.json") | {"base_model_name_or_path": str(tmp_path / "out")}
    assert outcome.receipt["options"]["subtract"] == "corda_init"


def test_what_was_subtracted_is_trained_and_merged_like_a_residual_of_decompose(tmp_path: Path) -> None:
    residual = tmp_path / "residual"
    merge(MODEL, output=residual, options=MergeOptions(subtract=RESIDUAL / "corda_init"))
    model = AutoModelForCausalLM.from_pretrained(residual, dtype=torch.bfloat16)
    peft = PeftModel.from_pretrained(model, str(residual), subfolder="corda_init", is_trainable=True)
    train(peft)
    peft.save_pretrained(tmp_path / "adapter")
    merge(residual, adapter=tmp_path / "adapter", output=tmp_path / "out")
    assert differing(tmp_path / "out", dict(peft.merge_and_unload().state_dict())) == []


def test_the_residual_of_peft_is_met_to_one_ulp(tmp_path: Path) -> None:
    """PEFT subtracts in float32; a few entries near the middle of two bfloat16 numbers fall to the other one."""
    merge(MODEL, output=tmp_path / "out", options=MergeOptions(subtract=RESIDUAL / "corda_init"))
    different, total = 0, 0
    for name, tensor in weights(tmp_path / "out").items():
        expected = weights(RESIDUAL)[name]
        steps = (tensor.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        assert int(steps.max()) <= 1
        different, total = different + int(steps.sum()), total + steps.numel()
    assert different / total < 1e-4


def test_the_command_line_subtracts_and_says_so(done: Callable[..., Any], tmp_path: Path) -> None:
    init = RESIDUAL / "corda_init"
    ran = done("merge", MODEL, "--subtract", init, "-o", tmp_path / "out")
    assert ran.out.startswith(f"Subtracted corda_init from model → {tmp_path / 'out'}\n")
    ran = done("merge", MODEL, "--subtract", init, "-o", tmp_path / "dry", "--dry-run")
    assert ran.out.startswith("Would subtract corda_init from model")


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (RESIDUAL, ("--subtract", RESIDUAL / "corda_init"),
         "residual is a residual already: it has its initial adapter with it.\n"
         "Subtract the initial adapter from the base model."),
        (MODEL, ("--subtract", ADAPTERS / "corda"), "corda is no initial adapter of model: its B·A is "),
        (MODEL, ("--subtract", ADAPTERS / "lora"), "lora is no initial adapter of model: its B·A is "),
        (MODEL, ("--subtract", ADAPTERS / "miss_bat"),
         "miss_bat is a miss adapter; --subtract takes plain LoRA factors out of a model.\n"
         "Give the initial adapter (corda_init) of a CorDA, PiSSA or OLoRA training."),
        (MODEL, ("--subtract", RESIDUAL / "corda_init", "--adapter", ADAPTERS / "corda"),
         "--subtract makes a residual, and goes with no --adapter, --scale, --init, --residual, --alpha or --format.\n"
         "To merge an adapter trained beside that residual into the base, give --adapter and --init."),
    ],
)  # fmt: skip
def test_a_subtraction_that_makes_no_residual_is_refused(
    refusal: Refusal, model: Path, arguments: tuple[object, ...], message: str
) -> None:
    assert refusal("merge", model, *arguments).startswith(message)


# Which initial adapter belongs to which adapter


@pytest.fixture(scope="module")
def two_trainings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ipm and kpm residuals with an adapter trained beside each: ipm/corda_init, ipm_adapter, …"""
    folder = tmp_path_factory.mktemp("trainings")
    for mode in ("ipm", "kpm"):
        options = DecomposeOptions(mode=mode, rank=4, method="svd")
        decompose(MODEL, output=folder / mode, options=options)
        model = AutoModelForCausalLM.from_pretrained(folder / mode)
        peft = PeftModel.from_pretrained(model, str(folder / mode), subfolder="corda_init", is_trainable=True)
        train(peft)
        peft.save_pretrained(folder / f"{mode}_adapter")
    return folder


def test_initial_adapters_are_matched_by_their_numbers_in_any_order(two_trainings: Path, tmp_path: Path) -> None:
    adapters = [two_trainings / "ipm_adapter", two_trainings / "kpm_adapter", ADAPTERS / "lora"]
    inits = [two_trainings / "kpm" / "corda_init", two_trainings / "ipm" / "corda_init"]
    run = RunOptions(dtype="float32")
    outcome = merge(MODEL, adapter=adapters, output=tmp_path / "out", options=MergeOptions(init=inits), run=run)
    assert [each["init"] for each in outcome.receipt["adapters"]] == ["corda_init", "corda_init", None]
    merge(MODEL, adapter=ADAPTERS / "lora", output=tmp_path / "lora", run=run)
    expected = {name: tensor.double() for name, tensor in weights(tmp_path / "lora").items()}
    for mode in ("ipm", "kpm"):
        after = load_file(two_trainings / f"{mode}_adapter" / "adapter_model.safetensors")
        before = load_file(two_trainings / mode / "corda_init" / "adapter_model.safetensors")
        for name in expected:
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in after:
                for sign, factors in ((1, after), (-1, before)):
                    expected[name] += sign * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_one_initial_adapter_serves_every_adapter_that_was_trained_from_it(two_trainings: Path, tmp_path: Path) -> None:
    init, other = two_trainings / "ipm" / "corda_init", tmp_path / "other"
    shutil.copytree(two_trainings / "ipm_adapter", other)
    path = other / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    options = MergeOptions(init=init, scales=(0.25, 0.5))
    outcome = merge(MODEL, adapter=[two_trainings / "ipm_adapter", other], output=tmp_path / "out", options=options)
    assert [each["init"] for each in outcome.receipt["adapters"]] == ["corda_init", "corda_init"]
    assert [source["role"] for source in outcome.receipt["inputs"]] == ["model", "adapter", "adapter", "init"]


def test_an_initial_adapter_that_fits_no_adapter_is_refused(refusal: Refusal, two_trainings: Path) -> None:
    message = refusal(
        "merge", MODEL, "--adapter", two_trainings / "ipm_adapter", "--adapter", ADAPTERS / "lora",
        "--init", two_trainings / "kpm" / "corda_init",
    )  # fmt: skip
    assert message.startswith(
        "None of the adapters was trained from corda_init.\nipm_adapter was not trained from the initial adapter corda_init:"
    )
    why = message.splitlines()[2]
    assert why.startswith("model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj, ")
    assert "and 1 more: the adapter has lora_A (8, 176)" in why


def test_two_initial_adapters_for_one_adapter_are_refused(
    refusal: Refusal, two_trainings: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(two_trainings / "ipm" / "corda_init", copy)
    inits = ("--init", two_trainings / "ipm" / "corda_init", "--init", copy)
    assert refusal("merge", MODEL, "--adapter", two_trainings / "ipm_adapter", *inits) == (
        "ipm_adapter may have been trained from corda_init and copy.\nGive only the one that its training started from."
    )


def test_as_is_takes_initial_adapters_in_order(refusal: Refusal, two_trainings: Path, tmp_path: Path) -> None:
    adapters = [two_trainings / "ipm_adapter", two_trainings / "kpm_adapter"]
    inits = [two_trainings / mode / "corda_init" for mode in ("ipm", "kpm")]
    merge(MODEL, adapter=adapters, output=tmp_path / "matched", options=MergeOptions(init=inits[::-1]))
    merge(MODEL, adapter=adapters, output=tmp_path / "out", options=MergeOptions(init=inits, as_is=True))
    assert differing(tmp_path / "out", weights(tmp_path / "matched")) == []
    given = [argument for adapter in adapters for argument in ("--adapter", adapter)]
    assert refusal("merge", MODEL, *given, "--init", inits[0], "--as-is") == (
        "There are 1 initial adapters for 2 adapters, and --as-is says not to compare them.\n"
        "Give as many --init as --adapter, in the same order, or leave out --as-is."
    )


def test_to_lora_takes_the_cache_too(cached: Path, tmp_path: Path) -> None:
    to_lora(cached / "adapter", init=cached / "cache" / "cache.pt", output=tmp_path / "cache")
    to_lora(cached / "adapter", init=cached / "init", output=tmp_path / "init")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cache", "init")]
    assert files[0] == files[1]


def test_on_a_residual_the_scales_must_add_up_to_one(refusal: Refusal, two_trainings: Path, tmp_path: Path) -> None:
    model, adapter = two_trainings / "ipm", two_trainings / "ipm_adapter"
    assert refusal("merge", model, "--adapter", adapter, "--scale", "0.5") == (
        "ipm is a residual: the scales of adapters trained beside it must add up to 1; these add up to 0.5.\n"
        "Each holds the part that the residual lacks, which the model must have once.\n"
        "Merge into the base model with --init."
    )
    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    path = other / "adapter_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)
    message = refusal("merge", model, "--adapter", adapter, "--adapter", other)
    assert "these add up to 2." in message
    run = RunOptions(dtype="float32")
    halves = MergeOptions(scales=(0.5, 0.5))
    merge(model, adapter=[adapter, other], output=tmp_path / "out", options=halves, run=run)
    options = MergeOptions(scales=(0.5, 0.5), init=model / "corda_init")
    merge(MODEL, adapter=[adapter, other], output=tmp_path / "base", options=options, run=run)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, weights(tmp_path / "base")[name], rtol=2**-7, atol=1e-3)


def test_random_factors_with_a_config_of_pissa_are_not_reproduced(refusal: Refusal, tmp_path: Path) -> None:
    modules = {UP.replace("layers.1", "layers.0"): weights(MODEL)["model.layers.0.mlp.up_proj.weight"].shape}
    assert set(modules) <= set(LINEARS)
    adapter = write_lora(tmp_path / "lora", modules, init_lora_weights="pissa")
    assert "its config says init_lora_weights='pissa'" in refusal("merge", MODEL, "--adapter", adapter)
