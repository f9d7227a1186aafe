"""The variants of LoRA, each on the layers that PEFT has it for: its bits, and a float64 computation by PEFT itself."""

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import (
    HIDDEN,
    LINEARS,
    LLAMA_CONFIG,
    UP,
    VOCABULARY,
    llama_tensors,
    lora_config,
    lora_tensors,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_json,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file

from corda_convert import DecomposeOptions, MergeOptions, decompose, merge
from corda_convert.adapters import lora as lora_module
from corda_convert.adapters import lora_options
from corda_convert.adapters.dora import DoraFactors
from corda_convert.adapters.factors import Block, Layout
from corda_convert.adapters.lora import LoraFactors
from corda_convert.checkpoint.layout import DiskLayout, Piece
from corda_convert.checkpoint.names import Place, Target
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorRef, read_tensor
from corda_convert.errors import UnsupportedInput
from corda_convert.plan.packing import row_blocks

Refusal = Callable[..., str]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {key: value for key, value in LLAMA_CONFIG.items() if key not in ("architectures", "model_type", "dtype")},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16, "tie_word_embeddings": False},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40,
            "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "bottleneck", "num_channels": 3},
    ),
    "videomae": (
        "VideoMAEModel",
        "VideoMAEConfig",
        {**VISION, "image_size": 8, "num_frames": 4, "tubelet_size": 2},
    ),
    "roberta": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 32,
            "max_position_embeddings": 20,
        },
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {**VISION, "image_size": 8}),
}  # fmt: skip


@cache
def tiny(family: str) -> Any:
    """A model of the family with random weights, the same ones every time."""
    model_class, config_class, options = CONFIGS[family]
    config = getattr(transformers, config_class)(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape) / 4
    return model


