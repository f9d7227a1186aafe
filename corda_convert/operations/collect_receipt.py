"""The receipt of collected covariances: what went in, and what each tensor and file of the output is."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.checkpoint.covariances import MEAN_ABS, Covariances
from corda_convert.checkpoint.folder import Checkpoint
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.remote_file import file_bytes
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorSpec
from corda_convert.corpus import CorpusOptions
from corda_convert.operations.process_memory import peak_resident_bytes
from corda_convert.operations.remote_inputs import described, stated_sha256
from corda_convert.output.digests import file_sha256
from corda_convert.output.receipt import RECEIPT_FORMAT, RECEIPT_FORMAT_VERSION, tool

if TYPE_CHECKING:
    import torch


def receipt_head(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is known before anything runs."""
    return {
        "format": RECEIPT_FORMAT,
        "format_version": RECEIPT_FORMAT_VERSION,
        "tool": tool(),
        "command": "collect",
        "options": dict(options),
    }


def model_input(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model. Its files are not read front to back, so only the Hub's digests and those of headers are known."""
    files = []
    for shard in checkpoint.shards:
        entry = {"name": shard.path.name, "bytes": file_bytes(shard.path), "sha256": stated_sha256(shard.path)}
        if isinstance(shard, SafetensorsFile):
            entry["header_sha256"] = shard.header_sha256()
        files.append(entry)
    return {"role": "model", **described(checkpoint.root), "files": files}


def text_inputs(corpus: CorpusOptions) -> list[dict[str, Any]]:
    """The files of text, or the preset."""
    if corpus.preset is not None:
        return [{"role": "data", "name": corpus.preset, "files": []}]
    return [{"role": "data", "name": file.name, "files": [_hashed(file)]} for file in corpus.files]


def covariance_input(covariances: Covariances) -> dict[str, Any]:
    """The covariances of others."""
    files = []
    for file in covariances.files:
        entry = _hashed(file.path)
        if isinstance(file, SafetensorsFile):
            entry["header_sha256"] = file.header_sha256()
        if isinstance(file, PickleFile) and file.aliases:
            entry["shared"] = file.aliases
        files.append(entry)
    return {"role": "covariances", **described(covariances.path), "files": files}


def tensor_entries(
    shards: Mapping[str, Sequence[TensorSpec]], action: str, tokens: Mapping[str, int]
) -> list[dict[str, Any]]:
    """One for each tensor, by file. A vector that stands beside a matrix refers to it."""
    names = {spec.name for specs in shards.values() for spec in specs}
    entries = []
    for file, specs in shards.items():
        for spec in specs:
            entry: dict[str, Any] = {"name": spec.name, "file": file, "dtype": spec.dtype, "shape": list(spec.shape)}
            entry["action"] = action
            module = spec.name.removesuffix(MEAN_ABS)
            if module != spec.name and module in names:
                entry["with"] = module
            elif module in tokens:
                entry["tokens"] = tokens[module]
            entries.append(entry)
    return entries


def usage(begun: float, device: torch.device, ranks: int) -> dict[str, Any]:
    """Time since `begun` (of `time.perf_counter`) and memory of this process."""
    import torch

    on_cuda = device.type == "cuda"
    return {
        "device": str(device),
        "seconds": round(time.perf_counter() - begun, 3),
        "peak_memory_bytes": peak_resident_bytes(),
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated(device) if on_cuda else None,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"ranks": ranks} if ranks > 1 else {}),
    }


def _hashed(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
