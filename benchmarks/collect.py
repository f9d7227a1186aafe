"""Collecting covariances: `corda-convert collect` against PEFT's own, on the same model and samples. See README.md.

python benchmarks/collect.py
python benchmarks/collect.py --shape llama-2-7b --layers 4
python benchmarks/collect.py --device cuda --shape llama-2-7b --samples 256
"""

from __future__ import annotations

import argparse
import json
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

HEADER = ("", "whole program s", "collection s", "peak RSS MB", "peak GPU MB", "largest error")


def main() -> None:
    arguments = _arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    tokens = str(arguments.samples * arguments.seq_len)
    made = run_helper("collect_inputs.py", arguments.work, arguments.shape, arguments.layers, tokens)
    folder = Path(made["model"]).parent
    read_once(sorted(Path(made["model"]).glob("*.safetensors")))
    outputs = {"ours": folder / "ours.safetensors", "peft": folder / "peft" / "cov.pt"}
    commands = {"ours": _ours(made, outputs["ours"], arguments), "peft": _peft(made, outputs["peft"], arguments)}
    runs: dict[str, list[tuple[Measurement, dict[str, Any]]]] = {"ours": [], "peft": []}
    for number in range(arguments.repeat):
        for who in runs:
            note(f"run {number + 1} of {arguments.repeat}: {who}")
            log = arguments.work / f"collect-{who}.log"
            measured = measure(commands[who], log=log)
            runs[who].append((measured, _told(log.read_text())))
    errors: dict[str, float] = {}
    if not arguments.no_error:
        note("float64")
        common = (str(arguments.samples), str(arguments.seq_len), *map(str, outputs.values()), arguments.device)
        errors = run_helper("collect_error.py", made["model"], made["text"], *common)
    names = {"ours": "`corda-convert collect`", "peft": "PEFT, load, `calib_cov_distribution`, save"}
    print(markdown_table(HEADER, [_row(names[who], runs[who], errors.get(who)) for who in runs]))
    print()
    facts = machine(arguments.device)
    print(machine_line(facts))
    save_json(arguments.json, {"machine": facts, "runs": runs, "errors": errors})


def _row(name: str, runs: list[tuple[Measurement, dict[str, Any]]], error: float | None) -> tuple[str, ...]:
    device = max((told["peak_device_memory_bytes"] or 0) for _, told in runs)
    return (
        name,
        spread([measured.wall_seconds for measured, _ in runs]),
        spread([told["seconds"] for _, told in runs]),
        f"{max(measured.peak_rss_bytes for measured, _ in runs) / 1e6:,.0f}",
        f"{device / 1e6:,.0f}" if device else "–",
        "–" if error is None else f"{error:.1e}",
    )


def _told(text: str) -> dict[str, Any]:
    """What the program printed last: an object, of ours the receipt."""
    told = dict(json.loads(text[text.index("{") :] if "\n{\n" in f"\n{text}" else text.strip().splitlines()[-1]))
    return dict(told.get("run", told))


def _ours(made: dict[str, str], output: Path, arguments: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "corda_convert", "collect", made["model"], "--data", made["text"], "--json", "-q"]
    command += ["--samples", str(arguments.samples), "--seq-len", str(arguments.seq_len)]
    command += ["--batch-tokens", str(arguments.seq_len), "--device", arguments.device, "--overwrite"]
    return [*command, "-o", str(output)]


def _peft(made: dict[str, str], output: Path, arguments: argparse.Namespace) -> list[str]:
    numbers = [str(arguments.samples), str(arguments.seq_len)]
    script = str(HERE / "collect_peft.py")
    return [sys.executable, script, made["model"], made["text"], *numbers, str(output), arguments.device]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=("small", "tinyllama", "llama-2-7b"))
    parser.add_argument("--layers", type=int, default=0, help="so many layers of that shape (default: all)")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--no-error", action="store_true", help="do not compare with float64")
    parser.add_argument("--json", type=Path, help="keep the raw numbers here")
    parser.add_argument("--work", type=Path, default=HERE / "work")
    return parser.parse_args()


if __name__ == "__main__":
    main()
