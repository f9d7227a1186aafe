"""PEFT's CorDA `cache_file`, written from our decomposition for PEFT, and read from PEFT's for ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    LINEARS,
    MODEL,
    RESIDUAL,
    UP,
    lora_tensors,
    random,
    read_json,
    weight_files,
    write_adapter,
    write_lora,
)
from building import lora_config as adapter_config
from conftest import Ran
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corda_convert import DecomposeOptions, MergeOptions, RunOptions, decompose, merge
from corda_convert.adapters import read_adapter
from corda_convert.adapters.cache import is_cache, read_cache
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.errors import (
    AdapterMismatch,
    CordaConvertError,
    MalformedFile,
    NotFinite,
    OutputRefused,
    UnsupportedInput,
)
from corda_convert.operations.from_cache import CacheOptions, decompose_from_cache
from corda_convert.operations.peft_cache import check_cache_path, write_cache

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT on GPT-2
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern"),
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def begun_by_peft(model: Path, cache: Path, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """What a training script of PEFT has before its first step, with a cache and no covariances."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    corda = CordaConfig(cache_file=str(cache), corda_method="kpm")
    lora = LoraConfig(init_lora_weights="corda", corda_config=corda, task_type="CAUSAL_LM", **config)
    preprocess_corda(base, lora)
    return get_peft_model(base, lora)


def factors_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name.replace(".default.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" in name}


def bases_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """The residual weights, by their names in the model."""
    state = model.state_dict()
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in state.items()
        if ".base_layer." in name
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def refused(kind: type[CordaConvertError], path: Path, folder: Path) -> str:
    """The message of a refusal that leaves nothing behind."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(kind) as caught:
        write_cache(path, folder)
    assert sorted(path.parent.iterdir()) == before
    return str(caught.value)


# Written for PEFT


@pytest.mark.parametrize("alpha", [None, 20.0, 3.0], ids=str)
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_peft_starts_from_the_bits_of_our_decomposition(mode: Any, alpha: float | None, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    options = DecomposeOptions(mode, 6, alpha)
    decompose(tmp_path / "base", output=tmp_path / "out", options=options, covariances=COVARIANCES)
    written = write_cache(tmp_path / "cache.pt", tmp_path / "out" / "corda_init")
    assert (written.modules, written.nbytes) == (42, (tmp_path / "cache.pt").stat().st_size)
    model = begun_by_peft(tmp_path / "base", written.path, r=6, lora_alpha=alpha or 6, target_modules=TARGETS)
    expected = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    found = factors_of(model)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    residual = weights(tmp_path / "out")
    assert len(bases_of(model)) == 42
    for name, tensor in bases_of(model).items():
        torch.testing.assert_close(tensor, residual[name], rtol=0, atol=1e-6)
        assert not torch.equal(tensor, base.state_dict()[name])


def test_peft_makes_the_same_residual_in_bfloat16_up_to_its_rounding(tmp_path: Path) -> None:
    decompose(MODEL, output=tmp_path / "out", options=DecomposeOptions("kpm", 8), covariances=COVARIANCES)
    cache = write_cache(tmp_path / "cache.pt", tmp_path / "out" / "corda_init").path
    model = begun_by_peft(MODEL, cache, torch.bfloat16, r=8, lora_alpha=8, target_modules=TARGETS)
    residual = weights(tmp_path / "out")
    for name, tensor in bases_of(model).items():
        assert tensor.dtype == torch.bfloat16
        different = tensor != residual[name]
        assert float(different.float().mean()) < 1e-3  # a float32 sum may lie on the other side of a rounding's edge
        torch.testing.assert_close(tensor, residual[name], rtol=2**-7, atol=1e-6)


def test_the_residual_is_the_same_where_the_script_has_another_scaling(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache.pt", RESIDUAL / "corda_init").path
    own, other = (
        begun_by_peft(MODEL, cache, r=8, lora_alpha=8, target_modules=TARGETS, use_rslora=rslora)
        for rslora in (False, True)
    )
    assert own.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == 1
    assert other.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] != 1
    for name, tensor in bases_of(own).items():
        torch.testing.assert_close(bases_of(other)[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_scalings_of_patterns_are_those_of_peft(rslora: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank_pattern": {"up_proj": 2, r"layers\.1\.mlp\.down_proj": 5}, "use_rslora": rslora}
    options |= {"alpha_pattern": {"gate_proj": 7}, "lora_alpha": 9, "r": 4, "target_modules": TARGETS}
    folder = made_by_peft(tmp_path / "init", **options)
    cache = write_cache(tmp_path / "cache.pt", folder).path
    expected = load_file(folder / "adapter_model.safetensors")
    found = factors_of(begun_by_peft(MODEL, cache, **options))
    assert {tensor.shape[0] for name, tensor in expected.items() if ".lora_A" in name} == {2, 4, 5}
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def made_by_peft(folder: Path, **config: Any) -> Path:
    """An adapter of random factors, saved by PEFT."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for place, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(random(*parameter.shape, seed=place))
    model.save_pretrained(folder)
    return folder


