"""What a merge must give, in float64 and from the definitions alone: no code of the package is called.

Only what has a meaning gets one: `Meaningless` says that the inputs contradict each other, so that a merge must be refused.
"""

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HEADS_AND_EMBEDDINGS = ("lm_head", "embed_tokens")
PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_B.bias", "lora_magnitude_vector",
    "miss_block", "bone_block", "trainable_tokens_delta",
)  # fmt: skip


class Meaningless(Exception):
    """These inputs do not go together: what they would give is not defined."""


@dataclass
class AdapterFiles:
    """An adapter as its two files hold it.

    Attributes:
        scale: how many times it is taken.
        initial: the factors that its training began with, if they have to be taken out.
        is_beside: whether the model is the residual that it was trained beside.
        pickled: whether the file is a pickle.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    scale: float = 1.0
    initial: "AdapterFiles | None" = None
    is_beside: bool = False
    pickled: bool = False


@dataclass
class Weight:
    """A weight of the output.

    Attributes:
        values: in float64; of a weight that is copied, as it is stored.
        dtype: of the output.
        magnitude: the largest number that takes part in a sum, which bounds what float32 loses.
        is_changed: whether it is another one than in the base.
    """

    values: Tensor
    dtype: torch.dtype
    magnitude: float = 0.0
    is_changed: bool = False

    def accepts(self, actual: Tensor) -> bool:
        """Whether these are the values, with one rounding to the dtype beyond what float32 loses."""
        if actual.dtype != self.dtype or actual.shape != self.values.shape:
            return False
        if not self.is_changed:
            return torch.equal(bits(actual), bits(self.values))
        half_ulp = torch.finfo(self.dtype).eps / 2 * self.values.abs() + torch.finfo(self.dtype).tiny
        return bool(((actual.double() - self.values).abs() <= half_ulp + 1e-6 * self.magnitude).all())


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@dataclass
class Model:
    """The weights by their names on disk, and what an adapter's names mean among them."""

    weights: dict[str, Weight]
    tied: dict[str, str] = field(default_factory=dict)
    head_follows: bool = False
    """Whether the config ties a head that has values of its own: PEFT trains the embedding's tokens in it, too."""

    def change(self, name: str, values: Tensor, magnitude: float) -> None:
        name = self.tied.get(name, name)
        self.weights[name] = Weight(values, self.weights[name].dtype, magnitude, is_changed=True)

    def matrix(self, name: str) -> Tensor:
        name = self.tied.get(name, name)
        if name not in self.weights or self.weights[name].values.dtype not in FLOATS:
            raise Meaningless(f"{name} is no weight of the model")
        return self.weights[name].values.double()


def merged(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], adapters: Iterable[AdapterFiles]
) -> dict[str, Weight]:
    """Every weight of the output. Raises `Meaningless`."""
    model = Model(plain(tensors, config))
    has_head = config.get("architectures") != ["LlamaModel"]
    if config.get("tie_word_embeddings") and has_head:
        model.head_follows = "lm_head.weight" in tensors
        if not model.head_follows:
            model.tied["lm_head.weight"] = "model.embed_tokens.weight"
    for adapter in adapters:
        one = {"LORA": lora, "MISS": blocks, "BONE": blocks, "TRAINABLE_TOKENS": tokens_alone}
        kind = adapter.config.get("peft_type")
        if not isinstance(kind, str) or kind.upper() not in one:
            raise Meaningless(f"peft_type {kind!r}")
        if not adapter.tensors:
            raise Meaningless("no tensors")
        one[kind.upper()](model, adapter)
    for weight in model.weights.values():
        if weight.is_changed and not bool(weight.values.to(weight.dtype).isfinite().all()):
            raise Meaningless("not finite")
    return model.weights


