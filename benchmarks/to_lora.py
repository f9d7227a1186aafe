"""Converting to LoRA: `corda-convert to-lora` against PEFT's and mergekit's ways, and against copying. See README.md.

python benchmarks/to_lora.py --shape llama-2-7b --gigabytes 13.5
python benchmarks/to_lora.py --gigabytes 2 --peers ~/peers/bin/python
python benchmarks/to_lora.py --shape llama-2-7b --gigabytes 13.5 --parts residual --only ours,cp
python benchmarks/to_lora.py --shape llama-2-7b --gigabytes 13.5 --parts residual --only ours,cp --disk
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from measuring import (
    HERE,
    Measurement,
    installed_version,
    machine,
    machine_line,
    markdown_table,
    measure,
    note,
    read_once,
    run_helper,
    save_json,
    spread,
)

CONTENDERS = {
    "ours": "corda-convert to-lora",
    "peft": "PEFT",
    "mergekit": "mergekit-extract-lora",
    "cp": "cp of the adapters",
}
PARTS = {
    "residual": ("ours", "peft", "cp"),
    "reduced": ("ours", "peft"),
    "balance": ("ours", "peft"),
    "bat": ("ours", "peft"),
    "tuned": ("ours", "mergekit"),
}
"""What is converted, and who can do it."""

TITLES = {
    "residual": "A residual adapter and its initial one, rank 128 each",
    "reduced": "The same, to a rank of {rank}",
    "balance": "MiSS balance blocks of rank 64",
    "bat": "MiSS bat blocks of 64, to a rank of {rank}",
    "tuned": "A model and its fine-tune, to a rank of {rank}",
}
HEADER = (
    "Contender",
    "Wall s, median (min–max)",
    "CPU s",
    "Peak RSS MB",
    "Of it anonymous MB",
    "Wall / ours",
    "Wall / cp",
    "Rank",
    "Error",
)
Runs = dict[str, list[Measurement]]


def command(part: str, contender: str, made: dict[str, str], output: Path, arguments: argparse.Namespace) -> list[str]:
    """What is timed: a whole program from its start to its end."""
    rank = str(arguments.rank)
    ours = [sys.executable, "-m", "corda_convert", "to-lora", "-o", str(output), "-q", "--device", arguments.device]
    peft = [sys.executable, str(HERE / "peft_convert.py")]
    if part in ("residual", "reduced"):
        if contender == "cp":
            return ["cp", "-r", made["trained"], made["initial"], str(output)]
        if contender == "ours":
            lower = ["--rank", rank] if part == "reduced" else []
            return [*ours, made["trained"], "--init", made["initial"], "--base", "someone/base", *lower]
        if part == "residual":
            return [*peft, "residual", made["model"], made["trained"], str(output), made["initial"]]
        return [*peft, "convert", made["model"], made["converted"], str(output), rank]
    if part in ("balance", "bat"):
        if contender == "ours":
            return [*ours, made[part], "--base", made["model"], *(["--rank", rank] if part == "bat" else [])]
        return [*peft, "convert", made["model"], made[part], str(output), rank if part == "bat" else "64"]
    if contender == "ours":
        return [*ours, "--from-checkpoints", made["model"], made["tuned"], "--rank", rank]
    program = [arguments.peers, "-m", "mergekit.scripts.extract_lora", "--base-model", made["model"]]
    return [*program, "--model", made["tuned"], "--out-path", str(output), "--max-rank", rank, "--lazy-unpickle"]


def compete(part: str, contenders: Sequence[str], made: dict[str, str], arguments: argparse.Namespace) -> Runs:
    """Every contender `--repeat` times in turn, each in a fresh process. The last outputs stay."""
    runs: Runs = {contender: [] for contender in contenders}
    for _ in range(arguments.repeat):
        for contender, results in runs.items():
            output = place(part, contender, arguments)
            shutil.rmtree(output, ignore_errors=True)
            if contender == "cp":
                output.mkdir()
            line = command(part, contender, made, output, arguments)
            results.append(run_once(line, arguments.work / f"{part}-{contender}.log", is_cold=arguments.disk))
            note(f"  {part} {contender}: {results[-1].wall_seconds:.2f} s, {results[-1].peak_rss_bytes / 1e6:.0f} MB")
    return runs


def run_once(line: Sequence[str], log: Path, *, is_cold: bool) -> Measurement:
    """One measured run; where `is_cold`, nothing is in the page cache before it, and the clock stops with the flushing."""
    if is_cold:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    result = measure(line, log=log)
    if not is_cold:
        return result
    begun = time.perf_counter()
    os.sync()
    return replace(result, wall_seconds=result.wall_seconds + time.perf_counter() - begun)


def place(part: str, contender: str, arguments: argparse.Namespace) -> Path:
    found: Path = arguments.work / f"{part}-by-{contender}"
    return found


def judge(part: str, runs: Runs, made: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """The errors of the last outputs, by contender, over the first layer."""
    kind = "residual" if part == "reduced" else part
    source = made["trained"] if kind == "residual" else made[kind]
    outputs = {contender: str(place(part, contender, arguments)) for contender in runs if contender != "cp"}
    found = run_helper("to_lora_error.py", kind, made["model"], source, made["initial"], *outputs.values())
    return {contender: found[output] for contender, output in outputs.items()}


def rows(runs: Runs, errors: dict[str, Any]) -> list[list[str]]:
    ours, copying = _median(runs, "ours"), _median(runs, "cp")
    table = []
    for contender, results in runs.items():
        wall = [each.wall_seconds for each in results]
        error = errors.get(contender)
        table.append(
            [
                CONTENDERS[contender],
                spread(wall),
                f"{statistics.median(each.cpu_seconds for each in results):.2f}",
                f"{max(each.peak_rss_bytes for each in results) / 1e6:,.0f}",
                f"{max(each.peak_anonymous_bytes for each in results) / 1e6:,.0f}",
                f"{statistics.median(wall) / ours:.2f}" if ours else "",
                f"{statistics.median(wall) / copying:.2f}" if copying else "",
                ", ".join(map(str, error["ranks"])) if error else "",
                f"{error['worst']:.1e}" if error else "",
            ]
        )
    return table


def _median(runs: Runs, contender: str) -> float | None:
    return statistics.median(each.wall_seconds for each in runs[contender]) if contender in runs else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the model (2)")
    parser.add_argument("--shape", choices=("tinyllama", "llama-2-7b"), default="tinyllama", help="(tinyllama)")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=",".join(PARTS))
    parser.add_argument(
        "--only", type=lambda text: text.split(","), default=list(CONTENDERS), help=",".join(CONTENDERS)
    )
    parser.add_argument("--rank", type=int, default=64, help="where one is chosen (64)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender (3)")
    parser.add_argument("--disk", action="store_true", help="from disk to disk: cold page cache, flushed output (root)")
    parser.add_argument("--device", default="cpu", help="of ours: cpu (the default) or cuda")
    parser.add_argument("--peers", default=sys.executable, help="python of an environment with mergekit")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for inputs and outputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the raw numbers")
    return parser.parse_args()


def inputs(arguments: argparse.Namespace) -> dict[str, str]:
    """The folders, made if need be and read once. The adapters alone where nothing else is needed."""
    needs_model = "peft" in arguments.only or any(part in arguments.parts for part in ("balance", "bat", "tuned"))
    options = [] if needs_model else ["--without-model"]
    options += ["--tuned"] if "tuned" in arguments.parts else []
    made = run_helper("make_lora_inputs.py", arguments.work, str(arguments.gigabytes), arguments.shape, *options)
    if "reduced" in arguments.parts and "peft" in arguments.only:  # PEFT reduces a LoRA that was converted before
        made["converted"] = str(arguments.work / "converted")
        shutil.rmtree(made["converted"], ignore_errors=True)
        line = command("residual", "ours", made, Path(made["converted"]), arguments)
        measure(line, log=arguments.work / "converted.log")
    read_once(sorted(file for folder in made.values() for file in Path(folder).glob("*.safetensors")))
    return dict(made)


def main() -> None:
    """Prints a table for each part on stdout."""
    arguments = parse()
    arguments.work = arguments.work.resolve()  # mergekit takes a relative path for a name on the Hub
    arguments.work.mkdir(parents=True, exist_ok=True)
    mergekit = installed_version(arguments.peers, "mergekit")
    facts = machine(arguments.device, {} if mergekit is None else {"mergekit": mergekit})
    made = inputs(arguments)
    raw: dict[str, Any] = {}
    for part in arguments.parts:
        able = [contender for contender in PARTS[part] if contender in arguments.only]
        if mergekit is None and "mergekit" in able:
            able.remove("mergekit")
            note("mergekit is not there, and left out")
        runs = compete(part, able, made, arguments)
        errors = judge(part, runs, made, arguments)
        raw[part] = {"runs": runs, "errors": errors}
        print(f"{TITLES[part].format(rank=arguments.rank)}:\n\n{markdown_table(HEADER, rows(runs, errors))}\n")
        for contender in runs:
            shutil.rmtree(place(part, contender, arguments), ignore_errors=True)
    print(f"{arguments.shape}, {arguments.gigabytes:g} GB, device {arguments.device}. {machine_line(facts)}")
    save_json(arguments.json, {"machine": facts, "parts": raw})


if __name__ == "__main__":
    main()
