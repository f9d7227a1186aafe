"""Makes the inputs of `decompose.py`, and the float64 reference that both contenders are compared with.

The weight is `W = P diag(s) Qᵀ` with random orthonormal P, Q and `s_i = i^-0.5`, scaled to a standard deviation of 0.02
and rounded to bf16. The covariance is `C = D Q diag(c) Qᵀ D`, float32, with random orthogonal Q and `c_i = i^-1.2`; D is 1
but for four input channels, where it is 20, 40, 60 and 80: the massive activations of language models, with variances
of hundreds to thousands of times the others'. C is scaled to a mean diagonal of 1. All from a fixed seed.

The reference is neither contender's method: LAPACK's SVD of all of `W (C + λI)` in float64, or cuSOLVER's on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEED = 20260101
WEIGHT_STD = 0.02
WEIGHT_DECAY, COVARIANCE_DECAY = 0.5, 1.2
OUTLIER_GAINS = (20.0, 40.0, 60.0, 80.0)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns."""
    Q: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q
    return Q


def power_law(count: int, decay: float) -> Tensor:
    """`1, 2^-decay, 3^-decay, …`"""
    return torch.arange(1, count + 1, dtype=torch.float64) ** -decay


def weight(d_out: int, d_in: int, generator: torch.Generator) -> Tensor:
    side = min(d_out, d_in)
    P, Q = orthonormal(d_out, side, generator), orthonormal(d_in, side, generator)
    W = (P * power_law(side, WEIGHT_DECAY)) @ Q.T
    return (W * (WEIGHT_STD / W.std())).bfloat16()


def covariance(d_in: int, generator: torch.Generator) -> Tensor:
    root = orthonormal(d_in, d_in, generator) * power_law(d_in, COVARIANCE_DECAY).sqrt()
    channels = torch.randperm(d_in, generator=generator)[: len(OUTLIER_GAINS)]
    root[channels] *= torch.tensor(OUTLIER_GAINS, dtype=torch.float64)[:, None]
    C = root @ root.T
    return (C / C.diagonal().mean()).float()


def make_inputs(folder: Path, d_out: int, d_in: int) -> Path:
    """`weight` and `covariance` in one file, made once."""
    file = folder / f"matrices-{d_out}x{d_in}-seed{SEED}.safetensors"
    if not file.exists():
        generator = torch.Generator().manual_seed(SEED)
        save_once({"weight": weight(d_out, d_in, generator), "covariance": covariance(d_in, generator)}, file)
    return file


def make_reference(folder: Path, inputs: Path, rank: int, factor: float, device: str) -> Path:
    """`ipm` and `kpm`: the left singular vectors at both ends, for a damping of `factor` times the mean diagonal."""
    file = folder / f"{inputs.stem}-reference-r{rank}-damp{factor:g}.safetensors"
    if not file.exists():
        tensors = load_file(inputs)
        W, C = (tensors[name].to(device, torch.float64) for name in ("weight", "covariance"))
        U, S, _ = torch.linalg.svd(W @ C + factor * C.diagonal().mean() * W, full_matrices=False)
        ends = {"ipm": U[:, :rank].contiguous(), "kpm": U[:, -rank:].contiguous(), "singular_values": S}
        ends = {name: tensor.cpu() for name, tensor in ends.items()}
        save_once(ends, file)
    return file


def save_once(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes under another name first, so that half a file is never taken for one."""
    staging = file.with_suffix(".part")
    save_file(tensors, staging)
    staging.rename(file)


def main() -> None:
    """Prints the file as JSON: the inputs, or with `--damp` the reference for them."""
    parser = argparse.ArgumentParser(description="Makes the inputs of decompose.py, or the reference for them.")
    parser.add_argument("work", type=Path)
    parser.add_argument("d_out", type=int)
    parser.add_argument("d_in", type=int)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--damp", type=float)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    file = make_inputs(arguments.work, arguments.d_out, arguments.d_in)
    if arguments.damp is not None:
        file = make_reference(arguments.work, file, arguments.rank, arguments.damp, arguments.device)
    print(json.dumps({"file": str(file)}))


if __name__ == "__main__":
    main()
