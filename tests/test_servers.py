"""Rules of servers: what each says of every kind of adapter, and that docs/servers.md is the table."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from building import ADAPTERS, FIXTURES, LINEARS, UP, lora_config, lora_tensors, write_adapter, write_lora, write_miss

from corda_convert.adapters import read_adapter
from corda_convert.adapters.rwkv import RwkvTraining
from corda_convert.operations.adapter_facts import AdapterFacts, facts_of
from corda_convert.operations.server_rules import RULES, SERVERS, SOURCES, VLLM_RANKS, Server
from corda_convert.operations.servers import FIXES, Fixes, check, fixes, flags

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT's own use

DOCUMENT = FIXTURES.parent / "docs" / "servers.md"


def facts(path: Path) -> AdapterFacts:
    return facts_of(read_adapter(path))


def found(path: Path, server: Server) -> dict[str, tuple[str, str | None]]:
    """Severity and fix of each rule that the adapter falls under."""
    return {finding.rule: (finding.severity, finding.fix) for finding in check(facts(path), server)}


@pytest.mark.parametrize("server", SERVERS)
def test_an_ordinary_lora_is_served_everywhere(tmp_path: Path, server: Server) -> None:
    assert found(ADAPTERS / "lora", server) == {}
    assert found(write_lora(tmp_path / "lora"), server) == {}


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_whole_weights_cannot_be_mended(server: Server) -> None:
    (finding,) = check(facts(ADAPTERS / "lora_modules_to_save"), server)
    assert finding.what == "whole weights: lm_head.weight"
    assert finding.severity == ("wrong" if server == "sglang" else "refused")
    assert (finding.is_obstacle, finding.how) == (True, "merge it into the base")
    assert fixes([finding]) == Fixes(left=(finding,))


def test_whole_norms_are_left_out_by_llama_cpp_without_a_word(tmp_path: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.model.norm.weight": torch.ones(16)}
    adapter = write_adapter(tmp_path / "a", tensors, lora_config(modules_to_save=["norm"]))
    assert found(adapter, "llama.cpp") == {"norms": ("wrong", None)}
    assert found(adapter, "vllm") == {"modules_to_save": ("refused", None)}


def test_norms_by_either_name_and_rslora_of_rank_one(tmp_path: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.model.layers.0.input_layernorm.weight": torch.ones(16)}
    adapter = write_adapter(tmp_path / "a", tensors, lora_config(modules_to_save=["input_layernorm"]))
    assert found(adapter, "llama.cpp") == {"norms": ("wrong", None)}
    assert found(write_lora(tmp_path / "b", rank=1, use_rslora=True), "sglang") == {}
    assert found(write_lora(tmp_path / "c", rank=2, use_rslora=True), "sglang") == {"rslora": ("wrong", "scaling")}


def test_patterns_that_change_the_scaling(tmp_path: Path) -> None:
    """r 8 and alpha 16 for all but UP, which has rank 4."""
    modules = {name: shape for name, shape in LINEARS.items() if name != UP}
    tensors = lora_tensors(modules, rank=8) | lora_tensors({UP: LINEARS[UP]}, rank=4)
    adapter = write_adapter(tmp_path / "a", tensors, lora_config(8, lora_alpha=16, rank_pattern={UP: 4}))
    assert found(adapter, "vllm") == {"scaling": ("wrong", "uniform")}
    assert found(adapter, "sglang") == {"ranks": ("refused", "uniform")}
    assert found(adapter, "llama.cpp") == {}, "it scales each pair by alpha over its own rank"
    assert found(adapter, "peft") == {}
    same = {"rank_pattern": {UP: 4}, "alpha_pattern": {UP: 8}}
    adapter = write_adapter(tmp_path / "b", tensors, lora_config(8, lora_alpha=16, **same))
    assert found(adapter, "vllm") == {}, "every scaling is 2"
    assert found(adapter, "llama.cpp") == {"scaling": ("wrong", "scaling")}
    assert found(adapter, "sglang") == {"ranks": ("refused", "uniform"), "scaling": ("wrong", "uniform")}
    assert fixes(check(facts(adapter), "sglang")) == Fixes(uniform=True, plain_scaling=True)


def served_scaling(adapter: AdapterFacts, server: Server, module: str) -> float:
    """What the server multiplies a module's B·A by, as its source says."""
    assert adapter.alpha is not None
    if server == "vllm":
        return adapter.alpha / (math.sqrt(adapter.rank) if adapter.use_rslora else adapter.rank)
    return adapter.alpha / (adapter.rank if server == "sglang" else adapter.ranks[module])


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank_pattern", [{}, {UP: 8}])
@pytest.mark.parametrize("alpha_pattern", [{}, {UP: 6.0}, {UP: 16}])
def test_a_scaling_is_objected_to_exactly_where_the_server_computes_another(
    tmp_path: Path, server: Server, rslora: bool, rank_pattern: dict[str, int], alpha_pattern: dict[str, float]
) -> None:
    """PEFT is the judge of what is right."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "use_rslora": rslora}
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj", "q_proj"], **options)
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.save_pretrained(tmp_path / "a")
    adapter = facts(tmp_path / "a")
    wrong = [
        name
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        and not math.isclose(
            module.scaling["default"],
            served_scaling(adapter, server, name.removeprefix("base_model.model.")),
        )
    ]
    objections = {name: fix for name, (_, fix) in found(tmp_path / "a", server).items()}
    assert bool(wrong) <= bool(objections)
    if not rank_pattern:  # SGLang refuses other ranks whatever the scaling
        assert bool(wrong) == bool(objections)
    assert set(objections.values()) <= {"uniform", "scaling"}
    if server != "vllm":
        assert ("scaling" in objections, "rslora" in objections) == (bool(alpha_pattern), rslora)


def test_dora_needs_merging_where_there_is_none(tmp_path: Path) -> None:
    tensors = lora_tensors({UP: LINEARS[UP]}) | {f"base_model.model.{UP}.lora_magnitude_vector": torch.ones(24)}
    adapter = write_adapter(tmp_path / "a", tensors, lora_config(use_dora=True))
    for server in ("vllm", "sglang", "llama.cpp"):
        assert found(adapter, server) == {"dora": ("refused", None)}
    assert found(adapter, "peft") == {}


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_biases_and_trained_tokens_need_merging(tmp_path: Path, server: Server) -> None:
    module = {UP: LINEARS[UP]}
    bias = lora_tensors(module) | {f"base_model.model.{UP}.base_layer.bias": torch.ones(24)}
    own = lora_tensors(module) | {f"base_model.model.{UP}.lora_B.bias": torch.ones(24)}
    rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    tokens = lora_tensors(module) | {rows: torch.ones(2, 16)}
    severity = "wrong" if server == "sglang" else "refused"
    adapter = write_adapter(tmp_path / "a", bias, lora_config(bias="lora_only"))
    assert found(adapter, server) == {"bias": (severity, None)}
    adapter = write_adapter(tmp_path / "b", own, lora_config(lora_bias=True))
    assert found(adapter, server) == {"lora_bias": (severity, None)}
    adapter = write_adapter(tmp_path / "c", tokens, lora_config(trainable_token_indices=[1, 2]))
    assert found(adapter, server) == {"tokens": (severity, None)}
    only = write_adapter(
        tmp_path / "d",
        {rows.replace("token_adapter.", ""): torch.ones(2, 16)},
        {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2]},
    )
    assert found(only, server) == {"kind": ("refused", None)}


@pytest.mark.parametrize("server", ["vllm", "sglang", "llama.cpp"])
def test_blocks_become_lora(tmp_path: Path, server: Server) -> None:
    findings = check(facts(write_miss(tmp_path / "a")), server)
    assert [(finding.rule, finding.fix) for finding in findings] == [("blocks", "blocks")]
    assert findings[0].what == "it is miss (balance)"
    assert fixes(findings) == Fixes(convert_blocks=True)


def test_of_blocks_peft_takes_miss_alone() -> None:
    assert found(ADAPTERS / "miss_bat", "peft") == {}
    assert found(ADAPTERS / "bone", "peft") == {"bone": ("refused", "blocks")}


@pytest.mark.parametrize("server", SERVERS)
def test_a_residual_adapter_is_wrong_on_the_base(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    for folder in (FIXTURES.parent, FIXTURES):  # where the residual that it names is found, and where it is not
        monkeypatch.chdir(folder)
        findings = check(facts(ADAPTERS / "corda"), server)
        assert [(finding.rule, finding.severity, finding.fix) for finding in findings] == [
            ("residual", "wrong", "initial")
        ]
        assert fixes(findings) == Fixes(subtract_initial=True)


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("corda", {"init": ("refused", "initial")}),
        ("pissa_niter_4", {"random_init": ("wrong", "initial")}),
        ("pissa", {}),
        ("olora", {}),
        ("eva", {}),
    ],
)
def test_what_peft_makes_of_each_init_on_the_base(tmp_path: Path, init: str, expected: dict[str, Any]) -> None:
    assert found(write_lora(tmp_path / "a", init_lora_weights=init), "peft") == expected


def test_an_adapter_that_peft_converted_is_no_residual_one(tmp_path: Path) -> None:
    """It keeps its corda_config; the factors tell."""
    config = {"corda_config": {"corda_method": "kpm"}}
    A, B = torch.randn(4, 16), torch.randn(24, 4)
    tensors = {
        f"base_model.model.{UP}.lora_A.weight": torch.cat([A, A + 0.01]),
        f"base_model.model.{UP}.lora_B.weight": torch.cat([B, -B + 0.01], 1),
    }
    assert found(write_adapter(tmp_path / "a", tensors, lora_config(8, **config)), "vllm") == {}
    assert "residual" in found(write_lora(tmp_path / "b", **config), "vllm")


def test_ranks_that_vllm_takes() -> None:
    def asked(rank: int, residual: str = "") -> tuple[list[str], str]:
        adapter = AdapterFacts("lora", rank=rank, alpha=rank, ranks={"a": rank}, residual=residual)
        return [finding.rule for finding in check(adapter, "vllm")], flags(adapter, "vllm", "PATH")[0]

    assert asked(16) == ([], "vllm serve BASE --enable-lora --lora-modules NAME=PATH")
    assert asked(24) == ([], "vllm serve BASE --enable-lora --max-lora-rank 32 --lora-modules NAME=PATH")
    assert asked(129)[1] == "vllm serve BASE --enable-lora --max-lora-rank 256 --lora-modules NAME=PATH"
    assert asked(512)[0] == []
    assert asked(513)[0] == ["rank"]
    assert asked(64, "yes") == (
        ["residual"],
        "vllm serve BASE --enable-lora --max-lora-rank 128 --lora-modules NAME=PATH",
    )
    assert asked(320, "yes")[0] == ["residual", "rank"]
    findings = check(AdapterFacts("lora", rank=600, alpha=600, ranks={"a": 600}), "vllm")
    assert fixes(findings) == Fixes(most_rank=512)
    assert findings[0].how == "to-lora --rank 512 makes the best LoRA of that rank, and tells its error"
    assert VLLM_RANKS[-1] == 512


def test_flags_of_the_others() -> None:
    adapter = AdapterFacts("lora", rank=8, alpha=8, ranks={"a": 8})
    assert flags(adapter, "sglang", "P") == ("sglang serve --model-path BASE --enable-lora --lora-paths NAME=P",)
    assert flags(adapter, "llama.cpp", "P") == (
        "python convert_lora_to_gguf.py --base BASE --outfile adapter.gguf P",
        "llama-server --model BASE.gguf --lora adapter.gguf",
    )
    assert flags(adapter, "peft", "P") == ('PeftModel.from_pretrained(base, "P")',)


def test_embeddings_heads_and_experts_depend_on_the_model(tmp_path: Path) -> None:
    tensors = lora_tensors({"lm_head": (32, 16)}) | {
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 32),
        "base_model.model.model.embed_tokens.lora_embedding_B": torch.ones(16, 4),
    }
    adapter = write_adapter(tmp_path / "a", tensors, lora_config())
    (finding,) = check(facts(adapter), "vllm")
    assert (finding.rule, finding.severity, finding.is_obstacle) == ("embeddings", "depends", False)
    assert finding.what == "factors for lm_head, model.embed_tokens"
    other = {name.replace("embed_tokens", "positions"): tensor for name, tensor in tensors.items() if "embed" in name}
    assert found(write_adapter(tmp_path / "p", other, lora_config()), "vllm") == {"embeddings": ("depends", None)}
    assert fixes([finding]) == Fixes()
    assert found(adapter, "llama.cpp") == {"head": ("depends", None)}
    assert found(adapter, "sglang") == {}
    experts = write_adapter(
        tmp_path / "b",
        lora_tensors({"model.layers.0.mlp.experts": (24, 16)}, rank=8),
        lora_config(4, target_parameters=["experts.down_proj"], target_modules=[]),
    )
    assert found(experts, "vllm") == {"experts": ("depends", None)}
    assert found(experts, "llama.cpp") == {"experts": ("refused", None)}


def test_convolutions_are_not_served(tmp_path: Path) -> None:
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.ones(4, 3, 2, 2),
        "base_model.model.conv.lora_B.weight": torch.ones(8, 4, 1, 1),
    }
    adapter = write_adapter(tmp_path / "a", tensors, lora_config())
    for server in ("vllm", "sglang", "llama.cpp"):
        assert found(adapter, server) == {"layers": ("refused", None)}


def test_an_expression_for_the_modules_is_nothing_for_sglang(tmp_path: Path) -> None:
    adapter = write_lora(tmp_path / "a", target_modules=r"model\.layers.*_proj")
    assert found(adapter, "sglang") == {"targets": ("refused", "targets")}
    assert found(adapter, "vllm") == {}
    assert fixes(check(facts(adapter), "sglang")) == Fixes(list_targets=True)
    assert found(write_lora(tmp_path / "b", target_modules="all-linear"), "sglang") == {}


@pytest.mark.parametrize("server", SERVERS)
def test_a_file_of_rwkv_peft_is_for_no_server(tmp_path: Path, server: Server) -> None:
    torch.save({"blocks.0.att.key.disha": torch.ones(4, 16)}, tmp_path / "rwkv.pth")
    adapter = facts_of(read_adapter(tmp_path / "rwkv.pth", RwkvTraining()))
    assert [(finding.rule, finding.fix) for finding in check(adapter, server)] == [("file", None)]


# The table


def test_rules_have_names_sources_and_fixes() -> None:
    names = [(rule.server, rule.name) for rule in RULES]
    assert len(set(names)) == len(names)
    assert {rule.server for rule in RULES} == set(SERVERS)
    assert {source for rule in RULES for source in rule.sources} <= SOURCES.keys()
    assert all(rule.sources for rule in RULES)
    assert {rule.fix for rule in RULES} - {None} == FIXES.keys()


def test_the_document_has_every_rule_and_every_source() -> None:
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert rows == [row for server in SERVERS for row in document_rows(server)]
    text = "\n".join(lines)
    for source, url in SOURCES.items():
        assert f"[{source}]: {url}" in text


def document_rows(server: Server) -> list[str]:
    return [
        f"| `{rule.name}` | {rule.severity} | {rule.why} | "
        f"{'merging' if rule.fix is None else FIXES[rule.fix].format(server=server, rank=VLLM_RANKS[-1])} | "
        f"{' '.join(f'[{source}]' for source in rule.sources)} |"
        for rule in RULES
        if rule.server == server
    ]


def test_the_example_of_the_document_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(FIXTURES.parent)
    example = DOCUMENT.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(example, {})
    printed = capsys.readouterr().out
    assert printed.startswith("wrong it was trained beside a residual to-lora --init INIT makes it")
    assert "subtract_initial=True" in printed
