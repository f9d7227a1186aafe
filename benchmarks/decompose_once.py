"""One contender, one decomposition, in a process of its own: CONTENDER INPUTS MODE RANK DEVICE FACTORS. Prints JSON.

Ours is the `step` of `decompose`'s transform: damping, singular vectors with their certificate, both factors, the
residual in bf16, all checks. PEFT's is `collect_eigens_for_layer` and the crop to the rank; what its LoRA layer does with
them afterwards (factors and residual, a small part) is not timed. Memory is what was in use at the peak, inputs
included, the interpreter and its libraries not.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Mode = Literal["ipm", "kpm"]
Tensors = dict[str, Tensor]
Contender = Callable[[Tensors, Mode, int, torch.device], tuple[Tensors, float]]
"""Takes `weight` and `covariance`; gives `lora_A`, `lora_B` at scaling 1, and the damping relative to the mean diagonal."""


def ours(inputs: Tensors, mode: Mode, rank: int, device: torch.device) -> tuple[Tensors, float]:
    from corda_convert.checkpoint.tensors import TensorFile, TensorRef, TensorSpec
    from corda_convert.operations.decomposition import DecomposeTransform, Names

    d_out, d_in = inputs["weight"].shape
    no_file = cast(TensorFile, None)  # the tensors are here already
    transform = DecomposeTransform(
        module_name="layer",
        weight=TensorRef(no_file, TensorSpec("layer.weight", "BF16", (d_out, d_in))),
        context=TensorRef(no_file, TensorSpec("layer", "F32", (d_in, d_in))),
        layout="out_in",
        mode=mode,
        method="corda",
        rank=rank,
        scaling=1.0,
        damp=0.01,
        names=Names("residual", "lora_A", "lora_B"),
        tokens=16 * d_in,  # as a file of ours tells; else whether the covariance is singular would be looked at
    )
    outputs = {
        "residual": torch.empty(d_out, d_in, dtype=torch.bfloat16),
        "lora_A": torch.empty(rank, d_in),
        "lora_B": torch.empty(d_out, rank),
    }
    session = transform.begin(device)
    session.step(0, {"weight": inputs["weight"], "context": inputs["covariance"]}, outputs)
    return {name: outputs[name] for name in ("lora_A", "lora_B")}, session.facts()["damping"]["factor"]


def peft(inputs: Tensors, mode: Mode, rank: int, device: torch.device) -> tuple[Tensors, float]:
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import collect_eigens_for_layer, crop_corda_eigens

    d_out, d_in = inputs["weight"].shape
    model = torch.nn.Module()
    layer: Any = torch.nn.Linear(d_in, d_out, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(inputs["weight"].to(device), requires_grad=False)
    layer.covariance_matrix = inputs["covariance"].to(device)
    layer.corda_method, layer.rank = mode, rank
    model.layer = layer
    config = LoraConfig(
        init_lora_weights="corda", r=rank, target_modules=["layer"], corda_config=CordaConfig(corda_method=mode)
    )
    layer.eigens = collect_eigens_for_layer(layer, config)
    crop_corda_eigens(model, config)
    return {"U": layer.eigens.U_WC, "S": layer.eigens.S_WC, "V": layer.eigens.V_WC}, float("nan")


def peft_factors(eigens: Tensors) -> Tensors:
    """What PEFT's `corda_init` makes of the eigens, at a scaling of 1."""
    root = eigens["S"].sqrt()
    return {
        "lora_A": eigens["V"].t().mul(root.view(-1, 1)).contiguous(),
        "lora_B": eigens["U"].mul(root).contiguous(),
    }


def peft_damping(covariance: Tensor) -> float:
    """The damping that `collect_eigens_for_layer` ended with: its rule once more, with its own operations."""
    damp = 0.01
    identity = torch.eye(covariance.shape[0], device=covariance.device)
    while True:
        mean = torch.mean(torch.diag(covariance))
        fixed = covariance + torch.diag(torch.ones(covariance.shape[0], device=covariance.device) * mean * damp)
        if torch.dist(fixed @ torch.linalg.inv(fixed), identity).item() < 0.05:
            return damp
        damp *= 2


def warm_up(contender: Contender, mode: Mode, device: torch.device) -> None:
    """Loads the libraries and starts their threads, on a small problem."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, 64, generator=generator)
    contender({"weight": X.bfloat16(), "covariance": X @ X.T + torch.eye(64)}, mode, 4, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)


def resident_bytes() -> int:
    """This process's memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes(device: torch.device, before: int) -> int:
    """The most memory used since `before`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main(name: str, inputs_file: str, mode: Mode, rank: int, device_name: str, factors_file: str) -> dict[str, Any]:
    """Times one decomposition; keeps its factors."""
    contender: Contender = {"ours": ours, "peft": peft}[name]
    device = torch.device(device_name)
    warm_up(contender, mode, device)
    before = resident_bytes()
    inputs = {key: tensor.clone() for key, tensor in load_file(inputs_file).items()}
    begun = time.perf_counter()
    found, damping = contender(inputs, mode, rank, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begun
    peak = peak_bytes(device, before)
    if name == "peft":
        found, damping = peft_factors(found), peft_damping(inputs["covariance"].to(device))
    save_file({key: tensor.cpu() for key, tensor in found.items()}, factors_file)
    return {"seconds": seconds, "peak_bytes": peak, "damping_factor": damping}


if __name__ == "__main__":
    _, contender_name, inputs_path, mode_name, rank_text, device_text, factors_path = sys.argv
    print(
        json.dumps(main(contender_name, inputs_path, cast(Mode, mode_name), int(rank_text), device_text, factors_path))
    )
