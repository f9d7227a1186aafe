"""`collect` of models that are not plain decoders here: encoders with decoders, heads, quantized ones, and those of the Hub."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import FIXTURES, MODEL, read_json, write_json
from hub_server import Hub
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from safetensors.torch import load_file, save_file
from test_collect import CPU, TEXT, load, matrices, of_peft, samples, tiny, worst
from test_collect_stream import MODELS, _of
from test_hub_reading import hub  # noqa: F401 - a fixture

from corda_convert.errors import UnsupportedInput
from corda_convert.linalg.fp8 import quantize_blocks
from corda_convert.operations.collect import collect
from corda_convert.operations.collect_options import CollectOptions

pytestmark = pytest.mark.filterwarnings("ignore")

Command = Callable[..., Any]
BLOCK = (16, 16)
T5 = _of(
    "T5ForConditionalGeneration",
    "T5Config",
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    vocab_size=64,
    decoder_start_token_id=0,
)
BART = _of(
    "BartForConditionalGeneration",
    "BartConfig",
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    vocab_size=64,
)
TARGETS = {
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_an_encoder_with_a_decoder_runs_as_a_whole(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PEFT where the samples are the labels, too."""
    monkeypatch.setitem(MODELS, name, {"t5": T5, "bart": BART}[name])
    folder = tiny(name, tmp_path / "model")
    model = load(folder)

    def run() -> None:
        for sample in samples(folder, TEXT):
            model(input_ids=torch.tensor([sample]), labels=torch.tensor([sample]))

    file = tmp_path / "peft" / "cov.pt"
    config = LoraConfig(init_lora_weights="corda", target_modules=TARGETS[name], corda_config=CordaConfig())
    calib_cov_distribution(model, config, run, None, str(file))
    theirs = torch.load(file, weights_only=True)
    collect(folder, output=tmp_path / "c.safetensors", options=CollectOptions(TEXT, whole_model=True), run=CPU)
    assert any("decoder" in module for module in theirs)
    assert worst(matrices(tmp_path / "c.safetensors"), theirs) < 2e-6
    with pytest.raises(UnsupportedInput, match="Run it with --whole-model"):
        collect(folder, output=tmp_path / "d.safetensors", options=CollectOptions(TEXT), run=CPU)


def test_a_model_that_takes_no_text_is_refused(refusal: Command, tmp_path: Path, monkeypatch: Any) -> None:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "num_mel_bins": 8}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    whisper = _of("WhisperForConditionalGeneration", "WhisperConfig", **sizes, **heads, **tokens)
    monkeypatch.setitem(MODELS, "whisper", whisper)
    folder = tiny("whisper", tmp_path / "model", suppress_tokens=None, begin_suppress_tokens=None)
    text = ("--data", FIXTURES / "data" / "task.jsonl", "--field", "question", "--no-pack", "--samples", 2)
    message = refusal("collect", folder, *text, "--whole-model")
    assert message.startswith("WhisperForConditionalGeneration cannot be run on text alone: ")


@pytest.mark.parametrize("is_whole", [False, True], ids=["by block", "whole"])
def test_the_head_is_collected_where_it_is_named(is_whole: bool, tmp_path: Path) -> None:
    folder = tiny("qwen3", tmp_path / "model")
    theirs = of_peft(folder, TEXT, ["lm_head", "o_proj"], tmp_path / "peft" / "cov.pt")
    options = CollectOptions(TEXT, targets=("lm_head", "o_proj"), whole_model=is_whole)
    collect(folder, output=tmp_path / "c.safetensors", options=options, run=CPU)
    ours = matrices(tmp_path / "c.safetensors")
    assert "lm_head" in ours
    assert worst(ours, theirs) < 2e-6


