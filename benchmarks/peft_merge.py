"""The merge as PEFT's documentation has it: MODEL ADAPTER OUTPUT DEVICE."""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(model_folder: str, adapter: str, output: str, device: str) -> None:
    """Loads, merges and saves, in bfloat16."""
    placement = {} if device == "cpu" else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, **placement)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
