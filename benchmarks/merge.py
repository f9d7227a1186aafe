"""Merging a LoRA adapter: `corda-convert merge` against its rivals and against copying the model. See README.md.

python benchmarks/merge.py
python benchmarks/merge.py --peers ~/venvs/peers/bin/python
python benchmarks/merge.py --sizes 2,4,8 --tensor 4
python benchmarks/merge.py --timeline docs/merge-timeline.svg
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timeline
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
    "ours": "corda-convert merge",
    "peft": "PEFT merge_and_unload",
    "axolotl": "axolotl, shard by shard",
    "mergekit": "mergekit model+adapter",
    "cp": "cp -r of the model",
}
PEERS = ("axolotl", "mergekit")
"""Contenders that need a package of their own name, in the environment of `--peers`."""

SHAPES = ("tinyllama", "llama-2-7b", "large-tensor")
Runs = dict[str, list[Measurement]]
Result = dict[str, Any]


def our_arguments(model: Path, adapter: Path, output: Path, device: str) -> list[str]:
    """Those of `corda-convert`."""
    return ["merge", str(model), "--adapter", str(adapter), "-o", str(output), "--device", device, "-q"]


def command(contender: str, model: Path, adapter: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    """What is timed: a whole program from its start to its end."""
    folders = (str(model), str(adapter), str(output))
    if contender == "cp":
        return ["cp", "-r", str(model), str(output)]
    if contender == "peft":
        return [sys.executable, str(HERE / "peft_merge.py"), *folders, arguments.device]
    if contender == "axolotl":
        return [arguments.peers, str(HERE / "axolotl_merge.py"), *folders, arguments.device]
    if contender == "mergekit":
        program = [arguments.peers, str(HERE / "mergekit_merge.py")]
        return [*program, *folders, arguments.device, str(_cache(output))]
    return [sys.executable, "-m", "corda_convert", *our_arguments(model, adapter, output, arguments.device)]


def _cache(output: Path) -> Path:
    """Where mergekit keeps the model that it merges with PEFT first."""
    return output.with_name(f"{output.name}-cache")


def _remove(outputs: Iterable[Path]) -> None:
    for output in outputs:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(_cache(output), ignore_errors=True)


def run_once(contender: str, model: Path, adapter: Path, output: Path, arguments: argparse.Namespace) -> Measurement:
    """One measured run. The output is new, and stays for the caller to remove."""
    _remove([output])
    line = command(contender, model, adapter, output, arguments)
    if arguments.disk:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    result = measure(line, log=arguments.work / f"{contender}.log")
    if arguments.disk:
        begun = time.perf_counter()
        os.sync()
        result = replace(result, wall_seconds=result.wall_seconds + time.perf_counter() - begun)
    shutil.rmtree(_cache(output), ignore_errors=True)
    note(f"  {contender}: {result.wall_seconds:.2f} s, {result.peak_rss_bytes / 1e6:.0f} MB")
    return result


def inputs(gigabytes: float, shape: str, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """The model and the adapter, made if need be, and read once."""
    note(f"inputs: {shape}, {gigabytes:g} GB …")
    made = run_helper("make_checkpoint.py", arguments.work, str(gigabytes), arguments.targets, shape)
    model, adapter = Path(made["model"]), Path(made["adapter"])
    read_once(sorted(file for folder in (model, adapter) for file in folder.iterdir()))
    return model, adapter


def model_bytes(model: Path) -> int:
    return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def largest_tensor_bytes(model: Path) -> int:
    """From the headers."""
    largest = 0
    for file in model.glob("*.safetensors"):
        with file.open("rb") as source:
            header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header.pop("__metadata__", None)
        largest = max(largest, *(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values()))
    return largest


def race(model: Path, adapter: Path, contenders: list[str], arguments: argparse.Namespace) -> tuple[Runs, Result]:
    """Every contender `--repeat` times in turn, and once a comparison of what they wrote."""
    runs: Runs = {contender: [] for contender in contenders}
    outputs = {contender: arguments.work / f"output-{contender}" for contender in runs}
    for turn in range(arguments.repeat):
        note(f"turn {turn + 1} of {arguments.repeat}")
        compares = arguments.compare and turn == arguments.repeat - 1
        for contender, output in outputs.items():
            runs[contender].append(run_once(contender, model, adapter, output, arguments))
            if contender == "cp" or not compares:
                _remove([output])
    written = {contender: output for contender, output in outputs.items() if output.exists()}
    compared = compare(model, adapter, written, arguments.device) if written else {}
    _remove(outputs.values())
    return runs, compared


def compare(model: Path, adapter: Path, outputs: dict[str, Path], device: str) -> Result:
    """Every output against PEFT's bit for bit, and against a float64 computation."""
    note("comparing the outputs …")
    errors = run_helper("merge_error.py", model, adapter, device, *outputs.values())
    found: Result = {contender: {"error": errors[str(output)]} for contender, output in outputs.items()}
    if "peft" in outputs:
        for contender in outputs.keys() - {"peft"}:
            found[contender]["against_peft"] = run_helper("compare_models.py", outputs[contender], outputs["peft"])
    return found


