"""Stacks of experts' matrices: decomposed one by one, beside PEFT and decompositions made here in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import covariance, files_below, random, read_json, write_checkpoint, write_covariances
from conftest import Ran
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from corda_convert import DecomposeOptions, MergeOptions, RunOptions, decompose, merge
from corda_convert.operations import process_memory
from corda_convert.operations.contexts import SharedContexts

Command = Callable[..., Ran]
Refusal = Callable[..., str]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match"
    ),  # PEFT counts modules only
    pytest.mark.filterwarnings("ignore:.*target_parameters.*"),
]

RANK, ALPHA, EXPERTS = 3, 5.0, 4
FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe", "deepseek_v3", "llama4_text")
BOTH = ("experts.gate_up_proj", "experts.down_proj")
IDS = torch.arange(3, 23)[None]
IN_FIRST = ("gpt_oss", "llama4_text")
"""Families that store (experts, d_in, d_out). Of Llama 4 PEFT does not know it."""


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model on disk, and as transformers loads it."""
    model = tiny(family).to(dtype)
    model.save_pretrained(folder)
    return loaded(model, folder, dtype)


def loaded(like: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return type(like).from_pretrained(folder, dtype=dtype).eval()


def beside(base: PreTrainedModel, residual: Path, adapter: Path | None = None) -> PeftModel:
    folder = adapter or residual / "corda_init"
    return PeftModel.from_pretrained(loaded(base, residual), folder, is_trainable=True).eval()


@torch.no_grad()
def difference(model: torch.nn.Module, base: torch.nn.Module) -> float:
    """Of the logits, relative to the largest."""
    expected = base(input_ids=IDS).logits
    return float((model(input_ids=IDS).logits - expected).abs().max() / expected.abs().max())


def farthest(model: PreTrainedModel, base: PreTrainedModel) -> float:
    state = model.state_dict()
    return max(float((state[name] - tensor).abs().max()) for name, tensor in base.state_dict().items())


def stacks_of(model: PreTrainedModel, ends: tuple[str, ...] = BOTH) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.endswith(ends)}


def skip_without_stacks(names: Iterable[str]) -> None:
    if not any(name.endswith(BOTH) for name in names):
        pytest.skip("this version of transformers keeps the experts of this family otherwise")


def options(method: Any = "svd", **changes: Any) -> DecomposeOptions:
    given = {"mode": "ipm", "rank": RANK, "alpha": ALPHA, "method": method, "targets": BOTH}
    return DecomposeOptions(**{**given, **changes})


def projected(weight: Tensor, rank: int, mode: str, T: Tensor | None = None) -> Tensor:
    """`U Uᵀ W`, by a float64 SVD of `W T`."""
    W = weight.double()
    U = torch.linalg.svd(W if T is None else W @ T.double()).U[:, : min(W.shape)]
    U = U[:, :rank] if mode == "ipm" else U[:, -rank:]
    return U @ (U.T @ W)


