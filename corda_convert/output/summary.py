"""A receipt in a few lines for a person."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import fsum, sqrt
from pathlib import Path
from typing import Any


def describe(receipt: Mapping[str, Any], output: Path) -> str:
    """What was done, what it cost, where it is."""
    run, summary = receipt["run"], receipt["summary"]
    nbytes = sum(file["bytes"] for file in receipt["files"])
    lines = [f"{_headline(receipt)} → {output}"]
    counted = ", ".join(f"{count} {action}" for action, count in summary["tensors"].items())
    lines.append(f"  tensors  {counted}")
    lines += _details(receipt, output)
    lines.append(f"  wrote    {len(receipt['files'])} files, {size(nbytes)}, in {run['seconds']:.1f} s")
    streamed = receipt.get("streamed_to")
    if streamed:
        lines.append(f"  of them  {len(streamed['files'])} are on the Hub only, in {streamed['repo_id']}")
    device = run["peak_device_memory_bytes"]
    memory = f"  memory   {size(run['peak_memory_bytes'])} at the peak"
    lines.append(memory + (f", {size(device)} on {run['device']}" if device else f", on {run['device']}"))
    lines.append("  receipt  corda_convert.json")
    if receipt["options"].get("write_cache"):
        lines.append(f"  cache    {receipt['options']['write_cache']}, for PEFT's preprocess_corda")
    if receipt["options"].get("no_residual"):
        lines.append(f"  next     corda-convert merge MODEL --subtract {output} makes the residual")
    return "\n".join(lines)


def describe_plan(receipt: Mapping[str, Any], output: Path) -> str:
    """What a dry run found."""
    plan = receipt["plan"]
    counted = ", ".join(f"{count} {action}" for action, count in plan["tensors"].items())
    return "\n".join(
        [
            f"Would {_headline(receipt, done=False)} → {output} (dry run: all checks passed, nothing was written)",
            f"  tensors  {counted}",
            *_details(receipt, output),
            f"  read     {size(plan['read_bytes'])}",
            f"  write    {size(plan['write_bytes'])}",
            f"  memory   {size(plan['memory_bytes'])} at most, of which {size(plan['buffer_bytes'])} buffers and workspace; "
            f"the largest step is {plan['worst_step'] or 'a copy'}",
        ]
    )


def describe_tensors(receipt: Mapping[str, Any]) -> str:
    """One line for each tensor that was changed."""
    lines = []
    for entry in receipt["tensors"]:
        if entry["action"] == "copied" or "with" in entry:
            continue
        text = f"{entry['action']:<12} {entry['name']}"
        if entry.get("weight_norm"):
            text += f"  ‖Δ‖/‖W‖ {entry['delta_norm'] / entry['weight_norm']:.2e}"
        if entry.get("rounding_loss"):
            text += f"  rounding {entry['rounding_loss']:.1%} of Δ"
        if "certificate" in entry:
            text += f"  residual {entry['certificate']['residual']:.1e}"
        lines.append(text)
    return "\n".join(lines)


def size(nbytes: int) -> str:
    """Bytes in decimal units, as disks and hubs count them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:,.2f} {unit}" if unit == "GB" else f"{nbytes / scale:,.1f} {unit}"
    return f"{nbytes} B"


def _headline(receipt: Mapping[str, Any], *, done: bool = True) -> str:
    options = receipt["options"]
    if receipt["command"] == "merge":
        if options.get("subtract"):
            return f"{'Subtracted' if done else 'subtract'} {options['subtract']} from {options['model']}"
        if "decomposed" in receipt:
            return f"{'Merged' if done else 'merge'} the decomposed layers of {options['model']}"
        into = f"{_list(options['adapters'])} into {options['model']}"
        beside = [*options["init"], *([options["residual"]] if options["residual"] else [])]
        return f"{'Merged' if done else 'merge'} {into}" + (f" with {_list(beside)}" if beside else "")
    if receipt["command"] == "decompose":
        if options.get("truncate") is not None:
            how = f"{options['method']}, without the {options['truncate']} smallest components"
            return f"{'Truncated' if done else 'truncate'} {options['model']} ({how})"
        budget = options.get("rank_budget")
        size_of = f"rank {options['rank']}" if budget is None else f"{budget:,} parameters"
        how = f"{options['method']}, {options['mode']}, {size_of}"
        return f"{'Decomposed' if done else 'decompose'} {options['model']} ({how})"
    if options.get("from_checkpoints"):
        before, after = options["from_checkpoints"]
        return f"{'Extracted' if done else 'extract'} a LoRA from {after} − {before}"
    beside = [*options["init"], *([options["residual"]] if options["residual"] else [])]
    text = f"{'Converted' if done else 'convert'} {_list(options['adapters'])}"
    return text + (f" with {_list(beside)}" if beside else "") + " to LoRA"


