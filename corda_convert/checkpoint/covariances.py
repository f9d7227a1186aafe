"""Covariance files: ours, plain safetensors with one matrix per module, sharded ones, PEFT's and the CorDA authors'.

Only headers are read here (a pickle is mapped); each matrix is read when its layer's turn comes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import missing_path, read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.remote_file import is_there
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorFile, TensorRef
from corda_convert.errors import CovarianceMismatch, MalformedFile, UnsupportedInput, some

FORMAT_NAME = "corda_convert.covariances"
FORMAT_VERSION = 1

MEAN_ABS = ".mean_abs"
"""A vector of this name beside a module's matrix holds the mean absolute value of each input."""

_WRAPPERS = re.compile(
    r"^(?:module\.|base_model\.model\.|_orig_mod\.|_fsdp_wrapped_module\.)+"
    r"|\b(?:_orig_mod|_fsdp_wrapped_module)\.|\.base_layer$"
)


@dataclass(frozen=True, slots=True)
class Covariances:
    """Uncentred covariances `XᵀX` and mean absolute values of layer inputs, by module path at run time.

    Attributes:
        path: the file or folder.
        files: what the matrices are read from.
        matrices: stored matrices, (d_in, d_in), by the module that names them.
        aliases: module → the stored module that has the same input.
        metadata: what the file says of itself: samples, tokens, normalization, model, data.
        scales: stored means of absolute inputs, (d_in,), up to a factor, by the module that names them.
        module_tokens: how many tokens went into a stored matrix or vector, where the file says that not all did.
    """

    path: Path
    files: tuple[TensorFile, ...]
    matrices: Mapping[str, TensorRef]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    scales: Mapping[str, TensorRef]
    module_tokens: Mapping[str, int] = field(default_factory=dict)

    def find(self, module_name: str) -> TensorRef | None:
        """The covariance of a module's inputs."""
        return self.matrices.get(module_name) or self.matrices.get(self.aliases.get(module_name, module_name))

    def find_scale(self, module_name: str) -> TensorRef | None:
        """The mean absolute values of a module's inputs."""
        return self.scales.get(module_name) or self.scales.get(self.aliases.get(module_name, module_name))

    def count(self, key: str) -> int | None:
        """How many `samples` or `tokens` went into each matrix, where the file says so."""
        text = self.metadata.get(key, "")
        return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None

    def tokens_by_tensor(self) -> dict[str, int]:
        """`module_tokens` by the names of the stored tensors."""
        stored = [*self.matrices.items(), *self.scales.items()]
        return {ref.name: self.module_tokens[module] for module, ref in stored if module in self.module_tokens}

    def close(self) -> None:
        for file in self.files:
            file.close()


def read_covariances(path: Path) -> Covariances:
    """Opens a covariance file or a sharded folder of them.

    Square matrices are covariances; vectors are mean absolute inputs, with `.mean_abs` behind the module's name or, as in
    the cache of the CorDA authors' ASVD, without. Names lose what PEFT, torch.compile, FSDP and DataParallel add to them.
    Raises `InputNotFound`, `MalformedFile`, `UnsupportedInput` for a later version of the format, or
    `CovarianceMismatch` for tensors of other shapes or not of floating-point numbers.
    """
    files = _open(path)
    metadata = _metadata(path, files)
    stored = [TensorRef(file, spec) for file in files for spec in file.specs.values()]
    if not stored:
        raise MalformedFile(f"{path} holds no covariances.")
    _check_kinds(path, stored)
    matrices = _by_module(path, [ref for ref in stored if len(ref.shape) == 2])
    scales = _by_module(path, [ref for ref in stored if len(ref.shape) == 1])
    _check_lengths(path, matrices, scales)
    aliases = _aliases(path, metadata, {*matrices, *scales})
    return Covariances(path, files, matrices, aliases, metadata, scales, _module_tokens(path, metadata))


def at_run_time(covariances: Covariances, names: NameMap) -> Covariances:
    """The same covariances, found by the model's present names too.

    A file may name modules as an earlier transformers did, as they stand on disk, or as in the model without its head.
    """
    given = list(dict.fromkeys([*covariances.matrices, *covariances.scales, *covariances.aliases]))
    aliases = dict(covariances.aliases)
    for module, target in zip(given, names.find([(f"{module}.weight",) for module in given]), strict=True):
        if target is not None and (name := target.name.removesuffix(".weight")) not in given:
            aliases[name] = covariances.aliases.get(module, module)
    return replace(covariances, aliases=aliases)