def test_conv1d_starts_as_a_linear_layer_does(tmp_path: Path) -> None:
    families.tiny("gpt2").save_pretrained(tmp_path / "base")
    options = DecomposeOptions("ipm", 4, method="svd", targets=("c_attn", "c_proj", "c_fc"))
    decompose(tmp_path / "base", output=tmp_path / "out", options=options)
    cache = write_cache(tmp_path / "cache.pt", tmp_path / "out" / "corda_init").path
    model = begun_by_peft(
        tmp_path / "base", cache, r=4, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True
    )
    expected = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    assert expected.keys() == factors_of(model).keys()
    assert all(torch.equal(factors_of(model)[name], tensor) for name, tensor in expected.items())
    for name, tensor in bases_of(model).items():
        torch.testing.assert_close(tensor, weights(tmp_path / "out")[name], rtol=0, atol=1e-6)


def test_the_file_is_what_peft_would_load_and_holds_plain_tensors(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "init", {UP: LINEARS[UP]}, rank=3)  # lora_alpha is twice the rank
    write_cache(tmp_path / "cache.pt", folder)
    cache = torch.load(tmp_path / "cache.pt", weights_only=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert list(cache) == [f"{UP}.eigens.{part}_WC" for part in "SUV"]
    S, U, V = cache.values()
    assert torch.equal(S, torch.full((3,), 2.0))
    assert torch.equal(U, tensors[f"base_model.model.{UP}.lora_B.weight"])
    assert torch.equal(V, tensors[f"base_model.model.{UP}.lora_A.weight"].T)
    assert {tensor.dtype for tensor in cache.values()} == {torch.float32}
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["cache.pt"]


def test_what_is_written_is_read_back_as_the_same_initial_adapter(tmp_path: Path) -> None:
    adapter = read_adapter(RESIDUAL / "corda_init")
    written = write_cache(tmp_path / "cache.pt", RESIDUAL / "corda_init")
    again = read_cache(written.path, read_adapter(ADAPTERS / "corda"))
    assert again.source.tensors.keys() == adapter.source.tensors.keys()
    for name, ref in again.source.tensors.items():
        assert torch.equal(read_tensor(ref), read_tensor(adapter.source.tensors[name]))


def test_sixteen_bit_factors_become_float32(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in lora_tensors({UP: LINEARS[UP]}).items()}
    folder = write_adapter(tmp_path / "init", tensors, adapter_config())
    write_cache(tmp_path / "cache.pt", folder)
    U = torch.load(tmp_path / "cache.pt", weights_only=True)[f"{UP}.eigens.U_WC"]
    assert torch.equal(U, tensors[f"base_model.model.{UP}.lora_B.weight"].float())


@pytest.mark.parametrize("name", ["miss_balance", "dora", "saved"])
def test_adapters_that_corda_does_not_begin_with_are_refused(name: str, tmp_path: Path) -> None:
    modules = {UP: LINEARS[UP]}
    if name == "dora":
        magnitude = {f"base_model.model.{UP}.lora_magnitude_vector": random(24)}
        folder = write_adapter(tmp_path / "dora", lora_tensors(modules) | magnitude, adapter_config(use_dora=True))
    elif name == "saved":
        head = {"base_model.model.lm_head.weight": random(32, 16)}
        folder = write_adapter(
            tmp_path / "saved", lora_tensors(modules) | head, adapter_config(modules_to_save=["lm_head"])
        )
    else:
        folder = ADAPTERS / name
    message = refused(UnsupportedInput, tmp_path / "cache.pt", folder)
    changed = {"dora": UP, "saved": "lm_head.weight"}.get(name, "model.layers.0.mlp.down_proj, ")
    assert message.startswith(f"{name} changes {changed}")
    assert "otherwise than PEFT's CorDA begins: with plain LoRA factors of Linear layers." in message


def test_a_scaling_of_zero_and_factors_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    zero = write_lora(tmp_path / "zero", {UP: LINEARS[UP]}, lora_alpha=0)
    assert refused(UnsupportedInput, tmp_path / "cache.pt", zero) == (
        f"zero has no positive scaling for {UP}; PEFT divides by it."
    )
    tensors = lora_tensors({UP: LINEARS[UP]})
    tensors[f"base_model.model.{UP}.lora_A.weight"][1, 2] = float("nan")
    nan = write_adapter(tmp_path / "nan", tensors, adapter_config())
    assert refused(NotFinite, tmp_path / "cache.pt", nan) == (
        f"{UP}.eigens.V_WC would hold NaN or Inf: the initial adapter does."
    )


def test_a_place_where_something_would_be_lost_is_refused(tmp_path: Path) -> None:
    output, cache, other = tmp_path / "out", tmp_path / "cache.pt", tmp_path / "other.pt"
    write_cache(cache, RESIDUAL / "corda_init")
    torch.save({UP: random(2, 2)}, other)
    assert is_cache(cache)
    assert not is_cache(other)
    expected = {
        (output / "cache.pt", False): f"The cache file {output / 'cache.pt'} would lie inside the output {output}.\n"
        "Choose a place beside it.",
        (cache, False): f"{cache} exists.\nChoose another file, or replace a cache file with --overwrite.",
        (other, True): f"{other} exists and is no CorDA cache of PEFT.\nChoose another file.",
        (tmp_path, True): f"{tmp_path} exists.\nChoose another file.",
        (other / "cache.pt", False): f"The folder {other} cannot be written.\nChoose another file.",
    }
    for (path, overwrite), message in expected.items():
        with pytest.raises(OutputRefused) as caught:
            check_cache_path(path, output, overwrite=overwrite)
        assert str(caught.value) == message
    check_cache_path(cache, output, overwrite=True)
    check_cache_path(tmp_path / "deep" / "new.pt", output, overwrite=False)


def test_a_cache_in_a_new_folder_and_over_an_old_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache.pt"
    first = write_cache(path, RESIDUAL / "corda_init")
    second = write_cache(path, RESIDUAL / "corda_init")
    assert first == second
    assert [each.name for each in path.parent.iterdir()] == ["cache.pt"]


# Read from PEFT


def cached_by_peft(folder: Path, model: Path, mode: str = "kpm", **config: Any) -> PeftModel:
    """Writes `cache.pt` as PEFT does from covariances. Returns what PEFT begins with."""
    folder.mkdir(exist_ok=True)
    corda = CordaConfig(
        cache_file=str(folder / "cache.pt"),
        covariance_file=str(COVARIANCES.with_name("knowledge.peft.pt")),
        corda_method=mode,
    )
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    preprocess_corda(base, LoraConfig(init_lora_weights="corda", corda_config=corda, task_type="CAUSAL_LM", **config))
    return begun_by_peft(model, folder / "cache.pt", **config)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 6, "lora_alpha": 6, "target_modules": TARGETS},
    "alpha": {"r": 6, "lora_alpha": 9, "target_modules": ["up_proj", "q_proj"]},
    "rslora": {"r": 5, "lora_alpha": 12, "target_modules": ["down_proj"], "use_rslora": True},
    "pattern": {
        "r": 4,
        "lora_alpha": 10,
        "target_modules": TARGETS,
        "rank_pattern": {"up_proj": 7, "1.mlp.down_proj": 2},
    },
}


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_cache_of_peft_stands_for_is_written_with_its_bits(name: str, mode: Any, tmp_path: Path) -> None:
    """The factors are PEFT's; its residual is rounded in float32, ours once from float64."""
    config = CONFIGS[name]
    AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).save_pretrained(tmp_path / "base")
    expected = cached_by_peft(tmp_path / "peft", tmp_path / "base", mode, **config)
    options = CacheOptions(mode, config["lora_alpha"], rslora=config.get("use_rslora", False))
    outcome = decompose_from_cache(
        tmp_path / "base", cache=tmp_path / "peft" / "cache.pt", output=tmp_path / "out", options=options
    )
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = PeftModel.from_pretrained(residual, str(tmp_path / "out"), subfolder="corda_init", is_trainable=True)
    own, theirs = factors_of(found), factors_of(expected)
    assert own.keys() == theirs.keys()
    assert [key for key, tensor in theirs.items() if not torch.equal(own[key], tensor)] == []
    for key, tensor in bases_of(expected).items():
        torch.testing.assert_close(bases_of(found)[key], tensor, rtol=0, atol=1e-6)
    for module, layer in found.named_modules():
        if hasattr(layer, "scaling"):
            assert layer.scaling == expected.get_submodule(module).scaling
    assert found.peft_config["default"].corda_config.corda_method == mode
    assert outcome.receipt["options"]["from_cache"] == "cache.pt"
    (source,) = [each for each in outcome.receipt["inputs"] if each["role"] == "cache"]
    assert source["files"][0]["sha256"] is not None


