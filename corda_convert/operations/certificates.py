"""Whether every decomposition ended with a certificate that holds, judged by what the run found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def certificate_warnings(tensors: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """A warning that names the modules where no solver's certificate holds, with the worst bound on an angle."""
    open_ones = [
        entry for entry in tensors if entry.get("certificate") is not None and not entry["certificate"]["holds"]
    ]
    if not open_ones:
        return ()
    worst = max(open_ones, key=lambda entry: float(entry["certificate"]["relative_residual"]))
    names = ", ".join(str(entry["module"]) for entry in open_ones[:5]) + (", …" if len(open_ones) > 5 else "")
    return (
        f"For {len(open_ones)} modules no solver could make sure of the wanted singular vectors: {names}. The worst is "
        f"{worst['module']} ({worst['solver']}, relative residual {worst['certificate']['relative_residual']:.1g}). Its "
        "singular values lie below what float64 resolves of the largest, or too close together. Residual and adapter "
        "still add up to the weight.",
    )
