"""What is told of dense families without transformers, beside what their own classes say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import ADAPTERS, LLAMA_CONFIG, MODEL, llama_tensors, write_checkpoint

from corda_convert.checkpoint.dense_families import DENSE_FAMILIES, dense_structure
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.structure import read_structure

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def saved(model_type: str, folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](**SIZES, **changes)
    getattr(transformers, DENSE_FAMILIES[model_type])(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("model_type", DENSE_FAMILIES)
def test_it_says_what_the_class_says(model_type: str, is_tied: bool, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(model_type, tmp_path / "model", tie_word_embeddings=is_tied))
    assert checkpoint.config is not None
    assert ("lm_head.weight" in checkpoint.tensors) == (not is_tied)
    wanted = [name for name in checkpoint.tensors if "layers" in name]
    mine = dense_structure(checkpoint.config, checkpoint.tensors, wanted)
    theirs = read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors)
    assert mine is not None
    assert theirs is not None
    on_disk = {name: parameter for name, parameter in theirs.parameters.items() if name in checkpoint.tensors}
    assert mine.parameters == on_disk
    assert mine.layouts == theirs.layouts
    assert mine.run_time_names == theirs.run_time_names
    assert theirs.converted == mine.converted == frozenset()
    assert mine.layers == {name: kind for name, kind in theirs.layers.items() if f"{name}.weight" in checkpoint.tensors}
    assert (mine.class_name, mine.base_prefix) == (theirs.class_name, theirs.base_prefix)
    assert mine.output_embedding == theirs.output_embedding
    assert set(theirs.ties) | set(theirs.ties.values()) <= {"lm_head.weight", "model.embed_tokens.weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "gpt2"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": None},
        {"quantization_config": {"quant_method": "fp8"}},
    ],
)
def test_it_says_nothing_of_other_configs(changes: dict[str, Any], tmp_path: Path) -> None:
    tensors = read_checkpoint(write_checkpoint(tmp_path / "model")).tensors
    assert dense_structure(LLAMA_CONFIG, tensors, ()) is not None
    assert dense_structure(LLAMA_CONFIG | changes, tensors, ()) is None


@pytest.mark.parametrize("wanted", ["model.embed_tokens.weight", "lm_head.weight", "model.layers.7.mlp.up_proj.weight"])
def test_it_says_nothing_where_the_class_is_needed(wanted: str, tmp_path: Path) -> None:
    tensors = read_checkpoint(write_checkpoint(tmp_path / "model")).tensors
    assert dense_structure(LLAMA_CONFIG, tensors, [wanted]) is None


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.0.up_proj.weight", "visual.patch.weight", "score.weight"])
def test_it_says_nothing_of_a_checkpoint_with_other_tensors(name: str, tmp_path: Path) -> None:
    tensors = llama_tensors() | {name: torch.ones(4, 4)}
    assert dense_structure(LLAMA_CONFIG, read_checkpoint(write_checkpoint(tmp_path / "m", tensors)).tensors, ()) is None


def test_a_merge_into_a_llama_does_not_import_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from corda_convert.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as status:\n    assert not status.code\n"
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    arguments = ["merge", MODEL, "--adapter", ADAPTERS / "lora", "-o", tmp_path / "out", "-q"]
    ran = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
