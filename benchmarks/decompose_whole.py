"""A whole checkpoint: `corda-convert decompose` against copying what it reads and writes. See README.md.

python benchmarks/decompose_whole.py
python benchmarks/decompose_whole.py --sizes 1,2 --repeat 1
python benchmarks/decompose_whole.py --device cuda --shape llama-2-7b --sizes 13.5
"""

from __future__ import annotations

import argparse
import json
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

HEADER = (
    "Model GB",
    "Read GB",
    "Written GB",
    "Mode",
    "Ours s",
    "Copies s",
    "Ours / copies",
    "Peak RSS MB",
    "Peak GPU MB",
    "Reading / computing / writing / hashing, busy s",
    "Other solvers than the first",
)
Result = dict[str, Any]


def decompose(made: dict[str, str], mode: str, output: Path, arguments: argparse.Namespace) -> Measurement:
    """Our program, from its start to its end."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "corda_convert", "decompose", made["model"], "--cov", made["covariances"]]
    command += ["--mode", mode, "--rank", str(arguments.rank), "--device", arguments.device, "-o", str(output), "-q"]
    return measure(command, log=arguments.work / "ours.log")


def copies(made: dict[str, str], output: Path, arguments: argparse.Namespace) -> Measurement:
    """Reading all inputs, and writing a copy of what ours wrote."""
    copy = output.with_name(f"{output.name}-copy")
    script = 'cat "$1"/*.safetensors "$2" > /dev/null && cp -r "$3" "$4"'
    arguments_of_script = ["sh", made["model"], made["covariances"], str(output), str(copy)]
    found = measure(["sh", "-c", script, *arguments_of_script], log=arguments.work / "copies.log")
    shutil.rmtree(copy)
    return found


def race(made: dict[str, str], mode: str, output: Path, arguments: argparse.Namespace) -> tuple[list[str], Result]:
    """Both in turn, and what the last receipt says."""
    ours: list[Measurement] = []
    plain: list[Measurement] = []
    for _ in range(arguments.repeat):
        ours.append(decompose(made, mode, output, arguments))
        plain.append(copies(made, output, arguments))
        note(f"  {mode}: {ours[-1].wall_seconds:.1f} s, copies {plain[-1].wall_seconds:.1f} s")
    receipt = json.loads((output / "corda_convert.json").read_text())
    sizes = [file.stat().st_size for file in (*Path(made["model"]).glob("*.safetensors"), Path(made["covariances"]))]
    written = sum(file.stat().st_size for file in output.rglob("*.safetensors"))
    run = receipt["run"]
    shutil.rmtree(output)
    wall, copied = ([each.wall_seconds for each in runs] for runs in (ours, plain))
    on_device = run["peak_device_memory_bytes"]
    fallbacks = sum(bool(tensor.get("fallback_from")) for tensor in receipt["tensors"])
    cells = [
        f"{sum(sizes[:-1]) / 1e9:.2f}",
        f"{sum(sizes) / 1e9:.2f}",
        f"{written / 1e9:.2f}",
        mode,
        spread(wall),
        spread(copied),
        f"{statistics.median(wall) / statistics.median(copied):.2f}",
        f"{max(each.peak_rss_bytes for each in ours) / 1e6:,.0f}",
        "–" if on_device is None else f"{on_device / 1e6:,.0f}",
        " / ".join(f"{run['busy_seconds'][stage]:.1f}" for stage in ("read", "compute", "write", "hash")),
        str(fallbacks),
    ]
    return cells, {"mode": mode, "ours": ours, "copies": plain, "run": run, "fallbacks": fallbacks}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tinyllama", "llama-2-7b"), default="tinyllama", help="shape (tinyllama)")
    parser.add_argument("--sizes", default="1", help="sizes of the model in GB (1): 1,2")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=["ipm", "kpm"], help="ipm,kpm")
    parser.add_argument("--rank", type=int, default=128, help="rank (128)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each (3)")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for inputs and outputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the raw numbers")
    return parser.parse_args()


def main() -> None:
    """Prints the table on stdout."""
    arguments = parse()
    arguments.work.mkdir(parents=True, exist_ok=True)
    facts = machine(arguments.device)
    rows: list[list[str]] = []
    raw: list[Result] = []
    for size in arguments.sizes.split(","):
        note(f"{size} GB")
        made = run_helper("make_checkpoint.py", arguments.work, size, "all", arguments.shape, "--covariances")
        read_once([*Path(made["model"]).glob("*.safetensors"), Path(made["covariances"])])
        for mode in arguments.modes:
            cells, result = race(made, mode, arguments.work / f"residual-{size}-{mode}", arguments)
            rows.append(cells)
            raw.append({"gigabytes": float(size), **result})
    print(markdown_table(HEADER, rows))
    print(f"\nShape {arguments.shape}, rank {arguments.rank}, device {arguments.device}. {machine_line(facts)}")
    save_json(arguments.json, {"machine": facts, "runs": raw})


if __name__ == "__main__":
    main()
