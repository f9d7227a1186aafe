"""Factors put together block by block: the same numbers, whatever the blocks and however many are made at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from building import (
    LAYER_SHAPES,
    lora_config,
    lora_tensors,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_lora,
    write_miss,
)
from safetensors.torch import load_file

from corda_convert import ToLoraOptions, to_lora
from corda_convert.errors import NotFinite
from corda_convert.operations import production
from corda_convert.plan import packing

SHAPES = {f"model.layers.{layer}.self_attn.q_proj": (80, 48) for layer in range(2)}
PREFIX = "base_model.model."


@pytest.fixture(params=[(1, 1), (600, 1), (600, 3), (1 << 20, 2)], ids=lambda pair: f"{pair[0]} at {pair[1]}")
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Elements of a block (16 rows at least), for so many threads."""
    elements, workers = request.param
    monkeypatch.setattr(packing, "BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(production, "worker_count", lambda device: workers)
    return int(elements)


def convert(trained: Path, output: Path, *, init: Path, uniform: bool = False) -> dict[str, torch.Tensor]:
    to_lora(trained, init=init, output=output, options=ToLoraOptions(as_is=True, uniform=uniform))
    return load_file(output / "adapter_model.safetensors")


def test_the_halves_are_those_of_both_adapters(blocks: int, tmp_path: Path) -> None:
    tensors, first = lora_tensors(SHAPES, rank=20), lora_tensors(SHAPES, rank=20, seed=7)
    trained = write_adapter(tmp_path / "trained", tensors, lora_config(20))
    initial = write_adapter(tmp_path / "initial", first, lora_config(20))
    found = convert(trained, tmp_path / "out", init=initial)
    for module in SHAPES:
        A, B = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
        assert torch.equal(found[A], torch.cat([tensors[A], first[A]]))
        assert torch.equal(found[B], torch.cat([tensors[B], -first[B]], dim=1))


def test_zeros_fill_a_uniform_rank(blocks: int, tmp_path: Path) -> None:
    first, second = SHAPES
    tensors = lora_tensors({first: (80, 48)}, rank=24) | lora_tensors({second: (80, 48)}, rank=4)
    config = lora_config(24, rank_pattern={second: 4})
    trained = write_adapter(tmp_path / "trained", tensors, config)
    initial = write_adapter(tmp_path / "initial", {name: tensor / 2 for name, tensor in tensors.items()}, config)
    found = convert(trained, tmp_path / "out", init=initial, uniform=True)
    A, B = found[f"{PREFIX}{second}.lora_A.weight"], found[f"{PREFIX}{second}.lora_B.weight"]
    own = tensors[f"{PREFIX}{second}.lora_A.weight"]
    assert A.shape == (48, 48)
    assert B.shape == (80, 48)
    assert torch.equal(A, torch.cat([own, own / 2, torch.zeros(40, 48)]))
    assert not B[:, 8:].any()


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_nan_in_any_block_is_named_and_nothing_is_written(blocks: int, part: str, tmp_path: Path) -> None:
    tensors = lora_tensors(SHAPES, rank=20)
    name = f"{PREFIX}model.layers.1.self_attn.q_proj.{part}.weight"
    tensors[name][-1, -1] = float("inf")
    initial = write_adapter(tmp_path / "initial", tensors, lora_config(20))
    trained = write_lora(tmp_path / "trained", SHAPES, rank=20)
    with pytest.raises(NotFinite, match=f"{part}.weight in .*initial/adapter_model"):
        convert(trained, tmp_path / "out", init=initial)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mini", [False, True])
@pytest.mark.parametrize(("layer", "r"), [("mlp.up_proj", 12), ("mlp.down_proj", 20)])
def test_blocks_of_miss_are_made_by_rows(blocks: int, layer: str, r: int, mini: bool, tmp_path: Path) -> None:
    module, (d_out, d_in) = f"model.layers.0.{layer}", LAYER_SHAPES[layer]
    base = write_checkpoint(tmp_path / "base")
    block = random(r, d_out // 2 if mini else d_out, seed=3)
    kind = {"init_weights": "mini", "mini_r": d_out // 2} if mini else {}
    adapter = write_miss(tmp_path / "miss", {module: (d_out, d_in)}, rank=r)
    config = read_json(adapter / "adapter_config.json") | kind
    write_adapter(adapter, {f"{PREFIX}{module}.miss_block": block}, config)
    to_lora(adapter, output=tmp_path / "out", options=ToLoraOptions(base=str(base), as_is=True))
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    change = found[f"{PREFIX}{module}.lora_B.weight"] @ found[f"{PREFIX}{module}.lora_A.weight"]
    expected = block.repeat(1, d_out // block.shape[1])[torch.arange(d_in) % r].T
    assert torch.equal(change, expected)
