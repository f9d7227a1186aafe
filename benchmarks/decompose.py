"""Decomposing one layer: `corda-convert decompose` against PEFT's CorDA, for time, memory and accuracy. See README.md.

python benchmarks/decompose.py
python benchmarks/decompose.py --sizes 11008x4096 --repeat 1
python benchmarks/decompose.py --shape llama-2-7b
python benchmarks/decompose.py --device cuda
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from measuring import HERE, machine, machine_line, markdown_table, note, run_helper, save_json, spread

CONTENDERS = ("ours", "peft")
LLAMA_2_7B = {(4096, 4096): 4, (11008, 4096): 2, (4096, 11008): 1}
"""The linear layers of a decoder layer, and how many of each there are."""

HEADER = (
    "Size (out×in)",
    "Mode",
    "Ours s",
    "PEFT s",
    "PEFT / ours",
    "Ours: subspace error",
    "PEFT: subspace error",
    "Ours: error of s·B·A",
    "PEFT: error of s·B·A",
    "PEFT's damping",
    "Ours peak MB",
    "PEFT peak MB",
)
Result = dict[str, Any]


def compete(inputs: str, mode: str, arguments: argparse.Namespace) -> dict[str, list[Result]]:
    """Every contender `--repeat` times in turn, each in a fresh process."""
    runs: dict[str, list[Result]] = {contender: [] for contender in CONTENDERS}
    for _ in range(arguments.repeat):
        for contender, results in runs.items():
            factors = factors_file(contender, arguments)
            rank, device = str(arguments.rank), arguments.device
            results.append(run_helper("decompose_once.py", contender, inputs, mode, rank, device, factors))
            note(f"  {mode} {contender}: {results[-1]['seconds']:.2f} s, {results[-1]['peak_bytes'] / 1e6:.0f} MB")
    return runs


def factors_file(contender: str, arguments: argparse.Namespace) -> Path:
    """Where a contender's last factors lie."""
    found: Path = arguments.work / f"factors-{contender}.safetensors"
    return found


def judge(
    size: tuple[int, int], inputs: str, mode: str, damping: float, contender: str, arguments: argparse.Namespace
) -> Result:
    """The errors of a contender's last factors, against the reference with the damping it used."""
    shape = tuple(map(str, size))
    options = ("--rank", str(arguments.rank), "--damp", repr(damping), "--device", arguments.device)
    reference = run_helper("make_matrices.py", arguments.work, *shape, *options)["file"]
    factors = factors_file(contender, arguments)
    found = run_helper("decompose_error.py", factors, reference, inputs, mode)
    factors.unlink()
    return found


def row(size: tuple[int, int], mode: str, runs: dict[str, list[Result]], errors: dict[str, Result]) -> list[str]:
    seconds = {contender: [run["seconds"] for run in results] for contender, results in runs.items()}
    ratio = statistics.median(seconds["peft"]) / statistics.median(seconds["ours"])
    peaks = [max(run["peak_bytes"] for run in runs[contender]) for contender in CONTENDERS]
    return [
        f"{size[0]}×{size[1]}",
        mode,
        *(spread(seconds[contender]) for contender in CONTENDERS),
        f"{ratio:.2f}",
        *(f"{errors[contender]['subspace']:.1e}" for contender in CONTENDERS),
        *(f"{errors[contender]['product']:.1e}" for contender in CONTENDERS),
        f"{runs['peft'][-1]['damping_factor']:g}",
        *(f"{peak / 1e6:,.0f}" for peak in peaks),
    ]


def whole_layer(raw: list[Result], modes: list[str]) -> str:
    """Seconds of each contender over the linear layers of a decoder layer, and their ratio."""
    rows = []
    for mode in modes:
        seconds = {
            contender: sum(
                LLAMA_2_7B[layer["size"]] * statistics.median(run["seconds"] for run in layer["runs"][contender])
                for layer in raw
                if layer["mode"] == mode
            )
            for contender in CONTENDERS
        }
        rows.append([mode, *(f"{value:.2f}" for value in seconds.values()), f"{seconds['peft'] / seconds['ours']:.2f}"])
    return markdown_table(("A decoder layer", "Ours s", "PEFT s", "PEFT / ours"), rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [(1024, 1024), (2048, 2048), (4096, 4096)]
    parser.add_argument("--sizes", type=_sizes, default=sizes, help="N or OUTxIN, with commas (1024,2048,4096)")
    parser.add_argument(
        "--shape", choices=("llama-2-7b",), help="the seven linear layers of a decoder layer, and their sum"
    )
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["ipm", "kpm"], help="ipm,kpm")
    parser.add_argument("--rank", type=int, default=128, help="rank (128)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender (3)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for inputs and references")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the raw numbers")
    return parser.parse_args()


def _sizes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        d_out, _, d_in = part.partition("x")
        found.append((int(d_out), int(d_in or d_out)))
    return found


def main() -> None:
    """Prints the table on stdout."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    facts = machine(arguments.device)
    rows: list[list[str]] = []
    raw: list[Result] = []
    for size in arguments.sizes if arguments.shape is None else LLAMA_2_7B:
        note(f"{size[0]}×{size[1]}")
        inputs = run_helper("make_matrices.py", arguments.work, *map(str, size))["file"]
        for mode in arguments.modes:
            runs = compete(inputs, mode, arguments)
            dampings = {contender: runs[contender][-1]["damping_factor"] for contender in CONTENDERS}
            errors = {
                contender: judge(size, inputs, mode, dampings[contender], contender, arguments)
                for contender in CONTENDERS
            }
            rows.append(row(size, mode, runs, errors))
            raw.append({"size": size, "mode": mode, "runs": runs, "errors": errors})
    print(markdown_table(HEADER, rows))
    if arguments.shape is not None:
        print(f"\n{whole_layer(raw, arguments.modes)}")
    print(f"\nRank {arguments.rank}, device {arguments.device}. {machine_line(facts)}")
    save_json(arguments.json, {"machine": facts, "rank": arguments.rank, "device": arguments.device, "layers": raw})


if __name__ == "__main__":
    main()
