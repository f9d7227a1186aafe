"""Quantized bases through the plan and the engine: everything dequantized, or fp8 kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from building import LLAMA_CONFIG, random, read_json, write_checkpoint, write_lora
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssConfig, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import corda_convert
from corda_convert.cli import cli
from corda_convert.errors import CordaConvertError, NotFinite, UnsupportedInput
from corda_convert.linalg.fp8 import dequantize_blocks, quantize_blocks
from corda_convert.operations.bases import read_base
from corda_convert.operations.merge import MergeOptions
from corda_convert.operations.options import RunOptions
from corda_convert.operations.production import checkpoint_files
from corda_convert.operations.transforms import Rounding
from corda_convert.plan import packing
from corda_convert.plan.model import ComputeJob

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about quantizers and their kernels

BLOCK = (16, 16)
QUANTIZATION = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
FP8_CONFIG = {
    **LLAMA_CONFIG,
    "dtype": "bfloat16",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "quantization_config": QUANTIZATION,
}
LAYER = "model.layers.0"
SHAPES = {
    **{f"{LAYER}.self_attn.{name}_proj": (32, 32) for name in "qkvo"},
    **{f"{LAYER}.mlp.{name}_proj": (48, 32) for name in ("gate", "up")},
    f"{LAYER}.mlp.down_proj": (32, 48),
}
ADAPTED = {name: SHAPES[name] for name in (f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.down_proj")}


def fp8_llama() -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": random(32, 32, dtype=torch.bfloat16),
        f"{LAYER}.input_layernorm.weight": torch.ones(32),  # float32, as some checkpoints keep a few tensors
        f"{LAYER}.post_attention_layernorm.weight": torch.ones(32, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(32, dtype=torch.bfloat16),
        "lm_head.weight": random(32, 32, seed=9, dtype=torch.bfloat16),
    }
    for place, (name, shape) in enumerate(SHAPES.items()):
        codes, scales = quantize_blocks(random(*shape, seed=20 + place), BLOCK, torch.float32)
        tensors |= {f"{name}.weight": codes.contiguous(), f"{name}.weight_scale_inv": scales}
    return tensors


def merged(
    source: Path,
    adapter: Path,
    output: Path,
    *,
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
    **options: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The output's tensors, and its receipt."""
    outcome = corda_convert.merge(source, adapter=adapter, output=output, options=MergeOptions(**options), run=run)
    tensors: dict[str, Tensor] = {}
    for path in output.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors, outcome.receipt


