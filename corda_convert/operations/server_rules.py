"""What servers do not take of an adapter: one table of rules, each with the place that it was read from.

docs/servers.md is this table; a test compares the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from corda_convert.errors import some
from corda_convert.operations.adapter_facts import AdapterFacts

Server = Literal["vllm", "sglang", "llama.cpp", "peft"]
SERVERS: tuple[Server, ...] = get_args(Server)

Severity = Literal["refused", "wrong", "depends"]
"""`refused`: the server does not load the adapter. `wrong`: it loads, and computes something else, without a word.
`depends`: on the model, or on the server's version."""

Fix = Literal["initial", "blocks", "rank", "uniform", "scaling", "targets"]
"""What `to-lora` can do about a finding. Where it can do nothing, merging is the way."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be."""

SOURCES: dict[str, str] = {
    "vllm-config": "https://github.com/vllm-project/vllm/blob/v0.26.0/vllm/config/lora.py",
    "vllm-peft": "https://github.com/vllm-project/vllm/blob/e745bafffc44/vllm/lora/peft_helper.py",
    "vllm-model": "https://github.com/vllm-project/vllm/blob/0306474e9d1f/vllm/lora/lora_model.py",
    "vllm-utils": "https://github.com/vllm-project/vllm/blob/001e63a89b47/vllm/lora/utils.py",
    "vllm-docs": "https://docs.vllm.ai/en/latest/features/lora.html",
    "vllm-heads": "https://github.com/vllm-project/vllm/pull/33234",
    "vllm-saved": "https://github.com/vllm-project/vllm/issues/9280",
    "sglang-config": "https://github.com/sgl-project/sglang/blob/0ceb81fe4868/python/sglang/srt/lora/lora_config.py",
    "sglang-lora": "https://github.com/sgl-project/sglang/blob/main/python/sglang/srt/lora/lora.py",
    "sglang-utils": "https://github.com/sgl-project/sglang/blob/01235a1633d1/python/sglang/srt/lora/utils.py",
    "sglang-docs": "https://docs.sglang.io/docs/advanced_features/lora",
    "sglang-dora": "https://github.com/sgl-project/sglang/pull/22125",
    "sglang-rslora": "https://github.com/sgl-project/sglang/issues/40835",
    "llama-convert": "https://github.com/ggml-org/llama.cpp/blob/0b03adaa632b/convert_lora_to_gguf.py",
    "llama-scale": "https://github.com/ggml-org/llama.cpp/blob/215841fc0178/src/llama-adapter.h",
    "llama-load": "https://github.com/ggml-org/llama.cpp/blob/0650ea8c05bc/src/llama-adapter.cpp",
    "llama-heads": "https://github.com/ggml-org/llama.cpp/issues/9065",
    "peft": "https://github.com/huggingface/peft/tree/v0.21.2/src/peft",
}
"""Where the rules were read: source files at a commit, pages and threads."""


@dataclass(frozen=True, slots=True)
class ServerRule:
    """One thing that a server does not take as it is.

    Attributes:
        name: of the rule; unique for its server.
        severity: what happens.
        offends: what in an adapter falls under the rule, in words; nothing where nothing does.
        why: what the server does with it.
        sources: keys of `SOURCES`.
        fix: what `to-lora` can do about it; None where merging is the way.
    """

    server: Server
    name: str
    severity: Severity
    offends: Callable[[AdapterFacts], str]
    why: str
    sources: tuple[str, ...]
    fix: Fix | None = None


# What offends.


def _not_lora(facts: AdapterFacts) -> str:
    if not facts.is_folder or facts.kind == "lora" or _blocks(facts):
        return ""
    return f"it is no LoRA ({facts.kind.replace('_', ' ')})"


def _blocks(facts: AdapterFacts) -> str:
    return f"it is {facts.kind} ({facts.mode})" if facts.is_folder and facts.mode else ""


def _bone(facts: AdapterFacts) -> str:
    return "its peft_type is BONE" if facts.is_folder and facts.kind == "bone" else ""


