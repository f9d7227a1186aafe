"""`inspect`: what a file or folder is, what it would touch in a model, whether a server takes it, and what can be done next.

Headers and configs only, so that it is quick on files larger than memory.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.adapters.cache import open_cache
from corda_convert.adapters.factors import Adapter
from corda_convert.adapters.source import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from corda_convert.checkpoint.covariances import FORMAT_NAME, MEAN_ABS, read_covariances
from corda_convert.checkpoint.folder import (
    INDEX_FILE,
    PICKLED_INDEX_FILE,
    PICKLED_SINGLE_FILE,
    PICKLED_SUFFIXES,
    RECEIPT_FILE,
    SINGLE_FILE,
    missing_path,
    read_checkpoint,
)
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.remote_file import announced_in, is_there
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorFile, TensorSpec
from corda_convert.errors import CordaConvertError, InputNotFound, MalformedFile, UnsupportedInput, some
from corda_convert.hub_reading import located
from corda_convert.operations import inspect_adapter, inspect_model
from corda_convert.operations.adapter_facts import facts_of
from corda_convert.operations.server_rules import Server

INSPECTION_FORMAT = "corda_convert.inspection"
INSPECTION_FORMAT_VERSION = 1

_ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLED_WEIGHTS_FILE)
_MODEL_FILES = ("config.json", INDEX_FILE, PICKLED_INDEX_FILE)
_PEFT_ENDS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".miss_block", ".bone_block")
_RWKV_ENDS = (".disha", ".bone", ".lora_A", ".lora_B")


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found at a path.

    Attributes:
        facts: the JSON object: `format`, `format_version`, `path`, `kind` (`adapter`, `checkpoint`, `covariances`, `cache`,
            `receipt`), `what` in words, what is of this kind, `receipt`, `base`, `server`, and `next`, a list of commands.
        is_fine: whether it fits the model that was asked for, the server takes it as it is, and its files are those of
            its receipt.
    """

    path: Path
    facts: Mapping[str, Any]
    is_fine: bool


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is asked of a path besides what it is."""

    base: Path | None
    server: Server | None

    def check_none(self, path: Path, what: str) -> None:
        """Raises `UnsupportedInput` where something is asked that only adapters have an answer to."""
        asked = [option for option, value in (("--base", self.base), ("--for", self.server)) if value is not None]
        if asked:
            raise UnsupportedInput(
                f"{path} is no adapter, but a {what}; {' and '.join(asked)} ask what becomes of an adapter.",
                next_step="Leave the option out, or give adapters alone.",
            )


def inspect(path: Path | str, *, base: Path | str | None = None, server: Server | None = None) -> Inspection:
    """Says what a file or folder is.

    `base` is a model: which of its tensors the adapter would touch, and what does not fit. `server` is one to serve the
    adapter as it is. Raises a `CordaConvertError` for what is nothing that this program knows, or is damaged.
    """
    given = Path(path)
    path, asked = located(given, "file or folder"), _Asked(None if base is None else located(base, "model"), server)
    if not (path.is_dir() or is_there(path)):
        raise missing_path(path, "file or folder")
    if asked.base is not None and not (asked.base.is_dir() or is_there(asked.base)):
        raise missing_path(asked.base, "model")
    try:
        facts = _inspect_folder(path, asked) if path.is_dir() else _inspect_file(path, asked)
    except OSError as error:
        raise MalformedFile(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    commands = list(facts.pop("next"))
    if path.is_dir():
        facts["receipt"] = facts.get("receipt") or inspect_model.receipt_of(path)
        is_here = given == path and facts["receipt"]
        commands += [f"corda-convert push {shlex.quote(str(path))} OWNER/NAME"] if is_here else []
    last = {key: facts.pop(key, None) for key in ("receipt", "base", "server")}
    found = {**_head(given), **facts, **last, "next": commands}
    for at, named in ((path, given), (asked.base, base)):  # the commands shall name what is on the Hub as the user did
        if at is not None and named is not None and Path(named) != at:
            _rename(found, shlex.quote(str(at)), shlex.quote(str(named)))
    return Inspection(given, found, _is_fine(found))


def _rename(facts: dict[str, Any], path: str, name: str) -> None:
    """Puts a name in the place of a path in all commands."""
    for where, key in ((facts, "next"), (facts["server"] or {}, "mending"), (facts["server"] or {}, "commands")):
        if key in where:
            where[key] = [command.replace(path, name) for command in where[key]]


def failure(path: Path, problem: CordaConvertError) -> dict[str, Any]:
    """The JSON object of a path that could not be inspected."""
    error = {**inspect_adapter.describe_problem(problem), "message": str(problem)}
    return {**_head(path), "kind": None, "error": error}


def _head(path: Path) -> dict[str, Any]:
    return {"format": INSPECTION_FORMAT, "format_version": INSPECTION_FORMAT_VERSION, "path": str(path)}


def _is_fine(facts: Mapping[str, Any]) -> bool:
    fits = facts["base"] is None or facts["base"]["fits"]
    served = facts["server"] is None or facts["server"]["takes_it"]
    return bool(fits and served and not (facts["receipt"] or {}).get("missing_or_changed"))


def _inspect_folder(path: Path, asked: _Asked) -> dict[str, Any]:
    if (path / CONFIG_FILE).is_file():
        return _adapter(inspect_adapter.read_any_adapter(path), path, asked)
    names = {entry.name for entry in (*path.iterdir(), *announced_in(path))}
    if not names & {*_MODEL_FILES, SINGLE_FILE, PICKLED_SINGLE_FILE}:
        if RECEIPT_FILE in names:
            return _receipt(path / RECEIPT_FILE, asked)
        raise _nothing_known(path, names)
    checkpoint = read_checkpoint(path)
    try:
        if _are_covariances(checkpoint.shards):
            return _covariances(path, asked)
        asked.check_none(path, "model")
        facts = inspect_model.describe_checkpoint(checkpoint)
        return {**facts, "next": inspect_model.checkpoint_commands(facts, path)}
    finally:
        checkpoint.close()


def _inspect_file(path: Path, asked: _Asked) -> dict[str, Any]:
    if (path.name in _ADAPTER_FILES and (path.parent / CONFIG_FILE).is_file()) or path.name in _MODEL_FILES:
        return _inspect_folder(path.parent, asked)
    if path.suffix == ".json":
        return _json(path, asked)
    if path.suffix == ".safetensors":
        return _tensors(path, SafetensorsFile(path), asked)
    if path.suffix in PICKLED_SUFFIXES:
        return _pickled(path, asked)
    raise UnsupportedInput(
        f"{path} is no file that corda-convert knows.",
        why="GGUF files are read by llama.cpp alone." if path.suffix == ".gguf" else None,
        next_step=f"It knows adapters, models and covariances in .safetensors, {', '.join(PICKLED_SUFFIXES)} and folders.",
    )


def _json(path: Path, asked: _Asked) -> dict[str, Any]:
    try:
        return _receipt(path, asked)
    except CordaConvertError as problem:
        if path.name == RECEIPT_FILE:
            raise
        raise UnsupportedInput(
            f"{path} is no receipt of corda-convert, and no model's or adapter's config."
        ) from problem


def _pickled(path: Path, asked: _Asked) -> dict[str, Any]:
    file = PickleFile(path)
    names = list(file.specs)
    if any(name.endswith((".eigens.S_WC", ".eigens.U_WC")) for name in names):
        asked.check_none(path, "cache file")
        cache = open_cache(path)
        return {**inspect_model.describe_cache(cache), "next": inspect_model.cache_commands(path)}
    if any(name.endswith((".init_lora_A", ".init_lora_B")) for name in names):
        return _initial(path, asked)
    if any(name.endswith(_RWKV_ENDS) for name in names):
        return _adapter(inspect_adapter.read_any_adapter(path), path, asked)
    return _tensors(path, file, asked)


def _tensors(path: Path, file: TensorFile, asked: _Asked) -> dict[str, Any]:
    """A file of tensors that is no adapter by itself: covariances, or a model's weights."""
    file.close()
    orphans = [name for name in file.specs if name.endswith(_PEFT_ENDS)]
    if orphans:
        raise InputNotFound(
            f"{path} holds the tensors of an adapter ({some(orphans, 2)}), but there is no {CONFIG_FILE} beside it.",
            why="Ranks, scalings and the kind stand in that.",
            next_step="Give the folder that PEFT's save_pretrained wrote.",
        )
    if _are_covariances((file,)):
        return _covariances(path, asked)
    asked.check_none(path, "file of weights")
    checkpoint = read_checkpoint(path)
    facts = inspect_model.describe_checkpoint(checkpoint)
    return {**facts, "next": inspect_model.checkpoint_commands(facts, path)}