# Beside PEFT


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_residual_and_adapter_are_the_base(tmp_path: Path, family: str, mode: str) -> None:
    base = saved(family, tmp_path / "base")
    skip_without_stacks(base.state_dict())
    targets = (*BOTH, *(("q_proj",) if family in ("gpt_oss", "olmoe") else ()))
    decompose(tmp_path / "base", output=tmp_path / "out", options=options(mode=mode, targets=targets))
    assert difference(loaded(base, tmp_path / "out"), base) > 1e-3
    together = beside(base, tmp_path / "out")
    assert difference(together, base) < 1e-5
    written = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    own = {name: tensor for name, tensor in together.state_dict().items() if ".lora_" in name}
    assert {name.replace(".default", "") for name in own} == set(written)
    assert all(torch.equal(tensor, written[name.replace(".default", "")]) for name, tensor in own.items())
    residual = loaded(base, tmp_path / "out").state_dict()
    for name, stack in stacks_of(base).items():
        matrices = stack if family not in IN_FIRST else stack.transpose(1, 2)
        left = residual[name] if family not in IN_FIRST else residual[name].transpose(1, 2)
        for W, res in zip(matrices, left, strict=True):
            assert torch.allclose(W.double() - projected(W, RANK, mode), res.double(), atol=1e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_merging_the_untrained_adapter_gives_the_base_back(tmp_path: Path, family: str) -> None:
    base = saved(family, tmp_path / "base")
    init = tmp_path / "out" / "corda_init"
    decompose(tmp_path / "base", output=tmp_path / "out", options=options(rslora=True))
    merge(tmp_path / "out", adapter=init, output=tmp_path / "merged")
    assert 0 < farthest(loaded(base, tmp_path / "merged"), base) < 1e-6
    merge(tmp_path / "base", adapter=init, output=tmp_path / "with_init", options=MergeOptions(init=init))
    assert farthest(loaded(base, tmp_path / "with_init"), base) == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_what_was_trained_beside_the_residual_merges_into_the_base(tmp_path: Path, family: str) -> None:
    base = saved(family, tmp_path / "base")
    decompose(tmp_path / "base", output=tmp_path / "out", options=options())
    trained = beside(base, tmp_path / "out")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    trained.save_pretrained(tmp_path / "trained")
    init = tmp_path / "out" / "corda_init"
    merge(tmp_path / "base", adapter=tmp_path / "trained", output=tmp_path / "merged", options=MergeOptions(init=init))
    merged = loaded(base, tmp_path / "merged")
    assert difference(merged, trained) < 1e-5
    assert difference(merged, base) > 1e-3
    merge(tmp_path / "out", adapter=tmp_path / "trained", output=tmp_path / "residual_merged")
    assert difference(loaded(base, tmp_path / "residual_merged"), trained) < 1e-5


@pytest.mark.parametrize("targets", [("experts.down_proj",), ("gate_up_proj",), (r".*\.0\.mlp\.experts\.down_proj",)])
def test_the_parameters_are_those_that_peft_finds(tmp_path: Path, targets: tuple[str, ...]) -> None:
    base = saved("qwen3_moe", tmp_path / "base")
    outcome = decompose(tmp_path / "base", output=tmp_path / "out", options=options(targets=targets))
    config = read_json(tmp_path / "out" / "corda_init" / "adapter_config.json")
    whole = config["target_parameters"]
    ours = {name for name in stacks_of(base) if name.endswith(tuple(whole))}
    assert len(ours) == (1 if "0" in targets[0] else 2)
    assert config["target_modules"] == []
    theirs = get_peft_model(base, LoraConfig(r=2, target_modules=[], target_parameters=whole)).targeted_parameter_names
    assert ours == set(theirs)
    assert difference(beside(base, tmp_path / "out"), saved("qwen3_moe", tmp_path / "base")) < 1e-5
    assert {entry["module"] for entry in outcome.receipt["tensors"] if "module" in entry} == {
        f"{module}.{expert}.{name}"
        for module, _, name in (each.rpartition(".") for each in ours)
        for expert in range(EXPERTS)
    }


def test_patterns_give_each_stack_its_rank_and_scaling(tmp_path: Path) -> None:
    base = saved("olmoe", tmp_path / "base")
    given = options(
        rank_pattern={"experts.down_proj": 2, "q_proj": 1},
        alpha_pattern={"0.mlp.experts.gate_up_proj": 7.0},
        targets=(*BOTH, "q_proj"),
    )
    decompose(tmp_path / "base", output=tmp_path / "out", options=given)
    together = beside(base, tmp_path / "out")
    assert difference(together, base) < 1e-5
    found = {name: module for name, module in together.named_modules() if hasattr(module, "parameter_name")}
    assert {(module.parameter_name, module.r["default"]) for module in found.values()} == {
        ("gate_up_proj", 3),
        ("down_proj", 2),
    }
    scalings = {module.scaling["default"] for module in found.values() if module.parameter_name == "gate_up_proj"}
    assert scalings == {7 / 3, 5 / 3}


def test_in_bfloat16_the_residual_is_rounded_once(tmp_path: Path) -> None:
    base = saved("mixtral", tmp_path / "base", torch.bfloat16)
    decompose(tmp_path / "base", output=tmp_path / "out", options=options())
    residual = loaded(base, tmp_path / "out", torch.bfloat16).state_dict()
    factors = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    A, B = (factors[f"base_model.model.model.layers.0.mlp.experts.lora_{side}.weight"].double() for side in "AB")
    for expert, W in enumerate(stacks_of(base)["model.layers.0.mlp.experts.down_proj"]):
        delta = ALPHA / RANK * B[:, expert::EXPERTS] @ A[expert * RANK : (expert + 1) * RANK]
        assert torch.equal(
            residual["model.layers.0.mlp.experts.down_proj"][expert], (W.double() - delta).to(torch.bfloat16)
        )


def test_truncation_keeps_no_adapter(tmp_path: Path) -> None:
    base = saved("gpt_oss", tmp_path / "base")
    outcome = decompose(
        tmp_path / "base", output=tmp_path / "out", options=DecomposeOptions(truncate=4, method="svd", targets=BOTH)
    )
    assert not (tmp_path / "out" / "corda_init").exists()
    left = loaded(base, tmp_path / "out").state_dict()
    for name, stack in stacks_of(base).items():
        for W, res in zip(stack.transpose(1, 2), left[name].transpose(1, 2), strict=True):
            assert torch.allclose(res.double(), W.double() - projected(W, 4, "kpm"), atol=1e-6)
    assert outcome.receipt["summary"]["tensors"]["truncated"] == 4


def test_the_adapter_alone_and_the_residual_made_of_it(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "base")
    decompose(tmp_path / "base", output=tmp_path / "out", options=options())
    outcome = decompose(tmp_path / "base", output=tmp_path / "alone", options=options(residual=False))
    name = "adapter_model.safetensors"
    assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "out" / "corda_init" / name).read_bytes()
    entries = [entry for entry in outcome.receipt["tensors"] if "module" in entry]
    assert {(entry["module"].rpartition(".")[2], entry["experts"]) for entry in entries} == {
        ("gate_up_proj", EXPERTS),
        ("down_proj", EXPERTS),
    }
    merge(tmp_path / "base", output=tmp_path / "subtracted", options=MergeOptions(subtract=tmp_path / "alone"))
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "subtracted"))
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-7) for key in ours)


