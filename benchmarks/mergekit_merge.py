"""mergekit's passthrough of MODEL+ADAPTER, as `mergekit-yaml` runs it: MODEL ADAPTER OUTPUT DEVICE CACHE.

It merges the adapter with PEFT into a model in CACHE, which has to be empty, and then writes the output from that one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main(model: str, adapter: str, output: str, device: str, cache: str) -> None:
    """Merges in bfloat16, reading and saving with as little memory as its options allow."""
    config = {
        "merge_method": "passthrough",
        "dtype": "bfloat16",
        "models": [{"model": f"{Path(model).resolve()}+{Path(adapter).resolve()}"}],
    }
    options = MergeOptions(
        lora_merge_cache=cache, lora_merge_dtype="bfloat16", device=device, lazy_unpickle=True, copy_tokenizer=False
    )
    options.apply_global_options()
    run_merge(MergeConfiguration.model_validate(config), output, options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