def facts_of(receipt: dict[str, Any], name: str) -> dict[str, Any]:
    (facts,) = (entry for entry in receipt["tensors"] if entry["name"] == name)
    return facts


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "adapter", ADAPTED, rank=4, target_modules=["q_proj", "down_proj"])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("rounding", ["nearest", "peft"])
def test_an_fp8_model_becomes_a_plain_one_that_transformers_loads(
    tmp_path: Path, lora: Path, shards: int, rounding: Rounding
) -> None:
    stored = fp8_llama()
    source = write_checkpoint(tmp_path / "model", stored, config=FP8_CONFIG, shards=shards)
    tensors, receipt = merged(source, lora, tmp_path / "out", rounding=rounding)
    assert set(tensors) == {name for name in stored if not name.endswith("_scale_inv")}
    assert {name for name, tensor in tensors.items() if tensor.dtype != torch.bfloat16} == {
        f"{LAYER}.input_layernorm.weight"
    }
    factors = load_file(lora / "adapter_model.safetensors")
    for module in SHAPES:
        plain = dequantize_blocks(stored[f"{module}.weight"], stored[f"{module}.weight_scale_inv"], BLOCK)
        if rounding == "peft":
            plain = plain.bfloat16().float()
        if module in ADAPTED:
            lora_A, lora_B = (factors[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
            plain = plain + 2 * (lora_B @ lora_A)
        assert torch.equal(tensors[f"{module}.weight"], plain.bfloat16()), module
    up = facts_of(receipt, f"{LAYER}.mlp.up_proj.weight")
    assert (up["action"], up["from"]) == ("dequantized", "fp8")
    assert facts_of(receipt, f"{LAYER}.mlp.down_proj.weight")["action"] == "folded"
    assert receipt["quantization"] == {"method": "fp8", "weights": len(SHAPES), "activation_scales_left_out": []}
    assert any("the output has plain weights; --requantize keeps fp8" in warning for warning in receipt["warnings"])
    (model,) = (entry for entry in receipt["inputs"] if entry["role"] == "model")
    assert [file["name"] for file in model["files"]] == sorted(path.name for path in source.glob("*.safetensors"))
    assert all(file["header_sha256"] for file in model["files"])
    config = read_json(tmp_path / "out" / "config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    if shards == 1:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
        assert all(torch.equal(loaded[name], tensors[name].to(loaded[name].dtype)) for name in tensors)


def test_untouched_weights_are_what_transformers_dequantizes(tmp_path: Path, lora: Path) -> None:
    source = write_checkpoint(tmp_path / "model", fp8_llama(), config=FP8_CONFIG)
    tensors, _ = merged(source, lora, tmp_path / "out")
    quantization = FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype="bfloat16"
    ).state_dict()
    for module in SHAPES.keys() - ADAPTED.keys():
        assert torch.equal(theirs[f"{module}.weight"], tensors[f"{module}.weight"]), module


def test_another_dtype_is_taken_for_every_tensor(tmp_path: Path, lora: Path) -> None:
    stored = fp8_llama()
    source = write_checkpoint(tmp_path / "model", stored, config=FP8_CONFIG)
    tensors, _ = merged(source, lora, tmp_path / "out", run=RunOptions(dtype="float32"))
    up = f"{LAYER}.mlp.up_proj.weight"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert torch.equal(tensors[up], dequantize_blocks(stored[up], stored[f"{up}_scale_inv"], BLOCK))


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, lora: Path) -> None:
    stored = fp8_llama()
    up = f"{LAYER}.mlp.up_proj.weight"
    stored[up] = stored[up].float().abs().to(torch.float8_e4m3fn)
    stored[f"{up}_scale_inv"][0, 0] *= 1e7
    source = write_checkpoint(tmp_path / "model", stored, config=FP8_CONFIG)
    with pytest.raises(NotFinite, match=r"mlp\.up_proj\.weight holds values outside the range of F16"):
        merged(source, lora, tmp_path / "out", run=RunOptions(dtype="float16"))


def test_fp8_that_stays_fp8_keeps_its_config_and_its_untouched_bits(tmp_path: Path, lora: Path) -> None:
    stored = fp8_llama()
    source = write_checkpoint(tmp_path / "model", stored, config=FP8_CONFIG, shards=2)
    tensors, receipt = merged(source, lora, tmp_path / "out", requantize=True)
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert facts_of(receipt, f"{LAYER}.mlp.down_proj.weight_scale_inv")["action"] == "requantized"
    assert set(tensors) == set(stored)
    for name, tensor in stored.items():
        same = torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8))
        assert same == (name.rpartition(".")[0] not in ADAPTED), name


def test_a_changed_config_tells_of_the_quantization_as_the_stored_one_does(tmp_path: Path) -> None:
    config = {
        "vocab_size": 32,
        "text_config": {"vocab_size": 32, "quantization_config": QUANTIZATION},
        "dtype": "float32",
    }
    tensors = {name: tensor for name, tensor in fp8_llama().items() if "up_proj" in name}
    source = write_checkpoint(tmp_path, tensors, config=config)
    changed = {"vocab_size": 40, "text_config": {"vocab_size": 40}, "dtype": "float32"}
    kept = read_base(source, RunOptions(), requantize=True)
    assert kept.config() is None
    assert kept.config(changed) == {
        "vocab_size": 40,
        "text_config": {"vocab_size": 40, "quantization_config": QUANTIZATION},
        "dtype": "float32",
    }
    plain = read_base(source, RunOptions())
    assert plain.config() == {"vocab_size": 32, "text_config": {"vocab_size": 32}, "dtype": "bfloat16"}
    assert plain.config(changed) == {"vocab_size": 40, "text_config": {"vocab_size": 40}, "dtype": "bfloat16"}


@pytest.mark.parametrize("path", ["model.gguf", "gptq"])
def test_merge_refuses_other_methods_by_name(tmp_path: Path, lora: Path, path: str) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    write_checkpoint(tmp_path / "gptq", config={**LLAMA_CONFIG, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UnsupportedInput, match=rf"is quantized with {path.removeprefix('model.')}"):
        merged(tmp_path / path, lora, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{"subtract": "initial"}, {}])
def test_requantize_without_an_adapter_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    source = write_checkpoint(tmp_path / "model", fp8_llama(), config=FP8_CONFIG)
    with pytest.raises(UnsupportedInput, match="--requantize goes with --adapter"):
        corda_convert.merge(source, output=tmp_path / "out", options=MergeOptions(requantize=True, **options))


def test_the_command_line_keeps_fp8(tmp_path: Path, lora: Path) -> None:
    source = write_checkpoint(tmp_path / "model", fp8_llama(), config=FP8_CONFIG)
    arguments = ["merge", str(source), "--adapter", str(lora), "--requantize", "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert (
        load_file(tmp_path / "out" / "model.safetensors")[f"{LAYER}.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn
    )


def test_a_shard_of_scales_only_has_no_counterpart(tmp_path: Path, lora: Path) -> None:
    stored = fp8_llama()
    names = sorted(stored, key=lambda name: name.endswith("_scale_inv"))
    source = write_checkpoint(tmp_path / "model", {name: stored[name] for name in names}, config=FP8_CONFIG, shards=4)
    assert all(name.endswith("_scale_inv") for name in load_file(source / "model-00004-of-00004.safetensors"))
    merged(source, lora, tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3)
    ]


