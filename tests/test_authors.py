"""Checkpoints of the CorDA authors' scripts, merged without an adapter: compared with float64, and run by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from building import HIDDEN, LAYER_SHAPES, LINEARS, LLAMA_CONFIG, UP, llama_tensors, random, read_json, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from corda_convert import MergeOptions, RunOptions, merge

Refusal = Callable[..., str]

RANK = 3
CODE = ("configuration_oursvd_llama.py", "modeling_oursvd_llama.py")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*SwigPy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Decomposed(nn.Module):
    """What the authors' code puts in the place of a Linear."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool) -> None:
        super().__init__()
        self.ALinear = nn.Linear(RANK, d_out, bias=bias)
        self.BLinear = nn.Linear(d_in, RANK, bias=False)
        self.weight_residual = nn.Parameter(torch.zeros(d_out, d_in))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.ALinear(self.BLinear(inputs)) + inputs @ self.weight_residual.T


def authors_config(**changes: Any) -> dict[str, Any]:
    auto_map = {
        "AutoConfig": "configuration_oursvd_llama.CovSVDLlamaConfig",
        "AutoModelForCausalLM": "modeling_oursvd_llama.CovSVDLlamaForCausalLM",
    }
    own = {"architectures": ["CovSVDLlamaForCausalLM"], "auto_map": auto_map, "lora_r": RANK, "truncation_ranks": None}
    return {**LLAMA_CONFIG, **own, "_name_or_path": "meta-llama/Llama-2-7b-hf", **changes}


