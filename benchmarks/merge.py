"""Merging a LoRA adapter: `corda-convert merge` against PEFT and against copying the model. See README.md.

python benchmarks/merge.py
python benchmarks/merge.py --sizes 2,4,8
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from measuring import (
    HERE,
    Measurement,
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
    "ours": "corda-convert merge",
    "peft": "PEFT merge_and_unload",
    "cp": "cp -r of the model",
}
Runs = dict[str, list[Measurement]]


def command(contender: str, model: Path, adapter: Path, output: Path, device: str) -> list[str]:
    """What is timed: a whole program from its start to its end."""
    if contender == "cp":
        return ["cp", "-r", str(model), str(output)]
    if contender == "peft":
        return [sys.executable, str(HERE / "peft_merge.py"), str(model), str(adapter), str(output), device]
    program = [sys.executable, "-m", "corda_convert", "merge", str(model), "--adapter", str(adapter)]
    return [*program, "-o", str(output), "--device", device, "-q"]


def run_once(contender: str, model: Path, adapter: Path, output: Path, arguments: argparse.Namespace) -> Measurement:
    """One measured run. The output is new, and stays for the caller to remove."""
    shutil.rmtree(output, ignore_errors=True)
    line = command(contender, model, adapter, output, arguments.device)
    result = measure(line, log=arguments.work / f"{contender}.log")
    note(f"  {contender}: {result.wall_seconds:.2f} s, {result.peak_rss_bytes / 1e6:.0f} MB")
    return result


def inputs(gigabytes: float, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The model and the adapter, made if need be, and read once."""
    note(f"inputs of about {gigabytes:g} GB …")
    made = run_helper("make_checkpoint.py", arguments.work, str(gigabytes), arguments.targets)
    model, adapter = Path(made["model"]), Path(made["adapter"])
    read_once(sorted(file for folder in (model, adapter) for file in folder.iterdir()))
    return model, adapter


def model_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def race(model: Path, adapter: Path, arguments: argparse.Namespace) -> tuple[Runs, dict[str, Any] | None]:
    """Every contender `--repeat` times in turn, and once a comparison of what ours and PEFT's wrote."""
    runs: Runs = {contender: [] for contender in arguments.only}
    compared = None
    for turn in range(arguments.repeat):
        note(f"turn {turn + 1} of {arguments.repeat}")
        outputs = {contender: arguments.work / f"output-{contender}" for contender in runs}
        compares = turn == arguments.repeat - 1 and {"ours", "peft"} <= runs.keys()
        for contender, output in outputs.items():
            runs[contender].append(run_once(contender, model, adapter, output, arguments))
            if not (compares and contender in ("ours", "peft")):
                shutil.rmtree(output)
        if compares:
            compared = run_helper("compare_models.py", outputs["ours"], outputs["peft"])
        for output in outputs.values():
            shutil.rmtree(output, ignore_errors=True)
    return runs, compared


def race_table(runs: Runs) -> str:
    ours = [run.wall_seconds for run in runs.get("ours", [])]
    rows = []
    for contender, results in runs.items():
        walls = [run.wall_seconds for run in results]
        ratio = f"{statistics.median(walls) / statistics.median(ours):.2f}" if ours else ""
        cpu = statistics.median(run.cpu_seconds for run in results)
        peak = max(run.peak_rss_bytes for run in results)
        rows.append([CONTENDERS[contender], spread(walls), f"{cpu:.2f}", f"{peak / 1e6:,.0f}", ratio])
    return markdown_table(
        ["Contender", "Wall s, median (min–max)", "CPU s", "Peak RSS MB", "Wall, as multiple of ours"], rows
    )


def compared_text(compared: dict[str, Any]) -> str:
    """What `compare_models.py` found, in words."""
    text = (
        f"Ours against PEFT's: {compared['differing_elements']:,} of {compared['elements']:,} elements differ in "
        f"{compared['tensors']} tensors; the largest difference is {compared['largest_difference_ulps']} bf16 ulps."
    )
    for key, meaning in (("in_one_only", "in one output only"), ("other_type_or_shape", "of another type or shape")):
        if compared[key]:
            text += f" Tensors {meaning}: {', '.join(compared[key])}."
    return text


def by_size(arguments: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Ours alone at several sizes: the table and the raw numbers."""
    rows, raw = [], {}
    for gigabytes in arguments.sizes:
        model, adapter = inputs(gigabytes, arguments)
        output = arguments.work / "output-ours"
        results = [run_once("ours", model, adapter, output, arguments) for _ in range(arguments.repeat)]
        shutil.rmtree(output)
        size = model_bytes(model)
        peak = max(run.peak_rss_bytes for run in results)
        rows.append([f"{size / 1e9:.2f}", spread([run.wall_seconds for run in results]), f"{peak / 1e6:,.0f}"])
        raw[model.name] = {"bytes": size, "runs": results}
    return markdown_table(["Model GB", "Wall s, median (min–max)", "Peak RSS MB"], rows), raw


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.1, help="size of the model (2.1)")
    parser.add_argument("--sizes", type=_numbers, help="run only ours, at these sizes in GB: 2,4,8")
    parser.add_argument("--targets", choices=("all", "attention"), default="all", help="modules of the adapter")
    parser.add_argument("--only", type=_contenders, default=list(CONTENDERS), help="contenders: ours,peft,cp")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each contender (5)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda, for ours and PEFT's")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for inputs and outputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the raw numbers")
    return parser.parse_args()


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",")]


def _contenders(text: str) -> list[str]:
    chosen = text.split(",")
    if not set(chosen) <= CONTENDERS.keys():
        raise argparse.ArgumentTypeError(f"contenders are {', '.join(CONTENDERS)}")
    return chosen


def main() -> None:
    """Prints the tables on stdout."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    facts = machine(arguments.device)
    raw: dict[str, Any] = {"machine": facts, "targets": arguments.targets, "device": arguments.device}
    if arguments.sizes:
        table, raw["sizes"] = by_size(arguments)
        print(table)
    else:
        model, adapter = inputs(arguments.gigabytes, arguments)
        runs, compared = race(model, adapter, arguments)
        raw |= {"bytes": model_bytes(model), "runs": runs, "compared": compared}
        print(race_table(runs))
        print(f"\nModel of {model_bytes(model) / 1e9:.2f} GB, adapter {adapter.name}, device {arguments.device}.")
        if compared:
            print(compared_text(compared))
    print(f"\n{machine_line(facts)}")
    save_json(arguments.json, raw)


if __name__ == "__main__":
    main()
