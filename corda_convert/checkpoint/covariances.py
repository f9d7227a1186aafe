"""Covariance files: ours, plain safetensors with one matrix per module, sharded ones, and PEFT's `covariance_file`.

Only headers are read here (a pickle is mapped); each matrix is read when its layer's turn comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from corda_convert.checkpoint.folder import missing_path, read_checkpoint
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import COMPUTABLE_DTYPES, TensorFile, TensorRef
from corda_convert.errors import CovarianceMismatch, MalformedFile

FORMAT_NAME = "corda_convert.covariances"


@dataclass(frozen=True, slots=True)
class Covariances:
    """Uncentred covariances `XᵀX` of layer inputs, (d_in, d_in), by module path at run time.

    Attributes:
        path: the file or folder.
        files: what the matrices are read from.
        matrices: stored matrices by the module that names them.
        aliases: module → the stored module that shares its input.
        metadata: what the file says of itself: samples, tokens, normalization, model, data.
    """

    path: Path
    files: tuple[TensorFile, ...]
    matrices: Mapping[str, TensorRef]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]

    def find(self, module_name: str) -> TensorRef | None:
        return self.matrices.get(self.aliases.get(module_name, module_name))

    def close(self) -> None:
        for file in self.files:
            file.close()


def read_covariances(path: Path) -> Covariances:
    """Opens a covariance file or a sharded folder of them.

    Raises `InputNotFound`, `MalformedFile`, or `CovarianceMismatch` for matrices that are not square or not of
    floating-point numbers.
    """
    files = _open(path)
    matrices = {name: TensorRef(file, spec) for file in files for name, spec in file.specs.items()}
    metadata = {key: value for file in files for key, value in file.metadata.items()}
    if not matrices:
        raise MalformedFile(f"{path} holds no covariances.")
    odd = [
        f"{name} {ref.spec.dtype} {ref.shape}"
        for name, ref in matrices.items()
        if len(ref.shape) != 2 or ref.shape[0] != ref.shape[1] or ref.spec.dtype not in COMPUTABLE_DTYPES
    ]
    if odd:
        raise CovarianceMismatch(
            f"{path} holds tensors that are no covariances: {', '.join(odd[:5])}.",
            why="A covariance is a square matrix of floating-point numbers, one for each layer input.",
            next_step="Give the file that PEFT's covariance_file or corda-convert collect wrote.",
        )
    return Covariances(path, files, matrices, _aliases(path, metadata, matrices), metadata)


def _open(path: Path) -> tuple[TensorFile, ...]:
    if path.is_dir():
        return read_checkpoint(path).shards
    if not path.is_file():
        raise missing_path(path, "covariance file")
    if path.suffix == ".safetensors":
        return (SafetensorsFile(path),)
    return (PickleFile(path),)


def _aliases(path: Path, metadata: Mapping[str, str], matrices: Mapping[str, TensorRef]) -> dict[str, str]:
    text = metadata.get("aliases")
    if text is None:
        return {}
    try:
        aliases = json.loads(text)
    except ValueError:
        aliases = None
    if not isinstance(aliases, dict) or not all(isinstance(target, str) for target in aliases.values()):
        raise MalformedFile(f"{path}: the metadata 'aliases' is not a JSON object of module names.")
    dangling = [f"{name} → {target}" for name, target in aliases.items() if target not in matrices]
    if dangling:
        raise MalformedFile(f"{path}: aliases name covariances that are not there: {', '.join(dangling[:5])}.")
    return aliases
