"""How far merged bf16 weights are from W + s·B·A in float64: MODEL ADAPTER DEVICE OUTPUT... Prints JSON.

For LoRA on linear layers with one rank and one alpha, which is what `make_checkpoint.py` makes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from compare_models import tensor_files
from safetensors import safe_open
from torch import Tensor

BLOCK_ELEMENTS = 4_000_000
BF16_DIGITS = 8
BF16_SMALLEST_EXPONENT = -125


@dataclass(slots=True)
class Errors:
    """Of one output. Errors are in units in the last place of a bf16 number of the exact value's size."""

    elements: int = 0
    beyond_half: int = 0
    largest: float = 0.0
    total: float = 0.0
    other_copied_tensors: int = 0

    def add(self, errors: Tensor) -> None:
        """Counts the errors of some elements. An exact value between two bf16 numbers is at most 0.5 from the nearest."""
        self.elements += errors.numel()
        self.beyond_half += int((errors > 0.5).sum())
        self.largest = max(self.largest, float(errors.max()))
        self.total += float(errors.sum())


def ulps(stored: Tensor, exact: Tensor) -> Tensor:
    """The distance of stored bf16 numbers from the exact ones, in units in the last place; NaN counts as infinite."""
    exponent = torch.frexp(exact).exponent.clamp(min=BF16_SMALLEST_EXPONENT)
    distance = (stored.double() - exact).abs() / torch.ldexp(torch.ones_like(exact), exponent - BF16_DIGITS)
    return distance.nan_to_num(nan=torch.inf)


class Model:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.files = tensor_files(folder)

    def rows(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A tensor in blocks of rows."""
        with safe_open(self.files[name], framework="pt") as opened:
            tensor = opened.get_slice(name)
            shape = tensor.get_shape()
            each = max(1, BLOCK_ELEMENTS // torch.Size(shape[1:]).numel())
            for first in range(0, shape[0], each):
                rows = slice(first, min(first + each, shape[0]))
                yield rows, tensor[rows]

    def all(self, name: str) -> Tensor:
        """A whole tensor."""
        with safe_open(self.files[name], framework="pt") as opened:
            found: Tensor = opened.get_tensor(name)
            return found


def judge(model: Model, adapter: Model, scaling: float, device: str, outputs: dict[str, Model]) -> dict[str, Errors]:
    """The errors of every output, which has the tensors of the model."""
    errors = {name: Errors() for name in outputs}
    for tensor_name in sorted(model.files):
        prefix = f"base_model.model.{tensor_name.removesuffix('.weight')}"
        blocks = [output.rows(tensor_name) for output in outputs.values()]
        if f"{prefix}.lora_A.weight" not in adapter.files:
            different = dict.fromkeys(outputs, False)
            for (_, weight), *merged in zip(model.rows(tensor_name), *blocks, strict=True):
                for name, (_, stored) in zip(outputs, merged, strict=True):
                    different[name] |= not torch.equal(stored, weight)
            for name, differs in different.items():
                errors[name].other_copied_tensors += differs
            continue
        lora_A = adapter.all(f"{prefix}.lora_A.weight").to(device).double()
        lora_B = adapter.all(f"{prefix}.lora_B.weight")
        for (rows, weight), *merged in zip(model.rows(tensor_name), *blocks, strict=True):
            exact = weight.to(device).double() + scaling * (lora_B[rows].to(device).double() @ lora_A)
            for name, (_, stored) in zip(outputs, merged, strict=True):
                errors[name].add(ulps(stored.to(device), exact))
    return errors


def main(model: str, adapter: str, device: str, *outputs: str) -> None:
    """Prints the errors by output folder."""
    config = json.loads(Path(adapter, "adapter_config.json").read_text())
    folders = {output: Model(Path(output)) for output in outputs}
    scaling = config["lora_alpha"] / config["r"]
    errors = judge(Model(Path(model)), Model(Path(adapter)), scaling, device, folders)
    found = {name: asdict(each) | {"mean": each.total / each.elements} for name, each in errors.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
