"""axolotl's memory-efficient merge, shard by shard, as `axolotl merge-lora` calls it: MODEL ADAPTER OUTPUT DEVICE."""

from __future__ import annotations

import sys

from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient


def main(model: str, adapter: str, output: str, device: str) -> None:
    """Merges with its defaults for a base that is not quantized."""
    merge_lora_sharded_efficient(model, adapter, output, device=device)


if __name__ == "__main__":
    main(*sys.argv[1:])