def race_table(runs: Runs) -> str:
    medians = {name: statistics.median(run.wall_seconds for run in results) for name, results in runs.items()}
    rows = []
    for contender, results in runs.items():
        rows.append(
            [
                CONTENDERS[contender],
                spread([run.wall_seconds for run in results]),
                f"{statistics.median(run.cpu_seconds for run in results):.2f}",
                f"{max(run.peak_rss_bytes for run in results) / 1e6:,.0f}",
                f"{max(run.peak_anonymous_bytes for run in results) / 1e6:,.0f}",
                *(f"{medians[contender] / medians[unit]:.2f}" if unit in medians else "" for unit in ("ours", "cp")),
            ]
        )
    header = ["Contender", "Wall s, median (min–max)", "CPU s", "Peak RSS MB", "Of it anonymous MB"]
    return markdown_table([*header, "Wall / ours", "Wall / cp -r"], rows)


def compared_table(compared: Result) -> str:
    rows = []
    for contender, found in compared.items():
        error, bits = found["error"], found.get("against_peft")
        rows.append(
            [
                CONTENDERS[contender],
                f"{bits['differing_elements']:,} of {bits['elements']:,}" if bits else "",
                f"{error['mean']:.4f}",
                f"{error['largest']:.1f}",
                f"{error['beyond_half']:,} of {error['elements']:,}",
                f"{error['other_copied_tensors']}",
            ]
        )
    header = ["Output of", "Elements unlike PEFT's", "Mean error, ulps", "Largest error, ulps"]
    return markdown_table([*header, "Folded elements off by more than ½ ulp", "Copied tensors changed"], rows)


def unlike(compared: Result) -> Iterable[str]:
    """Tensors that an output has and PEFT's has not, or the other way round."""
    for contender, found in compared.items():
        for key, meaning in (("in_one_only", "in one of the two only"), ("other_type_or_shape", "of another type")):
            names = found.get("against_peft", {}).get(key)
            if names:
                yield f"{CONTENDERS[contender]} and PEFT: tensors {meaning}: {', '.join(names)}."


def by_size(arguments: argparse.Namespace) -> tuple[str, Result]:
    """Ours alone, at several sizes of the model and of its largest tensor: the table and the raw numbers."""
    rows, raw = [], {}
    models = [(size, arguments.shape) for size in arguments.sizes]
    models += [(size, "large-tensor") for size in arguments.tensor]
    for gigabytes, shape in models:
        model, adapter = inputs(gigabytes, shape, arguments)
        output = arguments.work / "output-ours"
        results = [run_once("ours", model, adapter, output, arguments) for _ in range(arguments.repeat)]
        _remove([output])
        size, largest = model_bytes(model), largest_tensor_bytes(model)
        rows.append(
            [
                f"{size / 1e9:.2f}",
                f"{largest / 1e9:.2f}",
                spread([run.wall_seconds for run in results]),
                f"{max(run.peak_rss_bytes for run in results) / 1e6:,.0f}",
                f"{max(run.peak_anonymous_bytes for run in results) / 1e6:,.0f}",
            ]
        )
        raw[model.name] = {"bytes": size, "largest_tensor_bytes": largest, "runs": results}
    header = ["Model GB", "Largest tensor GB", "Wall s, median (min–max)", "Peak RSS MB", "Of it anonymous MB"]
    return markdown_table(header, rows), raw


