"""The CorDA paper in miniature, on the fixture model: its Figure 2, and the shape of its Table 1.

    python benchmarks/paper.py [truncation|tuning] [--seeds 5] [--figures docs] [--json FILE] [--work DIR]

`truncation` measures perplexity without the smallest components of each method, calibrated on the made-up facts, on other
questions about them and on English that the calibration did not see. `tuning` trains rank-8 adapters on the word problems,
each from its own beginning, with the same steps, rate and scaling: plain LoRA, PiSSA, and CorDA with the facts' covariances
(kpm) or the problems' (ipm). It measures the task that was learnt, the facts that were known before, and English.

What is finished is kept in the work folder, so an interrupted run is gone on with. Run it in the repository's root.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import HERE, machine, machine_line, markdown_table, note, save_json

from corda_convert import DecomposeOptions, RunOptions, decompose
from corda_convert.corpus import CorpusOptions
from corda_convert.operations.perplexity import PerplexityOptions
from corda_convert.operations.plot_truncation import plot_truncation
from corda_convert.operations.truncation import TruncationOptions, truncation_sweep
from corda_convert.plotting.pictures import STROKES, drawing, new_figure, save

FIXTURES = HERE.parent / "fixtures"
COVARIANCES = FIXTURES / "covariances"
TEMPLATE = "Question: {question} Answer: {answer}"

DISCARDED = (4, 8, 12, 16, 20, 24, 28, 32, 36)
"""The narrowest layers have 48 components."""

RANK = 8
TEXTS = ("task", "knowledge", "english")

BEGINNINGS: dict[str, DecomposeOptions | None] = {
    "LoRA": None,
    "PiSSA": DecomposeOptions(method="svd", mode="ipm", rank=RANK),
    "CorDA kpm": DecomposeOptions(mode="kpm", rank=RANK),
    "CorDA ipm": DecomposeOptions(mode="ipm", rank=RANK),
}
CALIBRATION = {"CorDA kpm": "knowledge", "CorDA ipm": "task"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="truncation, tuning; both by default")
    parser.add_argument("--seeds", type=int, default=5, help="how many runs of each kind are trained (5)")
    parser.add_argument("--steps", type=int, help="training steps, if not as many as the fixtures' adapters had")
    parser.add_argument("--figures", type=Path, help="folder for the pictures")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    parser.add_argument("--work", type=Path, default=HERE / "work" / "paper", help="folder for what is finished")
    options = parser.parse_args(arguments)
    stages = options.stages or ["truncation", "tuning"]
    if unknown := set(stages) - {"truncation", "tuning"}:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    options.work.mkdir(parents=True, exist_ok=True)
    raw: dict[str, Any] = {"machine": machine("cpu")}
    if "truncation" in stages:
        raw["truncation"] = truncation(options.work, options.figures)
    if "tuning" in stages:
        raw["tuning"] = tuning(options.work, options.seeds, options.steps, options.figures)
    print(machine_line(raw["machine"]))
    save_json(options.json, raw)


def truncation(work: Path, figures: Path | None) -> list[dict[str, Any]]:
    """Figure 2: a sweep on each text. Prints its tables."""
    knowledge, english = FIXTURES / "data" / "knowledge.eval.jsonl", FIXTURES / "data" / "english.eval.txt"
    texts = (CorpusOptions((knowledge,), (TEMPLATE,), pack=False), CorpusOptions((english,)))
    results = [_kept(work / f"truncation-{text.files[0].stem}.json", _sweep, text) for text in texts]
    for facts in results:
        rows = [
            [method, *(_number(each["perplexity"]) for each in facts["points"] if each["method"] == method)]
            for method in dict.fromkeys(each["method"] for each in facts["points"])
        ]
        whole = _number(facts["whole"]["perplexity"])
        print(f"Perplexity of {facts['text']} ({facts['whole']['tokens']:,} tokens), {whole} with nothing discarded:\n")
        print(markdown_table(["discarded", *map(str, DISCARDED)], rows) + "\n")
    if figures is not None:
        plot_truncation(results, outputs=[figures / "paper-truncation.svg"])
    return results


def _sweep(text: CorpusOptions) -> dict[str, Any]:
    note(f"truncation: {text.files[0].name}")
    return dict(
        truncation_sweep(
            FIXTURES / "model",
            text,
            covariances=COVARIANCES / "knowledge.safetensors",
            options=TruncationOptions(discarded=DISCARDED),
            measuring=PerplexityOptions(dtype="float32", device="cpu"),
        ).facts
    )


def tuning(work: Path, seeds: int, steps: int | None, figures: Path | None) -> dict[str, list[dict[str, float]]]:
    """Table 1's shape: each beginning trained with every seed. Prints the table."""
    sys.path.insert(0, str(FIXTURES))
    before = _kept(work / "tuning-before.json", _before)
    runs: dict[str, list[dict[str, float]]] = {}
    for name in BEGINNINGS:
        runs[name] = [tuned(name, seed, steps, work) for seed in range(1, seeds + 1)]
    columns = [*(f"{text}_perplexity" for text in TEXTS), "task_right", "knowledge_right", "last_loss"]
    header = ["beginning", *(column.replace("_", " ") for column in columns)]
    rows = [["before training", *(_number(before[column]) if column in before else "" for column in columns)]]
    rows += [[name, *(_mean([run[column] for run in found]) for column in columns)] for name, found in runs.items()]
    print(
        f"Mean ± standard deviation over {seeds} seeds, {next(iter(runs.values()))[0]['steps']:.0f} steps, rank {RANK}:\n"
    )
    print(markdown_table(header, rows) + "\n")
    if figures is not None:
        draw_tuning(runs, before, figures / "paper-tuning.svg")
    return {"before training": [before], **runs}