def _open(path: Path) -> tuple[TensorFile, ...]:
    if path.is_dir():
        return read_checkpoint(path).shards
    if not is_there(path):
        raise missing_path(path, "covariance file")
    if path.suffix == ".safetensors":
        return (SafetensorsFile(path),)
    return (PickleFile(path),)


def _metadata(path: Path, files: Iterable[TensorFile]) -> dict[str, str]:
    """What all shards say. Raises `MalformedFile` where they do not agree, `UnsupportedInput` for a later version."""
    metadata: dict[str, str] = {}
    for file in files:
        odd = [key for key, value in file.metadata.items() if metadata.setdefault(key, value) != value]
        if odd:
            raise MalformedFile(
                f"{path}: its files do not agree on {some(odd)}.", why="They are of several collections."
            )
    version = metadata.get("format_version", str(FORMAT_VERSION))
    if metadata.get("format") == FORMAT_NAME and version != str(FORMAT_VERSION):
        raise UnsupportedInput(
            f"{path} has version {version} of the covariance format; this program reads version {FORMAT_VERSION}.",
            next_step="Update corda-convert.",
        )
    return metadata


def _check_kinds(path: Path, stored: Iterable[TensorRef]) -> None:
    odd = [ref for ref in stored if not _is_input(ref)]
    if not odd:
        return
    is_cache = any(re.search(r"\.eigens\.[SUV]_WC$", ref.name) for ref in odd)
    raise CovarianceMismatch(
        f"{path} holds tensors that are no covariances: "
        f"{', '.join(f'{ref.name} {ref.spec.dtype} {ref.shape}' for ref in odd[:5])}.",
        why="It is the cache_file of PEFT's CorDA, which holds a finished decomposition."
        if is_cache
        else "A covariance is a square matrix of floating-point numbers, one for each layer input.",
        next_step="Give it with --from-cache."
        if is_cache
        else "Give the file that PEFT's covariance_file or corda-convert collect wrote.",
    )


def _is_input(ref: TensorRef) -> bool:
    """Whether it is of floating-point numbers, and a vector or a square matrix."""
    return ref.spec.dtype in COMPUTABLE_DTYPES and (
        len(ref.shape) == 1
        or (len(ref.shape) == 2 and ref.shape[0] == ref.shape[1] and not ref.name.endswith(MEAN_ABS))
    )


def _by_module(path: Path, refs: Iterable[TensorRef]) -> dict[str, TensorRef]:
    found: dict[str, TensorRef] = {}
    for ref in refs:
        module = _module(ref.name)
        if module in found:
            raise MalformedFile(f"{path}: {ref.name} and {found[module].name} are both for the inputs of {module}.")
        found[module] = ref
    return found


def _module(name: str) -> str:
    """`base_model.model.M.base_layer.mean_abs` → `M`."""
    return _WRAPPERS.sub("", name.removesuffix(MEAN_ABS))


def _check_lengths(path: Path, matrices: Mapping[str, TensorRef], scales: Mapping[str, TensorRef]) -> None:
    odd = [
        f"{ref.name} {ref.shape} beside {matrices[module].shape}"
        for module, ref in scales.items()
        if module in matrices and ref.shape[0] != matrices[module].shape[0]
    ]
    if odd:
        raise CovarianceMismatch(
            f"{path}: mean absolute inputs and covariances do not fit together: {some(odd)}.",
            why="Both must have one entry for each input of the layer.",
        )


def _json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """The object of a key of the metadata, empty where the key is missing; None if it is no JSON object."""
    try:
        read = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None


def _module_tokens(path: Path, metadata: Mapping[str, str]) -> dict[str, int]:
    read = _json_object(metadata, "module_tokens")
    if read is None or not all(type(count) is int and 0 <= count < 1 << 62 for count in read.values()):
        raise MalformedFile(f"{path}: the metadata 'module_tokens' is not a JSON object of counts.")
    return {_module(name): count for name, count in read.items()}


def _aliases(path: Path, metadata: Mapping[str, str], stored: set[str]) -> dict[str, str]:
    read = _json_object(metadata, "aliases")
    if read is None or not all(isinstance(target, str) for target in read.values()):
        raise MalformedFile(f"{path}: the metadata 'aliases' is not a JSON object of module names.")
    aliases = {_module(name): _module(target) for name, target in read.items()}
    dangling = [f"{name} → {target}" for name, target in aliases.items() if target not in stored]
    if dangling:
        raise MalformedFile(f"{path}: aliases name covariances that are not there: {', '.join(dangling[:5])}.")
    return aliases
