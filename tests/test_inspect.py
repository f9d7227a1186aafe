"""`inspect`: what it says of everything that this program reads, against PEFT, safetensors and what `merge` does."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    FIXTURES,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    UP,
    covariance,
    llama_tensors,
    lora_config,
    lora_tensors,
    read_json,
    write_adapter,
    write_checkpoint,
    write_covariances,
    write_json,
    write_lora,
    write_miss,
)
from conftest import Ran
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from corda_convert import inspect
from corda_convert.errors import CordaConvertError
from corda_convert.output.module_groups import describe_groups, group_modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
]

Command = Callable[..., Ran]
EVERY = [f"model.layers.*.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")] + [
    f"model.layers.*.{name}" for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
]


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixtures' adapters name their bases by paths from the repository's root."""
    monkeypatch.chdir(FIXTURES.parent)


def facts(path: Path, **asked: Any) -> dict[str, Any]:
    found = dict(inspect(path, **asked).facts)
    assert json.loads(json.dumps(found)) == found, "it is JSON"
    return found


def screen(command: Command, *arguments: object, status: int = 0) -> list[str]:
    ran = command("inspect", *arguments)
    assert (ran.status, ran.err) == (status, ""), ran
    return ran.out.splitlines()


# Adapters


@pytest.mark.parametrize("name", ["lora", "lora_patterns", "corda", "lora_modules_to_save"])
def test_ranks_and_scalings_of_a_lora_are_those_that_peft_computes(at_root: None, name: str) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL), ADAPTERS / name)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    found = facts(ADAPTERS / name)
    assert found["modules"] == len(layers)
    assert found["ranks"] == Counter(str(layer.r["default"]) for layer in layers)
    assert found["scalings"] == Counter(f"{layer.scaling['default']:g}" for layer in layers)
    config = model.peft_config["default"]
    assert (found["rank"], found["alpha"], found["use_rslora"]) == (config.r, config.lora_alpha, config.use_rslora)
    assert (found["rank_pattern"], found["alpha_pattern"]) == (config.rank_pattern, config.alpha_pattern)
    assert found["base_model"] == config.base_model_name_or_path