# On disk


def test_a_stack_of_square_matrices_merges_as_peft_loads_it(tmp_path: Path) -> None:
    model = tiny("granitemoe")
    model.config.intermediate_size = 32
    torch.manual_seed(0)
    type(model)(model.config).save_pretrained(tmp_path / "base")
    base = loaded(model, tmp_path / "base")
    skip_without_stacks(base.state_dict())
    decompose(tmp_path / "base", output=tmp_path / "out", options=options(targets=("experts.down_proj",)))
    assert len({stack.shape for stack in stacks_of(base, ("down_proj",)).values()} & {(EXPERTS, 32, 32)}) == 1
    assert difference(beside(base, tmp_path / "out"), base) < 1e-5
    merge(tmp_path / "out", adapter=tmp_path / "out" / "corda_init", output=tmp_path / "merged")
    assert farthest(loaded(base, tmp_path / "merged"), base) < 1e-6


def test_experts_that_lie_transposed_on_disk_are_written_back_so(tmp_path: Path) -> None:
    base = saved("qwen3_vl_moe", tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    skip_without_stacks(tensors)
    flipped = {
        name: tensor.transpose(1, 2).contiguous() if name.endswith(BOTH) else tensor for name, tensor in tensors.items()
    }
    write_checkpoint(tmp_path / "flipped", flipped, config=read_json(tmp_path / "plain" / "config.json"))
    for name in ("plain", "flipped"):
        decompose(tmp_path / name, output=tmp_path / f"{name}_out", options=options())
    ours, theirs = (load_file(tmp_path / f"{name}_out" / "model.safetensors") for name in ("flipped", "plain"))
    stacks = [name for name in tensors if name.endswith(BOTH)]
    assert len(stacks) == 4
    for name in tensors:
        expected = theirs[name].transpose(1, 2) if name in stacks else theirs[name]
        assert torch.equal(ours[name], expected)
        assert torch.equal(ours[name], flipped[name]) == (name not in stacks)
    together = beside(base, tmp_path / "flipped_out")
    assert difference(together, base) < 1e-5


def test_experts_in_several_shards_and_in_another_order(tmp_path: Path) -> None:
    base = saved("qwen3_moe", tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    apart = {name: tensors[name] for shard in range(5) for name in sorted(tensors)[shard::5]}
    write_checkpoint(tmp_path / "base", apart, shards=3, config=read_json(tmp_path / "whole" / "config.json"))
    for folder in ("whole", "base"):
        decompose(tmp_path / folder, output=tmp_path / f"{folder}_out", options=options())
    places = read_json(tmp_path / "base_out" / "model.safetensors.index.json")["weight_map"]
    assert places == read_json(tmp_path / "base" / "model.safetensors.index.json")["weight_map"]
    expected = load_file(tmp_path / "whole_out" / "model.safetensors")
    for path in (tmp_path / "base_out").glob("model-*.safetensors"):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())
    assert difference(beside(base, tmp_path / "base_out"), base) < 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_the_receipt_tells_of_each_tensor(tmp_path: Path, family: str) -> None:
    base = saved(family, tmp_path / "base")
    outcome = decompose(tmp_path / "base", output=tmp_path / "out", options=options())
    entries = {entry["name"]: entry for entry in outcome.receipt["tensors"]}
    experts = "model.layers.1.mlp.experts"
    stack = stacks_of(base)[f"{experts}.gate_up_proj"].double()
    if family == "gpt_oss":
        facts = entries[f"{experts}.gate_up_proj"]
        assert (facts["module"], facts["experts"]) == (f"{experts}.gate_up_proj", EXPERTS)
        delta = torch.stack([projected(W.T, RANK, "ipm") for W in stack])
        share = min(projected(W.T, RANK, "ipm").norm() ** 2 / W.norm() ** 2 for W in stack)
    else:
        facts = entries[f"{experts}.2.gate_proj.weight"]
        assert (facts["module"], facts["expert"]) == (f"{experts}.2.gate_up_proj", 2)
        assert entries[f"{experts}.2.up_proj.weight"]["with"] == f"{experts}.2.gate_proj.weight"
        stack = stack[2]
        delta = projected(stack, RANK, "ipm")
        share = delta.norm() ** 2 / stack.norm() ** 2
    assert facts["weight_norm"] == pytest.approx(float(stack.norm()))
    assert facts["delta_norm"] == pytest.approx(float(delta.norm()))
    assert facts["taken_share"] == pytest.approx(float(share))
    assert facts["certificate"]["holds"] is True
    for side in "AB":
        factor = entries[f"base_model.model.{experts}.base_layer.lora_{side}.weight"]
        assert factor["action"] == "decomposed"
        assert entries[factor["with"]]["module"].endswith("gate_up_proj")
    planned = outcome.receipt["plan"]["tensors"]
    assert planned == outcome.receipt["summary"]["tensors"]


def test_bytes_do_not_depend_on_the_run(tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "base")
    for name in ("a", "b"):
        decompose(tmp_path / "base", output=tmp_path / name, options=options(mode="kpm"))
    for path in ("model.safetensors", "corda_init/adapter_model.safetensors"):
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def comparable(output: Path) -> tuple[dict[str, bytes], Any]:
    """All files but the receipt, and what it says of the tensors but the time they took."""
    files = files_below(output)
    tensors = json.loads(files.pop("corda_convert.json"))["tensors"]
    return files, [{name: fact for name, fact in entry.items() if name != "seconds"} for entry in tensors]


@pytest.fixture
def sharded(tmp_path: Path) -> tuple[str, ...]:
    """The command for a model in three shards, experts of one layer in several, with a layer's covariances."""
    base = saved("mixtral", tmp_path / "whole")
    write_contexts(tmp_path / "c.safetensors", base, "layer", is_scale=False)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    config = read_json(tmp_path / "whole" / "config.json")
    model = write_checkpoint(tmp_path / "base", tensors, shards=3, config=config)
    targets = [part for end in BOTH for part in ("--target", end)]
    return "decompose", str(model), "--cov", str(tmp_path / "c.safetensors"), "--mode", "ipm", "--rank", "2", *targets


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, sharded: tuple[str, ...]) -> None:
    spec = {"arguments": sharded, "folder": str(tmp_path / "runs"), "kills": 3, "seed": "experts"}
    (tmp_path / "runs").mkdir()
    program = Path(__file__).with_name("interrupted_runs.py")
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(spec)], capture_output=True, text=True, env=alone, timeout=120
    )
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert sum(kill["killed"] != 0 for kill in kills) >= 1
    for number in range(len(kills)):
        assert comparable(tmp_path / "runs" / str(number) / "out") == comparable(
            tmp_path / "runs" / "undisturbed1" / "out"
        )