def test_a_head_that_shares_its_weight_is_refused(refusal: Command, tmp_path: Path) -> None:
    folder = tiny("llama", tmp_path / "model")
    text = ("--data", FIXTURES / "data" / "task.jsonl", "--field", "question", "--no-pack", "--samples", 2)
    message = refusal("collect", folder, *text, "--target", "lm_head")
    assert message.startswith("lm_head shares its weight with model.embed_tokens.weight")


def in_fp8(folder: Path) -> Path:
    """The model's decoder layers in blocks of fp8, as DeepSeek stores them."""
    path = folder / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        if ".layers." in name and tensor.ndim == 2:
            codes, scales = quantize_blocks(tensor.float(), BLOCK, torch.float32)
            tensors |= {name: codes.contiguous(), f"{name}_scale_inv": scales}
        else:
            tensors[name] = tensor.bfloat16()
    save_file(tensors, path, {"format": "pt"})
    config = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "quantization_config": config})
    return folder


def in_mxfp4(folder: Path) -> Path:
    """The model's experts in groups of 32 numbers of four bits, which are drawn at random."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    generator = torch.Generator().manual_seed(7)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.full((experts, outputs, inputs // 32), 124, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    save_file(tensors, path, {"format": "pt"})
    config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "quantization_config": config})
    return folder


KINDS: dict[str, tuple[str, Callable[[Path], Path], Callable[[], Any]]] = {
    "fp8": (
        "qwen3",
        in_fp8,
        lambda: transformers.FineGrainedFP8Config(weight_block_size=BLOCK, dequantize=True),
    ),
    "mxfp4": ("gpt_oss", in_mxfp4, lambda: transformers.Mxfp4Config(dequantize=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_models_give_what_they_give_as_transformers_dequantizes_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import families

    monkeypatch.setitem(MODELS, "gpt_oss", families._gpt_oss)
    name, quantize, reading = KINDS[kind]
    folder = quantize(tiny(name, tmp_path / "model"))
    plain = load(folder, torch.bfloat16, quantization_config=reading())
    shutil.copytree(folder, tmp_path / "plain")
    save_file({key: each.clone() for key, each in plain.state_dict().items()}, tmp_path / "plain" / "model.safetensors")
    config = {key: value for key, value in read_json(folder / "config.json").items() if key != "quantization_config"}
    write_json(tmp_path / "plain" / "config.json", config)
    targets = ("q_proj", "o_proj", *(("experts.gate_up_proj", "experts.down_proj") if kind == "mxfp4" else ()))
    options = CollectOptions(TEXT, targets=targets)
    for model in (folder, tmp_path / "plain"):
        collect(model, output=tmp_path / f"{model.name}.safetensors", options=options, run=CPU)
    ours, theirs = (matrices(tmp_path / f"{model}.safetensors") for model in ("model", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[module], theirs[module]) for module in ours)


def test_a_model_that_cannot_be_dequantized_is_refused_by_the_name_of_its_kind(
    refusal: Command, tmp_path: Path
) -> None:
    folder = tiny("qwen3", tmp_path / "model")
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "quantization_config": config})
    text = ("--data", FIXTURES / "data" / "task.jsonl", "--field", "question", "--no-pack", "--samples", 2)
    assert "gptq" in refusal("collect", folder, *text).lower()


def test_a_model_of_the_hub_gives_the_bytes_of_its_folder(hub: Hub, done: Command, tmp_path: Path) -> None:  # noqa: F811
    hub.add_repository("acme/model").add_folder(MODEL)
    text = ("--data", FIXTURES / "data" / "task.jsonl", "--field", "question", "--no-pack", "--samples", 5)
    done("collect", MODEL, *text, "--target", "q_proj", "-o", tmp_path / "here")
    done("collect", "acme/model", *text, "--target", "q_proj", "-o", tmp_path / "there")
    here, there = (load_file(next((tmp_path / name).glob("*.safetensors"))) for name in ("here", "there"))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    source = json.loads((tmp_path / "there" / "corda_convert.json").read_text())["inputs"][0]
    assert (source["role"], source["name"], len(source["commit"])) == ("model", "acme/model", 40)
