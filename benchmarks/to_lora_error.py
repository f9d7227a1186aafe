"""How far converted LoRAs are from the change that they stand for, in float64: KIND MODEL SOURCE INITIAL OUTPUT…

KIND is residual, balance, bat or tuned. Looks at the first layer's modules, and prints a JSON object.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PREFIX = "base_model.model."


def tensors(folder: Path) -> dict[str, Tensor]:
    """Those of the first layer, by name without PEFT's prefix."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as source:
            names = [name for name in source.keys() if ".layers.0." in name]  # noqa: SIM118
            found |= {name.removeprefix(PREFIX): source.get_tensor(name).double() for name in names}
    return found


def scaling(folder: Path, module: str) -> float:
    """PEFT's, by the config."""
    config = json.loads((folder / "adapter_config.json").read_text())

    def of(patterns: dict[str, float], otherwise: float) -> float:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)

    rank = of(config.get("rank_pattern") or {}, config["r"])
    alpha = of(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def product(found: dict[str, Tensor], folder: Path, module: str) -> Tensor:
    return scaling(folder, module) * found[f"{module}.lora_B.weight"] @ found[f"{module}.lora_A.weight"]


def exact(kind: str, model: Path, source: Path, initial: Path) -> dict[str, Tensor]:
    """The change of each module."""
    own = tensors(source)
    if kind == "residual":
        first = tensors(initial)
        modules = [name.removesuffix(".lora_A.weight") for name in own if name.endswith(".lora_A.weight")]
        return {module: product(own, source, module) - product(first, initial, module) for module in modules}
    weights = tensors(model)
    if kind == "tuned":
        names = [name for name in weights if "_proj" in name]
        return {name.removesuffix(".weight"): own[name] - weights[name] for name in names}
    changes = {}
    for name, block in own.items():
        module = name.removesuffix(".miss_block")
        weight = weights[f"{module}.weight"]
        r = block.shape[-1] if kind == "bat" else block.shape[0]
        if kind == "balance":
            changes[module] = block.T[:, torch.arange(weight.shape[1]) % r]
            continue
        rows = []
        for part, band in zip(block, weight.split(r, dim=0), strict=True):
            rows.append(torch.cat([each @ part + part for each in band.split(r, dim=1)], dim=1))
        changes[module] = torch.cat(rows)
    return changes


def main(kind: str, model: str, source: str, initial: str, *outputs: str) -> None:
    """Relative errors, and the part that no LoRA of the rank can do without."""
    changes = exact(kind, Path(model), Path(source), Path(initial))
    found = {}
    for output in outputs:
        own = tensors(Path(output))
        errors, ranks = [], set()
        for module, change in changes.items():
            missed = float((product(own, Path(output), module) - change).norm())
            ranks.add(own[f"{module}.lora_A.weight"].shape[0])
            errors.append(missed / float(change.norm()))
        found[output] = {"worst": max(errors), "mean": sum(errors) / len(errors), "ranks": sorted(ranks)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
