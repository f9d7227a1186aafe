"""Adapter formats: each one's files ↔ its typed factors, and how they fold into a weight."""

from __future__ import annotations

from pathlib import Path

from corda_convert.adapters.factors import Adapter, AdapterFormat
from corda_convert.adapters.lora_format import LoraFormat
from corda_convert.adapters.miss import BlockFormat
from corda_convert.adapters.source import CONFIG_FILE, open_adapter
from corda_convert.adapters.tokens import TokensFormat
from corda_convert.errors import MalformedFile, UnsupportedInput

FORMATS: tuple[AdapterFormat, ...] = (LoraFormat(), BlockFormat(), TokensFormat())


def read_adapter(folder: Path) -> Adapter:
    """Reads and accounts for every tensor of a PEFT adapter. Raises one of our errors."""
    source = open_adapter(folder)
    for adapter_format in FORMATS:
        if source.peft_type in adapter_format.peft_types:
            adapter = adapter_format.parse(source)
            if not adapter.modules and not adapter.replacements:
                raise MalformedFile(f"{folder} adapts no module.")
            return adapter
    known = ", ".join(name for adapter_format in FORMATS for name in adapter_format.peft_types)
    raise UnsupportedInput(
        f"{folder}: {CONFIG_FILE} has peft_type {source.config.get('peft_type')!r}, which this version cannot fold.",
        why=f"It knows {known}.",
        next_step="Merge it with PEFT's merge_and_unload, if PEFT can merge this kind.",
    )