@pytest.mark.parametrize("folder", sorted(ADAPTERS.iterdir()), ids=lambda path: path.name)
def test_every_fixture_is_counted_as_safetensors_counts_it(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    found = facts(folder)
    assert found["kind"] == "adapter"
    assert found["tensors"] == len(tensors)
    assert found["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert found["dtypes"] == {"F32": found["parameters"]}
    assert found["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    assert sum(group["count"] for group in found["targets"]) == found["modules"]


@pytest.mark.parametrize(
    ("name", "what", "mode"),
    [
        ("lora", "LoRA adapter", None),
        ("lora_patterns", "rsLoRA adapter", None),
        ("corda", "LoRA adapter, trained beside a residual", None),
        ("miss_balance", "MiSS adapter (balance)", "balance"),
        ("miss_mini", "MiSS adapter (mini)", "mini"),
        ("bone_bat", "Bone adapter (bat)", "bat"),
    ],
)
def test_what_the_fixtures_are(at_root: None, name: str, what: str, mode: str | None) -> None:
    found = facts(ADAPTERS / name)
    assert (found["what"], found["mode"], found["rank"]) == (what, mode, 8)
    assert found["targets"] == [{"names": EVERY, "indices": [[0, 1, 2, 3, 4, 5]], "count": 42}]


def test_dora_tokens_biases_and_experts(tmp_path: Path) -> None:
    module = {UP: LINEARS[UP]}
    dora = lora_tensors(module) | {f"base_model.model.{UP}.lora_magnitude_vector": torch.ones(24)}
    found = facts(write_adapter(tmp_path / "a", dora, lora_config(use_dora=True)))
    assert (found["what"], found["use_dora"], found["modules"]) == ("DoRA adapter", True, 1)
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 16)}
    biases = {f"base_model.model.{UP}.base_layer.bias": torch.ones(24)}
    mixed = lora_tensors(module) | rows | biases
    config = lora_config(bias="lora_only", trainable_token_indices=[1, 2])
    found = facts(write_adapter(tmp_path / "b", mixed, config))
    assert (found["trained_tokens"], found["biases"]) == ({"model.embed_tokens": 2}, [f"{UP}.bias"])
    experts = lora_tensors({"model.layers.0.mlp.experts": (24, 16)}, rank=8)
    config = lora_config(4, target_parameters=["experts.down_proj"], target_modules=[])
    assert facts(write_adapter(tmp_path / "c", experts, config))["experts"] == 1


@pytest.mark.parametrize("init", ["corda", "pissa", "pissa_niter_4", "olora", "lora_ga"])
def test_an_init_that_leaves_a_residual_is_told(tmp_path: Path, init: str) -> None:
    found = facts(write_lora(tmp_path / "a", init_lora_weights=init))
    assert (found["init"], found["trained_beside_residual"]) == (init, f"its config says init_lora_weights={init!r}")
    assert found["next"][-1] == f"corda-convert to-lora {tmp_path / 'a'} --init INIT -o OUT"


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_init_that_leaves_none_is_not(tmp_path: Path, init: object) -> None:
    found = facts(write_lora(tmp_path / "a", init_lora_weights=init))
    assert (found["init"], found["trained_beside_residual"]) == (str(init).lower(), None)


def test_the_initial_adapter_in_a_residual(command: Command, at_root: None) -> None:
    found = facts(Path("fixtures/residual/corda_init"))
    assert found["is_initial"]
    assert found["next"][1] == "corda-convert merge BASE --adapter TRAINED --init fixtures/residual/corda_init -o OUT"
    assert not facts(Path("fixtures/adapters/corda"))["is_initial"]


def test_files_of_an_adapter_stand_for_their_folder(at_root: None) -> None:
    expected = facts(ADAPTERS / "lora")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        found = facts(ADAPTERS / "lora" / name)
        assert {**found, "path": expected["path"], "next": expected["next"]} == expected


def test_the_screen_of_a_residual_adapter(command: Command, at_root: None) -> None:
    lines = screen(command, "fixtures/adapters/corda", "--base", "fixtures/model", "--for", "vllm", status=1)
    assert lines == [
        "fixtures/adapters/corda: LoRA adapter, trained beside a residual",
        "  rank     8, alpha 8, scaling 1",
        "  targets  q,k,v,o,gate,up,down × 6 layers (42 modules)",
        "  size     71,424 parameters in F32, 296.2 kB",
        "  init     true, corda_config kpm",
        "  residual its base_model_name_or_path fixtures/residual is a residual",
        "  base     fixtures/residual (a residual)",
        "  in base  model: 42 of 57 tensors, 940.0 kB",
        "           model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight, "
        "model.layers.0.mlp.up_proj.weight and 39 more",
        "  note     It was trained beside a residual: merge wants --init to put it into model.",
        "  server   vllm does not serve it as it is",
        "           wrong: it was trained beside a residual. On the base, the part that the residual lacks is there "
        "twice. The residual as the served model would be right. → to-lora --init INIT makes it an ordinary LoRA for the "
        "base, of twice the rank",
        "  mend     corda-convert to-lora fixtures/adapters/corda --init fixtures/residual/corda_init --for vllm -o OUT",
        "  then     vllm serve fixtures/model --enable-lora --lora-modules NAME=OUT",
        "  next     corda-convert merge fixtures/residual --adapter fixtures/adapters/corda -o OUT",
        "           corda-convert merge fixtures/model --adapter fixtures/adapters/corda --init "
        "fixtures/residual/corda_init -o OUT",
        "           corda-convert to-lora fixtures/adapters/corda --init fixtures/residual/corda_init -o OUT",
    ]


def test_the_readme_shows_what_is_printed(command: Command, at_root: None) -> None:
    lines = screen(command, "fixtures/adapters/lora", "--base", "fixtures/model", "--for", "vllm")
    readme = (FIXTURES.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(f"    {line}" for line in lines) in readme


def test_the_screen_of_patterns(command: Command) -> None:
    lines = screen(command, ADAPTERS / "lora_patterns")
    assert lines[1].startswith(
        "  rank     8 × 33, 4 × 6, 6 × 2, 12 × 1 modules, alpha 16 by default, scaling 5.65685 × 31, "
    )
    assert lines[2].startswith("  patterns rank down_proj → 4, ")
    assert lines[3].startswith("  patterns alpha down_proj → 12, ")


# In a model


@pytest.mark.parametrize(
    "name", ["lora", "lora_patterns", "lora_modules_to_save", "miss_balance", "miss_mini", "bone_bat"]
)
def test_the_touched_tensors_are_those_that_merge_changes(done: Command, tmp_path: Path, name: str) -> None:
    done("merge", MODEL, "--adapter", ADAPTERS / name, "-o", tmp_path / "out", "-q")
    tensors = read_json(tmp_path / "out" / "corda_convert.json")["tensors"]
    changed = [entry for entry in tensors if entry["action"] != "copied"]
    base = facts(ADAPTERS / name, base=MODEL)["base"]
    assert (base["fits"], base["tensors"], base["of_tensors"]) == (True, len(changed), len(tensors))
    assert {entry["name"] for entry in changed} >= set(base["first"])
    stored = {name: tensor.nbytes for file in MODEL.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert base["bytes"] == sum(stored[entry["name"]] for entry in changed)
    assert base["replaced"] == [entry["name"] for entry in tensors if entry["action"] == "replaced"]


@pytest.mark.parametrize(
    ("named", "shown"),
    [("acme/7b", "acme/7b"), ("{here}", "{here}"), ("/no/such/model", "BASE"), ("a\0b", "BASE"), (None, "BASE")],
)
def test_commands_name_the_base_that_the_adapter_names(tmp_path: Path, named: str | None, shown: str) -> None:
    here = write_checkpoint(tmp_path / "a base")
    name = None if named is None else named.format(here=here)
    adapter = write_lora(tmp_path / "lora", {UP: LINEARS[UP]}, base_model_name_or_path=name)
    block = write_miss(tmp_path / "miss", {UP: LINEARS[UP]}, base_model_name_or_path=name)
    base = shlex.quote(shown.format(here=here))
    assert facts(adapter)["next"][0] == f"corda-convert merge {base} --adapter {adapter} -o OUT"
    assert facts(block)["next"][1] == f"corda-convert to-lora {block} --base {base} -o OUT"
    found = facts(adapter, server="sglang")["server"]["commands"]
    assert found == [f"sglang serve --model-path {base} --enable-lora --lora-paths NAME={adapter}"]
    local = base if "here" in shown else "BASE"  # llama.cpp's converter reads a folder
    assert f"--base {local} " in facts(adapter, server="llama.cpp")["server"]["commands"][0]


def test_commands_name_the_base_that_was_asked_about_unless_it_is_a_residual(at_root: None, tmp_path: Path) -> None:
    other = shutil.copytree(MODEL, tmp_path / "other")
    assert facts(ADAPTERS / "lora", base=other)["next"][0].startswith(f"corda-convert merge {other} --adapter ")
    assert facts(ADAPTERS / "corda", base=RESIDUAL)["next"][1].startswith("corda-convert merge BASE --adapter ")
    wrong = facts(write_lora(tmp_path / "lora", {"x.y": (4, 4)}), base=other)
    assert (wrong["base"]["fits"], wrong["next"][0].split()[2]) == (False, "BASE")


def test_what_does_not_fit_is_said_as_merge_says_it(command: Command, refusal: Command, tmp_path: Path) -> None:
    wrong = {UP: (23, 16), "model.layers.7.mlp.up_proj": (24, 16)}
    adapter, model = write_lora(tmp_path / "lora", wrong), write_checkpoint(tmp_path / "model")
    problems = facts(adapter, base=model)["base"]["problems"]
    message = refusal("merge", model, "--adapter", adapter)
    assert len(problems) == 2
    for problem in problems:
        assert all(text in str(message) for text in problem.values() if text)
    lines = screen(command, adapter, "--base", model, status=1)
    assert "  in base  model: it does not fit" in lines


def test_an_adapter_of_a_tied_head_unties_it(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    model = write_checkpoint(tmp_path / "model", tensors, config={**LLAMA_CONFIG, "tie_word_embeddings": True})
    base = facts(write_lora(tmp_path / "lora", {"lm_head": (32, 16)}), base=model)["base"]
    assert base["untied"] == [["model.embed_tokens.weight", "lm_head.weight"]]
    assert base["first"] == ["lm_head.weight"]


def test_a_residual_as_base_is_noted_and_another_name_too(at_root: None, tmp_path: Path) -> None:
    notes = facts(Path("fixtures/adapters/corda"), base=RESIDUAL)["base"]["notes"]
    assert notes == ["residual is a residual; merge judges by the numbers whether the adapter was trained beside it."]
    other = write_lora(tmp_path / "lora", base_model_name_or_path="acme/seven")
    notes = facts(other, base=write_checkpoint(tmp_path / "model"))["base"]["notes"]
    assert notes == ['It names "acme/seven" as its base.']


def test_a_quantized_base_that_cannot_be_read_does_not_fit(tmp_path: Path) -> None:
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq"}}
    base = facts(write_lora(tmp_path / "lora"), base=write_checkpoint(tmp_path / "model", config=config))["base"]
    assert (base["fits"], len(base["problems"])) == (False, 1)
    assert base["problems"][0]["what"].startswith("model is quantized with gptq")


# RWKV-PEFT


def test_files_of_rwkv_peft(tmp_path: Path) -> None:
    name = "blocks.0.att.key"
    torch.save({f"{name}.disha": torch.ones(4, 16), "blocks.0.ln1.weight": torch.ones(16)}, tmp_path / "a.pth")
    found = facts(tmp_path / "a.pth")
    assert (found["what"], found["rank"], found["saved"]) == (
        "DiSHA adapter (balance) of RWKV-PEFT",
        4,
        ["blocks.0.ln1.weight"],
    )
    assert found["next"] == [f"corda-convert merge BASE.pth --adapter {tmp_path / 'a.pth'} -o OUT"]
    torch.save({f"{name}.lora_A": torch.ones(4, 16), f"{name}.lora_B": torch.ones(16, 4)}, tmp_path / "b.pth")
    found = facts(tmp_path / "b.pth")
    assert (found["rank"], found["alpha"], found["scalings"]) == (4, None, {}), "alpha does not stand in it"
    factors = {f"model.{name}.init_lora_A": torch.ones(4, 16), f"model.{name}.init_lora_B": torch.ones(16, 4)}
    torch.save(factors, tmp_path / "init_pissa.pth")
    found = facts(tmp_path / "init_pissa.pth")
    assert (found["kind"], found["is_initial"], found["rank"]) == ("adapter", True, 4)
    torch.save({f"{name}.weight": torch.ones(16, 16), "emb.weight": torch.ones(8, 16)}, tmp_path / "base.pth")
    found = facts(tmp_path / "base.pth")
    assert (found["kind"], found["what"], found["is_pickled"]) == ("checkpoint", "file of weights", True)
    assert facts(tmp_path / "a.pth", base=tmp_path / "base.pth")["base"]["fits"] is False, "it has no ln1"


# Models


def test_a_dense_model(command: Command, at_root: None) -> None:
    assert screen(command, "fixtures/model") == [
        "fixtures/model: dense model",
        "  model    LlamaForCausalLM, 6 layers, 96 wide, vocabulary 2048",
        "  size     864,480 parameters in BF16, 1.7 MB, 57 tensors in 2 files",
        "  next     corda-convert merge fixtures/model --adapter ADAPTER -o OUT",
        "           corda-convert decompose fixtures/model --cov COVARIANCES --mode kpm --rank RANK -o RESIDUAL",
    ]
    found = facts(MODEL)
    stored = [tensor for file in MODEL.glob("*.safetensors") for tensor in load_file(file).values()]
    assert found["parameters"] == sum(tensor.numel() for tensor in stored)
    assert facts(MODEL / "model.safetensors.index.json")["parameters"] == found["parameters"]


def test_a_residual_tells_its_initial_adapter(at_root: None, command: Command) -> None:
    found = facts(RESIDUAL)
    assert (found["form"], found["initial_adapter"]["rank"], found["initial_adapter"]["modules"]) == ("residual", 8, 42)
    assert "  adapter  fixtures/residual/corda_init: rank 8, alpha 8, scaling 1" in screen(command, "fixtures/residual")


def test_a_shard_leads_to_its_folder() -> None:
    found = facts(MODEL / "model-00001-of-00002.safetensors")
    assert (found["what"], found["next"]) == ("shard of a model", [f"corda-convert inspect {MODEL}"])


def test_a_model_without_a_config_and_a_pickled_one(tmp_path: Path) -> None:
    found = facts(write_checkpoint(tmp_path / "bare", config=None))
    assert (found["architecture"], found["layers"], found["form"]) == (None, 2, "dense")
    (tmp_path / "old").mkdir()
    torch.save(llama_tensors(), tmp_path / "old" / "pytorch_model.bin")
    assert facts(tmp_path / "old")["is_pickled"]


def test_quantized_models(tmp_path: Path) -> None:
    tensors = llama_tensors(dtype=torch.bfloat16)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    name = f"{UP}.weight"
    fp8 = {**tensors, name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    found = facts(write_checkpoint(tmp_path / "fp8", fp8, config=config))
    assert (found["what"], found["parameters"]) == ("model, quantized with fp8", parameters)
    assert found["quantization"] == {"method": "fp8", "is_readable": True}
    del tensors[name]
    packed = {**tensors, f"{UP}.qweight": torch.ones(2, 24, dtype=torch.int32), f"{UP}.g_idx": torch.ones(16)}
    config = {**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq"}}
    found = facts(write_checkpoint(tmp_path / "gptq", packed, config=config))
    assert (found["quantization"], found["parameters"], found["next"]) == (
        {"method": "gptq", "is_readable": False},
        None,
        [],
    )


def test_a_checkpoint_of_the_authors(tmp_path: Path) -> None:
    tensors = {
        "model.layers.0.mlp.up_proj.ALinear.weight": torch.ones(24, 4),
        "model.layers.0.mlp.up_proj.BLinear.weight": torch.ones(4, 16),
        "model.layers.0.mlp.up_proj.weight_residual": torch.ones(24, 16),
        "model.norm.weight": torch.ones(16),
    }
    folder = write_checkpoint(tmp_path / "authors", tensors, config={**LLAMA_CONFIG, "lora_r": 4})
    found = facts(folder)
    assert (found["form"], found["decomposed"]) == ("decomposed", {"modules": 1, "ranks": {"4": 1}})
    assert found["next"] == [f"corda-convert merge {folder} -o OUT"]


# Covariances and caches


def test_our_covariances() -> None:
    found = facts(COVARIANCES)
    assert (found["kind"], found["modules"], found["matrices"], found["aliases"]) == ("covariances", 42, 24, 18)
    assert (found["samples"], found["tokens"], found["normalization"]) == (256, 4666, "peft")
    assert found["inputs"] == {"96": 18, "176": 6}
    assert not found["has_few_tokens"]


def test_covariances_of_others(tmp_path: Path) -> None:
    found = facts(FIXTURES / "covariances" / "task.peft.pt")
    assert (found["kind"], found["type"], found["modules"], found["tokens"]) == ("covariances", "plain", 42, None)
    assert found["what"].endswith("PEFT's covariance_file or the CorDA authors' cache")
    assert facts(write_covariances(tmp_path / "plain.safetensors"))["what"].endswith("without metadata")
    torch.save({UP: torch.ones(16)}, tmp_path / "mean_abs.pt")
    found = facts(tmp_path / "mean_abs.pt")
    assert (found["mean_abs"], found["matrices"]) == (1, 0)
    assert "--method asvd" in found["next"][0]


def test_what_is_no_covariance_file_but_looks_like_one(tmp_path: Path) -> None:
    save_file({f"{UP}.weight": covariance(16)}, tmp_path / "square.safetensors")
    assert facts(tmp_path / "square.safetensors")["kind"] == "checkpoint"
    ours = {"format": "corda_convert.covariances", "format_version": "1"}
    save_file({UP: torch.ones(16, 8)}, tmp_path / "ours.safetensors", ours)
    with pytest.raises(CordaConvertError, match="holds tensors that are no covariances"):
        inspect(tmp_path / "ours.safetensors")


@pytest.mark.parametrize(("tokens", "few"), [(159, True), (160, False)])
def test_ten_tokens_for_each_input_are_enough(tmp_path: Path, tokens: int, few: bool) -> None:
    ours = {"format": "corda_convert.covariances", "format_version": "1", "tokens": str(tokens)}
    assert facts(write_covariances(tmp_path / "c.safetensors", {UP: covariance(16)}, ours))["has_few_tokens"] is few


def test_covariances_in_shards_and_few_tokens(tmp_path: Path) -> None:
    ours = {"format": "corda_convert.covariances", "format_version": "1", "tokens": "12"}
    (tmp_path / "covs").mkdir()
    save_file({UP: covariance(16)}, tmp_path / "covs" / "model-00001-of-00001.safetensors", ours)
    index = {"weight_map": {UP: "model-00001-of-00001.safetensors"}}
    write_json(tmp_path / "covs" / "model.safetensors.index.json", index)
    found = facts(tmp_path / "covs")
    assert (found["kind"], found["matrices"], found["has_few_tokens"]) == ("covariances", 1, True)


def test_a_cache_file_of_peft(tmp_path: Path) -> None:
    parts = {"S_WC": torch.ones(4), "U_WC": torch.ones(24, 4), "V_WC": torch.ones(16, 4)}
    torch.save({f"{UP}.eigens.{part}": tensor for part, tensor in parts.items()}, tmp_path / "cache.pt")
    found = facts(tmp_path / "cache.pt")
    assert (found["kind"], found["ranks"], found["modules"]) == ("cache", {"4": 1}, 1)
    del parts["S_WC"]
    torch.save({f"{UP}.eigens.{part}": tensor for part, tensor in parts.items()}, tmp_path / "half.pt")
    with pytest.raises(CordaConvertError, match="is no CorDA cache of PEFT"):
        inspect(tmp_path / "half.pt")


# Outputs and receipts


def test_an_output_tells_what_made_it_and_whether_it_is_whole(done: Command, command: Command, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done("merge", MODEL, "--adapter", ADAPTERS / "lora", "--dtype", "float32", "-o", output, "-q")
    found = facts(output)
    receipt = found["receipt"]
    assert (receipt["command"], receipt["inputs"], receipt["options"]["dtype"]) == (
        "merge",
        ["model", "lora"],
        "float32",
    )
    assert (receipt["files"], receipt["missing_or_changed"]) == (len(list(output.iterdir())) - 1, [])
    assert found["next"][-1] == f"corda-convert push {output} OWNER/NAME"
    alone = facts(output / "corda_convert.json")
    assert (alone["kind"], alone["receipt"]) == ("receipt", receipt)
    (output / "chat_template.jinja").unlink()
    with (output / "tokenizer.json").open("a") as stream:
        stream.write(" ")
    assert facts(output)["receipt"]["missing_or_changed"] == ["chat_template.jinja", "tokenizer.json"]
    lines = screen(command, output, status=1)
    assert "  damaged  not as the receipt says: chat_template.jinja, tokenizer.json" in lines


def test_outputs_of_the_other_commands(done: Command, tmp_path: Path) -> None:
    rest = ("--method", "svd", "--mode", "ipm", "--rank", 4, "-q")
    done("decompose", MODEL, *rest, "-o", tmp_path / "residual")
    found = facts(tmp_path / "residual")
    assert (found["form"], found["initial_adapter"]["rank"]) == ("residual", 4)
    assert found["receipt"]["command"] == "decompose"
    done("decompose", MODEL, *rest, "--no-residual", "-o", tmp_path / "init")
    found = facts(tmp_path / "init")
    assert (found["kind"], found["rank"], found["receipt"]["command"]) == ("adapter", 4, "decompose")


@pytest.mark.parametrize("content", ["{}", '{"format": "corda_convert.receipt", "files": [1]}', "[]", "{"])
def test_a_damaged_receipt_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "corda_convert.json").write_text(content)
    with pytest.raises(CordaConvertError, match=r"corda_convert\.json"):
        inspect(tmp_path)


# The command


def test_several_paths_are_each_reported_and_one_failure_counts(command: Command, tmp_path: Path) -> None:
    write_json(tmp_path / "odd.json", {})
    good = write_lora(tmp_path / "good")
    ran = command("inspect", tmp_path / "odd.json", good, tmp_path / "gone", "--json")
    assert (ran.status, ran.err) == (1, "")
    objects = [json.loads(line) for line in ran.out.splitlines()]
    assert [found["kind"] for found in objects] == [None, "adapter", None]
    assert objects[1] == inspect(good).facts
    assert {found["format"] for found in objects} == {"corda_convert.inspection"}
    assert objects[2]["error"]["what"] == f"No such file or folder: {tmp_path / 'gone'}"
    ran = command("inspect", good, tmp_path / "gone")
    assert ran.status == 1
    assert ran.out.startswith(f"{good}: LoRA adapter\n")
    assert ran.err == f"Error: No such file or folder: {tmp_path / 'gone'}\nCheck the path.\n"
    assert command("inspect", good, good).out.count(f"{good}: LoRA adapter") == 2


def test_the_status_says_whether_a_server_takes_it(command: Command, tmp_path: Path) -> None:
    assert screen(command, write_lora(tmp_path / "a", rank=24), "--for", "vllm")[-4:-2] == [
        "  server   vllm takes it as it is",
        f"  start    vllm serve BASE --enable-lora --max-lora-rank 32 --lora-modules NAME={tmp_path / 'a'}",
    ]
    lines = screen(command, write_miss(tmp_path / "b"), "--for", "sglang", status=1)
    assert "  server   sglang does not serve it as it is" in lines
    head = write_lora(tmp_path / "c", {"lm_head": (32, 16)})
    lines = screen(command, head, "--for", "vllm")
    assert any(line.startswith("           depends: factors for lm_head.") for line in lines)
    found = facts(head, server="vllm")["server"]
    assert (found["takes_it"], [finding["severity"] for finding in found["findings"]]) == (True, ["depends"])


@pytest.mark.parametrize(
    "path",
    [
        *(f"adapters/{name}" for name in ("corda", "lora", "lora_patterns", "lora_modules_to_save", "miss_mini")),
        *("adapters/miss_bat", "adapters/bone", "residual", "residual/corda_init", "model"),
        *("covariances/task.safetensors", "covariances/task.peft.pt"),
    ],
)
def test_the_commands_that_are_offered_run(done: Command, at_root: None, tmp_path: Path, path: str) -> None:
    """With the words in capitals replaced; as dry runs."""
    trained = "adapters/lora" if path == "model" else "adapters/corda"
    given = {
        "BASE": "fixtures/model",
        "MODEL": "fixtures/model",
        "RANK": "4",
        "OUT": "out",
        "RESIDUAL": "out",
        "COVARIANCES": str(COVARIANCES),
        "ADAPTER": f"fixtures/{trained}",
        "TRAINED": f"fixtures/{trained}",
    }
    commands = facts(Path("fixtures") / path)["next"]
    assert commands
    for command in commands:
        program, *words = (given.get(word, word) for word in command.split())
        assert program == "corda-convert"
        words[words.index("-o") + 1] = str(tmp_path / "out")
        done(*words, "--dry-run")


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("name", ["corda", "lora_patterns", "miss_bat", "lora_modules_to_save"])
def test_what_mends_an_adapter_for_a_server_runs(
    done: Command, at_root: None, tmp_path: Path, server: Any, name: str
) -> None:
    found = inspect(Path("fixtures/adapters") / name, server=server).facts["server"]
    replaced = {"BASE": "fixtures/model", "RANK": "4", "OUT": str(tmp_path / "out")}
    (mending,) = [[replaced.get(word, word) for word in text.split()[1:]] for text in found["mending"] or ["a b"]]
    if found["takes_it"]:
        assert (mending, "fixtures" in found["commands"][0]) == (["b"], True)
        return
    done(*mending)
    assert (mending[0] == "merge") == (found["commands"] == []) == (name == "lora_modules_to_save")
    if found["commands"]:
        assert "OUT" in found["commands"][0]
        assert inspect(tmp_path / "out", server=server).is_fine


def test_one_module_is_named_with_its_layer(tmp_path: Path, command: Command) -> None:
    modules = {"model.layers.7.experts.3.up_proj": (8, 8)}
    lines = screen(command, write_lora(tmp_path / "{}*", modules, target_modules=["up_proj"]))
    assert "  targets  model.layers.7.experts.3.up_proj (1 module)" in lines


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp", "peft"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("corda", ("--init", "fixtures/residual/corda_init")),
        ("lora_patterns", ()),
        ("miss_mini", ("--base", "fixtures/model")),
    ],
)
def test_what_to_lora_makes_for_a_server_is_taken_by_it(
    command: Command, done: Command, at_root: None, tmp_path: Path, name: str, options: tuple[str, ...], server: str
) -> None:
    adapter = f"fixtures/adapters/{name}"
    done("to-lora", adapter, *options, "--for", server, "-o", tmp_path / "lora", "-q")
    lines = screen(command, tmp_path / "lora", "--for", server)
    assert f"  server   {server} takes it as it is" in lines
    before = 0 if server == "peft" and name != "corda" else 1
    assert command("inspect", adapter, "--for", server).status == before


@pytest.mark.parametrize("path", [MODEL, COVARIANCES])
def test_what_is_asked_of_adapters_is_refused_of_others(command: Command, path: Path) -> None:
    ran = command("inspect", path, "--for", "vllm")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith(f"Error: {path} is no adapter, but a ")


def test_unknown_things_get_one_clear_message(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    save_file(lora_tensors(), tmp_path / "orphan.safetensors")
    write_lora(tmp_path / "runs" / "checkpoint-10")
    said = {
        tmp_path / "empty": "empty is nothing that corda-convert knows.",
        tmp_path / "text.txt": "text.txt is no file that corda-convert knows.",
        tmp_path / "m.gguf": "GGUF files are read by llama.cpp alone.",
        tmp_path / "orphan.safetensors": "but there is no adapter_config.json beside it.",
        tmp_path / "runs": "Give what is in it: checkpoint-10.",
        write_adapter(tmp_path / "vera", lora_tensors(), {"peft_type": "VERA"}): "has peft_type 'VERA'",
    }
    for path, message in said.items():
        ran = command("inspect", path)
        assert (ran.status, ran.out) == (1, "")
        assert ran.err.startswith("Error: ")
        assert message in ran.err


ODD = (0, -1, 2.5, "x", "", [], [1], {}, {"x": 1}, {"x": [1]}, None, True)


@pytest.mark.parametrize("name", ["lora_patterns", "corda", "miss_mini", "bone_bat", "lora_modules_to_save"])
def test_no_odd_value_in_an_adapters_config_is_a_traceback(command: Command, tmp_path: Path, name: str) -> None:
    config = read_json(ADAPTERS / name / "adapter_config.json")
    (tmp_path / "adapter_model.safetensors").symlink_to(ADAPTERS / name / "adapter_model.safetensors")
    for key in (*config, "token_indices"):
        for odd in ODD:
            write_json(tmp_path / "adapter_config.json", {**config, key: odd})
            ran = command("inspect", tmp_path, "--for", "sglang")
            assert ran.err.startswith("Error: ") if not ran.out else ran.err == "", (key, odd)


def test_no_odd_value_in_a_models_config_is_a_traceback(command: Command, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    for key in (*LLAMA_CONFIG, "text_config", "quantization_config", "lora_r", "auto_map"):
        for odd in ODD:
            write_json(folder / "config.json", {**LLAMA_CONFIG, key: odd})
            assert command("inspect", folder).status in (0, 1), (key, odd)


def test_a_folder_that_may_not_be_read_is_one_message(command: Command, tmp_path: Path) -> None:
    def forbidden(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", forbidden)
        ran = command("inspect", tmp_path, COVARIANCES)
    assert (ran.status, ran.err) == (1, f"Error: {tmp_path} cannot be read: Permission denied.\n")
    assert str(COVARIANCES) in ran.out


LOADED = """
import json, sys
from corda_convert.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(json.dumps([end.code, sorted(sys.modules)]))
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["fixtures/adapters/corda", "--base", "fixtures/model", "--for", "vllm"],
        ["fixtures/adapters/miss_bat", "--base", "fixtures/residual"],
        ["fixtures/residual", "fixtures/covariances/knowledge.safetensors"],
    ],
    ids=lambda value: value[0],
)
def test_nothing_heavy_is_loaded(arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LOADED, "inspect", *arguments], cwd=FIXTURES.parent, capture_output=True, text=True
    )
    modules = json.loads(ran.stdout.splitlines()[-1])[1]
    assert [name for name in ("torch", "transformers", "numpy", "safetensors") if name in modules] == []


def test_files_larger_than_memory_are_read_by_their_headers(tmp_path: Path) -> None:
    """A file of 100 GB without any bytes in it."""
    side = 158_112
    header = json.dumps({UP: {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side * side]}}).encode()
    path = tmp_path / "covs.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 4 * side * side)
    assert facts(path)["inputs"] == {str(side): 1}
    assert facts(path)["bytes"] > 99e9


# Names in short


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        (["lm_head"], "lm_head"),
        (["model.layers.0.q_proj"], "model.layers.0.q_proj"),
        ([f"layers.{n}.{name}" for n in range(3) for name in ("v_proj", "q_proj")], "q,v × 3 layers"),
        ([f"layers.{n}.q_proj" for n in (1, 2, 4)], "q in layers 1–2, 4"),
        ([f"h.{n}.attn.c_attn" for n in range(2)], "c_attn × 2 layers"),
        ([f"h.{n}.experts.{e}.w1" for n in range(2) for e in range(4)], "w1 × 2 layers × 4 experts"),
        (["h.0.experts.0.w1", "h.1.experts.1.w1"], "w1 (2 modules)"),
        (["lm_head", *(f"h.{n}.q_proj" for n in range(2))], "lm_head; q × 2 layers"),
    ],
)
def test_modules_in_short(modules: list[str], text: str) -> None:
    assert describe_groups([group.facts() for group in group_modules(modules)]) == text


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from("abc")), min_size=1))
def test_groups_have_every_module_once(places: set[tuple[int, int, str]]) -> None:
    modules = {f"layers.{layer}.experts.{expert}.{name}" for layer, expert, name in places}
    groups = group_modules(sorted(modules))
    assert sum(group.count for group in groups) == len(modules)
    for group in groups:
        if group.indices:
            layers, experts = group.indices
            written = {
                name.replace("*", str(layer), 1).replace("*", str(expert), 1)
                for name in group.names
                for layer in layers
                for expert in experts
            }
            assert written <= modules
            assert len(written) == group.count