def base_of(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    copy.deepcopy(tiny(family)).to(dtype).save_pretrained(folder)
    return folder


def load(base: Path, dtype: torch.dtype) -> Any:
    model_class = getattr(transformers, read_json(base / "config.json")["architectures"][0])
    return model_class.from_pretrained(base, dtype=dtype)


def adapter_of(base: Path, config: Any, folder: Path, dtype: torch.dtype = torch.float32, *, seed: int = 1) -> Path:
    """An adapter as PEFT saves it, with every parameter of its own changed as if by training."""
    model = get_peft_model(load(base, dtype), copy.deepcopy(config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        elif "lora_" in name or "trainable_tokens" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
        elif parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 4
    model.save_pretrained(folder)
    return folder


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load(base, dtype), str(adapter))
    return dict(model.merge_and_unload().state_dict())


def merged(base: Path, adapter: Path, output: Path, rounding: str = "nearest") -> dict[str, torch.Tensor]:
    merge(base, adapter=adapter, output=output, options=MergeOptions(rounding=rounding, as_is=True))
    dtype = getattr(torch, read_json(output / "config.json")["dtype"])
    return dict(load(output, dtype).state_dict())


def differing(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors whose bits differ."""
    assert actual.keys() == expected.keys()
    return {name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])}


def worst_error(actual: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The largest error beyond the one rounding, relative to the largest value of the tensor."""
    worst = 0.0
    for name, tensor in actual.items():
        if not tensor.is_floating_point():
            continue
        wanted = exact[name].double()
        half_ulp = (
            torch.finfo(tensor.dtype).eps * torch.exp2(torch.floor(torch.log2(wanted.abs().clamp(min=6.2e-5)))) / 2
        )
        beyond = ((tensor.double() - wanted).abs() - half_ulp).clamp(min=0) / wanted.abs().max().clamp(min=1e-30)
        worst = max(worst, float(beyond.max()) if beyond.numel() else 0.0)
    return worst


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": list(targets), "init_lora_weights": False, **options}
    )


CASES: dict[str, tuple[str, LoraConfig, frozenset[str]]] = {
    # family, config, tensors that PEFT rounds twice or whose norms it sums in another order
    "dora on Linear": ("llama", lora("q_proj", "up_proj", "lm_head", use_dora=True), frozenset()),
    "dora with patterns": (
        "llama",
        lora("q_proj", "down_proj", use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"0.*q_proj": 3}),
        frozenset(),
    ),
    "dora on Embedding": ("llama", lora("embed_tokens", "k_proj", use_dora=True), frozenset({"model.embed_tokens.weight"})),
    "dora on Conv1D": (
        "gpt2",
        lora("c_attn", "c_proj", use_dora=True, fan_in_fan_out=True),
        frozenset(
            f"transformer.h.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")
        ),
    ),
    "dora on Conv1d": ("whisper", lora("conv1", "conv2", "fc1", use_dora=True), frozenset()),
    "dora on Conv2d": ("resnet", lora("convolution", use_dora=True), frozenset()),
    "dora on Conv3d": ("videomae", lora("projection", use_dora=True), frozenset()),
    "lora_bias": ("whisper", lora("q_proj", "fc2", "conv2", lora_bias=True), frozenset()),
    "lora_bias on Conv1D": ("gpt2", lora("c_attn", lora_bias=True, fan_in_fan_out=True), frozenset()),
    "Conv1d": ("whisper", lora("conv1", "conv2", "v_proj"), frozenset()),
    "Conv2d": ("resnet", lora("convolution"), frozenset()),
    "Conv3d": ("videomae", lora("projection", "query"), frozenset()),
    "MultiheadAttention": (
        "siglip",
        lora("attention", "patch_embedding", "q_proj"),
        frozenset({"head.attention.in_proj_weight", "head.attention.out_proj.weight"}),
    ),
    "mica": (
        "llama",
        lora("q_proj", "embed_tokens", init_lora_weights="mica"),
        frozenset({"model.embed_tokens.weight", *(f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))}),
    ),
    "velora": ("llama", lora("q_proj", velora_config={"num_groups": 4}), frozenset()),
    "tokens in LoRA": ("llama", lora("q_proj", trainable_token_indices=[3, 1]), frozenset()),
    "tokens by module": (
        "llama",
        lora("q_proj", trainable_token_indices={"embed_tokens": [31, 0], "lm_head": [5]}),
        frozenset(),
    ),
    "tokens alone": ("llama", TrainableTokensConfig(token_indices=[7, 2, 30]), frozenset()),
    "tokens of the head": ("llama", TrainableTokensConfig(token_indices=[7], target_modules=["lm_head"]), frozenset()),
    "biases of all": ("gpt2", lora("c_attn", bias="all", fan_in_fan_out=True), frozenset()),
    "biases of LoRA's modules": ("whisper", lora("q_proj", "conv1", bias="lora_only"), frozenset()),
    "biases of other names": ("videomae", lora("projection", bias="all"), frozenset()),
    "biases of MultiheadAttention": (
        "siglip",
        lora("attention", bias="all"),
        frozenset({"head.attention.in_proj_weight", "head.attention.out_proj.weight"}),
    ),
    "a saved module of several": ("roberta", lora("query", modules_to_save=["classifier"]), frozenset()),
    "dora and a saved module": (
        "llama",
        lora("q_proj", use_dora=True, modules_to_save=["lm_head", "input_layernorm"]),
        frozenset(),
    ),
}  # fmt: skip

SUMMED_OTHERWISE = {"dora on Embedding", "dora on Conv1D"}


