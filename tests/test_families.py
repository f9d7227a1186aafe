"""Merging on every family whose checkpoints differ: PEFT's bits, the adapter model's logits, and what loads again."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, RARE_FAMILIES, tiny
from peft import LoraConfig, MissConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corda_convert import DecomposeOptions, MergeOptions, decompose, merge

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

DTYPES = (torch.float32, torch.bfloat16)
MERGED = (*FAMILIES, *(family for family in RARE_FAMILIES if family != "inkling2"))
"""Without inkling2, whose conversion cannot be followed."""

SPLIT = ("dinov2", "molmo2_text", "nomic_bert", "hrm_text")
"""Families with tensors on disk that are several Linear layers at run time."""

IDS = torch.arange(3, 23)[None]


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model on disk, in several shards, with norms that are not all ones; and as transformers loads it."""
    model = tiny(family)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return load(type(model), folder, dtype)


def load(model_class: type[PreTrainedModel], folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, info = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    wrong = {key: found for key, found in info.items() if found and key != "conversion_errors"}
    assert not wrong
    return model.eval()


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Every Linear and Conv1D but the head, and but subclasses of Linear that return something else (Llama 4's router)."""
    head = model.get_output_embeddings()
    names = [
        name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D) and module is not head
    ]
    if model.config.model_type == "deepseek_v3":  # where PEFT takes every such name for the experts'
        return [name for name in names if not name.endswith(("gate_proj", "up_proj", "down_proj"))]
    return names


def stacks(model: PreTrainedModel) -> list[str]:
    """Every parameter of experts: (E, d1, d2)."""
    return [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if type(module).__name__.endswith(("Experts", "ExpertsGEMM", "GroupedExpertsGemm"))
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3
    ]


def on_all_linear_layers_and_experts(model: PreTrainedModel) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=linear_layers(model), target_parameters=stacks(model))


def trained(model: PreTrainedModel, folder: Path, config: PeftConfig) -> PeftModel:
    """An adapter with random factors, saved."""
    adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            change = torch.randn(parameter.shape, generator=generator) * 0.3
            parameter.data = parameter.data + change.to(parameter.dtype)
    adapted.save_pretrained(folder)
    return adapted


def inputs(model: Any) -> dict[str, Tensor]:
    kind = model.config.model_type
    generator = torch.Generator().manual_seed(3)
    if kind == "dinov2":
        return {"pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    if kind == "whisper":
        return {"input_features": torch.randn(1, 8, 32, generator=generator), "decoder_input_ids": IDS[:, :8]}
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS + 5} if kind == "t5" else {})


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    result = model.eval()(**inputs(model))
    return result.logits if "logits" in result else result.last_hidden_state


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterable[str]:
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "bfloat16"))
@pytest.mark.parametrize("family", MERGED)
def test_a_merge_has_the_bits_of_peft_on_every_family(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    base = saved(family, tmp_path / "base", dtype)
    adapted = trained(base, tmp_path / "adapter", on_all_linear_layers_and_experts(base))
    expected = outputs(adapted) if dtype == torch.float32 else None
    output = tmp_path / "output"
    merge(tmp_path / "base", adapter=tmp_path / "adapter", output=output, options=MergeOptions(rounding="peft"))
    before, after = on_disk(tmp_path / "base"), on_disk(output)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    ours = load(type(base), output, dtype)
    if expected is not None:
        assert float((outputs(ours) - expected).abs().max()) < 1e-4
        assert float((outputs(base) - expected).abs().max()) > 1e-2
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    assert differing(ours.state_dict(), theirs.state_dict()) == []


@pytest.mark.parametrize("family", SPLIT)
@pytest.mark.parametrize("kind", ["dora", "balance", "bat"])
def test_norms_and_blocks_of_layers_that_share_a_tensor_are_those_of_peft(
    tmp_path: Path, family: str, kind: str
) -> None:
    base = saved(family, tmp_path / "base")
    layers = [name for name in linear_layers(base) if f"{name}.weight" not in on_disk(tmp_path / "base")]
    layers = [name for name in layers if name.endswith("_proj")]
    config = MissConfig(r=4, init_weights=kind == "balance" or "bat", target_modules=layers)
    if kind == "dora":
        config = LoraConfig(r=2, use_dora=True, target_modules=layers)
    adapted = trained(base, tmp_path / "adapter", config)
    merge(tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "output")
    ours = load(type(base), tmp_path / "output").state_dict()
    theirs = adapted.merge_and_unload().state_dict()
    for name, before in base.state_dict().items():
        assert torch.allclose(ours[name], theirs[name], atol=1e-5), name
        assert torch.equal(ours[name], before) == (name.removesuffix(".weight") not in layers)


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "whisper"])
def test_the_residual_and_its_initial_adapter_give_the_model_back(tmp_path: Path, family: str) -> None:
    base = saved(family, tmp_path / "base")
    options = DecomposeOptions(mode="ipm", rank=4, method="svd")
    decompose(tmp_path / "base", output=tmp_path / "residual", options=options)
    residual = load(type(base), tmp_path / "residual")
    expected, without = outputs(base), outputs(residual)
    adapted = PeftModel.from_pretrained(residual, tmp_path / "residual", subfolder="corda_init")
    assert float((outputs(adapted) - expected).abs().max()) < 1e-4
    assert float((without - expected).abs().max()) > 1e-2
