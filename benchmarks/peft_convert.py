"""PEFT's ways to an ordinary LoRA: residual MODEL ADAPTER OUTPUT INITIAL, or convert MODEL ADAPTER OUTPUT RANK.

`residual` is `save_pretrained(path_initial_model_for_weight_conversion=…)`, `convert` is `save_as_lora`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.conversion import save_as_lora
from transformers import AutoModelForCausalLM


def main(way: str, model_folder: str, adapter: str, output: str, last: str) -> None:
    """Loads the base in bfloat16, as its documentation has it."""
    warnings.simplefilter("ignore")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter)
    if way == "convert":
        save_as_lora(output, model, rank=int(last))
        return
    with tempfile.TemporaryDirectory() as folder:  # PEFT wants a name without dots, and writes into the folder
        initial = Path(folder) / "first_init"
        initial.mkdir()
        for file in Path(last).iterdir():
            (initial / file.name).symlink_to(file.resolve())
        shutil.copy(initial / "adapter_config.json", initial / "own.json")
        (initial / "adapter_config.json").unlink()
        (initial / "own.json").rename(initial / "adapter_config.json")
        model.save_pretrained(output, path_initial_model_for_weight_conversion=str(initial))


if __name__ == "__main__":
    main(*sys.argv[1:])
