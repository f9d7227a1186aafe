"""Compares the tensors of two bf16 model folders, one tensor at a time: FOLDER FOLDER. Prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


def tensor_files(folder: Path) -> dict[str, Path]:
    """Where each tensor lies."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def read(file: Path, name: str) -> Tensor:
    """One tensor."""
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
        return tensor


def places(tensor: Tensor) -> Tensor:
    """The number of each bf16 value in the order of all bf16 values: neighbours differ by one ulp, −0 equals 0."""
    bits = tensor.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Counts, over all tensors."""
    mine, other = tensor_files(ours), tensor_files(theirs)
    differing, elements, largest = 0, 0, 0
    other_type = []
    for name in sorted(mine.keys() & other.keys()):
        left, right = read(mine[name], name), read(other[name], name)
        if (left.dtype, left.shape) != (right.dtype, right.shape) or left.dtype != torch.bfloat16:
            other_type.append(name)
            continue
        elements += left.numel()
        if torch.equal(left.view(torch.int16), right.view(torch.int16)):
            continue
        distance = (places(left) - places(right)).abs()
        differing += int((left.view(torch.int16) != right.view(torch.int16)).sum())
        largest = max(largest, int(distance.max()))
    return {
        "tensors": len(mine.keys() & other.keys()),
        "elements": elements,
        "differing_elements": differing,
        "largest_difference_ulps": largest,
        "other_type_or_shape": other_type,
        "in_one_only": sorted(mine.keys() ^ other.keys()),
    }


if __name__ == "__main__":
    print(json.dumps(compare(Path(sys.argv[1]), Path(sys.argv[2]))))
