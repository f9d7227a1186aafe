"""The memory of `decompose` does not depend on the number of layers: neither what is planned, nor what a process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from building import LLAMA_CONFIG, write_checkpoint
from safetensors.torch import save_file

from corda_convert.plan.model import COPY_BYTES

WIDTH, INNER, VOCABULARY = 96, 768, 32
"""Large covariances and small spectra: many bytes for little work."""

FEW, MANY = 5, 35
TARGETS = {"mlp.down_proj": (WIDTH, INNER)}
OTHERS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}


def write_inputs(folder: Path, layers: int) -> int:
    """A model of so many layers, with covariances. Returns the bytes of both."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = {"model.embed_tokens.weight": draw(VOCABULARY, WIDTH)}
    matrices = {name: X @ X.T for name, (_, d_in) in TARGETS.items() for X in (draw(d_in, 2 * d_in),)}
    covariances = {}
    for prefix in (f"model.layers.{layer}." for layer in range(layers)):
        weights |= {f"{prefix}{name}.weight": draw(*shape) for name, shape in {**TARGETS, **OTHERS}.items()}
        covariances |= {f"{prefix}{name}": matrix.clone() for name, matrix in matrices.items()}
    weights |= {"model.norm.weight": draw(WIDTH), "lm_head.weight": draw(VOCABULARY, WIDTH)}
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": layers, "num_key_value_heads": 2}
    write_checkpoint(folder / "base", weights, shards=3, config=LLAMA_CONFIG | sizes)
    save_file(covariances, folder / "covariances.safetensors")
    return sum(tensor.nbytes for tensor in (*weights.values(), *covariances.values()))


def decomposed(folder: Path) -> dict[str, Any]:
    """The receipt of a run in a process of its own."""
    command = [sys.executable, "-m", "corda_convert", "decompose", "base", "--cov", "covariances.safetensors"]
    command += ["--mode", "ipm", "--rank", "8", "-o", "out", "--json", "-q"]
    command += [argument for name in TARGETS for argument in ("--target", name)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_seven_times_as_many_layers_take_no_more_memory(tmp_path: Path) -> None:
    sizes, peaks, planned = [], [], []
    for layers in (FEW, MANY):
        folder = tmp_path / str(layers)
        sizes.append(write_inputs(folder, layers))
        receipt = decomposed(folder)
        assert receipt["summary"]["tensors"]["decomposed"] == layers * len(TARGETS)
        peaks.append(receipt["run"]["peak_memory_bytes"])
        planned.append(receipt["plan"]["buffer_bytes"])
    assert planned[1] - planned[0] <= 2 * COPY_BYTES  # what runs of copied tensors take, which a shard's end cuts
    assert peaks[1] - peaks[0] < (sizes[1] - sizes[0]) / 5, (peaks, sizes)