def test_two_processes_make_the_bytes_of_one(
    tmp_path: Path, sharded: tuple[str, ...], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert command(*sharded, "-o", "out").status == 0
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "corda_convert",
    ]
    subprocess.run([*launch, *sharded, "-o", "out"], check=True, capture_output=True, cwd=tmp_path / "two", env=alone,
                   timeout=600)  # fmt: skip
    assert comparable(tmp_path / "one" / "out")[0] == comparable(tmp_path / "two" / "out")[0]


def test_a_group_is_one_expert_at_most(tmp_path: Path) -> None:
    """Memory does not grow with the number of experts."""
    saved("mixtral", tmp_path / "base")
    dry = RunOptions(dry_run=True)
    plan = decompose(tmp_path / "base", output=tmp_path / "out", options=options(residual=True), run=dry).plan
    one_expert = 4 * 3 * 32 * 48
    assert plan.read_buffer_bytes == one_expert
    assert process_memory.resident_bytes() > plan.memory_bytes


# Covariances


def write_contexts(path: Path, base: PreTrainedModel, kind: str, *, is_scale: bool) -> dict[str, Tensor]:
    """Covariances or mean absolute inputs for each layer, or each expert; by parameter and expert."""
    tensors: dict[str, Tensor] = {}
    used: dict[str, Tensor] = {}
    for place, (name, stack) in enumerate(stacks_of(base).items()):
        module, _, parameter = name.rpartition(".")
        is_down = parameter == "down_proj"
        d_in = stack.shape[1] if type(base).__name__.startswith(("GptOss", "Llama4")) else stack.shape[2]
        for expert in range(EXPERTS):
            end = {"expert": f".{expert}.{parameter}", "short": f".{expert}", "layer": ""}[kind]
            key = module + (end if not is_down or kind == "expert" else f"{end}.down_proj")
            seed = 50 * place + (0 if kind == "layer" else expert)
            made = random(d_in, seed=seed).abs() + 0.1 if is_scale else covariance(d_in, seed=seed)
            used[f"{name}.{expert}"] = made
            tensors[f"{key}.mean_abs" if is_scale else key] = made
    write_covariances(path, tensors)
    return used


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("kind", ["layer", "short", "expert"])
@pytest.mark.parametrize("method", ["corda", "svd-llm", "asvd"])
def test_covariances_are_of_the_layer_or_of_each_expert(tmp_path: Path, family: str, kind: str, method: str) -> None:
    base = saved(family, tmp_path / "base")
    path = tmp_path / "c.safetensors"
    used = write_contexts(path, base, kind, is_scale=method == "asvd")
    outcome = decompose(
        tmp_path / "base", output=tmp_path / "out", options=options(method, mode="kpm"), covariances=path
    )
    residual = loaded(base, tmp_path / "out").state_dict()
    for name, stack in stacks_of(base).items():
        for expert in range(EXPERTS):
            C = used[f"{name}.{expert}"].double()
            if method == "asvd":
                T = torch.diag(C.sqrt())
            elif method == "corda":
                T = C + 0.01 * C.diagonal().mean() * torch.eye(len(C))
            else:
                values, vectors = torch.linalg.eigh(C)
                T = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
            W, left = stack[expert], residual[name][expert].double()
            W, left = (W.T, left.T) if family in IN_FIRST else (W, left)
            assert torch.allclose(left, W.double() - projected(W, RANK, "kpm", T), atol=1e-5)
    assert difference(beside(base, tmp_path / "out"), base) < 1e-5
    stored = sum(tensor.nbytes for tensor in load_file(path).values())
    weights = sum(stack.nbytes for stack in stacks_of(base).values())
    copied = sum(tensor.nbytes for tensor in base.state_dict().values()) - weights
    assert outcome.receipt["plan"]["read_bytes"] == stored + weights + copied  # each but once