def plain(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Weight]:
    """The weights; those of a block-fp8 model as bfloat16."""
    quantization = config.get("quantization_config")
    if not quantization:
        return {name: Weight(tensor, tensor.dtype) for name, tensor in tensors.items()}
    weights: dict[str, Weight] = {}
    high, wide = quantization["weight_block_size"]
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            if name.removesuffix("_scale_inv") not in tensors:
                raise Meaningless("a scale without its weight")
            continue
        if tensor.dtype != torch.float8_e4m3fn:
            weights[name] = Weight(tensor, tensor.dtype)
            continue
        if tensor.ndim != 2:
            raise Meaningless(f"{name} is no matrix of blocks")
        scale = tensors.get(f"{name}_scale_inv")
        rows, columns = tensor.shape
        tiles = (-(-rows // high), -(-columns // wide))
        if scale is None or scale.shape not in (tiles, (1, *tiles)) or scale.dtype not in FLOATS:
            raise Meaningless(f"{name} has no scales of its shape")
        spread = scale.double().reshape(tiles).repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        values = tensor.double() * spread
        weights[name] = Weight(values, torch.bfloat16, float(values.abs().max()), is_changed=True)
    return weights


def stripped(key: str) -> str:
    key = re.sub(r"(_orig_mod|_fsdp_wrapped_module)\.", "", key).removeprefix("base_model.model.")
    return re.sub(r"\.default(?=\.(weight|bias)$|$)", "", key)


def parts(adapter: AdapterFiles) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The tensors by module and part, and those that are whole parameters."""
    modules: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    names = {key: stripped(key) for key in adapter.tensors}
    if all(name.startswith("base_model.model.") for name in names.values()):  # one prefix is as good as another
        names = {key: stripped(name) for key, name in names.items()}
    for key, tensor in adapter.tensors.items():
        name = names[key]
        part = next((part for part in PARTS if name.endswith(f".{part}")), None)
        place, label = (rest, name) if part is None else (modules.setdefault(name[: -len(part) - 1], {}), part)
        if label in place:
            raise Meaningless(f"two tensors for {name}")
        if tensor.dtype not in FLOATS or 0 in tensor.shape:
            raise Meaningless(f"{name} holds no numbers to compute with")
        if not bool(tensor.isfinite().all()):
            raise Meaningless(f"{name} is not finite")
        place[label] = tensor.double()
    return modules, rest


def positive(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Meaningless(f"{value!r} is no rank")
    return value


def finite(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise Meaningless(f"{value!r} is no number")
    return float(value)


def by_pattern(patterns: object, default: Any, name: str) -> Any:
    if patterns is not None and not isinstance(patterns, dict):
        raise Meaningless("patterns are an object")
    try:
        return next(
            (value for each, value in (patterns or {}).items() if re.match(rf"(.*\.)?({each})$", name)), default
        )
    except re.error as error:
        raise Meaningless("no regular expression") from error


def check_patterns(config: Mapping[str, Any], names: Iterable[str]) -> None:
    names = list(names)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise Meaningless("patterns are an object")
        for pattern in patterns:
            if not any(by_pattern({pattern: True}, False, name) for name in names):
                raise Meaningless(f"nothing matches {pattern}")


def rank_and_scaling(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    rank = positive(by_pattern(config.get("rank_pattern"), config.get("r", 8), name))
    alpha = finite(by_pattern(config.get("alpha_pattern"), config.get("lora_alpha", 8), name))
    positive(config.get("r", 8))
    finite(config.get("lora_alpha", 8))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def lora(model: Model, adapter: AdapterFiles) -> None:
    config = adapter.config
    is_known = adapter.is_beside or adapter.initial is not None
    if config.get("init_lora_weights") not in (None, True, False, "gaussian") and not is_known:
        raise Meaningless("trained beside a residual that is not known")
    modules, rest = parts(adapter)
    initial = {} if adapter.initial is None else parts(adapter.initial)[0]
    if adapter.initial is not None and set(initial) != set(modules):
        raise Meaningless("the initial adapter is of other modules")
    parameters = parameters_of(config, modules)
    tokens = {
        name: found["trainable_tokens_delta"] for name, found in modules.items() if "trainable_tokens_delta" in found
    }
    names = [parameters.get(name, name) for name in modules if name not in tokens]
    check_patterns(config, names)
    if config.get("trainable_token_indices") and not tokens:
        raise Meaningless("no trainable tokens")
    replace(model, config, rest)
    model.head_follows &= not any(name.startswith("lm_head") for name in tokens)
    for name, found in modules.items():
        if name in tokens:
            if len(found) > 1:
                raise Meaningless("factors and tokens")
            rows(model, name, tokens[name], config.get("trainable_token_indices"))
        elif name in parameters:
            experts(model, parameters[name], found, config, adapter.scale)
        else:
            layer(model, name, found, adapter, initial.get(name))


def layer(
    model: Model, name: str, found: Mapping[str, Tensor], adapter: AdapterFiles, initial: Mapping[str, Tensor] | None
) -> None:
    config = adapter.config
    weight = model.matrix(f"{name}.weight")
    is_embedding = name.endswith("embed_tokens")
    rank, scaling = rank_and_scaling(config, name)
    delta, size = product(found, rank, scaling * adapter.scale, is_embedding=is_embedding)
    wanted = {"lora_magnitude_vector"} if config.get("use_dora") else set()
    wanted |= {"lora_B.bias"} if config.get("lora_bias") else set()
    if {part for part in found if part in ("lora_magnitude_vector", "lora_B.bias")} != wanted:
        raise Meaningless("the config and the tensors differ")
    if initial is not None and adapter.initial is not None:
        initial_rank, initial_scaling = rank_and_scaling(adapter.initial.config, name)
        taken, taken_size = product(initial, initial_rank, initial_scaling * adapter.scale, is_embedding=is_embedding)
        if taken.shape != delta.shape:
            raise Meaningless("the initial adapter is of other shapes")
        delta, size = delta - taken, size + taken_size
    if delta.shape != weight.shape:
        raise Meaningless(f"{name} is {tuple(weight.shape)}")
    changed = weight + delta
    if config.get("use_dora"):
        magnitude = found["lora_magnitude_vector"].reshape(-1)
        if magnitude.shape != weight.shape[:1]:
            raise Meaningless("as many magnitudes as outputs")
        changed *= (magnitude / changed.norm(dim=1))[:, None]
    if is_embedding and model.tied.pop("lm_head.weight", None):
        model.weights["lm_head.weight"] = copy.copy(model.weights["model.embed_tokens.weight"])
    model.change(f"{name}.weight", changed, size + float(weight.abs().max()) + float(changed.abs().max()))
    if config.get("lora_bias"):
        bias, addend = model.matrix(f"{name}.bias"), found["lora_B.bias"] * scaling * adapter.scale
        if bias.shape != addend.shape:
            raise Meaningless("another bias")
        model.change(f"{name}.bias", bias + addend, float(bias.abs().max() + addend.abs().max()))


def product(found: Mapping[str, Tensor], rank: int, scaling: float, *, is_embedding: bool) -> tuple[Tensor, float]:
    """`s·B·A`, and the largest sum of magnitudes in it."""
    kind = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
    if set(found) - {"lora_B.bias", "lora_magnitude_vector"} != set(kind):
        raise Meaningless("not a pair of factors")
    A, B = found[kind[0]], found[kind[1]]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
        raise Meaningless("another rank")
    delta = scaling * B @ A
    return (delta.T if is_embedding else delta), float((abs(scaling) * B.abs() @ A.abs()).max())


def parameters_of(config: Mapping[str, Any], modules: Mapping[str, object]) -> dict[str, str]:
    """The wrappers of Qwen's experts among the modules, and their parameters: gate_up_proj is the inner one of two."""
    targets = config.get("target_parameters") or []
    names = {target.rpartition(".")[2] for target in targets}
    found: dict[str, str] = {}
    for module in {
        name.split(".base_layer")[0] for name in modules if name.split(".base_layer")[0].endswith(".experts")
    }:
        order = [name for name in ("gate_up_proj", "down_proj") if name in names]
        keys = [module + ".base_layer" * depth for depth in range(len(order))]
        if {name for name in modules if name.split(".base_layer")[0] == module} != set(keys):
            raise Meaningless("as many wrappers as parameters")
        found |= {key: f"{module}.{name}" for key, name in zip(reversed(keys), order, strict=True)}
    if targets and not found:
        raise Meaningless("no factors of a parameter")
    return found


def experts(model: Model, name: str, found: Mapping[str, Tensor], config: Mapping[str, Any], scale: float) -> None:
    """LoRA on the stacks of Qwen's experts, (E, d_out, d_in), which lie on disk expert by expert."""
    module, _, parameter = name.rpartition(".")
    halves = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else ("down_proj",)
    count = sum(
        re.fullmatch(rf"{re.escape(module)}\.\d+\.{halves[0]}\.weight", each) is not None for each in model.weights
    )
    rank, scaling = rank_and_scaling(config, name)
    if set(found) != {"lora_A.weight", "lora_B.weight"} or not count:
        raise Meaningless("not a pair of factors")
    A, B = found["lora_A.weight"], found["lora_B.weight"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank * count or B.shape[1] != rank * count:
        raise Meaningless("another rank, or another number of experts")
    for expert in range(count):
        places = [f"{module}.{expert}.{half}.weight" for half in halves]
        matrices = [model.matrix(place) for place in places]
        if len({matrix.shape for matrix in matrices}) > 1 or matrices[0].ndim != 2:
            raise Meaningless("halves of different shapes")
        weight = torch.cat(matrices)
        own_A, own_B = A[expert * rank : (expert + 1) * rank], B[:, expert::count]
        delta = scaling * scale * own_B @ own_A
        if delta.shape != weight.shape:
            delta = delta.T
        if delta.shape != weight.shape:
            raise Meaningless("another shape")
        size = float((abs(scaling) * own_B.abs() @ own_A.abs()).max() + weight.abs().max())
        for place, values in zip(places, (weight + delta).chunk(len(halves)), strict=True):
            model.change(place, values, size)


def blocks(model: Model, adapter: AdapterFiles) -> None:
    config = adapter.config
    mode = config.get("init_weights", True)
    mode = "balance" if isinstance(mode, bool) else mode
    kind = f"{config['peft_type'].lower()}_block"
    if mode not in ("balance", "bat", *(("mini",) if kind == "miss_block" else ())):
        raise Meaningless(f"the mode {mode!r}")
    modules, rest = parts(adapter)
    replace(model, config, rest)
    rank = positive(config.get("r", 64))
    for name, found in modules.items():
        if set(found) not in ({"miss_block"}, {"bone_block"}) or name.endswith("embed_tokens"):
            raise Meaningless("not one block for a Linear")
        (block,) = found.values()
        weight = model.matrix(f"{name}.weight")
        if weight.ndim != 2:
            raise Meaningless("no matrix")
        delta = repeated(block, weight, rank, config.get("mini_r")) if mode == "mini" else None
        if mode == "balance":
            delta = repeated(block, weight, rank, weight.shape[0])
        if mode == "bat":
            delta = folded(block, weight, rank, adapter.scale)
        elif delta is not None:
            delta = adapter.scale * delta
        assert delta is not None
        size = float(weight.abs().max()) * (1 + float(block.abs().max()) * rank) + float(block.abs().max())
        model.change(f"{name}.weight", weight + delta, size)


def repeated(block: Tensor, weight: Tensor, rank: int, width: object) -> Tensor:
    """`ΔW[o, i] = block[i mod r, o mod width]`."""
    d_out, d_in = weight.shape
    if block.ndim != 2 or block.shape[0] != rank or block.shape[1] != width or d_out % block.shape[1] or rank > d_in:
        raise Meaningless("another block")
    return block[torch.arange(d_in) % rank][:, torch.arange(d_out) % block.shape[1]].T


def folded(block: Tensor, weight: Tensor, rank: int, scale: float) -> Tensor:
    """`ΔW_ij = W_ij·B_i + B_i` in blocks of r × r."""
    d_out, d_in = weight.shape
    if d_out % rank or d_in % rank or block.shape != (d_out // rank, rank, rank):
        raise Meaningless("another block")
    tiles = weight.reshape(d_out // rank, rank, d_in // rank, rank).permute(0, 2, 1, 3)
    own = scale * block[:, None]
    return (tiles @ own + own).permute(0, 2, 1, 3).reshape(d_out, d_in)


def tokens_alone(model: Model, adapter: AdapterFiles) -> None:
    modules, rest = parts(adapter)
    replace(model, adapter.config, rest)
    for name, found in modules.items():
        if set(found) != {"trainable_tokens_delta"}:
            raise Meaningless("factors of another kind")
        rows(model, name, found["trainable_tokens_delta"], adapter.config.get("token_indices"))


def rows(model: Model, name: str, given: Tensor, indices: Any) -> None:
    name = name.removesuffix(".token_adapter")
    if isinstance(indices, dict):
        indices = next((each for end, each in indices.items() if name.endswith(end)), None)
    weight = model.matrix(f"{name}.weight")
    if not isinstance(indices, list) or any(type(index) is not int for index in indices):
        raise Meaningless("no indices")
    if len(set(indices)) != len(indices) or any(not 0 <= index < len(weight) for index in indices):
        raise Meaningless("indices of no rows, or twice of one")
    if given.shape != (len(indices), weight.shape[1]):
        raise Meaningless("other rows")
    changed = weight.clone()
    changed[indices] = given
    model.change(f"{name}.weight", changed, float(given.abs().max()))
    if model.head_follows and name.endswith("embed_tokens"):
        head = model.matrix("lm_head.weight").clone()
        head[indices] = given
        model.change("lm_head.weight", head, float(given.abs().max()))


def replace(model: Model, config: Mapping[str, Any], rest: Mapping[str, Tensor]) -> None:
    """Parameters that take the place of the base's."""
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list):
        raise Meaningless("modules_to_save is a list")
    for name in model.weights:
        if is_below(name, saved) and not any(as_parameter(key) == name for key in rest):
            raise Meaningless(f"{name} was trained, and is not in the file")
    resized = False
    for key, tensor in rest.items():
        name = as_parameter(key)
        module = name.rpartition(".")[0]
        is_bias = name.endswith(".bias") and config.get("bias", "none") != "none"
        if not (is_below(name, saved) or module.rpartition(".")[2] in HEADS_AND_EMBEDDINGS or is_bias):
            raise Meaningless(f"{key} is of no kind")
        before = model.matrix(name).shape
        if before != tensor.shape and (
            module.rpartition(".")[2] not in HEADS_AND_EMBEDDINGS or before[1:] != tensor.shape[1:]
        ):
            raise Meaningless(f"{key} has another shape")
        model.change(name, tensor, float(tensor.abs().max()))
        resized = resized or before != tensor.shape
    if resized and model.matrix("model.embed_tokens.weight").shape != model.matrix("lm_head.weight").shape:
        raise Meaningless("one vocabulary, two sizes")


def as_parameter(key: str) -> str:
    return key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")


def is_below(name: str, saved: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:cut]).endswith(each) for each in saved for cut in range(1, len(parts)))