@pytest.mark.parametrize("case", CASES)
def test_a_variant_merges_with_the_bits_of_peft_and_is_rounded_once_from_its_float64(case: str, tmp_path: Path) -> None:
    family, config, rounded_twice = CASES[case]
    for dtype in DTYPES:
        base = base_of(family, tmp_path / str(dtype), dtype)
        adapter = adapter_of(base, config, tmp_path / f"{dtype}-adapter", dtype)
        expected = peft_merged(base, adapter, dtype)
        exactly = merged(base, adapter, tmp_path / f"{dtype}-peft", "peft")
        assert differing(exactly, load(base, dtype).state_dict())
        assert differing(exactly, expected) <= (rounded_twice if case in SUMMED_OTHERWISE else set()), dtype
        nearest = merged(base, adapter, tmp_path / f"{dtype}-nearest")
        assert differing(nearest, expected) <= rounded_twice, dtype
        if case == "mica":  # PEFT does not take float64 for it; once trained it is plain LoRA
            saved = read_json(adapter / "adapter_config.json")
            write_json(adapter / "adapter_config.json", saved | {"init_lora_weights": True})
        assert worst_error(nearest, peft_merged(base, adapter, torch.float64)) < 5e-7, dtype


def test_every_option_of_the_installed_peft_is_decided() -> None:
    """An option that a newer PEFT adds must be read, found harmless or refused; until then it is refused as unknown."""
    decided = lora_options.READ | lora_options.HARMLESS | lora_options.UNSUPPORTED.keys()
    assert {field.name for field in dataclasses.fields(LoraConfig)} - decided == set()


@pytest.mark.parametrize("suffix", ["", ".weight", ".default", ".default.weight"])
def test_the_magnitudes_are_found_under_every_name_that_peft_gave_them(suffix: str, tmp_path: Path) -> None:
    base = base_of("llama", tmp_path / "base")
    adapter = adapter_of(base, lora("q_proj", use_dora=True), tmp_path / "adapter")
    expected = peft_merged(base, adapter, torch.float32)
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {
        name.replace("lora_magnitude_vector", f"lora_magnitude_vector{suffix}"): tensor
        for name, tensor in tensors.items()
    }
    assert suffix == "" or renamed.keys() != tensors.keys()
    save_file(renamed, adapter / "adapter_model.safetensors")
    assert differing(merged(base, adapter, tmp_path / "out"), expected) == set()


