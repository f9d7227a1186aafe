"""Folding into block-fp8 that stays fp8, against loops in float64 and transformers' own quantization."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from building import random, write_checkpoint, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from corda_convert import engine
from corda_convert.adapters import read_adapter
from corda_convert.checkpoint.dequantized import dequantized
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.quantized import Quantization
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.errors import CordaConvertError, PlanRefused
from corda_convert.linalg.fp8 import dequantize_blocks, quantize_blocks
from corda_convert.operations.edits import Applied, collect_edits, fit_changes, produced
from corda_convert.operations.production import checkpoint_files
from corda_convert.operations.requantize import requantized
from corda_convert.operations.transforms import CastTransform
from corda_convert.plan import packing
from corda_convert.plan.model import Produced

BLOCK = (128, 128)
FP8 = Quantization("fp8", None, BLOCK)
SCALE_DTYPES = [torch.float32, torch.bfloat16, torch.float8_e8m0fnu]


def by_loops(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Block by block in float64: s = amax / 448 rounded to float32, q = w / s rounded to the nearest F8_E4M3."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[~values.isnan()].unique()
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    for down in range(scales.shape[0]):
        for right in range(scales.shape[1]):
            part = (slice(down * block[0], (down + 1) * block[0]), slice(right * block[1], (right + 1) * block[1]))
            largest = float(weight[part].abs().max())
            scale = torch.tensor(largest / 448 if largest else 1.0)
            scales[down, right] = scale
            scaled = weight[part].double() / scale.double()
            place = torch.searchsorted(values, scaled).clamp(1, len(values) - 1)
            low, high = values[place - 1], values[place]
            codes[part] = torch.where(scaled - low <= high - scaled, low, high).float().to(torch.float8_e4m3fn)
    return codes, scales


@pytest.mark.parametrize("shape", [(160, 256), (576, 130), (5, 7), (256, 384)])
def test_quantizing_is_the_nearest_number_at_the_scale_of_the_block(shape: tuple[int, int]) -> None:
    weight = random(*shape, seed=3) * torch.logspace(-3, 3, shape[0])[:, None]
    weight[: min(128, shape[0]), : min(128, shape[1])] = 0
    codes, scales = quantize_blocks(weight, BLOCK, torch.float32)
    expected, expected_scales = by_loops(weight, BLOCK)
    assert torch.equal(scales, expected_scales)
    ties = codes.float() != expected.float()  # the loops take the lower number of a tie, E4M3 the even one
    step = (codes.double() - expected.double())[ties].abs()
    distance = (
        weight.double() / scales.double().repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    )
    assert torch.allclose((distance[ties] - codes.double()[ties]).abs(), step / 2, rtol=1e-5)
    assert int(ties.sum()) < 0.001 * weight.numel() + 2


@pytest.mark.parametrize(("dtype", "scale_format"), [(torch.float32, "float"), (torch.float8_e8m0fnu, "ue8m0")])
def test_quantizing_agrees_with_transformers(dtype: torch.dtype, scale_format: str) -> None:
    weight = random(256, 384, seed=4)
    weight[:128, :128] = weight[:128, :128].clamp(-3.5, 3.5)  # 448 times a power of two
    codes, scales = quantize_blocks(weight, BLOCK, dtype)
    config = SimpleNamespace(weight_block_size=BLOCK, scale_fmt=scale_format)
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=config))._quantize_one("a.weight", weight)
    assert torch.allclose(scales.float(), theirs["a.weight_scale_inv"].float(), rtol=3e-7)
    different = codes.float() != theirs["a.weight"].float()
    assert int(different.sum()) <= (0 if scale_format == "ue8m0" else 20)  # they multiply by 1/s, we divide by s


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_quantizing_what_was_quantized_changes_no_number(dtype: torch.dtype) -> None:
    first = quantize_blocks(random(160, 256, seed=5), BLOCK, dtype)
    values = dequantize_blocks(*first, BLOCK)
    second = quantize_blocks(values, BLOCK, dtype)
    if dtype != torch.float8_e8m0fnu:  # there a largest number that was rounded down to 224 halves the scale
        assert torch.equal(second[0].view(torch.uint8), first[0].view(torch.uint8))
        assert torch.allclose(second[1].float(), first[1].float(), rtol=2e-7, atol=0)
    assert torch.allclose(dequantize_blocks(*second, BLOCK), values, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_the_largest_and_the_smallest_numbers_stay_finite(dtype: torch.dtype) -> None:
    weight = torch.tensor([[3.0e38, -1.0], [1e-45, 0.0], [9e-43, 0.0], [449.9, 448.1]])
    for block in ((1, 2), (1, 1), (4, 2)):
        codes, scales = quantize_blocks(weight, block, dtype)
        assert bool(torch.isfinite(codes.float()).all())
        assert bool(torch.isfinite(scales.float()).all())
        assert bool((scales.float() > 0).all())


CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 160,
    "intermediate_size": 576,
    "vocab_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)},
}
LAYER = "model.layers.0"
SHAPES = {
    **{f"{LAYER}.self_attn.{name}_proj": (160, 160) for name in "qkvo"},
    **{f"{LAYER}.mlp.{name}_proj": (576, 160) for name in ("gate", "up")},
    f"{LAYER}.mlp.down_proj": (160, 576),
}
ADAPTED = {
    name: SHAPES[name] for name in (f"{LAYER}.self_attn.q_proj", f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.down_proj")
}


def fp8_tensors(scale_dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    tensors = {
        "model.embed_tokens.weight": random(32, 160, dtype=torch.bfloat16),
        f"{LAYER}.input_layernorm.weight": torch.ones(160, dtype=torch.bfloat16),
        f"{LAYER}.post_attention_layernorm.weight": torch.ones(160, dtype=torch.bfloat16),
        "model.norm.weight": torch.ones(160, dtype=torch.bfloat16),
        "lm_head.weight": random(32, 160, seed=9, dtype=torch.bfloat16),
    }
    for place, (name, shape) in enumerate(SHAPES.items()):
        codes, scales = quantize_blocks(random(*shape, seed=20 + place), BLOCK, scale_dtype)
        # no number above 224, and so a scale that the block would not be given again: what is quantized again shows
        codes, scales = (codes.float() / 2).to(torch.float8_e4m3fn), (scales.float() * 2).to(scale_dtype)
        tensors |= {f"{name}.weight": codes.contiguous(), f"{name}.weight_scale_inv": scales}
    return tensors


def merged(source: Path, adapter: Path, output: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The quantized checkpoint with the adapter folded in, through the plan and the engine; and the facts."""
    checkpoint = read_checkpoint(source)
    readable = dequantized(checkpoint, FP8)
    read = read_adapter(adapter)
    names = NameMap(readable, read_structure(readable.root, readable.config, readable.tensors))
    edits = collect_edits([Applied(read)], [fit_changes(read, names)], names)
    touched = requantized(produced(edits, names, None, "nearest"), readable)
    plan = packing.pack(checkpoint_files(checkpoint, touched, None), workers=2)
    record = engine.run(plan, output, torch.device("cpu"))
    tensors: dict[str, Tensor] = {}
    for file in plan.files:
        tensors |= load_file(output / file.name)
    return tensors, dict(record.facts)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even these small weights go through in several blocks of rows."""
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", 1 << 12)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_touched_weights_are_quantized_again_and_the_rest_keeps_its_bits(
    tmp_path: Path, shards: int, scale_dtype: torch.dtype
) -> None:
    stored = fp8_tensors(scale_dtype)
    source = write_checkpoint(tmp_path / "model", stored, config=CONFIG, shards=shards)
    adapter = write_lora(tmp_path / "adapter", ADAPTED, rank=4, target_modules=["q_proj", "up_proj", "down_proj"])
    factors = load_file(adapter / "adapter_model.safetensors")
    result, facts = merged(source, adapter, tmp_path / "out")
    assert set(result) == set(stored)
    for name, tensor in stored.items():
        module = name.rpartition(".")[0]
        assert result[name].dtype == tensor.dtype
        if module not in ADAPTED:
            assert torch.equal(result[name].view(torch.uint8), tensor.view(torch.uint8)), name
    for module in ADAPTED:
        codes, scales = stored[f"{module}.weight"], stored[f"{module}.weight_scale_inv"]
        lora_A, lora_B = (factors[f"base_model.model.{module}.lora_{letter}.weight"].double() for letter in "AB")
        exact = dequantize_blocks(codes, scales, BLOCK).double() + 2 * lora_B @ lora_A
        expected = quantize_blocks(exact.float(), BLOCK, scale_dtype)
        assert torch.allclose(result[f"{module}.weight_scale_inv"].float(), expected[1].float(), rtol=1e-2)
        got = dequantize_blocks(result[f"{module}.weight"], result[f"{module}.weight_scale_inv"], BLOCK).double()
        best = dequantize_blocks(*expected, BLOCK).double()
        assert float((got - exact).norm()) <= 1.001 * float((best - exact).norm())
        (fact,) = (fact for name, fact in facts.items() if name.startswith(f"{module}."))
        assert fact["action"] == "requantized"
        assert fact["rounding_norm"] == pytest.approx(float((got - exact).norm()), rel=1e-3)
        assert fact["requantized_blocks"] == fact["blocks"] == scales.numel()


def test_an_adapter_that_changes_nothing_leaves_every_bit(tmp_path: Path) -> None:
    stored = fp8_tensors()
    source = write_checkpoint(tmp_path / "model", stored, config=CONFIG)
    tensors = {}
    for module, (d_out, d_in) in ADAPTED.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = random(4, d_in)
        lora_B = torch.zeros(d_out, 4)
        if module.endswith("up_proj"):
            lora_B[300:310] = 1.0  # rows of the third row of blocks only
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_B
    adapter = write_lora(tmp_path / "adapter", ADAPTED, rank=4, target_modules=["q_proj", "up_proj", "down_proj"])
    save_file(tensors, adapter / "adapter_model.safetensors")
    result, _ = merged(source, adapter, tmp_path / "out")
    for name, tensor in stored.items():
        changed = result[name].view(torch.uint8) != tensor.view(torch.uint8)
        if name == f"{LAYER}.mlp.up_proj.weight":
            assert changed[256:384].any()
            changed[256:384] = False
        elif name == f"{LAYER}.mlp.up_proj.weight_scale_inv":
            assert changed[2].any()
            changed[2] = False
        assert not changed.any(), name


def test_a_replaced_weight_is_quantized(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model", fp8_tensors(), config=CONFIG)
    adapter = write_lora(tmp_path / "adapter", ADAPTED, rank=4, modules_to_save=["v_proj"])
    factors = load_file(adapter / "adapter_model.safetensors")
    replacement = random(160, 160, seed=77)
    module = f"{LAYER}.self_attn.v_proj"
    save_file(factors | {f"base_model.model.{module}.weight": replacement}, adapter / "adapter_model.safetensors")
    result, _ = merged(source, adapter, tmp_path / "out")
    codes, scales = quantize_blocks(replacement, BLOCK, torch.float32)
    assert torch.equal(result[f"{module}.weight"].view(torch.uint8), codes.contiguous().view(torch.uint8))
    assert torch.equal(result[f"{module}.weight_scale_inv"], scales)


def test_what_cannot_be_quantized_again_is_refused_together(tmp_path: Path) -> None:
    stored = fp8_tensors()
    stored[f"{LAYER}.self_attn.q_proj.weight_scale_inv"] = torch.tensor(0.01)
    stored[f"{LAYER}.mlp.up_proj.weight_scale_inv"] = torch.tensor([[0.01]])
    source = write_checkpoint(tmp_path / "model", stored, config=CONFIG)
    adapter = write_lora(tmp_path / "adapter", ADAPTED, rank=4, target_modules=["q_proj", "up_proj", "down_proj"])
    with pytest.raises(PlanRefused) as refusal:
        merged(source, adapter, tmp_path / "out")
    assert len(refusal.value.problems) == 2
    assert "self_attn.q_proj.weight has one scale for a whole matrix (160, 160)" in str(refusal.value)


def test_weights_that_do_not_keep_their_shape_are_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path, fp8_tensors(), config=CONFIG)
    readable = dequantized(read_checkpoint(source), FP8)
    name = f"{LAYER}.mlp.up_proj.weight"
    ref = readable.tensors[name]
    same = Produced(ref.spec, CastTransform(ref, "F32"))
    larger = Produced(TensorSpec(name, "F32", (640, 160)), CastTransform(ref, "F32"))
    for produced_instead in ((larger,), (same, larger)):
        with pytest.raises(CordaConvertError, match="would get another shape, or a tensor beside it"):
            requantized({name: produced_instead}, readable)


def test_mxfp4_that_is_touched_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a_blocks": torch.zeros(2, 32, 1, 16, dtype=torch.uint8),
        "a_scales": torch.full((2, 32, 1), 127, dtype=torch.uint8),
    }
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, tensors, config=None))
    readable = dequantized(checkpoint, Quantization("mxfp4", None, None))
    with pytest.raises(CordaConvertError, match="--requantize is for fp8"):
        requantized({"a": ()}, readable)
