"""The main job from end to end on the fixture model: decompose → train → convert → merge → load, and compare.

Run by `make demo`. Every command is the real command line, every model is loaded by transformers and PEFT, and the
table at the end says what each station knows, and by how much two stations differ that must agree.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "fixtures"
OUTPUT = ROOT / "demo-output"
MODEL = "fixtures/model"
RESIDUAL = "demo-output/residual"
ADAPTER = "demo-output/adapter"
LORA = "demo-output/lora"
MERGED = "demo-output/merged"
STEPS, ROWS, RATE = 150, 16, 2e-3


@dataclass
class Station:
    """One model on the way: how to load it, which station it must agree with, and what making it cost."""

    name: str
    base: str
    adapter: str | None = None
    subfolder: str | None = None
    agrees_with: str | None = None
    receipt: dict[str, Any] = field(default_factory=dict)

    def load(self) -> torch.nn.Module:
        """The model in float32, by transformers and PEFT alone."""
        model = AutoModelForCausalLM.from_pretrained(ROOT / self.base, dtype=torch.float32)
        if self.adapter is not None:
            kwargs = {"subfolder": self.subfolder} if self.subfolder else {}
            model = PeftModel.from_pretrained(model, str(ROOT / self.adapter), **kwargs)
        return model.eval()


def main() -> None:
    """Runs every station and prints the table."""
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()

    print("1. Take the components that the knowledge needs least out of the model, as an adapter to train.\n")
    covariances = "fixtures/covariances/knowledge.safetensors"
    decomposed = run(
        "decompose", MODEL, "--cov", covariances, "--mode", "kpm", "--rank", "8", "--dtype", "float32", "-o", RESIDUAL
    )
    print("2. Train that adapter on the task with PEFT, beside the residual.\n")
    train()
    print("3. Convert it into an ordinary LoRA for the unmodified base model.\n")
    init = f"{RESIDUAL}/corda_init"
    converted = run("to-lora", ADAPTER, "--init", init, "--base", MODEL, "-o", LORA)
    print("4. Or merge it into the base model's weights.\n")
    merged = run("merge", MODEL, "--adapter", ADAPTER, "--init", init, "--dtype", "float32", "-o", MERGED)
    in_place = run("merge", RESIDUAL, "--adapter", ADAPTER, "-o", "demo-output/merged-residual")

    report(
        [
            Station("base model", MODEL),
            Station("residual alone", RESIDUAL),
            Station("residual + corda_init", RESIDUAL, RESIDUAL, "corda_init", "base model", decomposed),
            Station("residual + trained adapter", RESIDUAL, ADAPTER),
            Station("base + converted LoRA", MODEL, LORA, None, "residual + trained adapter", converted),
            Station("merged into the base", MERGED, agrees_with="base + converted LoRA", receipt=merged),
            Station(
                "merged into the residual",
                "demo-output/merged-residual",
                agrees_with="residual + trained adapter",
                receipt=in_place,
            ),
        ]
    )


def run(*arguments: str) -> dict[str, Any]:
    """Runs a command of corda-convert from the repository's root, shows it, and returns its receipt."""
    print(f"   $ corda-convert {' '.join(arguments)}")
    command = [sys.executable, "-m", "corda_convert", *arguments, "--json"]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(finished.returncode)
    receipt: dict[str, Any] = json.loads(finished.stdout)
    counted = ", ".join(f"{count} {action}" for action, count in receipt["summary"]["tensors"].items())
    print(f"     {counted} tensors in {receipt['run']['seconds']:.2f} s\n")
    return receipt


def samples(name: str) -> list[str]:
    """The conversations of a data file, in the model's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    rows = [json.loads(line) for line in (FIXTURES / "data" / name).read_text(encoding="utf-8").splitlines()]
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
            tokenize=False,
        )
        for row in rows
    ]


def batches(texts: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches; padding has no label."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    for begin in range(0, len(texts), ROWS):
        batch = tokenizer(
            list(texts[begin : begin + ROWS]), return_tensors="pt", padding=True, add_special_tokens=False
        )
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        yield {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def train() -> None:
    """A short PEFT training of `corda_init`, exactly as a user writes it."""
    begun = time.perf_counter()
    residual = AutoModelForCausalLM.from_pretrained(ROOT / RESIDUAL, dtype=torch.float32)
    model = PeftModel.from_pretrained(residual, str(ROOT / RESIDUAL), subfolder="corda_init", is_trainable=True)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    texts, shuffler, losses = samples("task.train.jsonl"), random.Random(0), []
    while len(losses) < STEPS:
        shuffler.shuffle(texts)
        for batch in batches(texts):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            if len(losses) == STEPS:
                break
    model.save_pretrained(ROOT / ADAPTER)
    seconds = time.perf_counter() - begun
    print(f"     {STEPS} steps in {seconds:.1f} s: loss {losses[0]:.2f} → {sum(losses[-10:]) / 10:.2f}\n")


def perplexity(model: torch.nn.Module, name: str) -> float:
    """exp of the mean loss over the tokens of a data file."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches(samples(name)):
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * tokens
            count += tokens
    return math.exp(total / count)


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of a fixed batch of both kinds of text, without the padding."""
    texts = samples("knowledge.eval.jsonl")[:8] + samples("task.eval.jsonl")[:8]
    (batch,) = batches(texts)
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return output[batch["attention_mask"].bool()]


def report(stations: list[Station]) -> None:
    """Measures every station and prints the table."""
    print("5. Load every station with transformers and PEFT in float32, and compare.\n")
    columns = f"{'station':<28}{'knowledge':>10}{'task':>9}{'max |Δlogit|':>14}  {'against':<28}"
    header = f"{columns}{'bytes':>11}{'seconds':>9}{'peak MB':>9}"
    print(f"{'':<28}{'perplexity, held out':>19}\n{header}\n{'-' * len(header)}")
    known: dict[str, torch.Tensor] = {}
    for station in stations:
        model = station.load()
        known[station.name] = logits(model)
        difference = ""
        if station.agrees_with is not None:
            difference = f"{float((known[station.name] - known[station.agrees_with]).abs().max()):.1e}"
        cost = ""
        if station.receipt:
            nbytes = sum(file["bytes"] for file in station.receipt["files"])
            used = station.receipt["run"]
            cost = f"{nbytes:>11,}{used['seconds']:>9.2f}{used['peak_memory_bytes'] / 1e6:>9.0f}"
        scores = [perplexity(model, f"{name}.eval.jsonl") for name in ("knowledge", "task")]
        against = station.agrees_with or ""
        print(f"{station.name:<28}{scores[0]:>10.2f}{scores[1]:>9.2f}{difference:>14}  {against:<28}{cost}")
    largest = max(float(values.abs().max()) for values in known.values())
    print(
        f"\nLogits reach {largest:.1f} in magnitude. The outputs are in demo-output/, each with its receipt "
        "(corda_convert.json)."
    )


if __name__ == "__main__":
    main()
