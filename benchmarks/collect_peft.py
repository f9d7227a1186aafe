"""PEFT's collection, as `preprocess_corda` makes it before it decomposes: MODEL TEXT SAMPLES SEQ_LEN OUTPUT DEVICE."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import calib_cov_distribution
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_convert.corpus import CorpusOptions, read_samples

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main(folder: str, text: str, samples: str, seq_len: str, output: str, device: str) -> None:
    """Collects, saves the covariances, and prints the seconds of the collection alone and the GPU's memory."""
    options = CorpusOptions(files=(Path(text),), samples=int(samples), seq_len=int(seq_len))
    inputs = [torch.tensor([ids]) for ids in read_samples(options, AutoTokenizer.from_pretrained(folder))]
    placement = {} if device == "cpu" else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placement)

    def run() -> None:
        for sample in inputs:
            model(input_ids=sample.to(model.device))

    Path(output).unlink(missing_ok=True)  # PEFT would read it instead
    config = LoraConfig(init_lora_weights="corda", target_modules=LINEARS, corda_config=CordaConfig())
    begun = time.perf_counter()
    calib_cov_distribution(model, config, run, None, output)
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else None
    print(json.dumps({"seconds": time.perf_counter() - begun, "peak_device_memory_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