def traced(model: Path, adapter: Path, arguments: argparse.Namespace, facts: dict[str, Any]) -> tuple[str, Result]:
    """One run of ours with a record of its threads: draws the picture; the table and the record."""
    output, record = arguments.work / "output-ours", arguments.work / "trace.json"
    _remove([output])
    os.sync()
    program = [str(HERE / "merge_traced.py"), repr(time.perf_counter()), str(record)]
    measure(
        [sys.executable, *program, *our_arguments(model, adapter, output, arguments.device)],
        log=arguments.work / "ours.log",
    )
    _remove([output])
    trace = json.loads(record.read_text())
    title = f"corda-convert merge, {model_bytes(model) / 1e9:.2f} GB, {facts['cores']} cores"
    arguments.timeline.write_text(timeline.svg(trace, facts["cores"], title))
    return timeline.text(trace, facts["cores"]), trace


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.1, help="size of the model (2.1; 13.5 for llama-2-7b)")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama", help="shape of the model (tinyllama)")
    parser.add_argument("--sizes", type=_numbers, default=[], help="run only ours, at these sizes in GB: 2,4,8")
    parser.add_argument("--tensor", type=_numbers, default=[], help="run only ours, with tensors of so many GB: 4")
    parser.add_argument(
        "--timeline", type=Path, metavar="SVG", help="run only ours, once, and draw when its threads work"
    )
    parser.add_argument("--targets", choices=("all", "attention"), default="all", help="modules of the adapter")
    parser.add_argument("--only", type=_contenders, default=list(CONTENDERS), help="contenders: ours,peft,cp")
    parser.add_argument(
        "--peers",
        default=os.environ.get("CORDA_BENCHMARK_PEERS", sys.executable),
        metavar="PYTHON",
        help="interpreter of the environment with axolotl and mergekit (CORDA_BENCHMARK_PEERS, or this one)",
    )
    parser.add_argument("--repeat", type=int, default=5, help="runs of each contender (5)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda, for all but cp")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="do not compare the outputs")
    parser.add_argument("--disk", action="store_true", help="from disk to disk: cold page cache, flushed output (root)")
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
    raw: Result = {"targets": arguments.targets, "device": arguments.device}
    if arguments.sizes or arguments.tensor:
        raw["machine"] = machine(arguments.device)
        table, raw["sizes"] = by_size(arguments)
        print(table)
    else:
        one_model(arguments, raw)
    print(f"\n{machine_line(raw['machine'])}")
    save_json(arguments.json, raw)


def one_model(arguments: argparse.Namespace, raw: Result) -> None:
    """The race, or the timeline of ours. Adds to the raw numbers."""
    wanted = [] if arguments.timeline else arguments.only
    peers = {peer: installed_version(arguments.peers, peer) for peer in PEERS if peer in wanted}
    absent = [peer for peer, version in peers.items() if version is None]
    raw["machine"] = machine(arguments.device, {peer: text for peer, text in peers.items() if text is not None})
    model, adapter = inputs(arguments.gigabytes, arguments.shape, arguments)
    raw["bytes"] = model_bytes(model)
    if arguments.timeline:
        table, raw["trace"] = traced(model, adapter, arguments, raw["machine"])
        print(table)
    else:
        runs, compared = race(model, adapter, [name for name in wanted if name not in absent], arguments)
        raw |= {"runs": runs, "compared": compared}
        print(race_table(runs))
        for peer in absent:
            print(
                f"\nLeft out: {peer}, which is not installed for {arguments.peers}. How to get it: README.md, Rivals."
            )
        if compared:
            print(f"\n{compared_table(compared)}")
        for line in unlike(compared):
            print(f"\n{line}")
    print(f"\nModel of {raw['bytes'] / 1e9:.2f} GB, adapter {adapter.name}, device {arguments.device}.")


if __name__ == "__main__":
    main()
