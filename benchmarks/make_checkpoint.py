"""Makes the inputs of `merge.py`: a random Llama checkpoint, and a random LoRA adapter for it.

The model has the shape of TinyLlama 1.1B with as many layers as the size asks for. A run holds one shard in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, VOCABULARY, HEADS, KV_HEADS = 2048, 5632, 32000, 32, 4
KV_SIZE = HIDDEN // HEADS * KV_HEADS
WEIGHT_STD = 0.02
LORA_B_STD = 0.002
RANK, ALPHA = 128, 256
SHARD_BYTES = 500_000_000
SEED = 20260101

PROJECTIONS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV_SIZE, HIDDEN),
    "self_attn.v_proj": (KV_SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def layers_for(gigabytes: float) -> int:
    """How many layers bring the bf16 model to about that size."""
    per_layer = 2 * sum(d_out * d_in for d_out, d_in in PROJECTIONS.values())
    return max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / per_layer))


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the model, in the order in which it is written."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(layers):
        for module, shape in PROJECTIONS.items():
            yield f"model.layers.{layer}.{module}.weight", shape
        for norm in NORMS:
            yield f"model.layers.{layer}.{norm}.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def shards(layers: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors, shard by shard."""
    found: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in shapes(layers):
        nbytes = 2 * torch.Size(shape).numel()
        if found[-1] and filled + nbytes > SHARD_BYTES:
            found.append([])
            filled = 0
        found[-1].append((name, shape))
        filled += nbytes
    return found


def config(layers: int) -> dict[str, object]:
    """`config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "vocab_size": VOCABULARY,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def random_weight(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal weights; ones for a norm."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator).mul_(WEIGHT_STD).bfloat16()


def write_model(folder: Path, layers: int) -> None:
    """Writes the shards, their index and `config.json`."""
    generator = torch.Generator().manual_seed(SEED)
    parts = shards(layers)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {name: random_weight(shape, generator) for name, shape in part}
        save_file(tensors, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
    total = sum(2 * torch.Size(shape).numel() for _, shape in shapes(layers))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config(layers), indent=1))


def write_adapter(folder: Path, layers: int, targets: str, base_name: str) -> None:
    """Writes a LoRA adapter in PEFT's format, float32, with a delta of about 3 % of the weights' size."""
    generator = torch.Generator().manual_seed(SEED + 1)
    chosen = {module: shape for module, shape in PROJECTIONS.items() if targets == "all" or "self_attn" in module}
    tensors: dict[str, Tensor] = {}
    for layer in range(layers):
        for module, (d_out, d_in) in chosen.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}"
            bound = d_in**-0.5  # PEFT's kaiming_uniform_(a=√5)
            tensors[f"{prefix}.lora_A.weight"] = (torch.rand(RANK, d_in, generator=generator) * 2 - 1) * bound
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, RANK, generator=generator) * LORA_B_STD
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    adapter_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(module.rpartition(".")[2] for module in chosen),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=1))


def make(folder: Path, what: str, layers: int, targets: str, base_name: str) -> None:
    """Makes the folder if it is not there: under another name first, so that half a folder is never taken for one."""
    if folder.exists():
        return
    staging = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if what == "model":
        write_model(staging, layers)
    else:
        write_adapter(staging, layers, targets, base_name)
    staging.rename(folder)


def main() -> None:
    """Prints the two folders as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("gigabytes", type=float)
    parser.add_argument("targets", choices=("all", "attention"))
    arguments = parser.parse_args()
    layers = layers_for(arguments.gigabytes)
    model = arguments.work / f"llama-{layers}-layers"
    adapter = arguments.work / f"lora-{layers}-layers-{arguments.targets}-r{RANK}"
    make(model, "model", layers, arguments.targets, model.name)
    make(adapter, "adapter", layers, arguments.targets, model.name)
    print(json.dumps({"model": str(model), "adapter": str(adapter)}))


if __name__ == "__main__":
    main()
