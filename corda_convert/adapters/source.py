"""An adapter folder as it is on disk: its config, its tensors by stripped key, and what PEFT's wrappers added to names."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.checkpoint.folder import missing_path, model_name, read_json
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.remote_file import is_there
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorFile, TensorRef
from corda_convert.errors import AdapterMismatch, InputNotFound, MalformedFile

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_WEIGHTS_FILE = "adapter_model.bin"
PEFT_PREFIX = "base_model.model."

_WRAPPERS = re.compile(r"(_orig_mod\.|_fsdp_wrapped_module\.)")
_ADAPTER_NAME = re.compile(r"\.default(?=\.(?:weight|bias)$|$)")


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter's config and tensors. `tensors` is keyed without PEFT's prefix and wrapper names.

    `folder` is the one file, where an adapter is that.
    """

    folder: Path
    config: dict[str, Any]
    file: TensorFile
    tensors: dict[str, TensorRef]

    @property
    def name(self) -> str:
        return model_name(self.folder)

    @property
    def is_file(self) -> bool:
        return self.folder == self.file.path

    @property
    def peft_type(self) -> str:
        return str(self.config.get("peft_type", "")).upper()

    @property
    def base_name(self) -> str:
        """`base_model_name_or_path`, or nothing."""
        return str(self.config.get("base_model_name_or_path") or "")

    def close(self) -> None:
        self.file.close()


def open_adapter(folder: Path) -> AdapterSource:
    """Reads an adapter's config and header. Raises `InputNotFound` or `MalformedFile`."""
    if not folder.is_dir():
        raise missing_path(folder, "adapter")
    if not (folder / CONFIG_FILE).is_file():
        raise InputNotFound(
            f"{folder} holds no {CONFIG_FILE}, so it is no adapter of PEFT.",
            next_step=f"PEFT saved one in {inner[0]}: give that."
            if (inner := [path.parent for path in sorted(folder.glob(f"*/{CONFIG_FILE}"))])
            else "Give the folder that PEFT's save_pretrained wrote.",
        )
    file = _open_weights(folder)
    tensors: dict[str, TensorRef] = {}
    for name, spec in file.specs.items():
        key = strip_key(name)
        if key in tensors:
            raise MalformedFile(f"{file.path}: {name} and {tensors[key].name} are the same tensor, {key}.")
        tensors[key] = TensorRef(file, spec)
    if not tensors:
        raise MalformedFile(f"{file.path} holds no tensors.", next_step="Save the adapter again.")
    return AdapterSource(folder, read_json(folder / CONFIG_FILE), file, tensors)


def _open_weights(folder: Path) -> TensorFile:
    if is_there(folder / WEIGHTS_FILE):
        return SafetensorsFile(folder / WEIGHTS_FILE)
    if (folder / PICKLED_WEIGHTS_FILE).is_file():
        return PickleFile(folder / PICKLED_WEIGHTS_FILE)
    raise InputNotFound(
        f"{folder} holds neither {WEIGHTS_FILE} nor {PICKLED_WEIGHTS_FILE}.", next_step="Save the adapter again."
    )


def strip_key(name: str) -> str:
    """`base_model.model.M.lora_A.default.weight` → `M.lora_A.weight`."""
    return _ADAPTER_NAME.sub("", _WRAPPERS.sub("", name).removeprefix(PEFT_PREFIX))


def integer(config: dict[str, Any], key: str, default: int) -> int:
    """A positive integer of the config. Raises `AdapterMismatch`."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= sys.maxsize:
        raise AdapterMismatch(f"{CONFIG_FILE}: {key} is {value!r}, a positive integer was expected.")
    return value


def number(config: dict[str, Any], key: str, default: float) -> float:
    """A finite number of the config. Raises `AdapterMismatch`."""
    value = config.get(key, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise AdapterMismatch(f"{CONFIG_FILE}: {key} is {value!r}, a number was expected.")
    return float(value)
