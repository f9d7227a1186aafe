"""Covariances of single experts: those that no token reached, and the tokens of each, up to `decompose`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from building import FIXTURES
from safetensors.torch import load_file, save_file
from test_collect import matrices, tiny

from corda_convert.checkpoint.covariances import read_covariances
from corda_convert.errors import MalformedFile

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ("--target", "experts.gate_up_proj", "--target", "experts.down_proj")
TEXT = ("--data", FIXTURES / "data" / "task.jsonl", "--field", "question", "--no-pack", "--samples", 20)
RANK = ("--mode", "ipm", "--rank", 4)
LAYERS = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
STARVED = {LAYERS[0]: (1, 3), LAYERS[1]: (2,)}
Command = Callable[..., Any]


def with_router(folder: Path, starved: Mapping[str, tuple[int, ...]]) -> Path:
    """A mixture of experts with one expert for each token, whose routers never choose some."""
    path = tiny("qwen3_moe", folder, num_experts_per_tok=1) / "model.safetensors"
    tensors = load_file(path)
    for module, experts in starved.items():
        gate = tensors[f"{module.removesuffix('.experts')}.gate.weight"]
        for expert in experts:
            gate[expert] = 0.0
        others = [expert for expert in range(len(gate)) if expert not in experts]
        gate[others[1]] = -gate[others[0]]  # one of the two is above zero
    save_file(tensors, path, {"format": "pt"})
    return folder


def test_experts_that_no_token_reached_are_told_and_refused_together(
    done: Command, refusal: Command, tmp_path: Path
) -> None:
    folder = with_router(tmp_path / "model", STARVED)
    covs = tmp_path / "covs.safetensors"
    ran = done("collect", folder, *TEXT, *TARGETS, "--experts", "each", "-o", covs)
    reached = set(matrices(covs))
    expected = {f"{module}.{expert}" for module in LAYERS for expert in range(4) if expert not in STARVED[module]}
    assert reached == expected | {f"{name}.down_proj" for name in expected}
    assert f"No token reached 3 experts: {LAYERS[0]} (1, 3); {LAYERS[1]} (2)." in ran.err
    message = refusal("decompose", folder, "--cov", covs, *RANK, *TARGETS)
    assert message == (
        "No covariance for 6 of the 16 experts' matrices in 4 stacks: "
        f"{LAYERS[0]}.gate_up_proj (experts 1, 3); {LAYERS[0]}.down_proj (experts 1, 3); "
        f"{LAYERS[1]}.gate_up_proj (expert 2); {LAYERS[1]}.down_proj (expert 2).\n"
        "Others in these stacks have one: no token of the text reached these experts.\n"
        "Collect on more text, or one for all experts of a layer with collect --experts shared; or leave the stacks out with "
        "--exclude."
    )
    message = refusal("decompose", folder, "--cov", covs, *RANK, *TARGETS, "--method", "asvd")
    assert message.startswith("No mean absolute inputs for 6 of the 16 experts' matrices in 4 stacks: ")


def test_decompose_warns_by_the_tokens_of_each_expert(done: Command, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", tmp_path / "model")
    covs = tmp_path / "covs.safetensors"
    done("collect", folder, *TEXT, *TARGETS, "--experts", "each", "-o", covs)
    found = read_covariances(covs)
    counts = {module: count for module, count in found.module_tokens.items() if not module.endswith("down_proj")}
    width = 32
    fewest = min(counts, key=lambda module: counts[module])
    total = found.count("tokens")
    assert total is not None
    assert counts[fewest] < 10 * width < total, "a file-wide count would not warn"
    assert sum(counts.values()) == 2 * 2 * total  # two experts for each token, in each of two layers
    ran = done("decompose", folder, "--cov", covs, *RANK, *TARGETS, "-o", tmp_path / "residual", "--json")
    receipt = json.loads(ran.out)
    entries = [entry for entry in receipt["tensors"] if entry.get("covariance")]
    assert len(entries) == 2 * 2 * 4
    for entry in entries:
        stored = entry["module"].removesuffix(".gate_up_proj")
        assert entry["covariance"]["tokens"] == found.module_tokens[stored]
    (warning,) = [text for text in receipt["warnings"] if "tokens" in text]
    assert f"{min(count for count in found.module_tokens.values()):,} tokens of 20 samples" in warning


@pytest.mark.parametrize("text", ["[]", "{", '{"q": -1}', '{"q": "many"}', '{"q": true}'])
def test_counts_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "covs.safetensors"
    metadata = {"format": "corda_convert.covariances", "format_version": "1", "module_tokens": text}
    save_file({"q": torch.eye(4)}, path, metadata)
    with pytest.raises(MalformedFile, match="'module_tokens' is not a JSON object of counts"):
        read_covariances(path)