def test_a_stack_of_experts_is_dequantized_by_the_rows_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 1 << 10)
    base = read_base(gpt_oss(tmp_path)[0], RunOptions())
    plan = packing.pack(checkpoint_files(base.written, {}, None))
    chunks = [chunk for job in plan.jobs if isinstance(job, ComputeJob) for chunk in job.chunks]
    largest = max(write.nbytes for chunk in chunks for write in chunk.writes)
    assert largest < base.readable.spec(f"{LAYER}.mlp.experts.gate_up_proj").row_nbytes


def test_requantize_is_refused_where_it_means_nothing(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain")
    with pytest.raises(UnsupportedInput, match="plain is not quantized"):
        read_base(plain, RunOptions(), requantize=True)
    source = write_checkpoint(tmp_path / "model", fp8_llama(), config=FP8_CONFIG)
    with pytest.raises(UnsupportedInput, match="Leave out --requantize, or --dtype and --rounding"):
        read_base(source, RunOptions(dtype="bfloat16"), requantize=True)
    with pytest.raises(UnsupportedInput, match="Leave out --requantize, or --dtype and --rounding"):
        read_base(source, RunOptions(), rounding="peft", requantize=True)


def gpt_oss(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A tiny gpt-oss as it is published: experts in mxfp4, the rest in bfloat16."""
    config = GptOssConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_local_experts=4, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, num_experts_per_tok=2, layer_types=["full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for name in (f"{LAYER}.mlp.experts.gate_up_proj", f"{LAYER}.mlp.experts.down_proj"):
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(115, 125, blocks.shape[:-1], dtype=torch.uint8, generator=generator)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    saved = {**config.to_dict(), "architectures": ["GptOssForCausalLM"], "quantization_config": quantization}
    return write_checkpoint(folder, tensors, config=saved, shards=2), tensors


def test_gpt_oss_becomes_what_transformers_dequantizes(tmp_path: Path) -> None:
    source, stored = gpt_oss(tmp_path / "model")
    adapted = {f"{LAYER}.self_attn.o_proj": (32, 32)}
    adapter = write_lora(tmp_path / "adapter", adapted, rank=4, target_modules=["o_proj"])
    tensors, receipt = merged(source, adapter, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=Mxfp4Config(dequantize=True), dtype="bfloat16"
    ).state_dict()
    assert set(tensors) == set(theirs)
    changed = {name for name, tensor in tensors.items() if not torch.equal(theirs[name], tensor)}
    assert changed == {f"{LAYER}.self_attn.o_proj.weight"}
    down = facts_of(receipt, f"{LAYER}.mlp.experts.down_proj")
    assert (down["action"], down["from"]) == ("dequantized", "mxfp4")
    kept, _ = merged(source, adapter, tmp_path / "kept", requantize=True)
    assert set(kept) == set(stored)
    assert {name for name in stored if not torch.equal(kept[name], stored[name])} == changed


def test_lora_on_mxfp4_experts_gives_the_bits_of_the_merge_into_the_plain_model(tmp_path: Path) -> None:
    source, stored = gpt_oss(tmp_path / "model")
    experts = f"{LAYER}.mlp.experts"
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales"))}
    for name in (f"{experts}.gate_up_proj", f"{experts}.down_proj"):
        plain[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    config = {key: value for key, value in read_json(source / "config.json").items() if key != "quantization_config"}
    unquantized = write_checkpoint(tmp_path / "plain", plain, config=config)
    model = AutoModelForCausalLM.from_pretrained(unquantized, dtype="bfloat16")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=[], target_parameters=targets))
    for place, (name, parameter) in enumerate(peft.named_parameters()):
        if "lora_" in name:
            parameter.data = random(*parameter.shape, seed=place)
    peft.save_pretrained(tmp_path / "adapter")
    tensors, receipt = merged(source, tmp_path / "adapter", tmp_path / "out")
    expected, _ = merged(unquantized, tmp_path / "adapter", tmp_path / "expected")
    assert facts_of(receipt, f"{experts}.gate_up_proj")["action"] == "folded"
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert not torch.equal(tensors[f"{experts}.down_proj"], plain[f"{experts}.down_proj"])
    with pytest.raises(CordaConvertError, match="is stored as mxfp4: --requantize is for fp8"):
        merged(source, tmp_path / "adapter", tmp_path / "kept", requantize=True)