def test_a_layers_covariance_is_taken_for_its_experts_before_any_other_is_read(tmp_path: Path) -> None:
    """With a layer's two in turn, as most files have them: both are held."""
    base = saved("mixtral", tmp_path / "base")
    path = tmp_path / "c.safetensors"
    write_contexts(path, base, "layer", is_scale=False)
    held: list[int] = []
    original = SharedContexts.keep

    def keep(self: SharedContexts, *arguments: Any) -> None:
        original(self, *arguments)
        held.append(len(self._held))

    SharedContexts.keep = keep  # type: ignore[method-assign]
    try:
        decompose(tmp_path / "base", output=tmp_path / "out", options=options("corda"), covariances=path)
    finally:
        SharedContexts.keep = original  # type: ignore[method-assign]
    assert max(held) == 2
    assert held[-1] == 0


def test_the_names_of_a_checkpoints_own_experts_are_found(tmp_path: Path) -> None:
    """What was collected when each expert was a Linear layer: its projections share an input."""
    saved("qwen3_moe", tmp_path / "base")
    experts = [f"model.layers.{layer}.mlp.experts.{expert}" for layer in range(2) for expert in range(EXPERTS)]
    tensors = {f"{each}.gate_proj": covariance(32, seed=i) for i, each in enumerate(experts)}
    tensors |= {f"{each}.down_proj": covariance(24, seed=30 + i) for i, each in enumerate(experts)}
    aliases = {f"{each}.up_proj": f"{each}.gate_proj" for each in experts}
    old = write_covariances(tmp_path / "old.safetensors", tensors, {"aliases": json.dumps(aliases)})
    new = write_covariances(
        tmp_path / "new.safetensors",
        {name.removesuffix(".gate_proj"): tensor for name, tensor in tensors.items()},
    )
    for path in (old, new):
        decompose(tmp_path / "base", output=tmp_path / path.stem, options=options("corda"), covariances=path)
    assert (tmp_path / "old/model.safetensors").read_bytes() == (tmp_path / "new/model.safetensors").read_bytes()


