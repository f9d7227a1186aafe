"""What `verify` found, in a few lines for a person."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corda_convert.output.summary import size

MOST_PROBLEMS = 50
_MOST_SKIPPED = 5

_FIGURES = {
    "orthonormality": "cosines up to {:.1e}",
    "certificate": "‖MMᵀu − σ²u‖ up to {:.1e} of σ₁²",
    "beyond_rank": "what is beyond the rank up to {:.2f} of the rounding",
    "relative_error": "relative error up to {:.2e}",
}
_HOW = {
    "exact": "in float64 by other code",
    "bits": "compared bit by bit",
    "again": "run again by the code that made them",
}


def describe(facts: Mapping[str, Any]) -> str:
    """The JSON object as lines."""
    problems = facts["problems"]
    count = len(problems)
    verdict = "fine" if facts["is_fine"] else f"{count} {'problem' if count == 1 else 'problems'}"
    lines = [f"{facts['path']}: {verdict}"]
    for problem in problems[:MOST_PROBLEMS]:
        lines += [f"  wrong    {problem['what']}", *(f"           {text}" for text in _reasons(problem))]
    if count > MOST_PROBLEMS:
        lines.append(f"  wrong    and {count - MOST_PROBLEMS} more; --json lists all")
    if "files" not in facts:
        return "\n".join(lines)
    files = facts["files"]
    lines.append(f"  made by  {facts['command']}")
    lines.append(
        f"  checked  {files['count']} files, {size(files['bytes'])}, {facts['tensors']} tensors: sizes, SHA-256, index, "
        "headers, NaN and Inf"
    )
    if facts["from_input_not_finite"]:
        lines.append(f"  note     {len(facts['from_input_not_finite'])} tensors hold NaN or Inf as the input does")
    if facts["inputs"]:
        same = sum(each["same"] for each in facts["inputs"])
        lines.append(f"  inputs   {same} of {len(facts['inputs'])} files are those that the receipt names")
    if facts["recomputed"] is not None:
        lines += _recomputed(facts["recomputed"])
    return "\n".join(lines)


def _reasons(problem: Mapping[str, Any]) -> list[str]:
    return [problem[key] for key in ("why", "next_step") if problem[key]]


def _recomputed(found: Mapping[str, Any]) -> list[str]:
    lines = [f"  sample   {found['sample']} of each kind, seed {found['seed']}"]
    for kind, facts in found["kinds"].items():
        parts = [f"{facts['checked']} of {facts['of']} {kind}"]
        parts += [f"{count} {_HOW[how]}" if len(facts["how"]) > 1 else _HOW[how] for how, count in facts["how"].items()]
        if facts["wrong"]:
            parts.append(f"{facts['wrong']} wrong")
        if facts["how"].keys() - {"bits"} and facts["numbers"] and facts["largest_error_ulp"] is not None:
            parts.append(f"largest error {facts['largest_error_ulp']:.3f} ulp, in {facts['worst']}")
        parts += [text.format(facts[name]) for name, text in _FIGURES.items() if name in facts]
        lines.append(f"  numbers  {'; '.join(parts)}")
    skipped = found["not_recomputed"]
    for name, reason in list(skipped.items())[:_MOST_SKIPPED]:
        lines.append(f"  left out {name}: {reason}")
    if len(skipped) > _MOST_SKIPPED:
        lines.append(f"  left out and {len(skipped) - _MOST_SKIPPED} more; --json lists all")
    return lines
