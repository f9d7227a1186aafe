"""How far a contender's factors are from the float64 reference: FACTORS REFERENCE INPUTS MODE. Prints JSON."""

from __future__ import annotations

import json
import sys

import torch
from safetensors.torch import load_file

from corda_convert.linalg.subspace import subspace_distance


def errors(factors_file: str, reference_file: str, inputs_file: str, mode: str) -> dict[str, float]:
    """`subspace`: the sine of the largest principal angle; `product`: the relative error of `s·B·A` against `U Uᵀ W`."""
    factors = load_file(factors_file)
    U = load_file(reference_file)[mode]
    W = load_file(inputs_file)["weight"].double()
    A, B = factors["lora_A"].double(), factors["lora_B"].double()
    exact = U @ (U.T @ W)
    return {
        "subspace": subspace_distance(B, U),
        "product": float(torch.linalg.matrix_norm(B @ A - exact) / torch.linalg.matrix_norm(exact)),
    }


if __name__ == "__main__":
    print(json.dumps(errors(*sys.argv[1:])))