def test_the_modules_inputs_are_not_those_of_the_down_projection(refusal: Refusal, tmp_path: Path) -> None:
    """Although they are as many in this model."""
    saved("gpt_oss", tmp_path / "base")
    module = "model.layers.0.mlp.experts"
    path = write_covariances(tmp_path / "c.safetensors", {module: covariance(32), f"{module}.1": covariance(32)})
    message = refusal("decompose", tmp_path / "base", "--cov", path, "--mode", "ipm", "--rank", "2",
                      "--target", "0.mlp.experts.down_proj")  # fmt: skip
    assert message.startswith(f"No covariance for experts of 1 of 1 stacks: {module}.down_proj.\n")
    assert f"Of {module}.0.down_proj none of these is there: {module}.0.down_proj, {module}.down_proj.\n" in message


def test_missing_covariances_are_named(refusal: Refusal, tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "base")
    module = "model.layers.0.mlp.experts"
    path = write_covariances(
        tmp_path / "c.safetensors", {module: covariance(32), f"{module}.down_proj": covariance(32)}
    )
    message = refusal("decompose", tmp_path / "base", "--cov", path, "--mode", "ipm", "--rank", "2",
                      "--target", "experts.gate_up_proj", "--target", "experts.down_proj")  # fmt: skip
    assert message == (
        "2 problems, nothing was written:\n"
        "\n"
        f"{module}.down_proj is (32, 32); the matrices of {module}.down_proj have 24 inputs, so (24, 24) was expected.\n"
        "The covariances are of another model, or of other inputs.\n"
        "Collect covariances with this model.\n"
        "\n"
        "No covariance for experts of 2 of 4 stacks: model.layers.1.mlp.experts.gate_up_proj, "
        "model.layers.1.mlp.experts.down_proj.\n"
        "Of model.layers.1.mlp.experts.0.gate_up_proj none of these is there: model.layers.1.mlp.experts.0.gate_up_proj, "
        "model.layers.1.mlp.experts.0.gate_proj, model.layers.1.mlp.experts.0.up_proj, model.layers.1.mlp.experts.0, "
        "model.layers.1.mlp.experts.gate_up_proj, model.layers.1.mlp.experts.\n"
        "Collect them too, or choose the modules that have one with --target."
    )


# What is not done


