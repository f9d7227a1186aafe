"""What `inspect` tells of checkpoints, covariances, PEFT's CorDA cache and receipts. Headers and configs only."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from corda_convert.adapters.cache import Cache
from corda_convert.checkpoint.covariances import FORMAT_NAME, Covariances
from corda_convert.checkpoint.dequantized import dequantized
from corda_convert.checkpoint.folder import RECEIPT_FILE, Checkpoint, read_json
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.quantized import Quantization, quantization_of
from corda_convert.checkpoint.remote_file import file_bytes, is_there
from corda_convert.errors import CordaConvertError, MalformedFile
from corda_convert.operations.adapter_facts import facts_of
from corda_convert.operations.authors import is_decomposed, read_layers
from corda_convert.operations.evidence import initial_adapter_of
from corda_convert.operations.inspect_adapter import describe_adapter, read_any_adapter, sizes
from corda_convert.output.module_groups import group_modules
from corda_convert.output.receipt import RECEIPT_FORMAT

_TOKENS_PER_INPUT = 10


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a model on disk is. Raises one of our errors where its parts do not go together."""
    specs = {name: ref.spec for name, ref in checkpoint.tensors.items()}
    quantization = quantization_of(checkpoint.config, specs, checkpoint.root)
    initial = initial_adapter_of(checkpoint.root) if checkpoint.is_folder else None
    layers = read_layers(checkpoint) if is_decomposed(checkpoint) else []
    config = checkpoint.config or {}
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    architectures = config.get("architectures")
    measured = sizes(specs, [shard.path for shard in checkpoint.shards])
    if quantization is not None:
        measured["parameters"] = _plain_parameters(checkpoint, quantization)
    form = "quantized" if quantization else "decomposed" if layers else "residual" if initial else "dense"
    return {
        "kind": "checkpoint",
        "what": _what(checkpoint, form, quantization),
        "form": form,
        "name": checkpoint.name,
        "is_pickled": checkpoint.is_pickled,
        "architecture": str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        "model_type": config.get("model_type"),
        "layers": text.get("num_hidden_layers") or _layers(specs),
        "hidden_size": text.get("hidden_size"),
        "vocabulary": text.get("vocab_size"),
        "ties_embeddings": config.get("tie_word_embeddings", text.get("tie_word_embeddings")),
        **measured,
        "quantization": quantization and {"method": quantization.method, "is_readable": quantization.is_readable},
        "decomposed": {"modules": len(layers), "ranks": _counted(layer.rank for layer in layers)} if layers else None,
        "initial_adapter": None if initial is None else _describe_initial(initial),
    }


def _what(checkpoint: Checkpoint, form: str, quantization: Quantization | None) -> str:
    if quantization is not None:
        return f"model, quantized with {quantization.method}"
    return {
        "decomposed": "model of the CorDA authors' scripts: each layer is a residual and an adapter",
        "residual": "residual model, with the initial adapter of its training",
        "dense": "dense model"
        if checkpoint.is_folder
        else "shard of a model"
        if is_shard(checkpoint)
        else "file of weights",
    }[form]


def is_shard(checkpoint: Checkpoint) -> bool:
    """Whether it is one file of several, by its name."""
    return not checkpoint.is_folder and re.search(r"-\d+-of-(?!0*1\.)\d+\.", checkpoint.root.name) is not None


def _plain_parameters(checkpoint: Checkpoint, quantization: Quantization) -> int | None:
    """How many parameters a quantized model has; None where its tensors do not tell."""
    try:
        return sum(ref.spec.elements for ref in dequantized(checkpoint, quantization).tensors.values())
    except CordaConvertError:
        return None


def _layers(names: Iterable[str]) -> int | None:
    """The largest number of alike places in the names: the layers, where there is no config."""
    groups = group_modules(name.rpartition(".")[0] for name in names)
    return max((len(group.indices[0]) for group in groups if group.indices), default=None)


def _describe_initial(path: Path) -> dict[str, Any]:
    adapter = read_any_adapter(path)
    facts = describe_adapter(adapter, facts_of(adapter), path)
    adapter.source.close()
    kept = ("type", "rank", "alpha", "use_rslora", "ranks", "scalings", "rank_pattern", "alpha_pattern")
    return {
        "path": str(path),
        **{key: facts[key] for key in (*kept, "corda_method", "modules", "targets", "parameters")},
    }


def checkpoint_commands(facts: Mapping[str, Any], path: Path) -> list[str]:
    """What can be done next with a model."""
    own = shlex.quote(str(path))
    if facts["form"] == "decomposed":
        return [f"corda-convert merge {own} -o OUT"]
    if facts["what"].startswith("shard"):
        return [f"corda-convert inspect {shlex.quote(str(path.parent))}"]
    if facts["quantization"] and not facts["quantization"]["is_readable"]:
        return []
    merging = f"corda-convert merge {own} --adapter ADAPTER -o OUT"
    if facts["form"] != "dense" or facts["architecture"] is None:
        return [merging]
    return [merging, f"corda-convert decompose {own} --cov COVARIANCES --mode kpm --rank RANK -o RESIDUAL"]


