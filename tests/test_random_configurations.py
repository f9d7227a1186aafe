"""Architectures and adapters drawn at random: PEFT builds and saves, and its merge, or its unmerged model, is the oracle."""

import copy
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from corda_convert import MergeOptions, merge

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own, about unusual configurations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EXACT = {**DTYPES, "float64": torch.float64}


@dataclass(frozen=True)
class Family:
    """What an adapter may be put on.

    Attributes:
        linears: ends of names of layers.
        vocabulary: ends of names of embeddings and heads.
        saved: ends of names of modules to be trained whole.
        stack: what PEFT calls the list of layers.
        parameters: targets that are no layers.
        has_biases: whether all `linears` have one.
        is_tied: whether the vocabulary's modules share a weight.
        is_transposed: whether the layers are Conv1D.
    """

    linears: tuple[str, ...]
    vocabulary: tuple[str, ...]
    saved: tuple[str, ...]
    stack: str
    parameters: tuple[str, ...] = ()
    has_biases: bool = False
    is_tied: bool = True
    is_transposed: bool = False


FAMILIES = {
    "llama": Family(
        ("q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"), ("embed_tokens", "lm_head"),
        ("lm_head", "embed_tokens", "input_layernorm", "model.norm"), "layers", is_tied=False,
    ),
    "llama_tied": Family(
        ("q_proj", "v_proj", "up_proj"), ("embed_tokens", "lm_head"), ("lm_head", "embed_tokens", "model.norm"), "layers"
    ),
    "gpt2": Family(
        ("c_attn", "c_proj", "c_fc"), ("wte", "lm_head"), ("ln_f", "wpe", "lm_head"), "h", has_biases=True, is_transposed=True
    ),
    "qwen3_moe": Family(
        ("q_proj", "v_proj", "o_proj"), ("embed_tokens", "lm_head"), ("lm_head", "q_norm"), "layers",
        ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"), is_tied=False,
    ),
    "bert": Family(
        ("query", "key", "attention.output.dense", "intermediate.dense"), ("word_embeddings", "position_embeddings"),
        ("classifier", "pooler"), "layer", has_biases=True, is_tied=False,
    ),
    "gemma3": Family(
        ("q_proj", "o_proj", "fc1", "gate_proj"), ("embed_tokens", "lm_head"), ("lm_head", "multi_modal_projector"), "layers"
    ),
    "t5": Family(("q", "k", "wi", "wo"), ("shared", "lm_head"), ("lm_head", "final_layer_norm"), "block"),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """A model's family and dtype, an adapter's config and the dtype of its file, and the seed of what it learned."""

    family: str
    dtype: str
    options: Mapping[str, Any]
    adapter_dtype: str
    seed: int

    @property
    def is_miss(self) -> bool:
        return "init_weights" in self.options

    @property
    def touches_a_tie(self) -> bool:
        """Whether the adapter is on a weight that modules share: there PEFT's merge is no oracle."""
        family = FAMILIES[self.family]
        touched = {*self.options["target_modules"], *(self.options.get("modules_to_save") or ())}
        return family.is_tied and (bool(touched & set(family.vocabulary)) or "trainable_token_indices" in self.options)

    def config(self) -> Any:
        return copy.deepcopy((MissConfig if self.is_miss else LoraConfig)(**self.options))


BIASES_IN_SAVED_MODULES = Drawn(
    "bert",
    "bfloat16",
    {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier", "pooler"]},
    "float32",
    0,
)
"""PEFT saves those biases three times, under names of its wrappers."""


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    name = draw(st.sampled_from(sorted(FAMILIES)))
    family = FAMILIES[name]
    options: dict[str, Any] = {
        "target_modules": draw(st.lists(st.sampled_from(family.linears), min_size=1, unique=True)),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
    }
    if draw(st.integers(0, 3)) == 0:
        options["modules_to_save"] = draw(st.lists(st.sampled_from(family.saved), min_size=1, max_size=2, unique=True))
    if draw(st.integers(0, 4)) == 0:
        options |= {"layers_to_transform": [draw(st.integers(0, 1))], "layers_pattern": family.stack}
    if not family.is_transposed and draw(st.integers(0, 3)) == 0:
        mode = draw(st.sampled_from([True, "mini", "bat"]))
        options |= {"r": draw(st.sampled_from([2, 4, 8])), "init_weights": mode, "bias": "none"}
        options |= {"mini_r": draw(st.sampled_from([2, 4, 8]))} if mode == "mini" else {}
    else:
        options |= draw(lora_options(family, options["target_modules"]))
    case = Drawn(name, "float64", options, draw(st.sampled_from(sorted(DTYPES))), draw(st.integers(0, 99)))
    if case.touches_a_tie:
        return case  # the logits of two models are compared, for which other dtypes are too coarse
    return Drawn(name, draw(st.sampled_from(sorted(DTYPES))), options, case.adapter_dtype, case.seed)


@st.composite
def lora_options(draw: st.DrawFn, family: Family, targets: list[str]) -> dict[str, Any]:
    ranks, alphas = st.integers(1, 6), st.one_of(st.integers(1, 12), st.sampled_from([0.5, 2.25, 7.75]))
    layers = st.sampled_from(targets)
    chosen: dict[str, Any] = {
        "r": draw(ranks),
        "lora_alpha": draw(alphas),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(layers, ranks, max_size=2)),
        "alpha_pattern": draw(st.dictionaries(layers, alphas, max_size=2)),
        "init_lora_weights": draw(st.sampled_from([True, "gaussian", False])),
        "fan_in_fan_out": family.is_transposed,
    }
    extra = draw(st.sampled_from(["", "", "dora", "bias", "vocabulary", "tokens", "parameters"]))
    if extra == "dora":
        chosen["use_dora"] = True
    if extra == "bias" and family.has_biases:
        chosen["lora_bias"] = True
    if extra == "vocabulary":
        chosen["target_modules"] = [*targets, draw(st.sampled_from(family.vocabulary))]
    if extra == "tokens":
        chosen["trainable_token_indices"] = draw(st.lists(st.integers(0, 63), min_size=1, max_size=4, unique=True))
    if extra == "parameters" and family.parameters:
        count = draw(st.integers(1, len(family.parameters)))
        chosen["target_parameters"] = list(family.parameters[-count:])
        chosen["rank_pattern"] |= draw(st.dictionaries(st.sampled_from(family.parameters[-count:]), ranks, max_size=1))
    return chosen


def saved_base(case: Drawn, folder: Path) -> Any:
    """The model on disk, with values of its own in every tensor, and as transformers loads it."""
    model = tiny(case.family)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    model.to(EXACT[case.dtype]).save_pretrained(folder, max_shard_size="60KB")
    return load(model, folder)


def load(model: Any, folder: Path) -> Any:
    return type(model).from_pretrained(folder, dtype=model.dtype).eval()


def train(case: Drawn, base: Any, folder: Path) -> None:
    """An adapter as PEFT saves it, every parameter of it moved at random, in a file of the drawn dtype."""
    model = get_peft_model(copy.deepcopy(base), case.config())
    generator = torch.Generator().manual_seed(case.seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.25
        if "magnitude" in name:
            parameter.data *= 1 + noise.abs()
        elif parameter.requires_grad:
            parameter.data += noise.to(parameter.dtype)
    model.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(DTYPES[case.adapter_dtype]) for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    ids = torch.arange(64)[None, :48]
    decoder = {"decoder_input_ids": ids + 5} if model.config.model_type == "t5" else {}
    found: Tensor = model.eval()(input_ids=ids, **decoder).logits
    return found


def sums_otherwise(case: Drawn) -> bool:
    """Whether PEFT sums in another order: norms of a Conv1D go along its rows; bat's products are of smaller blocks."""
    is_dora = bool(case.options.get("use_dora")) and FAMILIES[case.family].is_transposed
    return is_dora or case.options.get("init_weights") == "bat"


def differing(case: Drawn, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """The tensors that are not PEFT's: bit by bit, or, where sums have another order, but for the last bits."""
    assert ours.keys() == theirs.keys()
    dtype = DTYPES[case.dtype]
    error = 8 * torch.finfo(torch.float32).eps + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)
    found = []
    for name in ours:
        tensor, wanted = (model[name].to(dtype) for model in (ours, theirs))  # T5 has some in float32 in memory
        if torch.equal(tensor, wanted):
            continue
        if not sums_otherwise(case) or float((tensor - wanted).abs().max() / wanted.abs().max()) > error:
            found.append(name)
    return found


def compare(case: Drawn, folder: Path, counts: Counter[str]) -> None:
    base = saved_base(case, folder / "base")
    counts["drawn"] += 1
    try:
        train(case, base, folder / "adapter")
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), folder / "adapter")
        expected = logits(adapted.double()) if case.touches_a_tie else None
        theirs = adapted.merge_and_unload().state_dict()
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, KeyError) as refused:
        counts[f"refused by PEFT: {str(refused)[:60]}"] += 1
        counts["discarded"] += 1
        reject()
    output = folder / "output"
    options = MergeOptions(rounding="peft" if expected is None else "nearest", as_is=True)
    merge(folder / "base", adapter=folder / "adapter", output=output, options=options)
    ours = load(base, output)
    if expected is None:
        counts["equal bits"] += 1
        assert differing(case, ours.state_dict(), theirs) == []
        assert differing(case, ours.state_dict(), base.state_dict())
    else:
        counts["equal logits"] += 1
        scale = float(expected.abs().max())
        assert float((logits(ours) - expected).abs().max()) < 1e-10 * scale
        assert float((logits(base) - expected).abs().max()) > 1e-3 * scale


def test_adapters_drawn_at_random_merge_as_in_peft() -> None:
    counts = Counter[str]()

    @settings(max_examples=80)
    @example(BIASES_IN_SAVED_MODULES)
    @given(case=drawn())
    def check(case: Drawn) -> None:
        with tempfile.TemporaryDirectory() as folder:
            compare(case, Path(folder), counts)

    check()
    print(dict(counts))
    assert counts["discarded"] * 2 <= counts["drawn"], counts
    assert min(counts["equal bits"], counts["equal logits"]) >= 5, counts