def test_all_linear_leaves_experts_and_says_so(command: Command, tmp_path: Path) -> None:
    saved("mixtral", tmp_path / "base")
    ran = command(
        "decompose", tmp_path / "base", "--method", "svd", "--mode", "ipm", "--rank", "2", "-o", tmp_path / "out"
    )
    assert "The experts' matrices in 4 parameters stay as they are: model.layers.0.mlp.experts.gate_up_proj" in ran.err
    assert "choose them with --target experts.gate_up_proj --target experts.down_proj" in ran.err
    config = read_json(tmp_path / "out" / "corda_init" / "adapter_config.json")
    assert "target_parameters" not in config


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--target", "mlp.gate"),
         "--target 'mlp.gate' matches no Linear layer.\nmodel.layers.0.mlp.gate.weight is of another kind; only Linear layers "
         "and experts are decomposed.\nThe layers end in: k_proj,"),
        (("--target", "experts.up"),
         "--target 'experts.up' matches no Linear layer.\nThe layers end in: k_proj, lm_head, o_proj, q_proj, v_proj, "
         "experts.down_proj, experts.gate_up_proj."),
        (("--target", "0.mlp.experts.down_proj", "--rank", "25"),
         "Rank 25 is above what the matrices of model.layers.0.mlp.experts.down_proj have: they are (32, 24).\n"
         "Choose a smaller number, or leave them out with --exclude."),
        (("--target", "experts.down_proj", "--write-cache", "cache.pt"),
         "PEFT's cache file (--write-cache) is for Linear layers only, and model.layers.0.mlp.experts.down_proj, "
         "model.layers.1.mlp.experts.down_proj hold matrices of experts.\nChoose others with --target."),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    refusal: Refusal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    saved("qwen3_moe", tmp_path / "base")
    message = refusal("decompose", tmp_path / "base", "--method", "svd", "--mode", "ipm", "--rank", "2", *more)
    assert message.startswith(expected)


def test_an_initial_adapter_with_another_scaling_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    saved("qwen3_moe", tmp_path / "base")
    for name, alpha in (("a", 3.0), ("b", 4.0)):
        decompose(tmp_path / "base", output=tmp_path / name, options=options(alpha=alpha))
    message = refusal(
        "merge", tmp_path / "base", "--adapter", tmp_path / "a/corda_init", "--init", tmp_path / "b/corda_init"
    )
    assert "experts.gate_up_proj: the adapter scales by 1, the initial adapter by 1.33333; they must agree." in message


def test_an_initial_adapter_of_another_training_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    saved("qwen3_moe", tmp_path / "base")
    for mode in ("ipm", "kpm"):
        decompose(tmp_path / "base", output=tmp_path / mode, options=options(mode=mode))
    adapter, other = (tmp_path / mode / "corda_init" for mode in ("ipm", "kpm"))
    expected = "corda_init was not trained from the initial adapter corda_init: the rows of lora_A point elsewhere"
    assert refusal("merge", tmp_path / "base", "--adapter", adapter, "--init", other).startswith(expected)
    assert refusal("merge", tmp_path / "kpm", "--adapter", adapter).startswith(expected)


# Conv1D


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("method", ["corda", "svd", "asvd", "svd-llm"])
def test_gpt2s_conv1d_with_every_method(tmp_path: Path, method: str, mode: str) -> None:
    base = saved("gpt2", tmp_path / "base")
    targets = ("c_attn", "c_proj", "c_fc")
    modules = {name: m.weight for name, m in base.named_modules() if name.endswith(targets)}
    tensors = {name: covariance(W.shape[0], seed=place) for place, (name, W) in enumerate(modules.items())}
    tensors |= {
        f"{name}.mean_abs": random(W.shape[0], seed=90 + place).abs() + 0.1
        for place, (name, W) in enumerate(modules.items())
    }
    path = write_covariances(tmp_path / "c.safetensors", tensors)
    decompose(
        tmp_path / "base",
        output=tmp_path / "out",
        options=options(method, mode=mode, targets=targets),
        covariances=None if method == "svd" else path,
    )
    assert difference(loaded(base, tmp_path / "out"), base) > 1e-3
    assert difference(beside(base, tmp_path / "out"), base) < 1e-5
    residual = loaded(base, tmp_path / "out").state_dict()
    for name, stored in modules.items():
        C, scale = tensors[name].double(), tensors[f"{name}.mean_abs"].double()
        values, vectors = torch.linalg.eigh(C)
        T = {
            "corda": C + 0.01 * C.diagonal().mean() * torch.eye(len(C)),
            "svd": torch.eye(len(C)),
            "asvd": torch.diag(scale.sqrt()),
            "svd-llm": vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T,
        }[method]
        W = stored.detach().T
        left = residual[f"{name}.weight"].double().T
        assert torch.allclose(left, W.double() - projected(W, RANK, mode, T), atol=1e-5)