def test_without_alpha_every_module_is_scaled_by_one(tmp_path: Path) -> None:
    cached_by_peft(tmp_path, MODEL, **CONFIGS["pattern"])
    decompose_from_cache(MODEL, cache=tmp_path / "cache.pt", output=tmp_path / "out", options=CacheOptions("kpm"))
    residual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model = PeftModel.from_pretrained(residual, str(tmp_path / "out"), subfolder="corda_init")
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 42
    assert {layer.scaling["default"] for layer in layers} == {1.0}
    assert {layer.r["default"] for layer in layers} == {2, 4, 7}


def test_the_cache_of_a_conv1d_model_is_taken_out_transposed(tmp_path: Path) -> None:
    base = families.tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    modules = ["c_attn", "c_proj", "c_fc"]
    decompose(
        tmp_path / "base", output=tmp_path / "out",
        options=DecomposeOptions("ipm", 4, method="svd", targets=tuple(modules)),
    )  # fmt: skip
    cache = write_cache(tmp_path / "cache.pt", tmp_path / "out" / "corda_init").path
    decompose_from_cache(tmp_path / "base", cache=cache, output=tmp_path / "again", options=CacheOptions("ipm"))
    assert weights(tmp_path / "again").keys() == weights(tmp_path / "out").keys()
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(weights(tmp_path / "again")[name], tensor)
    adapters = [load_file(tmp_path / name / "corda_init" / "adapter_model.safetensors") for name in ("out", "again")]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(tensor, adapters[1][name]) for name, tensor in adapters[0].items())


