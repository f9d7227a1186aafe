"""`collect --from-peft`: covariances that others collected, in our format."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.covariances import MEAN_ABS, read_covariances
from corda_convert.checkpoint.tensors import TensorRef, read_tensor
from corda_convert.errors import NotFinite
from corda_convert.operations.collect import Collected
from corda_convert.operations.collect_receipt import covariance_input, receipt_head, usage
from corda_convert.operations.collect_work import working
from corda_convert.operations.collect_writing import (
    OutputTensor,
    Sealing,
    check_covariance_output,
    metadata_of,
    write_covariances,
)


def convert_covariances(
    path: Path | str, *, output: Path | str, max_shard_bytes: int, dry_run: bool = False, overwrite: bool = False
) -> Collected:
    """Writes PEFT's `covariance_file`, the CorDA authors' cache, or another file of covariances in our format.

    One matrix is in memory at a time. Modules with the same bits get one matrix, and aliases. Numbers and their dtype stay.
    Raises a `CordaConvertError`; then nothing was written.
    """
    import torch

    begun = time.perf_counter()
    path, output = Path(path), Path(output)
    check_covariance_output(output, overwrite=overwrite)
    covariances = read_covariances(path)
    matrices, aliases = _distinct(dict(covariances.matrices))
    scales, scale_aliases = _distinct(dict(covariances.scales))
    aliases, vectors = _with_scales(matrices, aliases, scales, scale_aliases)
    aliases |= {
        name: aliases.get(target, target) for name, target in covariances.aliases.items() if name not in aliases
    }
    tensors = [
        OutputTensor(name, ref)
        for module in dict.fromkeys([*matrices, *vectors])
        for name, ref in ((module, matrices.get(module)), (f"{module}{MEAN_ABS}", vectors.get(module)))
        if ref is not None
    ]
    known = {key: covariances.metadata.get(key) for key in ("samples", "tokens", "model", "data")}
    normalization = covariances.metadata.get("normalization") or ("peft" if matrices else None)
    counts = json.dumps(dict(covariances.module_tokens)) if covariances.module_tokens else None
    metadata = metadata_of(aliases, {**known, "normalization": normalization, "module_tokens": counts})
    head = receipt_head({"from_peft": path.name})
    if dry_run:
        nbytes = sum(tensor.spec.nbytes for tensor in tensors)
        plan = {"modules": len(tensors) + len(aliases), "disk_bytes": {"output": nbytes}}
        return Collected(output, {**head, "plan": plan})
    identity = {"from": path.name, "size": str(path.stat().st_size)}
    facts = {**head, "warnings": [], "aliases": aliases}
    with working(output, identity, overwrite=True) as work:
        facts["inputs"] = [covariance_input(covariances)]
        sealing = Sealing(facts, "converted", {}, lambda: usage(begun, torch.device("cpu"), 1))
        receipt = write_covariances(
            output, tensors, metadata, sealing, work=work.folder, max_shard_bytes=max_shard_bytes
        )
    covariances.close()
    return Collected(output, receipt)


def _distinct(refs: dict[str, TensorRef]) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """The first of those that have the same bits, and whose the others are. Raises `NotFinite`."""
    import torch

    from corda_convert.linalg.finite import is_finite

    first: dict[tuple[tuple[int, ...], str, bytes], str] = {}
    distinct: dict[str, TensorRef] = {}
    aliases: dict[str, str] = {}
    for module, ref in refs.items():
        values = read_tensor(ref)
        if not is_finite(values):
            raise NotFinite(
                f"{ref.name} in {ref.file.path} holds NaN or Inf.",
                why="The calibration ran over a float16 range, or the file is damaged.",
            )
        memory: Any = values.contiguous().view(torch.uint8).numpy()
        key = (ref.shape, ref.spec.dtype, hashlib.sha256(memory).digest())
        leader = first.setdefault(key, module)
        if leader == module:
            distinct[module] = ref
        else:
            aliases[module] = leader
    return distinct, aliases


def _with_scales(
    matrices: dict[str, TensorRef],
    aliases: dict[str, str],
    scales: dict[str, TensorRef],
    scale_aliases: dict[str, str],
) -> tuple[dict[str, str], dict[str, TensorRef]]:
    """One set of aliases for both. A vector whose alias is another than its matrix's stays under its own name."""
    if not matrices:
        return scale_aliases, scales
    vectors = dict(scales)
    for module, leader in scale_aliases.items():
        if aliases.get(module) != leader:
            vectors[module] = scales[leader]
    return dict(aliases), vectors