def _details(receipt: Mapping[str, Any], output: Path) -> list[str]:
    adapters = receipt.get("adapters", ())
    lines = [f"  adapter  {_adapter(adapter, is_alone=len(adapters) == 1)}" for adapter in adapters]
    if "decomposed" in receipt:
        decomposed = receipt["decomposed"]
        lines.append(f"  adapter  in the model, {decomposed['modules']} modules, rank {_list(decomposed['ranks'])}")
    if receipt.get("order_matters"):
        lines.append(
            "  order    as given: a change depends on the weight that it is made to, or every result is rounded"
        )
    vocabulary = receipt.get("vocabulary")
    if vocabulary:
        lines.append(f"  vocab    {vocabulary['before']} → {vocabulary['after']}")
    lines += [f"  untied   {_list(untied['parameters'])}" for untied in receipt.get("untied", ())]
    covariances = receipt.get("covariances")
    if covariances:
        known = [f"{covariances[key]} {key}" for key in ("samples", "tokens") if covariances.get(key)]
        lines.append(f"  covs     {covariances['matrices']} matrices" + (f" from {', '.join(known)}" if known else ""))
    lines += _rank_budget(receipt.get("rank_budget"))
    lines += _decomposition(
        [entry for entry in receipt.get("tensors", ()) if "taken_share" in entry], str(receipt["options"].get("method"))
    )
    if receipt["command"] == "to-lora":
        baked = ", scaling baked into lora_B" if receipt["scaling_baked_in"] else ""
        ranks = _list(receipt["ranks"]) if len(receipt["ranks"]) > 1 else str(receipt["rank"])
        lines.append(
            f"  LoRA     rank {ranks}, alpha {'the rank' if ',' in ranks else format(receipt['alpha'], 'g')}{baked}"
        )
        lines += _reduction(receipt.get("tensors", ()))
        served = receipt.get("served", {})
        lines += [f"  mended   {what}" for what in served.get("mended", ())]
        lines += [f"  serve    {_with_path(command, output)}" for command in served.get("command", ())]
        lines += [f"  depends  {what}" for what in served.get("depends", ())]
    summary = receipt.get("summary", {})
    if summary.get("weight_norm"):
        text = f"  change   ‖ΔW‖/‖W‖ {summary['delta_norm'] / summary['weight_norm']:.2e}"
        if summary.get("rounding_norm"):
            text += f", rounding {summary['rounding_norm'] / summary['weight_norm']:.1e}"
            if summary["delta_norm"]:
                text += f", {summary['rounding_norm'] / summary['delta_norm']:.1%} of the change"
        lines.append(text)
    left = receipt.get("not_carried_over")
    if left:
        lines.append(f"  left     {_list(left)}: not carried over")
    return lines


def _with_path(command: str, output: Path) -> str:
    """A server's command with the adapter's folder in its place: the receipt names no path."""
    for word, text in (
        ("NAME=ADAPTER", shlex.quote(f"{output.name}={output}")),
        ('"ADAPTER"', json.dumps(str(output), ensure_ascii=False)),
        (" ADAPTER", f" {shlex.quote(str(output))}"),
    ):
        if word in command:
            return command.replace(word, text)
    return command


def _rank_budget(budget: Mapping[str, Any] | None) -> list[str]:
    """What a budget pays, and, once the ranks are chosen, what they took beside what equal ones would."""
    if budget is None:
        return []
    line = f"  budget   {budget['parameters']:,} parameters, rank {budget['uniform_rank']} everywhere"
    if "ranks" not in budget:
        return [line]
    ranks = budget["ranks"].values()
    return [
        f"{line}; spent {budget['spent']:,} on ranks {min(ranks)} to {max(ranks)}, which take "
        f"{_percent(budget['mean_share'])} on average where equal ones would {_percent(budget['mean_share_uniform'])}"
    ]