def tuned(name: str, seed: int, steps: int | None, work: Path) -> dict[str, float]:
    """What one training gave, from the work folder if it was done before."""
    file = work / f"tuning-{name.replace(' ', '-')}-{seed}-{steps or 'all'}.json"
    found: dict[str, float] = _kept(file, _tune, name, seed, steps, work)
    return found


def _before() -> dict[str, float]:
    import training

    note("the base model")
    return measured(training.load_model(FIXTURES / "model"))


def _tune(name: str, seed: int, steps: int | None, work: Path) -> dict[str, float]:
    """Trains one adapter as the fixtures' were, but for its beginning and its scaling of 1."""
    import training
    import tuning as fixture

    note(f"{name}, seed {seed}")
    training.set_up(seed)
    torch.set_num_threads(1)  # the matrices are too small for more
    model = beginning(name, work)
    tokenizer = training.load_tokenizer()
    batches = fixture.task_batches(tokenizer, training.read_samples(FIXTURES / "data" / "task.train.jsonl"), seed)
    count = steps or fixture.STEPS
    losses = training.optimise(model, batches, steps=count, rate=fixture.RATE, warmup=fixture.WARMUP, decay=0.0)
    return {"steps": count, "seed": seed, "last_loss": statistics.fmean(losses[-10:]), **measured(model)}


def beginning(name: str, work: Path) -> Any:
    """The model with its adapter before training, in float32."""
    import training
    from peft import LoraConfig, PeftModel, get_peft_model
    from tuning import LINEARS

    options = BEGINNINGS[name]
    if options is None:
        config = LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", target_modules=LINEARS)
        return get_peft_model(training.load_model(FIXTURES / "model"), config)
    folder = work / f"residual-{name.replace(' ', '-')}"
    if not folder.exists():
        covariances = COVARIANCES / f"{CALIBRATION[name]}.safetensors" if name in CALIBRATION else None
        run = RunOptions(device="cpu", dtype="float32")
        decompose(FIXTURES / "model", output=folder, options=options, covariances=covariances, run=run)
    residual = training.load_model(folder)
    return PeftModel.from_pretrained(residual, str(folder), subfolder="corda_init", is_trainable=True)


def measured(model: Any) -> dict[str, float]:
    """Perplexities of the held-out texts, and the share of questions whose greedy answer is right, word for word."""
    import math

    import training

    tokenizer = training.load_tokenizer()
    found = {
        f"{name}_perplexity": math.exp(training.token_losses(model, tokenizer, texts).mean().item())
        for name, texts in training.held_out_streams().items()
    }
    for name in ("task", "knowledge"):
        samples = training.read_samples(FIXTURES / "data" / f"{name}.eval.jsonl")
        found[f"{name}_right"] = right_answers(model, tokenizer, samples)
    return found


@torch.no_grad()
def right_answers(model: Any, tokenizer: Any, samples: Sequence[Any]) -> float:
    """A greedy answer is the expected one exactly if each of its tokens, and the end after it, is the likeliest given those
    before it: that needs one forward."""
    import training

    right = 0
    for start in range(0, len(samples), 40):
        chunk = samples[start : start + 40]
        batch = training.batch_of(tokenizer, [sample.text() for sample in chunk])
        likeliest = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(dim=-1)
        for row, sample in enumerate(chunk):
            begin = len(tokenizer(f"Question: {sample.question} Answer:")["input_ids"])
            end = int(batch["attention_mask"][row].sum())
            right += bool(torch.equal(likeliest[row, begin - 1 : end - 1], batch["input_ids"][row, begin:end]))
    return right / len(samples)


def draw_tuning(runs: dict[str, list[dict[str, float]]], before: dict[str, float], file: Path) -> None:
    """What was learnt against what was kept, a point for each seed: the best corner is at the lower left."""
    with drawing():
        figure, (axes,) = new_figure(1, 2, width=8.4, height=3.6)
        for ax, kept in zip(axes, ("knowledge", "english"), strict=True):
            for stroke, (name, found) in zip(STROKES, runs.items(), strict=False):
                ax.plot(
                    [run["task_perplexity"] for run in found],
                    [run[f"{kept}_perplexity"] for run in found],
                    linestyle="none",
                    marker=stroke.marker,
                    markersize=6,
                    color=stroke.color,
                    label=name,
                )
            ax.axhline(before[f"{kept}_perplexity"], color="#555555", linewidth=1, label="before training")
            ax.set_xlabel("perplexity of the task, learnt")
            ax.set_ylabel(f"perplexity of {kept}, known before")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        save(figure, [file])


def _kept(file: Path, make: Any, *arguments: Any) -> Any:
    """What the file holds, made first if it is not there."""
    if not file.exists():
        content = make(*arguments)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.4g}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3g} ± {statistics.stdev(values) if len(values) > 1 else 0:.2g}"


if __name__ == "__main__":
    main()
