"""The receipt `corda_convert.json`: what was done, from what, and what every output file must be."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import RECEIPT_FILE, read_json
from corda_convert.errors import MalformedFile
from corda_convert.version import __version__

RECEIPT_FORMAT = "corda_convert.receipt"
RECEIPT_FORMAT_VERSION = 1


def tool() -> dict[str, Any]:
    """Versions of this program and of what its bits depend on."""
    import torch

    return {
        "name": "corda-convert",
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": f"{sys.platform} {platform.machine()}",
    }


def encode_receipt(receipt: dict[str, Any]) -> str:
    """The receipt as strict JSON: no NaN, no Inf."""
    return json.dumps(receipt, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_receipt(folder: Path, receipt: dict[str, Any]) -> None:
    """Writes the receipt into its folder."""
    (folder / RECEIPT_FILE).write_text(encode_receipt(receipt), encoding="utf-8")


def streamed_files(receipt: Mapping[str, Any]) -> frozenset[str]:
    """The files that are listed, and that `--stream` has left on the Hub only."""
    streamed = receipt.get("streamed_to")
    names = streamed.get("files") if isinstance(streamed, dict) else None
    return frozenset(str(name) for name in names) if isinstance(names, list) else frozenset()


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a folder that this program made, or None. Raises `MalformedFile` for a damaged one."""
    path = folder / RECEIPT_FILE
    if not path.is_file():
        return None
    receipt = read_json(path)
    if receipt.get("format") != RECEIPT_FORMAT:
        raise MalformedFile(f"{path} is no receipt of corda-convert.")
    if receipt.get("format_version") != RECEIPT_FORMAT_VERSION:
        raise MalformedFile(
            f"{path} has the receipt version {receipt.get('format_version')!r}; this program knows "
            f"{RECEIPT_FORMAT_VERSION}.",
            next_step="Install the version of corda-convert that wrote it.",
        )
    return receipt
