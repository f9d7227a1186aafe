"""What `collect` says when it is done, or planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def describe(receipt: Mapping[str, Any], output: Path) -> str:
    """A few lines for the user."""
    text = receipt.get("data")
    lines = [] if text is None else [f"  text     {text['description']}, {text['tokens']:,} tokens"]
    if "plan" in receipt:
        return "\n".join([f"Would write {output}", *lines, *_planned(receipt["plan"])])
    (inputs,) = receipt["summary"]["tensors"].values()
    lines.append(f"  inputs   {inputs:,} distinct ones of {inputs + len(receipt['aliases']):,} modules")
    files = [file for file in receipt["files"] if file["name"].endswith(".safetensors")]
    nbytes = sum(file["bytes"] for file in files)
    lines.append(f"  size     {_size(nbytes)}" + (f" in {len(files)} files" if len(files) > 1 else ""))
    lines.append(f"  next     corda-convert decompose MODEL --cov {output} --mode kpm --rank RANK -o OUT")
    return "\n".join([f"Wrote {output}", *lines])


def _planned(plan: Mapping[str, Any]) -> list[str]:
    device, host, disk = (plan.get(f"{place}_bytes", {}) for place in ("device", "host", "disk"))
    places = (("device", device), ("memory", host), ("disk", disk))
    lines = [f"  modules  {plan['modules']:,}"]
    for place, sizes in places:
        parts = [f"{name.replace('_', ' ')} {_size(nbytes)}" for name, nbytes in sizes.items() if nbytes]
        if parts:
            lines.append(f"  {place:<8} {', '.join(parts)}")
    return lines


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