def _file(facts: AdapterFacts) -> str:
    return "" if facts.is_folder else "it is a file of RWKV-PEFT, no adapter folder"


def _residual(facts: AdapterFacts) -> str:
    return "it was trained beside a residual" if facts.residual else ""


def _remade(facts: AdapterFacts) -> str:
    return _residual(facts) if facts.init.startswith("pissa_niter") else ""


def _needs_file(facts: AdapterFacts) -> str:
    return _residual(facts) if facts.init.startswith(("corda", "lora_ga")) else ""


def _beside(facts: AdapterFacts) -> str:
    return "" if facts.init.startswith(("pissa", "olora", "corda", "lora_ga")) else _residual(facts)


def _dora(facts: AdapterFacts) -> str:
    return f"DoRA in {len(facts.dora)} modules" if facts.dora else ""


def _saved(facts: AdapterFacts) -> str:
    return f"whole weights: {some(facts.saved, 3)}" if facts.saved else ""


def _saved_norms(facts: AdapterFacts) -> str:
    norms = [name for name in facts.saved if _is_norm(name)]
    return f"whole norms: {some(norms, 3)}" if norms else ""


def _saved_others(facts: AdapterFacts) -> str:
    others = [name for name in facts.saved if not _is_norm(name)]
    return f"whole weights: {some(others, 3)}" if others else ""


def _is_norm(name: str) -> bool:
    return "_layernorm" in name or ".norm" in name


def _biases(facts: AdapterFacts) -> str:
    return f"trained biases: {some(facts.biases, 3)}" if facts.biases else ""


def _lora_biases(facts: AdapterFacts) -> str:
    return f"lora_B has a bias in {len(facts.lora_biases)} modules" if facts.lora_biases else ""


def _tokens(facts: AdapterFacts) -> str:
    return f"trained tokens of {some(facts.tokens, 3)}" if facts.tokens and facts.kind == "lora" else ""


def _embeddings(facts: AdapterFacts) -> str:
    return f"factors for {some(facts.embeddings, 3)}" if facts.embeddings else ""


def _head(facts: AdapterFacts) -> str:
    return "factors for lm_head" if any(name.endswith("lm_head") for name in facts.embeddings) else ""


def _experts(facts: AdapterFacts) -> str:
    return f"factors for stacks of experts: {some(facts.experts, 2)}" if facts.experts else ""


def _unusual(facts: AdapterFacts) -> str:
    return f"factors for convolutions or MultiheadAttention: {some(facts.unusual, 3)}" if facts.unusual else ""


def _rslora(facts: AdapterFacts) -> str:
    return "rsLoRA: its scaling is alpha / √r" if facts.use_rslora and max(facts.ranks.values(), default=1) > 1 else ""


def _scalings(facts: AdapterFacts) -> str:
    """Modules whose scaling is another than that of the config's own r and alpha."""
    if facts.scaling is None or not facts.is_folder:
        return ""
    odd = [name for name, scaling in facts.scalings.items() if not math.isclose(scaling, facts.scaling)]
    return f"{len(odd)} modules with a scaling of their own by patterns: {some(odd, 2)}" if odd else ""


def _alphas(facts: AdapterFacts) -> str:
    """Modules whose alpha is another than that of the config."""
    if facts.alpha is None or not facts.is_folder:
        return ""
    roots = {name: math.sqrt(rank) if facts.use_rslora else float(rank) for name, rank in facts.ranks.items()}
    odd = [name for name, s in facts.scalings.items() if not math.isclose(s * roots[name], facts.alpha)]
    return f"{len(odd)} modules with an alpha of their own by patterns: {some(odd, 2)}" if odd else ""


def _ranks(facts: AdapterFacts) -> str:
    """Modules whose rank is another than that of the config."""
    odd = [
        name for name, rank in facts.ranks.items() if facts.kind == "lora" and facts.is_folder and rank != facts.rank
    ]
    return f"{len(odd)} modules with a rank of their own by patterns: {some(odd, 2)}" if odd else ""