_WEIGHTED = {"corda": "W(C+λI)", "svd": "W", "asvd": "WS", "svd-llm": "WC^½"}
"""Of what the components are, by method."""


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _decomposition(layers: Sequence[Mapping[str, Any]], method: str) -> list[str]:
    """Ranks, shares and certificates of the decomposed layers, and those that needed another solver."""
    if not layers:
        return []
    ranks = sorted({layer["rank"] for layer in layers})
    shares = [layer["taken_share"] for layer in layers]
    worst = max(layers, key=lambda layer: layer["certificate"]["residual"])
    solvers = Counter(layer["solver"] for layer in layers)
    lines = [
        f"  modules  {len(layers)}, rank {_list(ranks)}; took {_percent(min(shares))} to {_percent(max(shares))} of "
        f"‖{_WEIGHTED[method]}‖²",
        f"  solver   {', '.join(f'{name} for {count}' for name, count in solvers.items())}; worst residual "
        f"{worst['certificate']['residual']:.1e}, of {worst['module']}",
    ]
    fallen = [layer for layer in layers if layer.get("fallback_from")]
    if fallen:
        named = [f"{layer['module']} ({' → '.join((*layer['fallback_from'], layer['solver']))})" for layer in fallen]
        lines.append(f"  fallback {_list(named)}")
    doubtful = [layer["module"] for layer in layers if not layer["certificate"]["holds"]]
    if doubtful:
        lines.append(f"  doubtful {_list(doubtful)}: the certificate does not hold")
    return lines


def _reduction(tensors: Iterable[Mapping[str, Any]]) -> list[str]:
    """What a lower rank lost, and what the rounding of a residual did."""
    reduced = [entry for entry in tensors if "relative_error" in entry]
    if not reduced:
        return []
    total = sqrt(fsum(entry["delta_norm"] ** 2 for entry in reduced))
    error = sqrt(fsum(entry["error"] ** 2 for entry in reduced))
    worst = max(reduced, key=lambda entry: float(entry["relative_error"]))
    lines = [
        f"  error    ‖ΔW − BA‖/‖ΔW‖ {error / total if total else 0.0:.2e}; most {worst['relative_error']:.2e}, of "
        f"{worst['module']}"
    ]
    weighted = [entry for entry in reduced if "relative_output_error" in entry]
    if weighted:
        worst = max(weighted, key=lambda entry: float(entry["relative_output_error"]))
        lines.append(f"  outputs  ‖(ΔW − BA) C^½‖ at most {worst['relative_output_error']:.2e}, of {worst['module']}")
    recovered = [entry["recovered"] for entry in reduced if "recovered" in entry]
    if recovered:
        lost = sqrt(fsum(each["error"] ** 2 for each in recovered))
        lines.append(
            f"  residual its rounding is {lost:.2e}, {_percent(lost / total if total else 0.0)} of ‖ΔW‖: s·B₀A₀ was taken "
            "from the difference of two models"
        )
    doubtful = [entry["module"] for entry in reduced if not entry.get("certificate", {}).get("holds", True)]
    if doubtful:
        lines.append(f"  doubtful {_list(doubtful)}: the certificate does not hold")
    return lines


def _adapter(adapter: Mapping[str, Any], *, is_alone: bool) -> str:
    text = f"{adapter['kind']}, {adapter['modules']} modules"
    if adapter["ranks"]:
        text += f", rank {_list(adapter['ranks'])}"
    if adapter["scalings"]:
        scalings = ", ".join(f"{value:g}" for value in adapter["scalings"])
        text += (f", alpha {adapter['alpha']:g}" if adapter["alpha"] is not None else "") + f", scaling {scalings}"
    if not is_alone:
        text = f"{adapter['name']} × {adapter['scale']:g}: {text}" + (
            f", with {adapter['init']}" if adapter["init"] else ""
        )
    elif adapter["scale"] != 1:
        text += f", × {adapter['scale']:g}"
    return text


def _list(values: list[Any], most: int = 6) -> str:
    text = ", ".join(str(value) for value in values[:most])
    return text + (f" and {len(values) - most} more" if len(values) > most else "")
