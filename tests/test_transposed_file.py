"""A matrix read by its columns is its transpose."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from building import LLAMA_CONFIG, lora_config, random, write_adapter, write_checkpoint
from safetensors.torch import save_file

from corda_convert import MergeOptions, merge
from corda_convert.adapters import lora
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.checkpoint.tensors import TensorRef, read_rows, read_tensor
from corda_convert.checkpoint.transposed_file import transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_of_the_transpose_are_columns(dtype: torch.dtype, tmp_path: Path) -> None:
    matrix = random(5, 37, dtype=dtype)
    save_file({"other": random(3), "A": matrix}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    ref = transposed(TensorRef(file, file.specs["A"]))
    assert ref.shape == (37, 5)
    assert torch.equal(read_tensor(ref), matrix.T)
    assert torch.equal(read_rows(ref, 7, 20), matrix[:, 7:20].T)
    assert torch.equal(read_rows(ref.rows(7, 20), 2, 13), matrix[:, 9:20].T)
    part = transposed(TensorRef(file, file.specs["A"]).rows(1, 4))
    assert torch.equal(read_rows(part, 30, 37), matrix[1:4, 30:].T)
    assert read_rows(ref, 4, 4).shape == (0, 5)
    with pytest.raises(ValueError, match="no whole columns"):
        ref.file.read_into("A", 1, memoryview(bytearray(10)))


def test_an_embedding_is_folded_the_same_whether_its_factor_is_read_whole_or_by_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with initial factors, and with a scaling that is no power of two."""
    vocabulary, hidden, rank = 5000, 64, 8
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    tensors = {name: random(*shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    model = write_checkpoint(tmp_path / "model", tensors, config=LLAMA_CONFIG | {"tie_word_embeddings": False})
    prefix = "base_model.model.model.embed_tokens.lora_embedding"
    for name, seed in (("trained", 1), ("initial", 2)):
        factors = {
            f"{prefix}_A": random(rank, vocabulary, seed=3) + 0.01 * random(rank, vocabulary, seed=seed),
            f"{prefix}_B": random(hidden, rank, seed=4) + 0.01 * random(hidden, rank, seed=seed),
        }
        write_adapter(tmp_path / name, factors, lora_config(rank, lora_alpha=12, target_modules=["embed_tokens"]))
    outputs = {}
    for large in (1 << 30, 1):
        monkeypatch.setattr(lora, "LARGE_BYTES", large)
        options = MergeOptions(init=tmp_path / "initial", as_is=True)
        outcome = merge(model, adapter=tmp_path / "trained", output=tmp_path / str(large), options=options)
        digests = [file["sha256"] for source in outcome.receipt["inputs"] for file in source["files"]]
        assert all(digests)
        outputs[large] = (tmp_path / str(large) / "model.safetensors").read_bytes(), digests
    assert outputs[1] == outputs[1 << 30]
    assert outputs[1][0] != (model / "model.safetensors").read_bytes()