def _large(facts: AdapterFacts) -> str:
    if facts.served_rank <= VLLM_RANKS[-1]:
        return ""
    return f"rank {facts.served_rank}" + (" once it is an ordinary LoRA" if facts.residual else "")


def _expression(facts: AdapterFacts) -> str:
    given = facts.target_modules
    return f"target_modules is the expression {given!r}" if isinstance(given, str) and given != "all-linear" else ""


_PAIRS = "It reads pairs of lora_A and lora_B."
_TWICE = (
    "On the base, the part that the residual lacks is there twice. The residual as the served model would be right."
)
_NOT_READ = "It loads adapter folders of PEFT."

RULES: tuple[ServerRule, ...] = (
    ServerRule("vllm", "file", "refused", _file, _NOT_READ, ("vllm-model",)),
    ServerRule("vllm", "kind", "refused", _not_lora, _PAIRS, ("vllm-peft", "vllm-utils")),
    ServerRule("vllm", "blocks", "refused", _blocks, _PAIRS, ("vllm-peft", "vllm-utils"), "blocks"),
    ServerRule("vllm", "residual", "wrong", _residual, _TWICE, ("vllm-peft",), "initial"),
    ServerRule("vllm", "dora", "refused", _dora, "It has no DoRA.", ("vllm-peft", "vllm-model")),
    ServerRule("vllm", "modules_to_save", "refused", _saved, "It takes no whole weights.", ("vllm-peft", "vllm-saved")),
    ServerRule("vllm", "tokens", "refused", _tokens, _PAIRS, ("vllm-utils",)),
    ServerRule("vllm", "bias", "refused", _biases, "It takes no biases.", ("vllm-peft",)),
    ServerRule("vllm", "lora_bias", "refused", _lora_biases, "It takes no biases.", ("vllm-utils", "vllm-model")),
    ServerRule("vllm", "layers", "refused", _unusual, "It has LoRA for its linear layers.", ("vllm-utils",)),
    ServerRule(
        "vllm",
        "scaling",
        "wrong",
        _scalings,
        "It computes one scaling from r and lora_alpha, and does not look at patterns.",
        ("vllm-peft",),
        "uniform",
    ),
    ServerRule(
        "vllm",
        "rank",
        "refused",
        _large,
        "--max-lora-rank is 1, 8, 16, 32, 64, 128, 256, 320 or 512.",
        ("vllm-config", "vllm-peft"),
        "rank",
    ),
    ServerRule(
        "vllm",
        "embeddings",
        "depends",
        _embeddings,
        "Only some of its models have LoRA for embedding and head (Llama has, Qwen lacks it).",
        ("vllm-utils", "vllm-heads"),
    ),
    ServerRule(
        "vllm",
        "experts",
        "depends",
        _experts,
        "Recent versions read stacks of experts, for some models, as is_3d_lora_weight.",
        ("vllm-model",),
    ),
    ServerRule("sglang", "file", "refused", _file, _NOT_READ, ("sglang-config",)),
    ServerRule("sglang", "kind", "refused", _not_lora, "It takes peft_type LORA.", ("sglang-lora",)),
    ServerRule("sglang", "blocks", "refused", _blocks, "It takes peft_type LORA.", ("sglang-lora",), "blocks"),
    ServerRule("sglang", "residual", "wrong", _residual, _TWICE, ("sglang-lora",), "initial"),
    ServerRule("sglang", "dora", "refused", _dora, "It has no DoRA.", ("sglang-dora",)),
    ServerRule(
        "sglang", "rslora", "wrong", _rslora, "It scales by alpha / r.", ("sglang-lora", "sglang-rslora"), "scaling"
    ),
    ServerRule(
        "sglang",
        "scaling",
        "wrong",
        _alphas,
        "It computes one scaling from r and lora_alpha; recent versions look at patterns only to refuse them.",
        ("sglang-lora", "sglang-config"),
        "uniform",
    ),
    ServerRule(
        "sglang",
        "ranks",
        "refused",
        _ranks,
        "Its buffers have the config's r for every module.",
        ("sglang-config",),
        "uniform",
    ),
    ServerRule(
        "sglang",
        "targets",
        "refused",
        _expression,
        "It takes a list of names, or all-linear.",
        ("sglang-utils",),
        "targets",
    ),
    ServerRule("sglang", "modules_to_save", "wrong", _saved, "It leaves whole weights out.", ("sglang-lora",)),
    ServerRule("sglang", "tokens", "wrong", _tokens, "It leaves trained tokens out.", ("sglang-lora",)),
    ServerRule("sglang", "bias", "wrong", _biases, "It leaves biases out.", ("sglang-lora",)),
    ServerRule("sglang", "lora_bias", "wrong", _lora_biases, "It leaves biases out.", ("sglang-lora",)),
    ServerRule("sglang", "layers", "refused", _unusual, "It has LoRA for its linear layers.", ("sglang-utils",)),
    ServerRule(
        "sglang",
        "experts",
        "depends",
        _experts,
        "It has LoRA for experts of some models, by the names of their linear layers.",
        ("sglang-utils",),
    ),
    ServerRule("llama.cpp", "file", "refused", _file, _NOT_READ, ("llama-convert",)),
    ServerRule("llama.cpp", "kind", "refused", _not_lora, _PAIRS, ("llama-convert",)),
    ServerRule("llama.cpp", "blocks", "refused", _blocks, _PAIRS, ("llama-convert",), "blocks"),
    ServerRule("llama.cpp", "residual", "wrong", _residual, _TWICE, ("llama-convert",), "initial"),
    ServerRule("llama.cpp", "dora", "refused", _dora, _PAIRS, ("llama-convert",)),
    ServerRule(
        "llama.cpp",
        "rslora",
        "wrong",
        _rslora,
        "It scales each pair by lora_alpha over its rank.",
        ("llama-scale",),
        "scaling",
    ),
    ServerRule(
        "llama.cpp",
        "scaling",
        "wrong",
        _alphas,
        "It scales each pair by lora_alpha over its rank, and does not look at patterns.",
        ("llama-convert", "llama-scale"),
        "scaling",
    ),
    ServerRule("llama.cpp", "modules_to_save", "refused", _saved_others, _PAIRS, ("llama-convert",)),
    ServerRule(
        "llama.cpp",
        "norms",
        "wrong",
        _saved_norms,
        "It converts norms, and leaves them out on loading.",
        ("llama-load",),
    ),
    ServerRule("llama.cpp", "tokens", "refused", _tokens, _PAIRS, ("llama-convert",)),
    ServerRule("llama.cpp", "bias", "refused", _biases, _PAIRS, ("llama-convert",)),
    ServerRule("llama.cpp", "lora_bias", "refused", _lora_biases, _PAIRS, ("llama-convert",)),
    ServerRule("llama.cpp", "layers", "refused", _unusual, "Its factors are matrices.", ("llama-convert",)),
    ServerRule(
        "llama.cpp",
        "experts",
        "refused",
        _experts,
        "It stacks the factors of single experts; those of PEFT's stacks have no name there.",
        ("llama-convert",),
    ),
    ServerRule(
        "llama.cpp",
        "head",
        "depends",
        _head,
        "It refuses a head that the model ties to its embedding.",
        ("llama-convert", "llama-heads"),
    ),
    ServerRule("peft", "file", "refused", _file, _NOT_READ, ("peft",)),
    ServerRule(
        "peft", "bone", "refused", _bone, "PEFT 0.19 and later have no Bone; MiSS took its place.", ("peft",), "blocks"
    ),
    ServerRule("peft", "residual", "wrong", _beside, _TWICE, ("peft",), "initial"),
    ServerRule(
        "peft",
        "init",
        "refused",
        _needs_file,
        "It wants to initialize it again, and has nothing to.",
        ("peft",),
        "initial",
    ),
    ServerRule(
        "peft", "random_init", "wrong", _remade, "It initializes it again, with other numbers.", ("peft",), "initial"
    ),
)
"""Every rule, by server."""
