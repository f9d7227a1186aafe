"""PEFT's CorDA `cache_file`, written from our decomposition for PEFT, and read from PEFT's for ours."""

from __future__ import annotations

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
    write_adapter,
    write_lora,
)
from building import lora_config as adapter_config
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corda_convert import DecomposeOptions, decompose
from corda_convert.adapters import read_adapter
from corda_convert.adapters.cache import is_cache, read_cache
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.errors import CordaConvertError, NotFinite, OutputRefused, UnsupportedInput
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
