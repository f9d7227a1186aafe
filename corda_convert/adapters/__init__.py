"""Adapter formats: each one's files ↔ its typed factors, and how they fold into a weight."""

from __future__ import annotations

from pathlib import Path

from corda_convert.adapters.factors import Adapter, AdapterFormat
from corda_convert.adapters.lora_format import LoraFormat
from corda_convert.adapters.miss import BlockFormat
from corda_convert.adapters.rwkv import RwkvTraining, read_rwkv
from corda_convert.adapters.source import CONFIG_FILE, open_adapter
from corda_convert.adapters.tokens import TokensFormat
from corda_convert.errors import MalformedFile, UnsupportedInput

FORMATS: tuple[AdapterFormat, ...] = (LoraFormat(), BlockFormat(), TokensFormat())


def read_adapter(path: Path, training: RwkvTraining | None = None) -> Adapter:
    """Reads and accounts for every tensor of an adapter: a folder of PEFT, or with `training` a file of RWKV-PEFT.

    Raises one of our errors.
    """
    if path.is_file() and training is not None:
        return read_rwkv(path, training)
    if path.is_file():
        raise UnsupportedInput(
            f"{path} is a file; the folder of an adapter was expected.",
            why="The files of RWKV-PEFT can be merged, and nothing else.",
        )
    source = open_adapter(path)
    for adapter_format in FORMATS:
        if source.peft_type in adapter_format.peft_types:
            adapter = adapter_format.parse(source)
            if not adapter.modules and not adapter.replacements:
                raise MalformedFile(f"{path} adapts no module.")
            return adapter
    known = ", ".join(name for adapter_format in FORMATS for name in adapter_format.peft_types)
    raise UnsupportedInput(
        f"{path}: {CONFIG_FILE} has peft_type {source.config.get('peft_type')!r}, which this version cannot fold.",
        why=f"It knows {known}.",
        next_step="Merge it with PEFT's merge_and_unload, if PEFT can merge this kind.",
    )
