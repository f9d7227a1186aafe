"""Small checkpoints, adapters and covariances, written as the ecosystem's own libraries write them.

Every tensor comes from a seeded generator, so that a test fails or passes for good.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MODEL = FIXTURES / "model"
RESIDUAL = FIXTURES / "residual"
ADAPTERS = FIXTURES / "adapters"
COVARIANCES = FIXTURES / "covariances" / "knowledge.safetensors"

HIDDEN, INNER, VOCABULARY, LAYERS = 16, 24, 32, 2
KEY_VALUE = 8  # one of two heads

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}

LAYER_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}

LINEARS: dict[str, tuple[int, int]] = {
    f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in LAYER_SHAPES.items()
}
"""Every Linear of the tiny Llama but its head: module path and (d_out, d_in)."""

UP = "model.layers.1.mlp.up_proj"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def llama_tensors(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}.weight": shape for name, shape in LAYER_SHAPES.items()}
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
        }
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {name: random(*shape, seed=seed + place, dtype=dtype) for place, (name, shape) in enumerate(shapes.items())}


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    shards: int = 1,
    config: Mapping[str, Any] | None = LLAMA_CONFIG,
) -> Path:
    """The tiny Llama (or `tensors`) as one file, or as several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = llama_tensors() if tensors is None else dict(tensors)
    if config is not None:
        write_json(folder / "config.json", config)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(tensors)
    per_shard = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        chosen = names[number * per_shard : (number + 1) * per_shard]
        file_name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file_name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})
    return folder


def lora_config(rank: int = 4, **changes: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "base_model_name_or_path": None,
        "init_lora_weights": True,
        "bias": "none",
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        **changes,
    }


def lora_tensors(
    modules: Mapping[str, tuple[int, int]] = LINEARS, *, rank: int = 4, seed: int = 100
) -> dict[str, torch.Tensor]:
    tensors = {}
    for place, (module, (d_out, d_in)) in enumerate(modules.items()):
        tensors[f"base_model.model.{module}.lora_A.weight"] = random(rank, d_in, seed=seed + 2 * place)
        tensors[f"base_model.model.{module}.lora_B.weight"] = random(d_out, rank, seed=seed + 2 * place + 1)
    return tensors


def write_adapter(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(folder / "adapter_config.json", config)
    return folder


def write_lora(
    folder: Path, modules: Mapping[str, tuple[int, int]] = LINEARS, *, rank: int = 4, seed: int = 100, **config: Any
) -> Path:
    return write_adapter(folder, lora_tensors(modules, rank=rank, seed=seed), lora_config(rank, **config))


def write_miss(
    folder: Path, modules: Mapping[str, tuple[int, int]] = LINEARS, *, rank: int = 4, seed: int = 200, **config: Any
) -> Path:
    tensors = {
        f"base_model.model.{module}.miss_block": random(rank, d_out, seed=seed + place)
        for place, (module, (d_out, _)) in enumerate(modules.items())
    }
    return write_adapter(folder, tensors, {"peft_type": "MISS", "r": rank, "init_weights": True, **config})


def covariance(size: int, *, seed: int = 300) -> torch.Tensor:
    samples = random(2 * size, size, seed=seed)
    return samples.T @ samples


def covariance_tensors(modules: Mapping[str, tuple[int, int]] = LINEARS) -> dict[str, torch.Tensor]:
    return {module: covariance(d_in, seed=300 + place) for place, (module, (_, d_in)) in enumerate(modules.items())}


def write_covariances(
    path: Path, tensors: Mapping[str, torch.Tensor] | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """A covariance file: safetensors, or what `torch.save` writes for any other suffix."""
    tensors = covariance_tensors() if tensors is None else dict(tensors)
    if path.suffix == ".safetensors":
        save_file(tensors, path, dict(metadata or {}))
    else:
        torch.save(tensors, path)
    return path


def safetensors_bytes(header: bytes | str | Mapping[str, Any], data: bytes = b"") -> bytes:
    """A file with this very header, valid or not."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file's content by its path in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weight_files(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_below(folder).items() if name.endswith(".safetensors")}
