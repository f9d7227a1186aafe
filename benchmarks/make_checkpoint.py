"""Makes the inputs of whole runs: a random Llama checkpoint, a random LoRA adapter for it, and covariances of its inputs.

Tensors are drawn and written in blocks of rows, so that a run holds about a hundred MB, however large a tensor is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

WEIGHT_STD = 0.02
LORA_B_STD = 0.002
RANK, ALPHA = 128, 256
SHARD_BYTES = 500_000_000
SEED = 20260101
BLOCK_ELEMENTS = 16_000_000
COVARIANCE_DECAY = 1.2
OUTLIER_CHANNELS, OUTLIER_GAIN = 4, 40.0
SHARED_INPUTS = {
    "self_attn.q_proj": ("self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": (),
    "mlp.gate_proj": ("mlp.up_proj",),
    "mlp.down_proj": (),
}
"""The distinct inputs of a layer by their first module, and the others that have them."""

NORMS = ("input_layernorm", "post_attention_layernorm")

Draw = Callable[[int, tuple[int, ...]], Tensor]
"""Draws the next rows of a tensor: how many, and the shape of the whole."""


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """The sizes of a Llama model. `lm_head` tells whether the adapter is on the output embedding, too."""

    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    lm_head: bool = False

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The linear modules of a layer."""
        q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q_size, self.hidden),
            "self_attn.k_proj": (kv_size, self.hidden),
            "self_attn.v_proj": (kv_size, self.hidden),
            "self_attn.o_proj": (self.hidden, q_size),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every tensor of the model, in the order in which it is written."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for module, shape in self.projections.items():
                yield f"model.layers.{layer}.{module}.weight", shape
            for norm in NORMS:
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def targets(self, which: str) -> dict[str, tuple[int, int]]:
        """The modules that carry the adapter: `all` linear ones, or those of `attention`."""
        found = {
            f"model.layers.{layer}.{module}": shape
            for layer in range(self.layers)
            for module, shape in self.projections.items()
            if which == "all" or "self_attn" in module
        }
        return found | ({"lm_head": (self.vocabulary, self.hidden)} if self.lm_head and which == "all" else {})

    def config(self) -> dict[str, object]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocabulary,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
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


def tinyllama(gigabytes: float) -> LlamaShape:
    """TinyLlama 1.1B, with as many layers as bring it to about that size."""
    return _with_layers(gigabytes, hidden=2048, intermediate=5632, heads=32, kv_heads=4, head_dim=64)


def llama_2_7b(gigabytes: float) -> LlamaShape:
    """Llama 2 7B, which has 32 layers at 13.5 GB."""
    return _with_layers(gigabytes, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128)


def large_tensor(gigabytes: float) -> LlamaShape:
    """Two embeddings of that size each, as wide as those of Llama 3.1 405B, the output one with the adapter.

    The one layer between them is small.
    """
    hidden = 16384
    return LlamaShape(
        hidden=hidden,
        intermediate=1024,
        vocabulary=max(1, round(gigabytes * 1e9 / 2 / hidden)),
        heads=8,
        kv_heads=4,
        head_dim=64,
        layers=1,
        lm_head=True,
    )


def _with_layers(gigabytes: float, **sizes: int) -> LlamaShape:
    one = LlamaShape(vocabulary=32000, layers=1, **sizes)
    per_layer = 2 * sum(d_out * d_in for d_out, d_in in one.projections.values())
    layers = max(1, round((gigabytes * 1e9 - 4 * one.vocabulary * one.hidden) / per_layer))
    return LlamaShape(vocabulary=32000, layers=layers, **sizes)


