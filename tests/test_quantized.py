"""Quantized checkpoints: fp8 and mxfp4 against float64 formulas and transformers' own code, the rest refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from building import write_checkpoint, write_json
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from corda_convert.checkpoint import stored_weights
from corda_convert.checkpoint.dequantized import DequantizedFile, dequantized, describe, written_dtype
from corda_convert.checkpoint.folder import Checkpoint, read_checkpoint
from corda_convert.checkpoint.quantized import (
    Quantization,
    check_no_gguf,
    check_readable,
    quantization_of,
    without_quantization,
)
from corda_convert.checkpoint.stored_weights import regions
from corda_convert.checkpoint.tensors import TensorSpec, read_tensor
from corda_convert.errors import CordaConvertError, MalformedFile, NotFinite, PlanRefused, UnsupportedInput

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def random_bytes(*shape: int, seed: int, below: int = 256) -> Tensor:
    return torch.randint(0, below, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def e4m3(*shape: int, seed: int = 0) -> Tensor:
    """Every finite code of F8_E4M3 may stand in it."""
    codes = random_bytes(*shape, seed=seed)
    return torch.where(codes & 127 == 127, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def scales(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4).to(dtype)


def formula(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """q·s in float64, rounded once to float32."""
    rows, columns = weight.shape[-2:]
    grid = scale.double().repeat_interleave(block[0], -2)[..., :rows, :]
    return (weight.double() * grid.repeat_interleave(block[1], -1)[..., :columns]).float()


def opened(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None, *, shards: int = 1
) -> Checkpoint:
    checkpoint = read_checkpoint(write_checkpoint(folder, tensors, config=config, shards=shards))
    return dequantized(checkpoint, found(checkpoint))


def found(checkpoint: Checkpoint) -> Quantization:
    specs = {name: ref.spec for name, ref in checkpoint.tensors.items()}
    quantization = quantization_of(checkpoint.config, specs, checkpoint.root)
    assert quantization is not None
    return quantization


@pytest.mark.parametrize("shape", [(160, 256), (576, 384), (130, 100), (1, 300), (256, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks_with_ragged_edges_follow_the_formula(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, scale = e4m3(*shape), scales(-(-shape[0] // 128), -(-shape[1] // 128), dtype=dtype)
    checkpoint = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, FP8)
    assert list(checkpoint.tensors) == ["a.weight"]
    read = read_tensor(checkpoint.tensors["a.weight"])
    assert read.dtype == torch.float32
    assert torch.equal(read, formula(weight, scale, (128, 128)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_has_the_bits_of_transformers_where_blocks_divide_the_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scale = e4m3(256, 384), scales(2, 3).to(dtype)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    read = read_tensor(opened(tmp_path, tensors, FP8).tensors["a.weight"])
    assert torch.equal(read, Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32))
    assert torch.equal(read.bfloat16(), Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16))


def test_fp8_stacks_of_experts_follow_the_formula(tmp_path: Path) -> None:
    weight, scale = e4m3(3, 160, 200), scales(3, 2, 2)
    checkpoint = opened(tmp_path, {"experts.up": weight, "experts.up_scale_inv": scale}, FP8)
    assert torch.equal(read_tensor(checkpoint.tensors["experts.up"]), formula(weight, scale, (128, 128)))


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1)])
def test_one_scale_for_a_whole_fp8_matrix_multiplies_it(tmp_path: Path, scale_shape: tuple[int, ...]) -> None:
    weight, scale = e4m3(300, 140), torch.full(scale_shape, 0.0125)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "a.activation_scale": torch.tensor(2.0)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    before = read_checkpoint(write_checkpoint(tmp_path, tensors, config=config))
    after = dequantized(before, found(before))
    assert torch.equal(read_tensor(after.tensors["a.weight"]), (weight.double() * scale.double().view(1, 1)).float())
    assert describe(found(before), before, after) == {
        "method": "fp8",
        "weights": 1,
        "activation_scales_left_out": ["a.activation_scale"],
    }


def test_scales_in_another_shard_are_found_and_the_order_on_disk_is_kept(tmp_path: Path) -> None:
    tensors = {
        "a.weight": e4m3(160, 256),
        "norm.weight": torch.ones(5),
        "b.weight": e4m3(130, 130, seed=5),
        "b.weight_scale_inv": scales(2, 2, seed=6),
        "a.weight_scale_inv": scales(2, 2, seed=7),
        "z.weight_scale_inv": scales(1, 1, seed=7),
        "z.weight": e4m3(8, 8, seed=8),
    }
    checkpoint = opened(tmp_path, tensors, FP8, shards=3)
    assert [list(shard.specs) for shard in checkpoint.shards] == [
        ["norm.weight", "a.weight", "b.weight"],
        [],
        ["z.weight"],
    ]
    for name in ("a", "b", "z"):
        expected = formula(tensors[f"{name}.weight"], tensors[f"{name}.weight_scale_inv"], (128, 128))
        assert torch.equal(read_tensor(checkpoint.tensors[f"{name}.weight"]), expected)
    assert torch.equal(read_tensor(checkpoint.tensors["norm.weight"]), torch.ones(5))
    assert [written_dtype(ref) for ref in checkpoint.tensors.values()] == ["F32", "BF16", "BF16", "BF16"]
    checkpoint.close()


def packed_experts(*, experts: int = 3, rows: int = 10, groups: int = 3) -> dict[str, Tensor]:
    return {
        "mlp.gate_up_proj_blocks": random_bytes(experts, rows, groups, 16, seed=3),
        "mlp.gate_up_proj_scales": random_bytes(experts, rows, groups, seed=4, below=250) + 1,
        "mlp.gate_up_proj_bias": torch.ones(experts, rows, dtype=torch.bfloat16),
    }


def test_mxfp4_has_the_bits_of_transformers(tmp_path: Path) -> None:
    tensors = packed_experts()
    checkpoint = opened(tmp_path, tensors, MXFP4)
    assert {name: ref.spec.dtype for name, ref in checkpoint.tensors.items()} == {
        "mlp.gate_up_proj": "BF16",
        "mlp.gate_up_proj_bias": "BF16",
    }
    read = read_tensor(checkpoint.tensors["mlp.gate_up_proj"])
    expected = convert_moe_packed_tensors(tensors["mlp.gate_up_proj_blocks"], tensors["mlp.gate_up_proj_scales"])
    assert read.shape == (3, 96, 10)
    assert torch.equal(read.view(torch.int16), expected.view(torch.int16))


def test_mxfp4_is_found_without_a_config_and_its_scales_in_another_shard(tmp_path: Path) -> None:
    tensors = packed_experts()
    checkpoint = opened(tmp_path, tensors, None, shards=3)
    expected = convert_moe_packed_tensors(tensors["mlp.gate_up_proj_blocks"], tensors["mlp.gate_up_proj_scales"])
    assert torch.equal(read_tensor(checkpoint.tensors["mlp.gate_up_proj"]), expected)


def quantized_weights(folder: Path) -> list[tuple[DequantizedFile, str, Tensor]]:
    fp8 = {
        "a.weight": e4m3(300, 200),
        "a.weight_scale_inv": scales(3, 2),
        "s": e4m3(3, 60, 70),
        "s_scale_inv": scales(3, 1, 1),
    }
    first, second = opened(folder / "fp8", fp8, FP8), opened(folder / "mxfp4", packed_experts(), MXFP4)
    refs = [first.tensors["a.weight"], first.tensors["s"], second.tensors["mlp.gate_up_proj"]]
    return [(ref.file, ref.name, read_tensor(ref)) for ref in refs if isinstance(ref.file, DequantizedFile)]


@pytest.mark.parametrize("region_elements", [1, 333, 1 << 18])
def test_any_range_of_elements_reads_as_a_part_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, region_elements: int
) -> None:
    weights = quantized_weights(tmp_path)
    monkeypatch.setattr(stored_weights, "REGION_ELEMENTS", region_elements)
    generator = torch.Generator().manual_seed(0)
    for file, name, whole in weights:
        flat, size = whole.flatten(), whole.element_size()
        for _ in range(20):
            begin, end = sorted(torch.randint(0, flat.numel() + 1, (2,), generator=generator).tolist())
            buffer = bytearray((end - begin) * size)
            file.read_into(name, begin * size, memoryview(buffer))
            assert bytes(buffer) == flat[begin:end].view(torch.uint8).numpy().tobytes()


def test_regions_cover_each_element_once_and_cross_no_block() -> None:
    covered = []
    for region in regions((3, 50, 7), 5, 3 * 50 * 7 - 2, 16):
        assert region.row // 16 == (region.row + region.rows - 1) // 16
        first = (region.matrix * 50 + region.row) * 7 + region.column
        assert region.rows == 1 or (region.column, region.columns) == (0, 7)
        covered += range(first, first + region.elements)
    assert covered == list(range(5, 3 * 50 * 7 - 2))


def test_a_part_of_an_element_is_refused(tmp_path: Path) -> None:
    file, name, _ = quantized_weights(tmp_path)[0]
    for begin, nbytes in ((2, 4), (0, 6), (300 * 200 * 4, 4)):
        with pytest.raises(ValueError, match="whole elements"):
            file.read_into(name, begin, memoryview(bytearray(nbytes)))


def test_nan_in_a_weight_or_its_scales_is_refused(tmp_path: Path) -> None:
    poisoned = e4m3(160, 256).view(torch.uint8).clone()
    poisoned[159, 255] = 0x7F
    bad_scale = scales(2, 2)
    bad_scale[1, 1] = float("inf")
    damaged = packed_experts()
    damaged["mlp.gate_up_proj_scales"][2, 3, 1] = 255
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({"a.weight": poisoned.view(torch.float8_e4m3fn), "a.weight_scale_inv": scales(2, 2)}, FP8, "a.weight"),
        ({"a.weight": e4m3(160, 256), "a.weight_scale_inv": bad_scale}, FP8, "a.weight"),
        (damaged, MXFP4, "mlp.gate_up_proj"),
    ]
    for number, (tensors, config, name) in enumerate(cases):
        ref = opened(tmp_path / str(number), tensors, config).tensors[name]
        with pytest.raises(NotFinite, match="dequantizes to NaN or Inf"):
            read_tensor(ref)


def test_the_config_of_the_result_tells_of_no_quantization_at_any_level(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "text_config": {"hidden_size": 8, **FP8},
        "compression_config": {"format": "x"},
        "list": [{"a": 1}],
    }
    clean = {"model_type": "llama", "text_config": {"hidden_size": 8}, "list": [{"a": 1}]}
    assert without_quantization(config) == clean
    assert "quantization_config" in config["text_config"]
    tensors = {"a.weight": e4m3(8, 8), "a.weight_scale_inv": scales(1, 1)}
    assert opened(tmp_path, tensors, {"model_type": "llama", **FP8}).config == {"model_type": "llama"}


def test_the_block_size_of_the_config_counts(tmp_path: Path) -> None:
    weight, scale = e4m3(100, 70), scales(4, 5)
    config = {"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}}
    checkpoint = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, config)
    assert torch.equal(read_tensor(checkpoint.tensors["a.weight"]), formula(weight, scale, (32, 16)))


def test_a_plain_checkpoint_is_not_quantized(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path))
    assert quantization_of(checkpoint.config, {n: r.spec for n, r in checkpoint.tensors.items()}, tmp_path) is None
    assert quantization_of({"quantization_config": None}, {}, tmp_path) is None


BY_CONFIG: dict[str, dict[str, Any]] = {
    "bitsandbytes 4-bit": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "bitsandbytes 8-bit": {"text_config": {"quantization_config": {"load_in_8bit": True}}},
    **{
        method: {"quantization_config": {"quant_method": method}}
        for method in (
            "gptq", "awq", "compressed-tensors", "fbgemm_fp8", "mxfp8", "nvfp4", "torchao", "hqq", "eetq", "gguf", "quanto",
            "a-method-of-tomorrow",
        )
    },
    "a method that its config does not name": {"quantization_config": {"bits": 4}},
}  # fmt: skip


@pytest.mark.parametrize("method", BY_CONFIG)
def test_a_method_that_only_the_config_names_is_refused_by_its_name(tmp_path: Path, method: str) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, config=BY_CONFIG[method]))
    with pytest.raises(UnsupportedInput) as refusal:
        dequantized(checkpoint, found(checkpoint))
    assert refusal.value.what == f"{checkpoint.name} is quantized with {method}: its config says so."
    assert refusal.value.next_step == "Merge into the unquantized base model."


def test_files_and_keys_other_than_quantization_config_are_read(tmp_path: Path) -> None:
    plain = {"a.weight": TensorSpec("a.weight", "BF16", (4, 4))}
    by_compression = quantization_of({"compression_config": {"format": "pack-quantized"}}, plain, tmp_path)
    assert by_compression is not None
    assert by_compression.method == "compressed-tensors"
    write_json(tmp_path / "hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}})
    by_file = quantization_of({}, plain, tmp_path)
    assert by_file is not None
    assert by_file.method == "modelopt nvfp4"
    (tmp_path / "hf_quant_config.json").write_text("[", encoding="utf-8")
    damaged = quantization_of({}, plain, tmp_path)
    assert damaged is not None
    assert damaged.method == "modelopt"


W = "model.layers.0.mlp.up_proj"
BY_HEADER: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "bitsandbytes 4-bit": {f"{W}.weight": ("U8", (128, 1)), f"{W}.weight.absmax": ("F32", (4,))},
    "bitsandbytes 8-bit": {f"{W}.weight": ("I8", (16, 16)), f"{W}.SCB": ("F32", (16,))},
    "gptq": {f"{W}.qweight": ("I32", (2, 16)), f"{W}.g_idx": ("I32", (16,))},
    "awq": {f"{W}.qweight": ("I32", (16, 2)), f"{W}.qzeros": ("I32", (1, 2))},
    "compressed-tensors": {f"{W}.weight_packed": ("I32", (16, 2)), f"{W}.weight_scale": ("BF16", (16, 1))},
    "nvfp4": {f"{W}.weight": ("U8", (16, 8)), f"{W}.weight_scale": ("F8_E4M3", (16, 1)), f"{W}.weight_scale_2": ("F32", ())},
    "mxfp8": {f"{W}.weight": ("F8_E4M3", (16, 64)), f"{W}.weight_scale_inv": ("U8", (16, 2))},
    "hqq": {f"{W}.W_q": ("U8", (16, 8))},
    "eetq": {f"{W}.weight": ("I8", (16, 16)), f"{W}.weight_scales": ("F16", (16,))},
    "torchao": {f"{W}._weight_qdata": ("I8", (16, 16)), f"{W}._weight_scale": ("F32", (16,))},
    "quanto": {f"{W}.weight._data": ("I8", (16, 16)), f"{W}.weight._scale": ("F32", (16,))},
    "aqlm": {f"{W}.codes": ("I16", (16, 2, 1)), f"{W}.codebooks": ("F16", (1, 256, 1, 8))},
    "mlx": {f"{W}.weight": ("U32", (16, 2)), f"{W}.scales": ("BF16", (16, 1)), f"{W}.biases": ("BF16", (16, 1))},
    "fp8 weights with weight_scale": {f"{W}.weight": ("F8_E4M3", (16, 16)), f"{W}.weight_scale": ("F32", (16, 1))},
    "integer weights with weight_scale": {f"{W}.weight": ("I8", (16, 16)), f"{W}.weight_scale": ("F32", (16, 1))},
}  # fmt: skip


@pytest.mark.parametrize("method", BY_HEADER)
@pytest.mark.parametrize("config", [None, FP8])
def test_a_method_that_the_tensors_tell_is_refused_with_the_first_of_them(
    tmp_path: Path, method: str, config: dict[str, Any] | None
) -> None:
    norm = {"model.norm.weight": ("BF16", (16,))}
    specs = {name: TensorSpec(name, dtype, shape) for name, (dtype, shape) in (norm | BY_HEADER[method]).items()}
    quantization = quantization_of(config, specs, tmp_path)
    assert quantization is not None
    first = next(iter(BY_HEADER[method]))
    with pytest.raises(UnsupportedInput, match="Merge into the unquantized base model") as refusal:
        check_readable(quantization, "acme")
    assert refusal.value.what.startswith(f"acme is quantized with {method}")
    assert f": {first} is {BY_HEADER[method][first][0]} (" in refusal.value.what


def test_what_does_not_fit_in_an_fp8_checkpoint_is_reported_together(tmp_path: Path) -> None:
    tensors = {
        "grid.weight": e4m3(160, 256),
        "grid.weight_scale_inv": scales(2, 1),
        "orphan.weight_scale_inv": scales(1, 1),
        "bare.weight": e4m3(16, 16),
        "five.weight": torch.zeros(16, 16, dtype=torch.float8_e5m2),
        "five.weight_scale_inv": scales(1, 1),
        "packed.weight": torch.zeros(16, 16, dtype=torch.int8),
        "packed.weight_scale_inv": scales(1, 1),
        "integer.weight": e4m3(16, 16),
        "integer.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32),
        "plain.weight": torch.zeros(16, 16),
        "plain.weight_scale_inv": scales(1, 1),
    }
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, tensors, config=FP8))
    quantization = Quantization("fp8", None, (128, 128))
    with pytest.raises(PlanRefused) as refusal:
        dequantized(checkpoint, quantization)
    for name in ("grid", "orphan", "bare", "five", "packed", "integer", "plain"):
        assert sum(f"{name}.weight" in problem.what for problem in refusal.value.problems) == 1, name
    assert "has scales (2, 2)" in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp.gate_up_proj_blocks": torch.zeros(3, 10, 48, dtype=torch.uint8)},
        {"mlp.gate_up_proj_blocks": torch.zeros(3, 10, 3, 8, dtype=torch.uint8)},
        {"mlp.gate_up_proj_scales": torch.zeros(3, 10, 4, dtype=torch.uint8)},
        {"mlp.gate_up_proj_scales": torch.zeros(3, 10, 3)},
        {"mlp.gate_up_proj": torch.zeros(3, 96, 10)},
    ],
)
def test_mxfp4_of_other_shapes_is_refused(tmp_path: Path, changes: dict[str, Tensor]) -> None:
    with pytest.raises(CordaConvertError, match="gate_up_proj_blocks") as refusal:
        opened(tmp_path, packed_experts() | changes, MXFP4)
    assert isinstance(refusal.value, UnsupportedInput | MalformedFile)


@pytest.mark.parametrize("config", [FP8, MXFP4])
def test_a_config_left_behind_by_a_dequantized_model_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    checkpoint = read_checkpoint(write_checkpoint(tmp_path, config=config))
    with pytest.raises(MalformedFile, match=r"take quantization_config out of config\.json"):
        dequantized(checkpoint, found(checkpoint))


def test_gguf_is_refused_as_a_file_and_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with pytest.raises(UnsupportedInput, match=r"quantized with gguf: model-Q4_K_M\.gguf"):
            check_no_gguf(path)
    write_checkpoint(tmp_path)
    check_no_gguf(tmp_path)  # the GGUF file beside the weights is a side product


def test_stored_bytes_of_other_tensors_are_untouched(tmp_path: Path) -> None:
    tensors = {
        "a.weight": e4m3(8, 8),
        "a.weight_scale_inv": scales(1, 1),
        "ids": torch.arange(9),
        "half": torch.ones(3).half(),
    }
    checkpoint = opened(tmp_path, tensors, FP8)
    stored = load_file(tmp_path / "model.safetensors")
    shard = checkpoint.shards[0]
    assert shard.extent("a.weight") is None
    for name in ("ids", "half"):
        assert shard.extent(name) is not None
        assert torch.equal(read_tensor(checkpoint.tensors[name]), stored[name])


def test_pickled_fp8_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", FP8)
    torch.save({"a.weight": e4m3(8, 8), "a.weight_scale_inv": scales(1, 1)}, tmp_path / "pytorch_model.bin")
    checkpoint = read_checkpoint(tmp_path)
    with pytest.raises(UnsupportedInput, match="fp8 weights in pickled files"):
        dequantized(checkpoint, found(checkpoint))