def _are_covariances(files: tuple[TensorFile, ...]) -> bool:
    """Whether the tensors are covariances: by the metadata, or squares and vectors that are named like modules."""
    if any(file.metadata.get("format") == FORMAT_NAME for file in files):
        return True
    specs = [spec for file in files for spec in file.specs.values()]
    return bool(specs) and all(map(_may_be_covariance, specs))


def _may_be_covariance(spec: TensorSpec) -> bool:
    is_square = len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]
    named = spec.name.endswith(MEAN_ABS) or not spec.name.endswith((".weight", ".bias", ".weight_scale"))
    return named and (is_square or len(spec.shape) == 1)


def _adapter(adapter: Adapter, path: Path, asked: _Asked) -> dict[str, Any]:
    facts = facts_of(adapter)
    described = inspect_adapter.describe_adapter(adapter, facts, path)
    if asked.base is not None:
        described["base"] = inspect_adapter.describe_base(adapter, facts, asked.base)
    fits = described.get("base", {}).get("fits")
    base = inspect_adapter.base_of(adapter, facts, path, asked.base if fits else None)
    if asked.server is not None:
        described["server"] = inspect_adapter.describe_server(adapter, facts, asked.server, path, base)
    adapter.source.close()
    return {**described, "next": inspect_adapter.adapter_commands(adapter, facts, path, base)}


