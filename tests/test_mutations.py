"""Mutants of adapters and models: each is refused in one message, or merged to what float64 gives for the mutated inputs."""

import copy
import random as stdlib_random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import float64_oracle as oracle
import pytest
import torch
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
from conftest import Ran, checked_refusal
from families import tiny
from float64_oracle import AdapterFiles, Meaningless
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about the models that the mutants pretend to be

PREFIX = "base_model.model."
ATTENTION = {name: shape for name, shape in LINEARS.items() if "self_attn" in name}


@dataclass
class Case:
    """A model and its adapters, as they will lie on disk.

    Attributes:
        beside: initial adapter in the model's own folder, which makes that a residual.
        damage: what is done to the files; the folders of the model and of the first adapter.
        is_readable: whether the files still mean something after the damage.
    """

    tensors: dict[str, Tensor]
    adapters: list[AdapterFiles]
    config: dict[str, Any] = field(default_factory=lambda: dict(LLAMA_CONFIG))
    shards: int = 1
    beside: AdapterFiles | None = None
    damage: Callable[[Path, Path], object] | None = None
    is_readable: bool = True


Mutation = tuple[str, Case]


# The kinds


def plain_llama(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return llama_tensors(dtype=dtype)


def with_config(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    return {**LLAMA_CONFIG, "dtype": dtype, **changes}


def some_lora(
    modules: Mapping[str, tuple[int, int]] = ATTENTION, rank: int = 4, seed: int = 100, **config: Any
) -> AdapterFiles:
    targets = sorted({name.rpartition(".")[2] for name in modules})
    return AdapterFiles(
        lora_tensors(modules, rank=rank, seed=seed), lora_config(rank, target_modules=targets, **config)
    )


def plain_lora() -> Case:
    return Case(plain_llama(), [some_lora(LINEARS)], shards=3)


def half_precision() -> Case:
    adapter = some_lora(LINEARS)
    adapter.tensors = {name: tensor.bfloat16() for name, tensor in adapter.tensors.items()}
    return Case(plain_llama(torch.bfloat16), [adapter], with_config("bfloat16"))


def patterns() -> Case:
    adapter = some_lora(
        ATTENTION, use_rslora=True, rank_pattern={"k_proj": 2}, alpha_pattern={"0.self_attn.q_proj": 2.5}
    )
    for place, (name, tensor) in enumerate(adapter.tensors.items()):
        if "k_proj" in name:
            shape = (2, tensor.shape[1]) if "lora_A" in name else (tensor.shape[0], 2)
            adapter.tensors[name] = random(*shape, seed=400 + place)
    return Case(plain_llama(), [adapter])


def dora() -> Case:
    adapter = some_lora(ATTENTION, use_dora=True)
    for place, (name, (d_out, _)) in enumerate(ATTENTION.items()):
        adapter.tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = random(d_out, seed=500 + place).abs() + 1
    return Case(plain_llama(), [adapter])


def lora_bias() -> Case:
    tensors = plain_llama()
    adapter = some_lora(ATTENTION, lora_bias=True)
    for place, (name, (d_out, _)) in enumerate(ATTENTION.items()):
        tensors[f"{name}.bias"] = random(d_out, seed=600 + place)
        adapter.tensors[f"{PREFIX}{name}.lora_B.bias"] = random(d_out, seed=700 + place)
    return Case(tensors, [adapter], with_config(attention_bias=True))


def modules_to_save() -> Case:
    adapter = some_lora(ATTENTION, modules_to_save=["lm_head", "post_attention_layernorm"])
    adapter.tensors[f"{PREFIX}lm_head.weight"] = random(VOCABULARY, HIDDEN, seed=800)
    for layer in (0, 1):
        name = f"{PREFIX}model.layers.{layer}.post_attention_layernorm.weight"
        adapter.tensors[name] = random(HIDDEN, seed=801 + layer)
    return Case(plain_llama(), [adapter])


def block_adapter(mode: str, peft_type: str = "MISS") -> Case:
    init = {"balance": True, "mini": "mini", "bat": "bat"}[mode]
    config = {"peft_type": peft_type, "r": 4, "init_weights": init, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"mini_r": 2} if mode == "mini" else {}
    tensors = {}
    for place, (name, (d_out, _)) in enumerate(LINEARS.items()):
        shape = {"balance": (4, d_out), "mini": (4, 2), "bat": (d_out // 4, 4, 4)}[mode]
        tensors[f"{PREFIX}{name}.{peft_type.lower()}_block"] = random(*shape, seed=900 + place)
    return Case(plain_llama(), [AdapterFiles(tensors, config)])


def trainable_tokens() -> Case:
    tensors = {f"{PREFIX}model.embed_tokens.trainable_tokens_delta": random(3, HIDDEN, seed=1000)}
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [30, 2, 7], "target_modules": ["embed_tokens"]}
    return Case(plain_llama(), [AdapterFiles(tensors, config)])


def tokens_of_a_tied_model() -> Case:
    tensors = {name: tensor for name, tensor in plain_llama().items() if name != "lm_head.weight"}
    adapter = some_lora(ATTENTION, trainable_token_indices=[1, 9])
    adapter.tensors[f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta"] = random(2, HIDDEN, seed=1001)
    return Case(tensors, [adapter], with_config(tie_word_embeddings=True))


def embedding(*, is_tied: bool) -> Case:
    tensors = plain_llama()
    if is_tied:
        del tensors["lm_head.weight"]
    adapter = some_lora(ATTENTION)
    adapter.config["target_modules"] = [*adapter.config["target_modules"], "embed_tokens"]
    adapter.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = random(4, VOCABULARY, seed=1100)
    adapter.tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = random(HIDDEN, 4, seed=1101)
    return Case(tensors, [adapter], with_config(tie_word_embeddings=is_tied))


def stacks_of_experts() -> Case:
    model = tiny("qwen3_moe")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                tensors[name.replace("gate_up_proj", f"{expert}.gate_proj.weight")] = gate.contiguous()
                tensors[name.replace("gate_up_proj", f"{expert}.up_proj.weight")] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, matrix in enumerate(tensor):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = matrix.contiguous()
        else:
            tensors[name] = tensor.clone()
    factors: dict[str, Tensor] = {}
    for layer in (0, 1):
        module = f"{PREFIX}model.layers.{layer}"
        for place, (key, d_out, d_in) in enumerate(
            [(".base_layer", 48, 32), ("", 32, 24)]  # gate_up_proj lies below down_proj
        ):
            seed = 1200 + 10 * layer + 2 * place
            factors[f"{module}.mlp.experts{key}.lora_A.weight"] = random(8, d_in, seed=seed)
            factors[f"{module}.mlp.experts{key}.lora_B.weight"] = random(d_out, 8, seed=seed + 1)
        factors[f"{module}.self_attn.q_proj.lora_A.weight"] = random(2, 32, seed=1250 + layer)
        factors[f"{module}.self_attn.q_proj.lora_B.weight"] = random(32, 2, seed=1260 + layer)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = lora_config(2, target_parameters=targets, peft_version="0.21.2")
    model_config = {**model.config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32"}
    return Case(tensors, [AdapterFiles(factors, config)], model_config, shards=2)


def residual_parts() -> tuple[dict[str, Tensor], dict[str, Tensor], AdapterFiles, AdapterFiles]:
    """A base, its residual, and adapters: as taken out by PiSSA's method with a scaling of 2, and as trained from there."""
    base = plain_llama()
    residual = dict(base)
    initial: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    for place, name in enumerate(ATTENTION):
        weight = base[f"{name}.weight"].double()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        B, A = left[:, :4] * (values[:4] / 2).sqrt(), (values[:4] / 2).sqrt()[:, None] * right[:4]
        residual[f"{name}.weight"] = (weight - 2 * B @ A).float()
        for label, factor in (("A", A), ("B", B)):
            key = f"{PREFIX}{name}.lora_{label}.weight"
            initial[key] = factor.float().contiguous()
            noise = random(*factor.shape, seed=1300 + 2 * place + (label == "B")) / 10
            trained[key] = (factor + noise).float().contiguous()
    config = lora_config(4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    return base, residual, AdapterFiles(initial, config), AdapterFiles(trained, config)


def on_the_residual() -> Case:
    _, residual, initial, trained = residual_parts()
    trained.is_beside = True
    return Case(residual, [trained], beside=initial)


def with_initial_factors() -> Case:
    base, _, initial, trained = residual_parts()
    trained.initial = initial
    return Case(base, [trained])


def two_adapters() -> Case:
    second = some_lora({UP: LINEARS[UP], **ATTENTION}, rank=3, seed=1400)
    first = some_lora(LINEARS)
    first.scale, second.scale = 0.5, -1.25
    return Case(plain_llama(), [second, first])


def pickled() -> Case:
    case = plain_lora()
    case.adapters[0].pickled = True
    return case


def block_fp8() -> Case:
    config = with_config(
        "bfloat16",
        quantization_config={"quant_method": "fp8", "weight_block_size": [8, 16], "activation_scheme": "dynamic"},
    )
    tensors: dict[str, Tensor] = {}
    for name, tensor in plain_llama(torch.bfloat16).items():
        tensors[name] = tensor
        if name.removesuffix(".weight") in LINEARS:
            rows, columns = tensor.shape
            scales = random(rows // 8, -(-columns // 16), seed=1500 + len(tensors)).abs() / 100 + 0.001
            spread = scales.repeat_interleave(8, 0).repeat_interleave(16, 1)[:, :columns]
            tensors[name] = (tensor.float() / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scales
    return Case(tensors, [some_lora(ATTENTION)], config, shards=2)


# The mutations. Each place is drawn with a seed of its own.


def chosen(case: Case, names: list[str], what: str, count: int) -> list[str]:
    return stdlib_random.Random(f"{what} {len(case.tensors)}").sample(sorted(names), min(count, len(names)))


def change_first(number: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = number
        return changed

    return change


TENSOR_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda tensor: tensor.transpose(-1, -2).contiguous() if tensor.ndim > 1 else tensor[:, None],
    "without its last row": lambda tensor: tensor[:-1].contiguous(),
    "without its last column": lambda tensor: tensor[..., :-1].contiguous(),
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "half its rows": lambda tensor: tensor[: len(tensor) // 2].contiguous(),
    "flat": lambda tensor: tensor.reshape(-1),
    "in a dimension more": lambda tensor: tensor[None].contiguous(),
    "of no rows": lambda tensor: tensor[:0],
    "a number": lambda tensor: tensor.sum(),
    "integers": lambda tensor: (tensor * 10).to(torch.int32),
    "bytes": lambda tensor: (tensor.abs() * 10).to(torch.uint8),
    "fp8": lambda tensor: tensor.to(torch.float8_e4m3fn),
    "float64": lambda tensor: tensor.double(),
    "float16": lambda tensor: tensor.half(),
    "NaN": change_first(float("nan")),
    "infinite": change_first(float("inf")),
    "huge": change_first(3e38),
    "negative": lambda tensor: -tensor,
    "zero": torch.zeros_like,
    "rows upside down": lambda tensor: tensor.flip(0).contiguous(),
}


def as_stored(change: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """The change of a tensor that may be fp8, for which torch has few operations."""
    if tensor.dtype != torch.float8_e4m3fn:
        return change(tensor)
    changed = change(tensor.float())
    return changed.to(tensor.dtype) if changed.dtype == torch.float32 else changed


KEY_CHANGES: dict[str, Callable[[str], str]] = {
    "of a layer that is not there": lambda key: key.replace(".layers.1.", ".layers.7.").replace(
        ".layers.0.", ".layers.8."
    ),
    "of a mistyped module": lambda key: key.replace("_proj.", "_porj.").replace("_tokens.", "_toknes."),
    "of a mistyped part": lambda key: (
        key.replace(".lora_", ".lora_x").replace("_block", "_blok").replace("_delta", "_dleta")
    ),
    "without PEFT's prefix": lambda key: key.removeprefix(PREFIX),
    "with the prefix twice": lambda key: PREFIX + key,
    "compiled": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "with the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "of an adapter of another name": lambda key: key.replace(".weight", ".other.weight"),
}


def tensor_mutations(case: Case, which: int, places: int) -> Iterator[Mutation]:
    """One tensor of an adapter changed, renamed, doubled or gone."""
    keys = sorted(case.adapters[which].tensors)

    def mutant() -> tuple[Case, dict[str, Tensor]]:
        changed = copy.deepcopy(case)
        return changed, changed.adapters[which].tensors

    for what, change in TENSOR_CHANGES.items():
        for key in chosen(case, keys, what, places):
            changed, tensors = mutant()
            tensors[key] = change(tensors[key])
            yield f"{key} {what}", changed
    for what, rename in KEY_CHANGES.items():
        for key in chosen(case, [key for key in keys if rename(key) != key], what, places):
            changed, tensors = mutant()
            tensors[rename(key)] = tensors.pop(key)
            yield f"{key} {what}", changed
            changed, tensors = mutant()
            tensors[rename(key)] = tensors[key].clone()
            yield f"{key} doubled, {what}", changed
    for key in chosen(case, keys, "dropped", 2 * places):
        changed, tensors = mutant()
        del tensors[key]
        yield f"{key} dropped", changed
    for key in chosen(case, keys, "module dropped", places):
        module = key.partition(".lora_")[0]
        changed, tensors = mutant()
        for own in [own for own in tensors if own.startswith(f"{module}.")]:
            del tensors[own]
        yield f"{module} dropped", changed
    for first, second in zip(chosen(case, keys, "swap", 6), chosen(case, keys, "with", 6), strict=True):
        changed, tensors = mutant()
        tensors[first], tensors[second] = tensors[second], tensors[first]
        yield f"{first} and {second} swapped", changed
    for key in chosen(case, [key for key in keys if ".lora_A" in key], "A and B", places):
        other = key.replace(".lora_A", ".lora_B")
        changed, tensors = mutant()
        tensors[key], tensors[other] = tensors[other], tensors[key]
        yield f"{key} and B swapped", changed
        changed, tensors = mutant()
        tensors[key], tensors[other] = tensors[other].T.contiguous(), tensors[key].T.contiguous()
        yield f"{key} and B swapped and transposed", changed
    for name, tensor in {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight": random(4, 4),
        "something": random(3),
        "base_model.model.lm_head.weight": random(VOCABULARY, HIDDEN, seed=7),
        "base_model.model.model.norm.weight": random(HIDDEN, seed=8),
        "base_model.model.model.layers.0.self_attn.q_proj.bias": random(HIDDEN, seed=9),
        "base_model.model.model.embed_tokens.base_layer.weight": random(VOCABULARY, HIDDEN, seed=7),
    }.items():
        if name not in keys:
            changed, tensors = mutant()
            tensors[name] = tensor
            yield f"{name} added", changed
    changed, tensors = mutant()
    tensors.clear()
    yield "no tensors", changed
    changed, tensors = mutant()
    tensors |= {key: tensor[:0] for key, tensor in tensors.items()}
    yield "all tensors of no rows", changed


GENERAL_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"peft_type {kind!r}": {"peft_type": kind}
        for kind in ("LORA", "MISS", "BONE", "TRAINABLE_TOKENS", "LOHA", "", None, 7)
    },
    **{f"r {rank!r}": {"r": rank} for rank in (0, 1, 2, 8, -4, 4.0, "4", True, None)},
    **{f"modules_to_save {names!r}": {"modules_to_save": names} for names in (["lm_head"], ["norm"], "lm_head", ["nothing"])},
    "other targets": {"target_modules": ["v_proj"]},
    "no targets": {"target_modules": None},
    "bias all": {"bias": "all"},
}  # fmt: skip
BLOCK_CONFIGS: dict[str, dict[str, Any]] = {
    "mini_r 4": {"mini_r": 4},
    **{f"init_weights {init!r}": {"init_weights": init} for init in (False, "mini", "bat", "other", None, 1)},
}
TOKEN_CONFIGS: dict[str, dict[str, Any]] = {
    **{
        f"token_indices {indices!r}": {"token_indices": indices}
        for indices in (
            [2, 7, 30], [2, 2, 7], [0, 1, 32], [0, 1, -1], [0, 1], "012", None, [0.0, 1, 2], {"embed_tokens": [5, 4, 3]},
        )
    },
}  # fmt: skip
LORA_CONFIGS: dict[str, dict[str, Any]] = {
    **{f"alpha {alpha!r}": {"lora_alpha": alpha} for alpha in (1, 0, -8, 2.5, 1e40, "8", None, True, float("nan"))},
    "use_rslora": {"use_rslora": True},
    "no use_rslora": {"use_rslora": False},
    "use_dora": {"use_dora": True},
    "no use_dora": {"use_dora": False},
    "lora_bias": {"lora_bias": True},
    "no lora_bias": {"lora_bias": False},
    **{
        f"rank_pattern {pattern!r}": {"rank_pattern": pattern}
        for pattern in ({"q_proj": 4}, {"q_proj": 2}, {"q_proj": 0}, {"nothing": 4}, {"(": 4}, ["q_proj"], {".*": 4})
    },
    **{
        f"alpha_pattern {pattern!r}": {"alpha_pattern": pattern}
        for pattern in (
            {"q_proj": 3.5}, {"q_proj": 1, "0.self_attn.q_proj": 2}, {"0.self_attn.q_proj": 2, "q_proj": 1}, {"proj": 1},
            {"nothing": 1}, {".*k_proj": "1"}, {"[qk]_proj": 5}, {"model.layers.0.self_attn.q_proj": 0.25},
        )
    },
    **{
        f"init_lora_weights {init!r}": {"init_lora_weights": init}
        for init in ("gaussian", False, "pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq")
    },
    **{
        f"{option} set": {option: value}
        for option, value in (
            ("use_qalora", True), ("use_bdlora", {"x": 1}), ("kasa_config", {"x": 1}), ("layer_replication", [[0, 1]]),
            ("alora_invocation_tokens", [1]), ("arrow_config", {"x": 1}), ("made_up", True),
        )
    },
    "tokens that are not there": {"trainable_token_indices": [5]},
    "parameters that are not there": {"target_parameters": ["experts.up_proj"]},
}  # fmt: skip
REFUSED_OPTIONS = {
    "use_qalora", "use_bdlora", "kasa_config", "layer_replication", "alora_invocation_tokens", "arrow_config", "made_up"
}  # fmt: skip


def config_mutations(case: Case, which: int) -> Iterator[Mutation]:
    kind = case.adapters[which].config["peft_type"]
    own = {"LORA": LORA_CONFIGS, "TRAINABLE_TOKENS": TOKEN_CONFIGS}.get(kind, BLOCK_CONFIGS)
    for what, changes in {**GENERAL_CONFIGS, **own}.items():
        changed = copy.deepcopy(case)
        changed.adapters[which].config |= changes
        changed.is_readable = not (REFUSED_OPTIONS & set(changes))
        yield what, changed
    for key in sorted(case.adapters[which].config):
        changed = copy.deepcopy(case)
        del changed.adapters[which].config[key]
        yield f"the config without {key}", changed


def file_mutations(case: Case) -> Iterator[Mutation]:
    """The first adapter's files damaged."""

    def overwrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
        def damage(_model: Path, adapter: Path) -> None:
            (path,) = adapter.glob(name)
            path.write_bytes(change(path.read_bytes()))

        return damage

    weights = "adapter_model.*"
    for what, damage in {
        "its last byte gone": overwrite(weights, lambda content: content[:-1]),
        "half of it gone": overwrite(weights, lambda content: content[: len(content) // 2]),
        "ten bytes left": overwrite(weights, lambda content: content[:10]),
        "empty": overwrite(weights, lambda content: b""),
        "a text": overwrite(weights, lambda content: b"version https://git-lfs.github.com/spec/v1"),
        "its config cut": overwrite("adapter_config.json", lambda content: content[:-5]),
        "its config a list": overwrite("adapter_config.json", lambda content: b"[]"),
        "its config not UTF-8": overwrite("adapter_config.json", lambda content: b"\xff" + content),
        "its config gone": lambda _, adapter: (adapter / "adapter_config.json").unlink(),
        "its weights gone": lambda _, adapter: next(adapter.glob(weights)).unlink(),
    }.items():
        changed = copy.deepcopy(case)
        changed.damage, changed.is_readable = damage, False
        yield f"the adapter's file: {what}", changed


def base_mutations(case: Case, places: int) -> Iterator[Mutation]:
    """One tensor of the model changed, renamed or gone; another config; damaged files."""
    matrices = [name for name, tensor in case.tensors.items() if tensor.ndim == 2]

    def mutant() -> tuple[Case, dict[str, Tensor]]:
        changed = copy.deepcopy(case)
        return changed, changed.tensors

    for what, change in TENSOR_CHANGES.items():
        for name in chosen(case, matrices, f"base {what}", places):
            changed, tensors = mutant()
            tensors[name] = as_stored(change, tensors[name])
            yield f"the model's {name} {what}", changed
    for name in chosen(case, list(case.tensors), "base dropped", 3 * places):
        changed, tensors = mutant()
        del tensors[name]
        yield f"the model's {name} dropped", changed
        changed, tensors = mutant()
        tensors[name.replace("model.", "modle.")] = tensors.pop(name)
        yield f"the model's {name} misnamed", changed
    for first, second in zip(
        chosen(case, matrices, "base swap", 4), chosen(case, matrices, "base with", 4), strict=True
    ):
        changed, tensors = mutant()
        tensors[first], tensors[second] = tensors[second], tensors[first]
        yield f"the model's {first} and {second} swapped", changed
    for name in ("something", "model.layers.9.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.extra"):
        changed, tensors = mutant()
        tensors[name] = random(HIDDEN, HIDDEN, seed=11)
        yield f"{name} added to the model", changed
    yield from model_config_mutations(case)
    yield from index_mutations(case)


def model_config_mutations(case: Case) -> Iterator[Mutation]:
    is_tied = bool(case.config.get("tie_word_embeddings"))
    for what, changes in {
        "another architecture": {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        "an unknown architecture": {"architectures": ["MadeUp"], "model_type": "made_up"},
        "a class of another name": {"architectures": ["LlamaModel"]},
        "no architectures": {"architectures": None},
        "the tie flipped": {"tie_word_embeddings": not is_tied},
        "another vocab_size": {"vocab_size": VOCABULARY + 8},
        "another hidden_size": {"hidden_size": 2 * HIDDEN},
        "more layers": {"num_hidden_layers": 5},
        "a layer less": {"num_hidden_layers": 1},
        "another dtype": {"dtype": "float16"},
        "a layer count that is no number": {"num_hidden_layers": "two"},
        "bitsandbytes": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    }.items():
        changed = copy.deepcopy(case)
        changed.config |= changes
        changed.is_readable = what != "bitsandbytes"
        yield f"the model's config with {what}", changed
    for what, damage in {
        "gone": lambda model, _: (model / "config.json").unlink(),
        "cut": lambda model, _: (model / "config.json").write_bytes((model / "config.json").read_bytes()[:-9]),
    }.items():
        changed = copy.deepcopy(case)
        changed.damage, changed.is_readable = damage, what == "gone" and not case.config.get("quantization_config")
        yield f"the model's config {what}", changed


def index_mutations(case: Case) -> Iterator[Mutation]:
    """Shards and their index no longer fit."""

    def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path, Path], object]:
        def damage(model: Path, _adapter: Path) -> None:
            path = model / "model.safetensors.index.json"
            index = read_json(path)
            change(index)
            write_json(path, index)

        return damage

    def swap(model: Path, _adapter: Path) -> None:
        first, second, *_ = sorted(model.glob("*.safetensors"))
        first.rename(model / "x")
        second.rename(first)
        (model / "x").rename(second)

    def move_one(index: dict[str, Any]) -> None:
        name, *_ = places = index["weight_map"]
        places[name] = next(place for place in sorted(places.values()) if place != places[name])

    damages: dict[str, tuple[bool, Callable[[Path, Path], object]]] = {
        "the first shard cut": (False, lambda model, _: cut(sorted(model.glob("*.safetensors"))[0])),
        "the first shard gone": (False, lambda model, _: sorted(model.glob("*.safetensors"))[0].unlink()),
    }
    if case.shards > 1:
        damages |= {
            "two shards swapped": (False, swap),
            "the index without a tensor": (False, rewritten(lambda index: index["weight_map"].popitem())),
            "a tensor in another shard": (False, rewritten(move_one)),
            "the index with a tensor more": (
                False,
                rewritten(lambda index: index["weight_map"].update(x=next(iter(index["weight_map"].values())))),
            ),
            "no weight_map": (False, rewritten(lambda index: index.pop("weight_map"))),
            "another total_size": (True, rewritten(lambda index: index["metadata"].update(total_size=7))),
            "no metadata": (True, rewritten(lambda index: index.pop("metadata"))),
        }
    for what, (is_readable, damage) in damages.items():
        changed = copy.deepcopy(case)
        changed.damage, changed.is_readable = damage, is_readable
        yield what, changed


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def initial_mutations(case: Case) -> Iterator[Mutation]:
    """The initial adapter that is given changed."""
    own = case.adapters[0].initial
    assert own is not None
    for what, mutated in tensor_mutations(Case(case.tensors, [own]), 0, 1):
        changed = copy.deepcopy(case)
        changed.adapters[0].initial = mutated.adapters[0]
        yield f"initial {what}", changed
    for alpha in (1, 16, "8"):
        changed = copy.deepcopy(case)
        changed.adapters[0].initial = AdapterFiles(own.tensors, own.config | {"lora_alpha": alpha})
        yield f"initial alpha {alpha!r}", changed


def scale_mutations(case: Case) -> Iterator[Mutation]:
    for scale in (0.0, -1.0, 3.25, 1e30, 1e308, float("nan"), float("inf")):
        changed = copy.deepcopy(case)
        changed.adapters[1].scale = scale
        changed.is_readable = abs(scale) < 1e300
        yield f"scale {scale}", changed


def mutants(case: Case) -> Iterator[Mutation]:
    yield "as it is", case
    yield from tensor_mutations(case, 0, 1)
    yield from config_mutations(case, 0)
    yield from file_mutations(case)
    yield from base_mutations(case, 1)
    if case.adapters[0].initial is not None:
        yield from initial_mutations(case)
    if len(case.adapters) > 1:
        yield from scale_mutations(case)


# Running one, and judging what became of it


def write(case: Case, folder: Path) -> list[str]:
    """The files, and the arguments that merge them."""
    model = write_checkpoint(folder / "model", case.tensors, shards=case.shards, config=case.config)
    if case.beside is not None:
        write_adapter(model / "corda_init", case.beside.tensors, case.beside.config)
    arguments = ["merge", str(model)]
    for place, adapter in enumerate(case.adapters):
        path = write_adapter(folder / f"adapter{place}", adapter.tensors, adapter.config)
        if adapter.pickled:
            torch.save(adapter.tensors, path / "adapter_model.bin")
            (path / "adapter_model.safetensors").unlink()
        arguments += ["--adapter", str(path)]
        if len(case.adapters) > 1:
            arguments += ["--scale", str(adapter.scale)]
        if adapter.initial is not None:
            arguments += [
                "--init",
                str(write_adapter(folder / "initial", adapter.initial.tensors, adapter.initial.config)),
            ]
    if case.damage is not None:
        case.damage(model, folder / "adapter0")
    return arguments


def expected(case: Case) -> dict[str, oracle.Weight] | None:
    if not case.is_readable:
        return None
    try:
        return oracle.merged(case.tensors, case.config, case.adapters)
    except Meaningless:
        return None


def wrong(output: Path, wanted: Mapping[str, oracle.Weight]) -> list[str]:
    """What of the output is not what it should be."""
    actual: dict[str, Tensor] = {}
    for path in output.glob("*.safetensors"):
        actual |= load_file(path)
    if actual.keys() != wanted.keys():
        return [f"other names: {sorted(actual.keys() ^ wanted.keys())}"]
    return [name for name, weight in wanted.items() if not weight.accepts(actual[name])]


# name: how it is built, how many mutants of it mean nothing, and how many mean something
KINDS: dict[str, tuple[Callable[[], Case], int, int]] = {
    "LoRA": (plain_lora, 127, 74),
    "LoRA in bfloat16": (half_precision, 122, 72),
    "rsLoRA with patterns": (patterns, 122, 75),
    "DoRA": (dora, 114, 81),
    "lora_bias": (lora_bias, 123, 72),
    "modules_to_save": (modules_to_save, 120, 74),
    "MiSS balance": (lambda: block_adapter("balance"), 90, 55),
    "MiSS mini": (lambda: block_adapter("mini"), 86, 60),
    "MiSS bat": (lambda: block_adapter("bat"), 93, 52),
    "Bone": (lambda: block_adapter("balance", "BONE"), 90, 55),
    "trainable tokens": (trainable_tokens, 62, 75),
    "tokens of a tied model": (tokens_of_a_tied_model, 114, 81),
    "an embedding": (lambda: embedding(is_tied=False), 117, 77),
    "a tied embedding": (lambda: embedding(is_tied=True), 119, 75),
    "experts": (stacks_of_experts, 129, 74),
    "on the residual": (on_the_residual, 113, 81),
    "with initial factors": (with_initial_factors, 154, 98),
    "two adapters": (two_adapters, 129, 72),
    "pickled": (pickled, 127, 74),
    "block-fp8": (block_fp8, 128, 73),
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=f"{kind}: {without + having} mutants, {without} of them without a meaning")
        for kind, (_, without, having) in KINDS.items()
    ],
)
def test_every_mutant_is_refused_or_merged_right(kind: str, command: Callable[..., Ran], tmp_path: Path) -> None:
    build, without_meaning, with_meaning = KINDS[kind]
    found = Counter[str]()
    failures: list[str] = []
    for what, case in mutants(build()):
        folder = tmp_path / "mutant"
        verdict, problems = judged(case, command, folder)
        found[verdict] += 1
        failures += [f"{what}: {problem}" for problem in problems]
        shutil.rmtree(folder)
    print(f"{kind}: {found['refused'] + found['refused in caution']} refused, {found['merged']} merged right")
    assert failures == []
    assert (found["refused"], found["merged"] + found["refused in caution"]) == (without_meaning, with_meaning)
    assert found["refused in caution"] <= with_meaning // 4, found


def test_a_mini_block_is_for_a_weight_that_has_rows(command: Callable[..., Ran], tmp_path: Path) -> None:
    case = block_adapter("mini")
    case.tensors[f"{UP}.weight"] = case.tensors[f"{UP}.weight"][:0]
    ran = command(*write(case, tmp_path), "-o", tmp_path / "output")
    assert "Adapter does not fit model.layers.1.mlp.up_proj" in checked_refusal(ran, tmp_path / "output")


def judged(case: Case, command: Callable[..., Ran], folder: Path) -> tuple[str, list[str]]:
    """What became of a case, and what is wrong with that. To refuse more than must be is no mistake."""
    wanted = expected(case)
    ran = command(*write(case, folder), "-o", folder / "output")
    if ran.status == 0:
        return "merged", ["it means nothing"] if wanted is None else wrong(folder / "output", wanted)
    assert checked_refusal(ran, folder / "output")
    return "refused" if wanted is None else "refused in caution", []


def test_there_are_thousands_of_mutants_and_both_kinds_are_common() -> None:
    without, having = (sum(kind[place] for kind in KINDS.values()) for place in (1, 2))
    assert without > 2000
    assert having > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_the_unchanged_case_of_every_kind_changes_weights(kind: str) -> None:
    """Otherwise all mutants of it could be right by doing nothing."""
    case = KINDS[kind][0]()
    wanted = expected(case)
    assert wanted is not None
    changed = [name for name, weight in wanted.items() if weight.is_changed]
    assert len(changed) >= len({key.partition(".lora_")[0] for key in case.adapters[0].tensors}) > 0
    for name in changed:
        stored = case.tensors.get(name)
        assert stored is None or stored.dtype == torch.float8_e4m3fn or not wanted[name].accepts(stored)