def describe_covariances(covariances: Covariances) -> dict[str, Any]:
    """What a covariance file holds."""
    metadata = covariances.metadata
    is_ours = metadata.get("format") == FORMAT_NAME
    stored = {*covariances.matrices, *covariances.scales}
    modules = [*dict.fromkeys([*covariances.matrices, *covariances.scales]), *covariances.aliases]
    specs = {ref.name: ref.spec for ref in (*covariances.matrices.values(), *covariances.scales.values())}
    widths = {name: (covariances.matrices.get(name) or covariances.scales[name]).shape[0] for name in stored}
    tokens = covariances.count("tokens")
    return {
        "kind": "covariances",
        "what": _covariances_what(covariances, is_ours=is_ours),
        "type": FORMAT_NAME if is_ours else "plain",
        "modules": len(modules),
        "matrices": len(covariances.matrices),
        "mean_abs": len(covariances.scales),
        "aliases": len(covariances.aliases),
        "targets": [group.facts() for group in group_modules(modules)],
        "inputs": _counted(widths.values()),
        "samples": covariances.count("samples"),
        "tokens": tokens,
        "normalization": metadata.get("normalization"),
        "model": metadata.get("model"),
        "data": metadata.get("data"),
        "has_few_tokens": tokens is not None and tokens < _TOKENS_PER_INPUT * max(widths.values()),
        **sizes(specs, [file.path for file in covariances.files]),
    }


def _covariances_what(covariances: Covariances, *, is_ours: bool) -> str:
    if is_ours:
        return "covariances of layer inputs"
    if not covariances.matrices:
        return "mean absolute values of layer inputs, for asvd"
    pickled = any(isinstance(file, PickleFile) for file in covariances.files)
    return "covariances of layer inputs, " + (
        "PEFT's covariance_file or the CorDA authors' cache" if pickled else "without metadata"
    )


def covariance_commands(facts: Mapping[str, Any], path: Path) -> list[str]:
    """What can be done next with covariances."""
    own = shlex.quote(str(path))
    method = "" if facts["matrices"] else " --method asvd"
    return [
        f"corda-convert decompose MODEL --cov {own}{method} --mode {mode} --rank RANK -o OUT" for mode in ("kpm", "ipm")
    ]


def describe_cache(cache: Cache) -> dict[str, Any]:
    """What PEFT's CorDA cache_file holds."""
    return {
        "kind": "cache",
        "what": "PEFT's CorDA cache_file: a finished decomposition",
        "modules": len(cache.modules),
        "ranks": _counted(eigens.S.shape[0] for eigens in cache.modules.values()),
        "targets": [group.facts() for group in group_modules(cache.modules)],
        **sizes(cache.file.specs, [cache.path]),
    }


def cache_commands(path: Path) -> list[str]:
    """What can be done next with a cache file."""
    own = shlex.quote(str(path))
    return [
        f"corda-convert decompose MODEL --from-cache {own} --mode kpm|ipm -o RESIDUAL",
        f"corda-convert merge BASE --adapter TRAINED --init {own} -o OUT",
    ]


def describe_receipt(path: Path) -> dict[str, Any]:
    """What an output's receipt says, and whether its files are there in their sizes. Raises `MalformedFile`."""
    receipt = read_json(path)
    if receipt.get("format") != RECEIPT_FORMAT:
        raise MalformedFile(f"{path} is no receipt of corda-convert.")
    try:
        files = {str(file["name"]): int(file["bytes"]) for file in receipt["files"]}
        tool, summary = receipt["tool"], receipt["summary"]
        brief = {
            "command": str(receipt["command"]),
            "tool": f"{tool['name']} {tool['version']}",
            "options": dict(receipt["options"]),
            "inputs": [str(source["name"]) for source in receipt["inputs"]],
            "tensors": dict(summary["tensors"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedFile(f"{path} is damaged: {error!r}.") from None
    changed = [name for name, nbytes in files.items() if not _is_there(path.parent, name, nbytes)]
    return {**brief, "files": len(files), "bytes": sum(files.values()), "missing_or_changed": changed}


def _is_there(folder: Path, name: str, nbytes: int) -> bool:
    path = folder / name
    return is_there(path) and file_bytes(path) == nbytes


def receipt_of(folder: Path) -> dict[str, Any] | None:
    """The receipt in a folder, if it has one. Raises `MalformedFile`."""
    return describe_receipt(folder / RECEIPT_FILE) if (folder / RECEIPT_FILE).is_file() else None


def _counted(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).most_common()}
