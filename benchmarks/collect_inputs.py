"""Makes the inputs of `collect.py`: WORK SHAPE LAYERS TOKENS, all layers for 0.

A random Llama in bfloat16, the fixtures' tokenizer, and a text.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from make_checkpoint import SEED, SHAPES, LlamaShape, write_model

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TOKENS_PER_LINE = 60

SMALL = LlamaShape(hidden=1024, intermediate=2816, vocabulary=2048, heads=16, kv_heads=16, head_dim=64, layers=12)
"""Twelve layers of a model of some 200 million parameters."""


def main(work: str, shape: str, layers: str, tokens: str) -> None:
    """Writes the model and the text, unless they are there, and prints where."""
    sizes = SMALL if shape == "small" else SHAPES[shape](13.5)
    sizes = replace(sizes, layers=int(layers) or sizes.layers)
    folder = Path(work) / f"collect-{shape}-{sizes.layers}"
    model, text = folder / "model", folder / f"text-{tokens}.jsonl"
    if not (model / "tokenizer.json").is_file():
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        write_model(model, sizes)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(FIXTURES / "model" / name, model / name)
    if not text.is_file():
        lines = (FIXTURES / "data" / "task.train.jsonl").read_text().splitlines()
        drawn = random.Random(SEED).choices(lines, k=int(tokens) // TOKENS_PER_LINE * 2)
        text.write_text("\n".join(json.dumps({"text": " ".join(json.loads(line).values())}) for line in drawn) + "\n")
    print(json.dumps({"model": str(model), "text": str(text)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
