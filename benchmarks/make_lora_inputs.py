"""Makes what `to-lora` converts: an adapter trained from an initial one, MiSS blocks in two modes, and a fine-tuned model.

The initial adapter is that of `make_checkpoint.py`. Prints the folders as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from make_checkpoint import RANK, SEED, SHAPES, Draw, LlamaShape, make, write_adapter, write_model, write_safetensors
from safetensors import safe_open
from torch import Tensor

LEARNED = 0.05
"""How far training moved the factors, relative to their size."""

MISS_RANK = 64
BLOCK_STD = 0.002
TUNED_RANK = 64
TUNED_STD = 0.002
"""Of what fine-tuning added to each Linear weight, in a few directions; rounding to bf16 adds the rest."""


def _reading(file: Path, name: str) -> Draw:
    """Gives the rows of a tensor of a file, from the first on."""
    place = 0

    def draw(rows: int, shape: tuple[int, ...]) -> Tensor:
        nonlocal place
        begin, place = place, place + rows
        with safe_open(file, "pt") as source:
            return source.get_slice(name)[begin:place].float()

    return draw


def _specs(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as source:
        return {name: tuple(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118


def write_trained(folder: Path, initial: Path) -> None:
    """The initial adapter with every factor moved a little."""
    generator = torch.Generator().manual_seed(SEED + 3)
    file = initial / "adapter_model.safetensors"

    def moved(name: str) -> Draw:
        read = _reading(file, name)

        def draw(rows: int, shape: tuple[int, ...]) -> Tensor:
            values = read(rows, shape)
            return values + LEARNED * values.std() * torch.randn(values.shape, generator=generator)

        return draw

    shapes = _specs(file)
    write_safetensors(folder / file.name, shapes, "F32", {name: moved(name) for name in shapes})
    shutil.copy(initial / "adapter_config.json", folder)


def write_blocks(folder: Path, model: LlamaShape, base_name: str, mode: str) -> None:
    """A MiSS adapter: `balance`, or `bat`, float32."""
    generator = torch.Generator().manual_seed(SEED + 4)

    def draw(rows: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(rows, *shape[1:], generator=generator) * BLOCK_STD

    chosen = model.targets("all")
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (d_out, _) in chosen.items():
        shape = (MISS_RANK, d_out) if mode == "balance" else (d_out // MISS_RANK, MISS_RANK, MISS_RANK)
        shapes[f"base_model.model.{module}.miss_block"] = shape
    write_safetensors(folder / "adapter_model.safetensors", shapes, "F32", dict.fromkeys(shapes, draw))
    config = {
        "peft_type": "MISS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": MISS_RANK,
        "init_weights": True if mode == "balance" else mode,
        "miss_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in chosen}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def write_tuned(folder: Path, model: Path) -> None:
    """The model with a change of low rank in every Linear weight of its layers, rounded to bf16."""
    generator = torch.Generator().manual_seed(SEED + 5)

    def tuned(file: Path, name: str, shape: tuple[int, ...]) -> Draw:
        read = _reading(file, name)
        if len(shape) != 2 or "_proj" not in name:
            return read
        rank = min(TUNED_RANK, *shape)
        right = torch.randn(rank, shape[1], generator=generator) * (TUNED_STD / rank**0.5)

        def draw(rows: int, shape: tuple[int, ...]) -> Tensor:
            return read(rows, shape) + torch.randn(rows, rank, generator=generator) @ right

        return draw

    for file in sorted(model.glob("*.safetensors")):
        shapes = _specs(file)
        draws = {name: tuned(file, name, shape) for name, shape in shapes.items()}
        write_safetensors(folder / file.name, shapes, "BF16", draws)
    for file in model.glob("*.json"):
        shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("gigabytes", type=float, help="of the model")
    parser.add_argument("shape", choices=tuple(SHAPES))
    parser.add_argument("--without-model", action="store_true", help="the adapters alone")
    parser.add_argument("--tuned", action="store_true", help="and the fine-tuned model")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape](arguments.gigabytes)
    model = arguments.work / f"{arguments.shape}-{shape.layers}-layers"
    initial = arguments.work / f"lora-{model.name}-all-r{RANK}"
    made = {"model": model, "initial": initial}
    for part in ("trained", "balance", "bat"):
        made[part] = arguments.work / f"{part}-{model.name}"
    make(initial, lambda folder: write_adapter(folder, shape, "all", model.name))
    make(made["trained"], lambda folder: write_trained(folder, initial))
    make(made["balance"], lambda folder: write_blocks(folder, shape, model.name, "balance"))
    make(made["bat"], lambda folder: write_blocks(folder, shape, model.name, "bat"))
    if not arguments.without_model:
        make(model, lambda folder: write_model(folder, shape))
    if arguments.tuned:
        made["tuned"] = arguments.work / f"tuned-{model.name}"
        make(made["tuned"], lambda folder: write_tuned(folder, model))
    print(json.dumps({name: str(path) for name, path in made.items()}))


if __name__ == "__main__":
    main()