def authors_tensors(*, dtype: torch.dtype = torch.float32, bias: bool = False) -> dict[str, Tensor]:
    """The tiny Llama with every Linear but the head decomposed."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in llama_tensors(dtype=dtype).items():
        module = name.removesuffix(".weight")
        if module not in LINEARS:
            tensors[name] = tensor
            continue
        (d_out, d_in), seed = LINEARS[module], 400 + 4 * len(tensors)
        tensors[f"{module}.weight_residual"] = tensor
        tensors[f"{module}.BLinear.weight"] = random(RANK, d_in, seed=seed, dtype=dtype)
        tensors[f"{module}.ALinear.weight"] = random(d_out, RANK, seed=seed + 1, dtype=dtype)
        if bias and "self_attn" in module:
            tensors[f"{module}.ALinear.bias"] = random(d_out, seed=seed + 2, dtype=dtype)
    return tensors


def write_authors(folder: Path, tensors: Mapping[str, Tensor] | None = None, *, shards: int = 1, **config: Any) -> Path:
    tensors = authors_tensors() if tensors is None else tensors
    write_checkpoint(folder, tensors, shards=shards, config=authors_config(**config))
    for name in CODE:
        (folder / name).write_text("raise SystemExit('code of a checkpoint must not run')\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def dense(tensors: Mapping[str, Tensor], module: str) -> Tensor:
    left, right = tensors[f"{module}.ALinear.weight"].double(), tensors[f"{module}.BLinear.weight"].double()
    return left @ right + tensors[f"{module}.weight_residual"].double()


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


# The weights


@pytest.mark.parametrize("shards", [1, 7])
def test_every_triple_becomes_its_sum_under_the_layers_own_name(tmp_path: Path, shards: int) -> None:
    tensors = authors_tensors()
    merge(write_authors(tmp_path / "model", shards=shards), output=tmp_path / "out")
    found = weights(tmp_path / "out")
    assert found.keys() == llama_tensors().keys()
    for name, tensor in found.items():
        module = name.removesuffix(".weight")
        if module in LINEARS:
            torch.testing.assert_close(tensor.double(), dense(tensors, module), rtol=1e-6, atol=1e-5)
        else:
            assert torch.equal(tensor, tensors[name])


def test_a_shard_that_would_be_empty_is_left_out_and_the_index_is_of_what_there_is(tmp_path: Path) -> None:
    tensors = authors_tensors()
    factors = {name: tensor for name, tensor in tensors.items() if "Linear" in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in factors}
    folder = write_authors(tmp_path / "model", {**factors, **rest}, shards=3)
    shard_of = read_json(folder / "model.safetensors.index.json")["weight_map"]
    assert {shard_of[name] for name in rest}.isdisjoint({"model-00001-of-00003.safetensors"})
    merge(folder, output=tmp_path / "out")
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    files = {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files == {f"model-0000{place}-of-00003.safetensors" for place in (2, 3)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in llama_tensors().values())


def test_half_precision_is_computed_in_float32_and_rounded_once(tmp_path: Path) -> None:
    tensors = authors_tensors(dtype=torch.float16)
    merge(write_authors(tmp_path / "model", tensors), output=tmp_path / "out")
    found = weights(tmp_path / "out")
    for module in LINEARS:
        exact = dense(tensors, module)
        weight = found[f"{module}.weight"]
        assert weight.dtype == torch.float16
        assert ((weight.double() - exact).abs() <= exact.abs() * 2.0**-11 * 1.001 + 1e-6).all()


def test_the_residual_decides_the_dtype_unless_one_is_chosen(tmp_path: Path) -> None:
    tensors = authors_tensors(dtype=torch.bfloat16)
    tensors |= {name: tensor.float() for name, tensor in tensors.items() if "Linear" in name}
    folder = write_authors(tmp_path / "model", tensors)
    merge(folder, output=tmp_path / "own")
    assert weights(tmp_path / "own")[f"{UP}.weight"].dtype == torch.bfloat16
    merge(folder, output=tmp_path / "chosen", run=RunOptions(dtype="float32"))
    found = weights(tmp_path / "chosen")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    torch.testing.assert_close(found[f"{UP}.weight"].double(), dense(tensors, UP), rtol=1e-6, atol=1e-5)


def test_pickled_checkpoints_are_read_too(tmp_path: Path) -> None:
    merge(write_authors(tmp_path / "model"), output=tmp_path / "expected")
    pickled = write_authors(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(authors_tensors(), pickled / "pytorch_model.bin")
    merge(pickled, output=tmp_path / "found")
    found, expected = weights(tmp_path / "found"), weights(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_one_file_without_a_config_and_one_pth_as_output(tmp_path: Path, done: Callable[..., Any]) -> None:
    folder = write_authors(tmp_path / "model")
    merge(folder, output=tmp_path / "expected")
    ran = done("merge", folder / "model.safetensors", "--format", "pth", "-o", tmp_path / "out")
    assert ran.out.startswith(f"Merged the decomposed layers of model → {tmp_path / 'out'}\n")
    assert f"in the model, {len(LINEARS)} modules, rank {RANK}\n" in ran.out
    found, expected = torch.load(tmp_path / "out" / "model.pth", weights_only=True), weights(tmp_path / "expected")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# The model


@pytest.mark.parametrize("bias", [False, True])
def test_transformers_loads_the_result_and_gives_the_logits_of_the_decomposed_model(
    tmp_path: Path, *, bias: bool
) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    tensors = authors_tensors(bias=bias)
    merge(write_authors(tmp_path / "model", tensors, attention_bias=bias), output=tmp_path / "out")
    made, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(made) is LlamaForCausalLM
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    config = {key: value for key, value in LLAMA_CONFIG.items() if key != "architectures"}
    theirs = LlamaForCausalLM(LlamaConfig(**config, attention_bias=bias)).eval()
    for module, (d_out, d_in) in LINEARS.items():
        parent, _, name = module.rpartition(".")
        setattr(theirs.get_submodule(parent), name, Decomposed(d_in, d_out, bias=bias and "self_attn" in module))
    theirs.load_state_dict(tensors, strict=True)
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        ours, expected = made.eval()(tokens).logits, theirs(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_config_is_that_of_the_plain_architecture(tmp_path: Path) -> None:
    folder = write_authors(tmp_path / "model")
    outcome = merge(folder, output=tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == LLAMA_CONFIG
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "config.json", "corda_convert.json", "model.safetensors", "tokenizer.json"}
    assert outcome.receipt["not_carried_over"] == sorted(CODE)
    assert outcome.receipt["decomposed"] == {"modules": len(LINEARS), "ranks": [RANK]}
    assert outcome.receipt["summary"]["tensors"]["folded"] == len(LINEARS)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "base_model: meta-llama/Llama-2-7b-hf" in card


def test_code_that_the_model_needs_besides_is_kept(tmp_path: Path) -> None:
    auto_map = {
        "AutoConfig": "alice/model--my_settings.CovSVDMistralConfig",
        "AutoModelForCausalLM": "alice/model--my_model.CovSVDMistralForCausalLM",
        "AutoTokenizer": "my_tokens.Tokens",
    }
    folder = write_authors(tmp_path / "model", architectures=["CovSVDMistralForCausalLM"], auto_map=auto_map)
    for name in ("my_settings.py", "my_model.py", "my_tokens.py"):
        (folder / name).write_text("", encoding="utf-8")
    outcome = merge(folder, output=tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["auto_map"] == {"AutoTokenizer": "my_tokens.Tokens"}
    assert [path.name for path in (tmp_path / "out").glob("*.py")] == ["my_tokens.py"]
    assert outcome.receipt["not_carried_over"] == sorted([*CODE, "my_settings.py", "my_model.py"])


def test_a_dry_run_tells_what_would_be_folded_and_writes_nothing(tmp_path: Path) -> None:
    outcome = merge(write_authors(tmp_path / "model"), output=tmp_path / "out", run=RunOptions(dry_run=True))
    assert outcome.receipt["plan"]["tensors"]["folded"] == len(LINEARS)
    assert not (tmp_path / "out").exists()


# Refusals


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("ALinear.weight", "has BLinear.weight and weight_residual but no ALinear.weight."),
        ("BLinear.weight", "has ALinear.weight and weight_residual but no BLinear.weight."),
        ("weight_residual", "has ALinear.weight and BLinear.weight but no weight_residual."),
    ],
)
def test_an_incomplete_triple_is_refused_by_name(tmp_path: Path, refusal: Refusal, missing: str, message: str) -> None:
    tensors = authors_tensors()
    del tensors[f"{UP}.{missing}"]
    assert f"model: {UP} {message}" in refusal("merge", write_authors(tmp_path / "model", tensors))


@pytest.mark.parametrize(
    ("added", "shape", "message"),
    [
        ("weight", LINEARS[UP], f"{UP} is decomposed, and has {UP}.weight too."),
        ("BLinear.bias", (RANK,), f"{UP} is decomposed, and has {UP}.BLinear.bias too."),
        ("bias", (LINEARS[UP][0],), f"{UP} is decomposed, and has {UP}.bias too."),
        ("ALinear.bias", (RANK,), f"the parts of {UP} do not go together: ALinear.bias (3,)"),
        ("ALinear.weight", (5, RANK), f"the parts of {UP} do not go together: ALinear.weight (5, 3)"),
        ("BLinear.weight", (RANK, 5), f"the parts of {UP} do not go together"),
        ("BLinear.weight", (RANK + 1, HIDDEN), f"the parts of {UP} do not go together"),
    ],
)
def test_a_layer_whose_parts_do_not_go_together_is_refused(
    tmp_path: Path, refusal: Refusal, added: str, shape: tuple[int, ...], message: str
) -> None:
    tensors = authors_tensors() | {f"{UP}.{added}": random(*shape)}
    assert message in refusal("merge", write_authors(tmp_path / "model", tensors))


def test_another_rank_than_the_configs_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    message = refusal("merge", write_authors(tmp_path / "model", lora_r=64))
    assert f"model: {UP} has rank 3; config.json says lora_r 64." in message


def test_all_problems_come_together(tmp_path: Path, refusal: Refusal) -> None:
    tensors = authors_tensors()
    modules = [f"model.layers.0.{name}" for name in LAYER_SHAPES][:2]
    for module in modules:
        del tensors[f"{module}.weight_residual"]
    message = refusal("merge", write_authors(tmp_path / "model", tensors))
    assert all(f"{module} has ALinear.weight and BLinear.weight but no" in message for module in modules)


def test_poisoned_factors_are_named(tmp_path: Path, refusal: Refusal) -> None:
    tensors = authors_tensors()
    tensors[f"{UP}.ALinear.weight"][0, 0] = float("inf")
    assert f"{UP}.ALinear.weight in " in refusal("merge", write_authors(tmp_path / "model", tensors))


def test_quantized_parts_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    tensors = authors_tensors() | {f"{UP}.weight_residual": torch.zeros(LINEARS[UP], dtype=torch.int8)}
    assert f"{UP}.weight_residual has the dtype I8" in refusal("merge", write_authors(tmp_path / "model", tensors))


@pytest.mark.parametrize("options", [("--alpha", "8"), ("--scale", "2"), ("--init", "model"), ("--residual", "model")])
def test_options_of_adapters_are_refused(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    folder = write_authors(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert refusal("merge", folder, *options) == (
        "--init, --residual, --scale and --alpha go with an adapter; model holds its own.\nLeave them out."
    )


def test_without_an_adapter_there_is_nothing_to_merge_into_another_model(tmp_path: Path, refusal: Refusal) -> None:
    assert refusal("merge", write_checkpoint(tmp_path / "model")) == (
        "There is nothing to merge.\n"
        "No adapter is given, and model is no checkpoint of the CorDA authors, which holds its own.\n"
        "Give one --adapter or several, or --subtract."
    )


def test_the_receipt_is_that_of_a_merge(tmp_path: Path) -> None:
    merge(write_authors(tmp_path / "model"), output=tmp_path / "out", options=MergeOptions())
    receipt = json.loads((tmp_path / "out" / "corda_convert.json").read_text(encoding="utf-8"))
    folded = next(tensor for tensor in receipt["tensors"] if tensor["name"] == f"{UP}.weight")
    tensors = authors_tensors()
    change = dense(tensors, UP) - tensors[f"{UP}.weight_residual"].double()
    assert (receipt["command"], folded["action"], folded["changes"][0]["rank"]) == ("merge", "folded", RANK)
    assert folded["delta_norm"] == pytest.approx(float(change.norm()), rel=1e-6)