@pytest.mark.parametrize(
    "config",
    [lora("embed_tokens", use_dora=True), TrainableTokensConfig(token_indices=[69_999, 0, 65_535, 65_536])],
    ids=["norms", "tokens"],
)
@pytest.mark.parametrize("large", [lora_module.LARGE_BYTES, 0], ids=["A whole", "A by columns"])
def test_changes_go_across_blocks_of_rows(
    config: Any, large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding of more than one block: the norms of its columns need them all before the first is written."""
    monkeypatch.setattr(lora_module, "LARGE_BYTES", large)
    rows = 70_000
    assert len(row_blocks((rows, HIDDEN))) > 1
    settings = {**LLAMA_CONFIG, "vocab_size": rows, "num_hidden_layers": 1}
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".layers.1." not in name}
    tensors |= {name: random(rows, HIDDEN, seed=7) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    base = write_checkpoint(tmp_path / "base", tensors, config=settings)
    adapter = adapter_of(base, config, tmp_path / "adapter")
    actual = merged(base, adapter, tmp_path / "out")
    assert worst_error(actual, peft_merged(base, adapter, torch.float64)) < 5e-7
    assert differing(actual, load(base, torch.float32).state_dict()) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("layout", ["out_in", "in_out"])
@pytest.mark.parametrize("part", ["outputs", "inputs"])
def test_dora_folds_into_blocks_that_lie_either_way(layout: Layout, part: str, tmp_path: Path) -> None:
    """A Linear that the model joins or transposes on loading: a block holds some of its outputs, and all of their inputs."""
    weight, rank = random(12, 10), 3
    A, B, m = random(rank, 10, seed=1), random(12, rank, seed=2), random(12, seed=3).abs() + 0.5
    save_file({"A": A, "B": B, "m": m}, tmp_path / "factors.safetensors")
    file = SafetensorsFile(tmp_path / "factors.safetensors")
    refs = {name: TensorRef(file, spec) for name, spec in file.specs.items()}
    dora = DoraFactors(LoraFactors("M", refs["A"], refs["B"], 0.5), refs["m"])
    outputs = (4, 9) if part == "outputs" else (0, 12)
    block = Block(layout, outputs, (0, 10))
    whole = {name: read_tensor(ref) for name, ref in dora.operands(block).items() if name not in dora.streams(block)}
    streamed = {name: read_tensor(dora.operands(block)[name]) for name in dora.streams(block)}
    own = weight[slice(*outputs)]
    rows = (own if layout == "out_in" else own.T).contiguous().clone()
    fold = dora.begin(block, whole, torch.float32, 1.0)
    if fold.needs_sweep:
        for begin in range(0, len(rows), 4):
            fold.sweep(rows[begin : begin + 4].clone(), begin, {})
    for begin in range(0, len(rows), 4):
        fold.fold(rows[begin : begin + 4], begin, {name: each[begin : begin + 4] for name, each in streamed.items()})
    V = weight.double() + 0.5 * B.double() @ A.double()
    expected = (m.double()[:, None] / V.norm(dim=1, keepdim=True) * V)[slice(*outputs)]
    actual = rows.double() if layout == "out_in" else rows.double().T
    assert float((actual - expected).abs().max()) < 1e-6


def dora_tensors() -> dict[str, torch.Tensor]:
    """DoRA on one module, as the file has it."""
    shape = LINEARS[UP]
    return {**lora_tensors({UP: shape}), f"base_model.model.{UP}.lora_magnitude_vector": random(shape[0]).abs() + 1}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "llama")


KEY = f"base_model.model.{UP}"
EMBEDDING = "base_model.model.model.embed_tokens"
DELTA = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"

REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "DoRA without its norms": (
        lora_tensors({UP: LINEARS[UP]}),
        {"use_dora": True},
        f"adapter: {UP} has lora_A and lora_B but no lora_magnitude_vector.\nThe adapter file is incomplete.",
    ),
    "norms without DoRA": (
        dora_tensors(),
        {},
        f"adapter: {UP} has lora_magnitude_vector, but adapter_config.json does not say use_dora.\n"
        "The config and the weights are not of one adapter.",
    ),
    "norms of another shape": (
        {**dora_tensors(), f"{KEY}.lora_magnitude_vector": random(5)},
        {"use_dora": True},
        f"Adapter does not fit {UP}: lora_magnitude_vector is (5,), the weight has 24 outputs.",
    ),
    "a bias without lora_bias": (
        {**lora_tensors({UP: LINEARS[UP]}), f"{KEY}.lora_B.bias": random(24)},
        {},
        f"adapter: {UP} has lora_B.bias, but adapter_config.json does not say lora_bias.\n"
        "The config and the weights are not of one adapter.",
    ),
    "lora_bias without a bias": (
        lora_tensors({UP: LINEARS[UP]}),
        {"lora_bias": True},
        f"adapter: {UP} has lora_A and lora_B but no lora_B.bias.\nThe adapter file is incomplete.",
    ),
    "lora_bias on a module that has none": (
        {**lora_tensors({UP: LINEARS[UP]}), f"{KEY}.lora_B.bias": random(24)},
        {"lora_bias": True},
        f"adapter has lora_B.bias for 1 of the layers without a bias in llama: {UP}.\n"
        "There is no tensor that it could be added to; PEFT cannot merge it either.\n"
        "Load the adapter with PEFT beside the model.",
    ),
    "DoRA with lora_bias": (
        {**dora_tensors(), f"{KEY}.lora_B.bias": random(24)},
        {"lora_bias": True, "use_dora": True},
        "adapter says both use_dora and lora_bias, which PEFT does not allow together.",
    ),
    "a convolution's factors for a Linear": (
        {f"{KEY}.lora_A.weight": random(4, 16, 1), f"{KEY}.lora_B.weight": random(24, 4, 1)},
        {},
        f"{UP} is of type linear, the adapter's factors are not for that.",
    ),
    "a convolution in groups": (
        {f"{KEY}.lora_A.weight": random(4, 16, 3), f"{KEY}.lora_B.weight": random(24, 2, 1)},
        {},
        f"adapter: {UP} is a convolution in groups (lora_A (4, 16, 3), lora_B (24, 2, 1)): every group of outputs sees all "
        "the inputs through lora_A, which no weight in groups can do.\nPEFT cannot merge it either.",
    ),
    "lora_bias on MultiheadAttention": (
        {
            f"{KEY}.{name}": tensor
            for prefix in ("", "base_layer.out_proj.")
            for name, tensor in {
                f"{prefix}lora_A.weight": random(4, 16),
                f"{prefix}lora_B.weight": random(24, 4),
                f"{prefix}lora_B.bias": random(24),
            }.items()
        },
        {"lora_bias": True},
        f"adapter: {UP} is a MultiheadAttention with lora_bias, which PEFT trains without using it.",
    ),
    "an unknown option": (
        lora_tensors(),
        {"use_unheard_of": True, "another_option": 0},
        "adapter: adapter_config.json sets options that this version does not know: use_unheard_of.\n"
        "They may change what the adapter does.\nRemove those that do not from the config.",
    ),
    "tokens beyond the vocabulary": (
        {DELTA: random(2, HIDDEN)},
        {"trainable_token_indices": [3, VOCABULARY]},
        "Adapter does not fit model.embed_tokens: it has 32 rows, and none for the trainable tokens 32.\n"
        "The vocabulary was resized before the training.",
    ),
    "fewer tokens than indices": (
        {DELTA: random(2, HIDDEN)},
        {"trainable_token_indices": {"embed_tokens": [3, 4, 5]}},
        "adapter: the trainable tokens of model.embed_tokens are (2, 16), adapter_config.json gives 3 indices.\n"
        "The config and the weights are not of one adapter.",
    ),
    "a token twice": (
        {DELTA: random(2, HIDDEN)},
        {"trainable_token_indices": [3, 3]},
        "adapter: adapter_config.json gives a trainable token of model.embed_tokens twice.",
    ),
    "a negative token": (
        {DELTA: random(2, HIDDEN)},
        {"trainable_token_indices": [3, -1]},
        "adapter: model.embed_tokens has trainable tokens, but adapter_config.json gives no list of their indices.",
    ),
    "tokens of another module": (
        {DELTA: random(2, HIDDEN)},
        {"trainable_token_indices": {"lm_head": [3, 4]}},
        "adapter: model.embed_tokens has trainable tokens, but adapter_config.json gives no list of their indices.",
    ),
    "tokens of another width": (
        {DELTA: random(2, 8)},
        {"trainable_token_indices": [3, 4]},
        "Adapter does not fit model.embed_tokens: the weight is (32, 16), the rows of its trainable tokens are (2, 8).",
    ),
    "indices without tokens": (
        lora_tensors(),
        {"trainable_token_indices": [3, 4]},
        "adapter: adapter_config.json has trainable_token_indices, but there are no trainable tokens.\n"
        "The adapter file is incomplete.",
    ),
    "tokens and factors on one module": (
        {
            DELTA: random(2, HIDDEN),
            f"{EMBEDDING}.lora_embedding_A": random(4, VOCABULARY),
            f"{EMBEDDING}.lora_embedding_B": random(HIDDEN, 4),
        },
        {"trainable_token_indices": [3, 4]},
        "adapter has both LoRA factors and trainable tokens for model.embed_tokens, as PEFT never has.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str, refusal: Refusal, llama: Path, tmp_path: Path) -> None:
    tensors, changes, message = REFUSED[case]
    adapter = write_adapter(tmp_path / "adapter", tensors, lora_config(**changes))
    assert refusal("merge", llama, "--adapter", adapter) == message


def test_dora_on_an_output_without_a_weight_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    tensors, factors = llama_tensors(), dora_tensors()
    tensors[f"{UP}.weight"][5] = 0
    factors[f"{KEY}.lora_B.weight"][5] = 0
    adapter = write_adapter(tmp_path / "adapter", factors, lora_config(use_dora=True))
    assert refusal("merge", write_checkpoint(tmp_path / "base", tensors), "--adapter", adapter) == (
        f"{UP}: the weight with the adapter's change is zero for an output, and DoRA divides by its norm.\n"
        "The model or the adapter is damaged."
    )


def test_a_convolution_of_another_kernel_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    """Of as many elements: only the shape of the kernel tells."""
    base = base_of("resnet", tmp_path / "base")
    factors = {
        "base_model.model.embedder.embedder.convolution.lora_A.weight": random(4, 3, 49, 1),
        "base_model.model.embedder.embedder.convolution.lora_B.weight": random(8, 4, 1, 1),
    }
    adapter = write_adapter(tmp_path / "adapter", factors, lora_config())
    assert refusal("merge", base, "--adapter", adapter) == (
        "Adapter does not fit embedder.embedder.convolution: the weight is (8, 3, 7, 7), lora_B gives 8 rows and lora_A "
        "3 × 49 × 1 columns."
    )


def test_norms_that_would_go_across_tensors_are_refused(tmp_path: Path) -> None:
    """A Conv1D that lies on disk in two halves, each with some of the inputs."""
    save_file(
        {"A": random(3, 10), "B": random(12, 3), "m": random(12)},
        tmp_path / "factors.safetensors",
    )
    file = SafetensorsFile(tmp_path / "factors.safetensors")
    refs = {name: TensorRef(file, spec) for name, spec in file.specs.items()}
    dora = DoraFactors(LoraFactors("M", refs["A"], refs["B"], 0.5), refs["m"])
    halves = [Piece(0, 5, "M.weight", None, first, 5) for first in (0, 5)]
    places = tuple(Place(f"half{n}", DiskLayout((5, 12), (piece,)), piece) for n, piece in enumerate(halves))
    whole = Piece(0, 10, "M.weight", None, 0, 10)
    assert (
        dora.fit(Target("M.weight", (10, 12), "conv1d", (Place("M", DiskLayout((10, 12), (whole,)), whole),)))
        == "in_out"
    )
    with pytest.raises(UnsupportedInput, match="which DoRA's norms would go across"):
        dora.fit(Target("M.weight", (10, 12), "conv1d", places))


class Unknown(torch.nn.Module):
    """A model that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(16, 2)
        self.patches = torch.nn.Conv2d(3, 8, (2, 3))
        self.linear = torch.nn.Linear(16, 24)
        self.words = torch.nn.Embedding(40, 16)


@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
def test_layers_of_an_unknown_architecture_are_told_by_the_adapters_keys(use_dora: bool, tmp_path: Path) -> None:
    targets = ["patches", "linear", "words"] + ([] if use_dora else ["attention"])
    model = get_peft_model(Unknown(), lora(*targets, use_dora=use_dora))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        parameter.data = random(*parameter.shape, seed=seed) + (4 if "magnitude" in name else 0)
    model.save_pretrained(tmp_path / "adapter")
    before = Unknown().state_dict()
    inner = {key.replace(".base_layer", ""): each.clone() for key, each in model.base_model.model.state_dict().items()}
    base = write_checkpoint(
        tmp_path / "base",
        {name: inner[name] for name in before},
        config={"tie_word_embeddings": False},
    )
    expected = model.merge_and_unload().state_dict()
    merge(base, adapter=tmp_path / "adapter", output=tmp_path / "out", options=MergeOptions(as_is=True))
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == before.keys()
    changed = {name for name in actual if not torch.equal(actual[name], inner[name])}
    assert {name.split(".")[0] for name in changed} == set(targets)
    torch.testing.assert_close(actual, {name: expected[name] for name in actual}, rtol=2e-6, atol=2e-6)


def test_tokens_beyond_the_base_go_with_the_resized_embedding(tmp_path: Path) -> None:
    """PEFT then saves the whole embeddings beside the rows."""
    base = base_of("llama", tmp_path / "base")

    def resized() -> Any:
        model = load(base, torch.float32)
        model.resize_token_embeddings(36, mean_resizing=False)
        return model

    model = get_peft_model(resized(), lora("q_proj", trainable_token_indices=[1, 33]))
    for seed, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_" in name or "trainable_tokens" in name:
            parameter.data = random(*parameter.shape, seed=seed)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    expected = PeftModel.from_pretrained(resized(), str(tmp_path / "adapter")).merge_and_unload().state_dict()
    assert differing(merged(base, tmp_path / "adapter", tmp_path / "out"), dict(expected)) == set()


TIED = {
    "dora on the embedding": lora("embed_tokens", use_dora=True),
    "dora on the head": lora("lm_head", use_dora=True),
    "dora on both": lora("lm_head", "embed_tokens", use_dora=True),
    "dora on both as one": lora("embed_tokens", use_dora=True, ensure_weight_tying=True),
    "tokens of both": lora("q_proj", trainable_token_indices=[3, 5]),
    "tokens of the head": lora("q_proj", trainable_token_indices={"lm_head": [3, 5]}),
    "other tokens of each": lora("q_proj", trainable_token_indices={"embed_tokens": [1, 2], "lm_head": [3, 5]}),
    "tokens, and factors of the head": lora("lm_head", trainable_token_indices=[3, 5]),
    "tokens alone": TrainableTokensConfig(token_indices=[3]),
    "tokens of the head alone": TrainableTokensConfig(token_indices=[3], target_modules=["lm_head"]),
}
STAY_TIED = {"tokens of both", "tokens alone"}


@pytest.mark.parametrize("case", TIED)
def test_variants_on_tied_embeddings_keep_the_logits_of_the_adapter_model(case: str, tmp_path: Path) -> None:
    """Where PEFT merges into the shared tensor, its unmerged model is the oracle."""
    tensors = {name: tensor / 4 for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    base = write_checkpoint(tmp_path / "base", tensors, config={**LLAMA_CONFIG, "tie_word_embeddings": True})
    adapter = adapter_of(base, TIED[case], tmp_path / "adapter")
    tokens = torch.arange(VOCABULARY)[None]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load(base, torch.float32), str(adapter))(tokens).logits
        before = load(base, torch.float32)(tokens).logits
        merge(base, adapter=adapter, output=tmp_path / "out", options=MergeOptions(as_is=True))
        actual = load(tmp_path / "out", torch.float32)(tokens).logits
    assert float((expected - before).abs().max()) > 1e-2
    assert float((actual - expected).abs().max() / expected.abs().max()) < 2e-6
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is (case in STAY_TIED)


POOLS = {
    "llama": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte"],
    "whisper": ["q_proj", "v_proj", "out_proj", "fc1", "conv1", "conv2"],
    "siglip": ["q_proj", "fc1", "attention", "patch_embedding"],
    "resnet": ["convolution"],
    "videomae": ["query", "projection"],
}
HAS_BIASES = {"whisper": {"q_proj", "v_proj", "fc1", "conv1", "conv2"}, "gpt2": {"c_attn", "c_proj", "c_fc"}}


@st.composite
def adapters(draw: st.DrawFn) -> tuple[str, LoraConfig]:
    """A family, and a config that PEFT takes for it."""
    family = draw(st.sampled_from(sorted(POOLS)))
    targets = draw(st.lists(st.sampled_from(POOLS[family]), min_size=1, unique=True))
    ranks = st.integers(1, 6)
    alphas = st.integers(1, 12)
    takes_variants = "attention" not in targets
    variant = draw(st.sampled_from(["", "use_dora", "lora_bias"])) if takes_variants else ""
    if variant == "lora_bias" and not set(targets) <= HAS_BIASES.get(family, set()):
        variant = ""
    return family, LoraConfig(
        r=draw(ranks),
        lora_alpha=draw(alphas),
        use_rslora=draw(st.booleans()),
        target_modules=targets,
        rank_pattern=draw(st.dictionaries(st.sampled_from(targets), ranks)),
        alpha_pattern=draw(st.dictionaries(st.sampled_from(targets), alphas)),
        fan_in_fan_out=family == "gpt2",
        init_lora_weights=draw(st.sampled_from([True, False])),
        bias=draw(st.sampled_from(["none", "all", "lora_only"])),
        **({variant: True} if variant else {}),
    )


@given(drawn=adapters(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_drawn_configurations_merge_with_the_bits_of_peft(
    drawn: tuple[str, LoraConfig], dtype: torch.dtype, seed: int
) -> None:
    family, config = drawn
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = base_of(family, folder / "base", dtype)
        adapter = adapter_of(base, config, folder / "adapter", dtype, seed=seed)
        expected = peft_merged(base, adapter, dtype)
        actual = merged(base, adapter, folder / "peft", "peft")
        summed_otherwise = {
            tensor
            for tensor in actual
            if config.use_dora
            and (family == "gpt2" or tensor == "model.embed_tokens.weight")
            and actual[tensor].ndim == 2
        }
        assert differing(actual, expected) <= summed_otherwise
        exact = peft_merged(base, adapter, torch.float64)
        assert worst_error(merged(base, adapter, folder / "nearest"), exact) < 5e-7


def test_dora_beside_a_residual_merges_into_it_with_the_bits_of_peft_and_into_the_base(tmp_path: Path) -> None:
    """`W + s·(BA − B₀A₀)` is what DoRA saw beside the residual, so its norms are of that."""
    base = write_checkpoint(tmp_path / "base")
    decompose(
        base, covariances=None, output=tmp_path / "residual", options=DecomposeOptions("ipm", rank=4, method="svd")
    )
    initial = tmp_path / "residual" / "corda_init"
    tensors = {}
    for seed, (name, tensor) in enumerate(load_file(initial / "adapter_model.safetensors").items()):
        tensors[name] = tensor + random(*tensor.shape, seed=seed) / 20
        if "lora_B" in name:
            tensors[name.replace("lora_B.weight", "lora_magnitude_vector")] = (
                random(tensor.shape[0], seed=seed).abs() + 1
            )
    config = read_json(initial / "adapter_config.json") | {"use_dora": True}
    adapter = write_adapter(tmp_path / "adapter", tensors, config)
    merge(tmp_path / "residual", adapter=adapter, output=tmp_path / "out")
    expected = peft_merged(tmp_path / "residual", adapter, torch.float32)
    actual = load_file(tmp_path / "out" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert differing(actual, expected) == set()
    merge(base, adapter=adapter, output=tmp_path / "on_base", options=MergeOptions(init=initial))
    exact = peft_merged(tmp_path / "residual", adapter, torch.float64)
    assert worst_error(load_file(tmp_path / "on_base" / "model.safetensors"), exact) < 5e-7


def test_dora_trained_beside_a_residual_is_refused_on_the_base(refusal: Refusal, llama: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", dora_tensors(), lora_config(use_dora=True, init_lora_weights="corda"))
    assert "its config says init_lora_weights='corda'" in refusal("merge", llama, "--adapter", adapter)


def test_to_lora_refuses_a_dora(refusal: Refusal, tmp_path: Path) -> None:
    initial = write_adapter(tmp_path / "initial", lora_tensors({UP: LINEARS[UP]}), lora_config())
    adapter = write_adapter(tmp_path / "adapter", dora_tensors(), lora_config(use_dora=True))
    assert refusal("to-lora", adapter, "--init", initial) == (
        f"adapter is a DoRA: in {UP} it sets the norm of every output, which depends on the weight beneath it.\n"
        "On another weight, the base instead of the residual, its factors and norms are another function, and no LoRA is it.\n"
        "Merge it into the base, with --init."
    )