def test_base_minus_and_plus_the_cache_is_the_base(tmp_path: Path) -> None:
    cached_by_peft(tmp_path, MODEL, **CONFIGS["alpha"])
    decompose_from_cache(
        MODEL, cache=tmp_path / "cache.pt", output=tmp_path / "out", options=CacheOptions("kpm", 9),
        run=RunOptions(dtype="float32"),
    )  # fmt: skip
    merge(tmp_path / "out", adapter=tmp_path / "out" / "corda_init", output=tmp_path / "merged", options=MergeOptions())
    for name, tensor in weights(MODEL).items():
        torch.testing.assert_close(weights(tmp_path / "merged")[name], tensor.float(), rtol=0, atol=1e-6)


def test_the_plan_counts_the_memory_for_making_factors_of_the_cache(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache.pt", RESIDUAL / "corda_init").path
    run, output = RunOptions(dry_run=True), tmp_path / "out"
    made = decompose_from_cache(MODEL, cache=cache, output=output, options=CacheOptions("kpm"), run=run).plan
    read = merge(MODEL, output=output, options=MergeOptions(subtract=RESIDUAL / "corda_init"), run=run).plan
    largest = max(tensor.nbytes for tensor in load_file(RESIDUAL / "corda_init" / "adapter_model.safetensors").values())
    assert made.workspace_bytes == read.workspace_bytes + 3 * largest


def test_names_of_the_model_without_its_head_are_found(tmp_path: Path) -> None:
    write_cache(tmp_path / "cache.pt", RESIDUAL / "corda_init")
    cache = torch.load(tmp_path / "cache.pt", weights_only=True)
    torch.save({name.removeprefix("model."): tensor for name, tensor in cache.items()}, tmp_path / "headless.pt")
    for name in ("cache", "headless"):
        options = CacheOptions("kpm", rank=8)
        decompose_from_cache(MODEL, cache=tmp_path / f"{name}.pt", output=tmp_path / name, options=options)
    assert all(
        torch.equal(weights(tmp_path / "headless")[name], tensor)
        for name, tensor in weights(tmp_path / "cache").items()
    )
    expected = load_file(RESIDUAL / "corda_init" / "adapter_model.safetensors")
    found = load_file(tmp_path / "headless" / "corda_init" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def cache_refusal(
    kind: type[CordaConvertError], tmp_path: Path, changes: dict[str, torch.Tensor | None], **options: Any
) -> str:
    """The message for the fixture's cache with some entries changed or taken out."""
    model = options.pop("model", MODEL)
    write_cache(tmp_path / "good.pt", RESIDUAL / "corda_init")
    cache = {**torch.load(tmp_path / "good.pt", weights_only=True), **changes}
    torch.save({name: tensor for name, tensor in cache.items() if tensor is not None}, tmp_path / "cache.pt")
    with pytest.raises(kind) as caught:
        decompose_from_cache(
            model, cache=tmp_path / "cache.pt", output=tmp_path / "out", options=CacheOptions("kpm", **options)
        )
    assert not (tmp_path / "out").exists()
    return str(caught.value)


FIRST = "model.layers.0.mlp.up_proj"


def test_a_cache_that_lacks_a_part_or_holds_something_else_is_refused(tmp_path: Path) -> None:
    message = cache_refusal(MalformedFile, tmp_path, {f"{FIRST}.eigens.U_WC": None, "other": random(2)})
    assert message.startswith(f"{tmp_path / 'cache.pt'} is no CorDA cache of PEFT: other, {FIRST}.")


def test_a_cache_of_another_rank_than_was_asked_for_is_refused(tmp_path: Path) -> None:
    message = cache_refusal(UnsupportedInput, tmp_path, {}, rank=4)
    assert message.startswith("The cache has rank 8 for model.layers.0.")
    assert message.endswith(
        "and 37 more; rank 4 was asked for.\nA cache holds the components of one rank, and no others.\n"
        "Leave out --rank, or decompose with the covariances."
    )


def test_vectors_of_other_lengths_are_refused(tmp_path: Path) -> None:
    message = cache_refusal(AdapterMismatch, tmp_path, {f"{FIRST}.eigens.V_WC": random(95, 8)})
    assert message == (
        f"S, U, V of {FIRST} are (8,), (176, 8), (95, 8); its weight is (176, 96), so (r,), (176, r), (96, r) were expected."
        "\nThe cache is of another model, or damaged."
    )


@pytest.mark.parametrize("value", [-1.0, float("nan")], ids=str)
def test_singular_values_that_are_none_are_refused(value: float, tmp_path: Path) -> None:
    message = cache_refusal(NotFinite, tmp_path, {f"{FIRST}.eigens.S_WC": torch.tensor([1.0] * 7 + [value])})
    assert message == (
        f"{FIRST}.eigens.S_WC in {tmp_path / 'cache.pt'} holds NaN or negative numbers; singular values were expected."
    )


def test_nan_among_the_vectors_stops_the_run(tmp_path: Path) -> None:
    vectors = random(176, 8)
    vectors[3, 1] = torch.nan
    message = cache_refusal(NotFinite, tmp_path, {f"{FIRST}.eigens.U_WC": vectors})
    assert f"{FIRST}.lora_B.weight in {tmp_path / 'cache.pt'} holds NaN or Inf." in message


def test_a_module_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    extra = {f"model.layers.9.mlp.up_proj.eigens.{part}_WC": random(2, 2) for part in "SUV"}
    assert cache_refusal(AdapterMismatch, tmp_path, extra) == (
        "cache.pt has vectors for 43 modules; 1 of them are not in model: model.layers.9.mlp.up_proj.\n"
        "The cache is of another model."
    )


def test_a_module_that_is_no_linear_layer_is_refused(tmp_path: Path) -> None:
    extra = {f"model.embed_tokens.eigens.{part}_WC": random(2, 2) for part in "SUV"}
    assert cache_refusal(AdapterMismatch, tmp_path, extra) == (
        "The cache has vectors for model.embed_tokens, no Linear or Conv1D in model.\nThe cache is of another model."
    )


def test_a_cache_of_another_model_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(MODEL).config)
    other.save_pretrained(tmp_path / "other")
    message = cache_refusal(AdapterMismatch, tmp_path, {}, model=tmp_path / "other")
    assert message.startswith("cache.pt is not of other: its U diag(S) Vᵀ is ")
    message = cache_refusal(AdapterMismatch, tmp_path, {}, model=RESIDUAL)
    assert message == "residual is a residual already: it has its initial adapter with it.\nGive the base model."


def test_an_alpha_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    assert cache_refusal(UnsupportedInput, tmp_path, {}, alpha=-1.0) == "Alpha is -1.0, a positive number was expected."


# On the command line


def test_a_cache_goes_round_on_the_command_line(done: Callable[..., Ran], tmp_path: Path) -> None:
    """Decomposed with a cache written beside, and the same residual and adapter again from that cache."""
    first, again, cache = tmp_path / "first", tmp_path / "again", tmp_path / "cache.pt"
    arguments = ("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank", 4, "--alpha", 12, "-q")
    done(*arguments, "--write-cache", cache, "-o", first)
    done("decompose", MODEL, "--from-cache", cache, "--mode", "kpm", "--rank", 4, "--alpha", 12, "-o", again)
    assert weight_files(first) == weight_files(again)
    configs = [read_json(folder / "corda_init" / "adapter_config.json") for folder in (first, again)]
    assert configs[0] | {"base_model_name_or_path": None} == configs[1] | {"base_model_name_or_path": None}


def test_the_summary_and_the_card_say_where_the_adapter_comes_from(done: Callable[..., Ran], tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache.pt", RESIDUAL / "corda_init").path
    ran = done("decompose", MODEL, "--from-cache", cache, "--mode", "kpm", "-o", tmp_path / "out")
    assert ran.out.startswith("Decomposed model (corda, kpm, rank 8) → ")
    assert "lora, 42 modules, rank 8, alpha 8, scaling 1" in ran.out
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the adapter that PEFT's CorDA cache `cache.pt` holds, to train beside it." in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "kpm", "--cov", COVARIANCES), "--from-cache computes nothing; leave out --cov."),
        (("--mode", "kpm", "--target", "up_proj"), "--from-cache computes nothing; leave out --target."),
        (("--mode", "kpm", "--method", "svd"), "--from-cache computes nothing; leave out --method."),
        (("--mode", "kpm", "--solver", "dense"), "--from-cache computes nothing; leave out --solver."),
        (
            ("--truncate", 3, "--exclude", "x", "--no-residual"),
            "--from-cache computes nothing; leave out --exclude, --no-residual, --truncate.",
        ),
        ((), "Missing option '--mode': what the cache was made with."),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_options_that_a_cache_leaves_without_effect_are_wrong_usage(
    arguments: tuple[object, ...], message: str, command: Callable[..., Ran], tmp_path: Path
) -> None:
    ran = command("decompose", MODEL, "--from-cache", tmp_path / "cache.pt", *arguments, "-o", tmp_path / "out")
    assert (ran.status, ran.err.rpartition("Error: ")[2].strip()) == (2, message)


def test_a_cache_that_is_not_there_is_refused(refusal: Callable[..., str], tmp_path: Path) -> None:
    message = refusal("decompose", MODEL, "--from-cache", tmp_path / "cache.pt", "--mode", "kpm")
    assert message.startswith(f"No such cache file: {tmp_path / 'cache.pt'}")