SHAPES: dict[str, Callable[[float], LlamaShape]] = {
    "tinyllama": tinyllama,
    "llama-2-7b": llama_2_7b,
    "large-tensor": large_tensor,
}


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    draw: Mapping[str, Draw],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one file, block of rows by block of rows. All tensors have one dtype, `BF16` or `F32`."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * {"BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as sink:
        sink.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            rows_each = max(1, BLOCK_ELEMENTS // torch.Size(shape[1:]).numel())
            for first in range(0, shape[0], rows_each):
                rows = draw[name](min(rows_each, shape[0] - first), shape)
                stored = rows.to({"BF16": torch.bfloat16, "F32": torch.float32}[dtype])
                sink.write(stored.contiguous().view(torch.uint8).numpy().data)


def shards(tensors: Iterator[tuple[str, tuple[int, ...]]]) -> list[dict[str, tuple[int, ...]]]:
    """The tensors, shard by shard."""
    found: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors:
        nbytes = 2 * torch.Size(shape).numel()
        if found[-1] and filled + nbytes > SHARD_BYTES:
            found.append({})
            filled = 0
        found[-1][name] = shape
        filled += nbytes
    return found


def write_model(folder: Path, model: LlamaShape) -> None:
    """Writes the shards, their index and `config.json`. Weights are normal, norms one."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(rows: int, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(rows)
        return torch.randn(rows, *shape[1:], generator=generator).mul_(WEIGHT_STD)

    parts = shards(model.tensors())
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        write_safetensors(folder / file_name, part, "BF16", dict.fromkeys(part, draw))
        weight_map |= dict.fromkeys(part, file_name)
    total = sum(2 * torch.Size(shape).numel() for _, shape in model.tensors())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(model.config(), indent=1))


def write_adapter(folder: Path, model: LlamaShape, targets: str, base_name: str) -> None:
    """Writes a LoRA adapter in PEFT's format, float32, with a delta of about 3 % of the weights' size."""
    generator = torch.Generator().manual_seed(SEED + 1)

    def rows_of_a(rows: int, shape: tuple[int, ...]) -> Tensor:  # PEFT's kaiming_uniform_(a=√5)
        return (torch.rand(rows, shape[1], generator=generator) * 2 - 1) * shape[1] ** -0.5

    def rows_of_b(rows: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(rows, shape[1], generator=generator) * LORA_B_STD

    chosen = model.targets(targets)
    shapes: dict[str, tuple[int, ...]] = {}
    draw: dict[str, Draw] = {}
    for module, (d_out, d_in) in chosen.items():
        lora_A, lora_B = (f"base_model.model.{module}.{factor}.weight" for factor in ("lora_A", "lora_B"))
        shapes |= {lora_A: (RANK, d_in), lora_B: (d_out, RANK)}
        draw |= {lora_A: rows_of_a, lora_B: rows_of_b}
    write_safetensors(folder / "adapter_model.safetensors", shapes, "F32", draw)
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
        "target_modules": sorted({module.rpartition(".")[2] for module in chosen}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config, indent=1))


def covariance(d_in: int, generator: torch.Generator) -> Tensor:
    """(d_in, d_in) float32 with eigenvalues `i^-1.2`, then four input channels amplified as massive activations are.

    Its eigenvectors are a product of reflections, which takes far less time than random ones.
    """
    C = torch.diag(torch.arange(1, d_in + 1, dtype=torch.float64) ** -COVARIANCE_DECAY).float()
    for _ in range(8):
        v = torch.randn(d_in, generator=generator)
        v /= v.norm()
        C -= torch.outer(2 * v, v @ C)
        C -= torch.outer(2 * (C @ v), v)
    channels = torch.randperm(d_in, generator=generator)[:OUTLIER_CHANNELS]
    C[channels] *= OUTLIER_GAIN
    C[:, channels] *= OUTLIER_GAIN
    C = torch.triu(C) + torch.triu(C, 1).T
    return C / C.diagonal().mean()


def write_covariances(folder: Path, model: LlamaShape) -> None:
    """Writes `covariances.safetensors`: one matrix for each distinct input of each layer, the others as aliases."""
    generator = torch.Generator().manual_seed(SEED + 2)
    widths = {module: model.projections[module][1] for module in SHARED_INPUTS}
    matrices = {width: covariance(width, generator) for width in sorted(set(widths.values()))}
    shapes: dict[str, tuple[int, ...]] = {}
    draw: dict[str, Draw] = {}
    aliases: dict[str, str] = {}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for module, others in SHARED_INPUTS.items():
            width = widths[module]
            shapes[prefix + module] = (width, width)
            draw[prefix + module] = _rows_of(matrices[width])
            aliases |= {prefix + other: prefix + module for other in others}
    tokens = str(16 * max(widths.values()))
    metadata = {"format": "corda_convert.covariances", "version": "1", "aliases": json.dumps(aliases), "tokens": tokens}
    write_safetensors(folder / "covariances.safetensors", shapes, "F32", draw, metadata)


def _rows_of(matrix: Tensor) -> Draw:
    """Gives the rows of a matrix, one block after the other, and then those of the next tensor from the first on."""
    place = 0

    def draw(rows: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal place
        begin, place = place, (place + rows) % len(matrix)
        return matrix[begin : begin + rows]

    return draw


def make(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes the folder if it is not there: under another name first, so that half a folder is never taken for one."""
    if folder.exists():
        return
    staging = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)
    staging.rename(folder)


def main() -> None:
    """Prints the two folders as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("gigabytes", type=float, help="of the model; of one embedding for large-tensor")
    parser.add_argument("targets", choices=("all", "attention"))
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--covariances", action="store_true", help="and covariances")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape](arguments.gigabytes)
    size = f"{arguments.gigabytes:g}-gb" if arguments.shape == "large-tensor" else f"{shape.layers}-layers"
    model = arguments.work / f"{arguments.shape}-{size}"
    adapter = arguments.work / f"lora-{model.name}-{arguments.targets}-r{RANK}"
    make(model, lambda folder: write_model(folder, shape))
    make(adapter, lambda folder: write_adapter(folder, shape, arguments.targets, model.name))
    made = {"model": str(model), "adapter": str(adapter)}
    if arguments.covariances:
        covariances = arguments.work / f"covariances-{model.name}"
        make(covariances, lambda folder: write_covariances(folder, shape))
        made["covariances"] = str(covariances / "covariances.safetensors")
    print(json.dumps(made))


if __name__ == "__main__":
    main()
