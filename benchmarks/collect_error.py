"""Both covariance files against float64: MODEL TEXT SAMPLES SEQ_LEN OURS PEFTS DEVICE.

Of the first layer: in bfloat16, inputs of later ones may be rounded otherwise in another process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_convert.checkpoint.covariances import read_covariances
from corda_convert.checkpoint.tensors import read_tensor
from corda_convert.corpus import CorpusOptions, read_samples

DISTINCT = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def main(folder: str, text: str, samples: str, seq_len: str, ours: str, pefts: str, device: str) -> None:
    """Prints each one's largest error, relative to the largest entry of its matrix."""
    options = CorpusOptions(files=(Path(text),), samples=int(samples), seq_len=int(seq_len))
    inputs = [torch.tensor([ids]) for ids in read_samples(options, AutoTokenizer.from_pretrained(folder))]
    placement = {} if device == "cpu" else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **placement)
    exact: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        rows = rows.squeeze(0).double() / rows.max().abs().double()
        exact[name] = exact.get(name, 0) + rows.T @ rows / len(inputs)

    for name in [f"model.layers.0.{module}" for module in DISTINCT]:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _module, args, name=name: add(name, args[0]))
    with torch.no_grad():
        for sample in inputs:
            model(input_ids=sample.to(model.device))
    errors = {}
    for who, path in (("ours", ours), ("peft", pefts)):
        found = read_covariances(Path(path))
        errors[who] = max(
            float((read_tensor(found.find(name)).double() - matrix.cpu()).abs().max() / matrix.abs().max())
            for name, matrix in exact.items()
        )
    print(json.dumps(errors))


if __name__ == "__main__":
    main(*sys.argv[1:])