def _initial(path: Path, asked: _Asked) -> dict[str, Any]:
    """The factors that a PiSSA training of RWKV-PEFT began with."""
    adapter = inspect_adapter.read_any_adapter(path, is_initial=True)
    facts = _adapter(adapter, path, asked)
    what = "initial factors of a PiSSA training of RWKV-PEFT"
    commands = [f"corda-convert merge BASE.pth --adapter TRAINED.pth --init {shlex.quote(str(path))} -o OUT"]
    return {**facts, "what": what, "is_initial": True, "next": commands}


def _covariances(path: Path, asked: _Asked) -> dict[str, Any]:
    asked.check_none(path, "covariance file")
    covariances = read_covariances(path)
    facts = inspect_model.describe_covariances(covariances)
    covariances.close()
    return {**facts, "next": inspect_model.covariance_commands(facts, path)}


def _receipt(path: Path, asked: _Asked) -> dict[str, Any]:
    brief = inspect_model.describe_receipt(path)
    asked.check_none(path, "receipt")
    return {"kind": "receipt", "what": "receipt of corda-convert", "receipt": brief, "next": []}


def _nothing_known(path: Path, names: set[str]) -> CordaConvertError:
    """The error for a folder that is no model and no adapter, with what in it may have been meant."""
    inner = sorted(name for name in names if (path / name / CONFIG_FILE).is_file())
    files = sorted(name for name in names if name.endswith((".safetensors", *PICKLED_SUFFIXES)))
    if any(name.endswith(".gguf") for name in names):
        why = "It holds GGUF files, which are read by llama.cpp alone."
    else:
        why = f"It has no {CONFIG_FILE}, no model with an index or of one file, and no {RECEIPT_FILE}."
    return InputNotFound(
        f"{path} is nothing that corda-convert knows.",
        why=why,
        next_step=f"Give what is in it: {some(inner + files)}." if inner or files else "Check the path.",
    )
