"""Pickled checkpoints (`pytorch_model.bin`, `.pth`): read as torch reads them, merged as the same model in safetensors."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
import torch
from building import (
    ADAPTERS,
    LINEARS,
    LLAMA_CONFIG,
    MODEL,
    VOCABULARY,
    files_below,
    llama_tensors,
    random,
    read_json,
    write_checkpoint,
    write_json,
    write_lora,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from corda_convert import CordaConvertError, MergeOptions, RunOptions, merge
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.pickle_file import GATHER_BYTES, PickleFile
from corda_convert.checkpoint.tensors import TensorRef, read_rows, read_tensor
from corda_convert.output.digests import file_sha256

Refusal = Callable[..., str]

OBLONG = {module: shape for module, shape in LINEARS.items() if shape[0] != shape[1]}
"""What needs no model class to tell rows from columns."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*SwigPy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def as_pickles(source: Path, folder: Path) -> Path:
    """The same model with each shard as torch.save writes it, under transformers' names."""
    folder.mkdir()
    names = {path.name: f"pytorch_{path.stem}.bin" for path in source.glob("*.safetensors")}
    for name, pickled in names.items():
        torch.save(load_file(source / name), folder / pickled)
    index = source / "model.safetensors.index.json"
    if index.exists():
        content = read_json(index)
        content["weight_map"] = {name: names[shard] for name, shard in content["weight_map"].items()}
        write_json(folder / "pytorch_model.bin.index.json", content)
    for path in source.iterdir():
        if path.name not in names and path != index and path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


# Merging


def test_a_merge_into_pickled_shards_is_the_merge_into_safetensors_shards(tmp_path: Path) -> None:
    pickled = as_pickles(MODEL, tmp_path / "pickled")
    adapter = ADAPTERS / "lora"
    expected = merge(MODEL, adapter=adapter, output=tmp_path / "expected")
    found = merge(pickled, adapter=adapter, output=tmp_path / "found")
    names = files_below(tmp_path / "expected").keys()
    assert {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} <= names
    assert files_below(tmp_path / "found").keys() == names
    for path in sorted((tmp_path / "expected").glob("*.safetensors")):
        ours = load_file(tmp_path / "found" / path.name)
        assert ours.keys() == load_file(path).keys()
        assert all(same_bits(ours[name], tensor) for name, tensor in load_file(path).items())
        with safe_open(tmp_path / "found" / path.name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    indexes = [read_json(tmp_path / folder / "model.safetensors.index.json") for folder in ("expected", "found")]
    assert indexes[0] == indexes[1]
    assert found.receipt["summary"] == expected.receipt["summary"]
    assert found.receipt["not_carried_over"] == expected.receipt["not_carried_over"]


def test_a_merge_into_one_pickle_makes_one_safetensors_file(tmp_path: Path) -> None:
    model, adapter = write_checkpoint(tmp_path / "model"), write_lora(tmp_path / "lora")
    pickled = as_pickles(model, tmp_path / "pickled")
    assert (pickled / "pytorch_model.bin").is_file()
    merge(model, adapter=adapter, output=tmp_path / "expected")
    outcome = merge(pickled, adapter=adapter, output=tmp_path / "found")
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("found", "expected"))
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)
    assert sorted(files_below(tmp_path / "found")) == [
        "README.md", "config.json", "corda_convert.json", "model.safetensors"
    ]  # fmt: skip
    assert outcome.receipt["not_carried_over"] == []


def test_the_receipt_has_the_digests_of_pickled_inputs(tmp_path: Path) -> None:
    pickled = as_pickles(write_checkpoint(tmp_path / "model", shards=2), tmp_path / "pickled")
    outcome = merge(pickled, adapter=write_lora(tmp_path / "lora"), output=tmp_path / "merged")
    (listed,) = (source["files"] for source in outcome.receipt["inputs"] if source["role"] == "model")
    assert {file["name"]: file["sha256"] for file in listed} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pickled.glob("*.bin")
    }


def test_pickles_that_are_read_front_to_back_are_not_read_again_for_their_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = as_pickles(write_checkpoint(tmp_path / "model", shards=2), tmp_path / "pickled")
    read_again: list[str] = []

    def watched(path: Path) -> str:
        read_again.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("corda_convert.operations.production.file_sha256", watched)
    monkeypatch.setattr("corda_convert.output.read_ahead.PIECE_BYTES", 1000)
    monkeypatch.setattr("corda_convert.output.read_ahead._spare_memory", lambda: 1000)
    outcome = merge(pickled, adapter=write_lora(tmp_path / "lora"), output=tmp_path / "merged")
    assert not [name for name in read_again if name.endswith(".bin")]
    listed = {file["name"]: file["sha256"] for file in outcome.receipt["inputs"][0]["files"]}
    assert listed == {path.name: file_sha256(path) for path in pickled.glob("*.bin")}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_a_single_pickle_outside_a_folder_is_a_model(tmp_path: Path, suffix: str) -> None:
    tensors, adapter = llama_tensors(dtype=torch.bfloat16), write_lora(tmp_path / "lora", OBLONG)
    torch.save(tensors, tmp_path / f"model{suffix}")
    model = write_checkpoint(tmp_path / "model", tensors, config=None)
    options = MergeOptions(as_is=True)
    merge(model / "model.safetensors", adapter=adapter, output=tmp_path / "expected", options=options)
    options = MergeOptions(as_is=True, format="safetensors")
    merge(tmp_path / f"model{suffix}", adapter=adapter, output=tmp_path / "found", options=options)
    found, expected = weights(tmp_path / "found"), weights(tmp_path / "expected")
    assert found.keys() == expected.keys() == tensors.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_safetensors_win_over_pickles_beside_them_as_in_transformers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    torch.save(llama_tensors(seed=50), model / "pytorch_model.bin")
    assert [shard.path.suffix for shard in read_checkpoint(model).shards] == [".safetensors"] * 2
    outcome = merge(model, adapter=write_lora(tmp_path / "lora"), output=tmp_path / "merged")
    assert outcome.receipt["not_carried_over"] == ["pytorch_model.bin"]


def test_dtype_and_dry_run_work_on_pickles(tmp_path: Path) -> None:
    pickled = as_pickles(write_checkpoint(tmp_path / "model"), tmp_path / "pickled")
    adapter = write_lora(tmp_path / "lora")
    run = RunOptions(dtype="bfloat16", dry_run=True)
    planned = merge(pickled, adapter=adapter, output=tmp_path / "merged", run=run)
    assert not (tmp_path / "merged").exists()
    done = merge(pickled, adapter=adapter, output=tmp_path / "merged", run=RunOptions(dtype="bfloat16"))
    assert done.receipt["plan"]["write_bytes"] == planned.receipt["plan"]["write_bytes"]
    assert {tensor.dtype for tensor in weights(tmp_path / "merged").values()} == {torch.bfloat16}


# Shared storages


def tied_llama(folder: Path, *, tie: bool) -> Path:
    """A Llama whose head is its embedding, saved twice under one storage, as transformers once did."""
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    folder.mkdir()
    torch.save(tensors, folder / "pytorch_model.bin")
    write_json(folder / "config.json", {**LLAMA_CONFIG, "tie_word_embeddings": tie})
    return folder


@pytest.mark.parametrize("tie", [True, False])
def test_a_head_that_shares_the_embeddings_bytes_stays_unless_the_class_ties_it(tmp_path: Path, tie: bool) -> None:
    model = tied_llama(tmp_path / "model", tie=tie)
    targets = sorted({module.rpartition(".")[2] for module in LINEARS})
    adapter = write_lora(tmp_path / "lora", target_modules=targets)
    outcome = merge(model, adapter=adapter, output=tmp_path / "merged")
    assert ("lm_head.weight" in weights(tmp_path / "merged")) is not tie
    assert read_checkpoint(model).aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tie else {})
    (listed,) = outcome.receipt["inputs"][0]["files"]
    assert listed["shared"] == {"lm_head.weight": "model.embed_tokens.weight"}
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(peft_merged(load(model), adapter)))


def load(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return model


def peft_merged(base: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, adapter).merge_and_unload()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(VOCABULARY)[None]).logits


def test_of_a_group_of_tied_tensors_the_one_stays_that_save_pretrained_keeps(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "safetensors")
    model.config.save_pretrained(tmp_path / "pickled")
    state = model.state_dict()
    backwards = {name: state[name] for name in reversed(state)}  # second names come before the first
    torch.save(backwards, tmp_path / "pickled" / "pytorch_model.bin")
    found = read_checkpoint(tmp_path / "pickled")
    expected = read_checkpoint(tmp_path / "safetensors")
    assert len(state) == len(expected.tensors) + len(found.aliases) == len(expected.tensors) + 3
    assert found.tensors.keys() == expected.tensors.keys()
    assert set(found.aliases.values()) == {"shared.weight"}


# Tensors that do not lie in one piece


@st.composite
def strided(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """A view with any strides into a storage that begins with something else, and a range of its elements."""
    shape = draw(st.lists(st.integers(1, 9), min_size=0, max_size=4))
    steps = [draw(st.integers(0, 3)) for _ in shape]
    order = draw(st.permutations(range(len(shape))))
    strides, unit = [0] * len(shape), 1
    for dim in order:
        strides[dim] = unit * steps[dim]
        unit *= max(1, shape[dim] * max(1, steps[dim]))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int8]))
    before = draw(st.integers(0, 5))
    storage = torch.arange(before + unit).to(dtype)
    tensor = storage.as_strided(shape, strides, before)
    begin = draw(st.integers(0, tensor.numel()))
    return tensor, begin, draw(st.integers(begin, tensor.numel()))


@given(strided(), st.sampled_from([8, 16, 64, GATHER_BYTES]))
@settings(max_examples=150)
def test_any_part_of_any_strided_tensor_is_read_as_torch_lays_it_out(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[torch.Tensor, int, int], gather_bytes: int
) -> None:
    tensor, begin, end = case
    path = tmp_path_factory.getbasetemp() / "strided.pt"
    torch.save({"x": tensor}, path)
    size = tensor.element_size()
    found = bytearray((end - begin) * size)
    file = PickleFile(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corda_convert.checkpoint.pickle_file.GATHER_BYTES", gather_bytes)
        file.read_into("x", begin * size, memoryview(found))
    file.close()
    expected = tensor.clone(memory_format=torch.contiguous_format).view(-1)[begin:end]
    assert bytes(found) == (expected.view(torch.uint8).numpy().tobytes() if len(found) else b"")
    assert (file.extent("x") is not None) == tensor.is_contiguous()


def test_a_large_transposed_tensor_is_gathered_in_stretches(tmp_path: Path) -> None:
    tensor = random(300, 1000).T
    assert tensor.nbytes > 8 * GATHER_BYTES
    torch.save({"x": tensor}, tmp_path / "x.pt")
    file = PickleFile(tmp_path / "x.pt")
    longest = 0

    class Watched(PickleFile):
        def read_bytes_into(self, offset: int, view: memoryview) -> None:
            nonlocal longest
            longest = max(longest, len(view))
            super().read_bytes_into(offset, view)

    watched = Watched(tmp_path / "x.pt")
    ref = TensorRef(watched, file.specs["x"])
    assert same_bits(read_tensor(ref), tensor.contiguous())
    assert same_bits(read_rows(ref, 13, 700), tensor[13:700].contiguous())
    assert 0 < longest <= GATHER_BYTES
    for opened in (file, watched):
        opened.close()


def test_a_model_of_transposed_tensors_merges_like_any_other(tmp_path: Path) -> None:
    tensors = llama_tensors()
    transposed = {name: tensor.T.contiguous().T if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    assert not transposed["lm_head.weight"].is_contiguous()
    model, adapter = write_checkpoint(tmp_path / "model"), write_lora(tmp_path / "lora")
    pickled = as_pickles(model, tmp_path / "pickled")
    torch.save(transposed, pickled / "pytorch_model.bin")
    expected = merge(model, adapter=adapter, output=tmp_path / "expected")
    found = merge(pickled, adapter=adapter, output=tmp_path / "found")
    ours, theirs = weights(tmp_path / "found"), weights(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    assert found.receipt["summary"] == expected.receipt["summary"]


def test_untouched_tensors_of_every_kind_go_through_bit_for_bit(tmp_path: Path) -> None:
    odd = odd_tensors()
    adapter = write_lora(tmp_path / "lora", OBLONG)
    torch.save(llama_tensors() | odd, tmp_path / "model.pth")
    merge(tmp_path / "model.pth", adapter=adapter, output=tmp_path / "merged", options=MergeOptions(as_is=True))
    found = torch.load(tmp_path / "merged" / "model.pth", weights_only=True)
    assert all(same_bits(found[name], tensor.contiguous()) for name, tensor in odd.items())


def odd_tensors() -> dict[str, torch.Tensor]:
    """Every dtype that training leaves in a file, no elements, no dimensions, other strides, NaN."""
    tensors = {
        f"x.{str(dtype).removeprefix('torch.')}": torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.int8, torch.bool,
                      torch.float8_e4m3fn)
    }  # fmt: skip
    tensors |= {f"{name}.transposed": tensor.T for name, tensor in tensors.items()}
    return tensors | {
        "x.scalar": torch.tensor(3),
        "x.scalar.bool": torch.tensor(True),
        "x.empty": torch.empty(0),
        "x.empty.matrix": torch.empty(4, 0, dtype=torch.bfloat16),
        "x.nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "x.nan.transposed": torch.tensor([[float("nan"), float("inf"), -0.0]] * 2).T,
    }


# Refusals


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_in_a_models_pickle_does_not_run(refusal: Refusal, tmp_path: Path, writer: str) -> None:
    model = as_pickles(write_checkpoint(tmp_path / "model"), tmp_path / "pickled")
    content = {**llama_tensors(), "bomb": Bomb(tmp_path / "it-ran")}
    if writer == "torch":
        torch.save(content, model / "pytorch_model.bin")
    else:
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    message = refusal("merge", model, "--adapter", write_lora(tmp_path / "lora"))
    assert message.startswith(
        f"{model / 'pytorch_model.bin'} is not a file of plain tensors that can be loaded safely: "
    )
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    "shard",
    ["../pytorch_model.bin", "/etc/model.bin", "sub/model.bin", "model.safetensors", "a\\b.bin", "training.pt", ".."],
)
def test_an_index_of_pickles_may_only_name_bin_files_beside_it(refusal: Refusal, tmp_path: Path, shard: str) -> None:
    model = as_pickles(write_checkpoint(tmp_path / "model", shards=2), tmp_path / "pickled")
    index = read_json(model / "pytorch_model.bin.index.json")
    index["weight_map"]["lm_head.weight"] = shard
    write_json(model / "pytorch_model.bin.index.json", index)
    message = refusal("merge", model, "--adapter", write_lora(tmp_path / "lora"))
    assert f"names the shard {shard!r}, which is no bin file of this folder." in message


def test_a_missing_pickled_shard_and_an_index_that_contradicts_the_shards_are_refused(
    refusal: Refusal, tmp_path: Path
) -> None:
    adapter = write_lora(tmp_path / "lora")
    model = as_pickles(write_checkpoint(tmp_path / "model", shards=2), tmp_path / "pickled")
    index = model / "pytorch_model.bin.index.json"
    content = read_json(index)
    del content["weight_map"]["lm_head.weight"]
    content["weight_map"]["model.extra"] = "pytorch_model-00001-of-00002.bin"
    write_json(index, content)
    message = refusal("merge", model, "--adapter", adapter)
    assert f"{index} names 1 tensors that its shards lack: model.extra." in message
    assert f"{index} does not name 1 tensors of its shards: lm_head.weight." in message
    (model / "pytorch_model-00002-of-00002.bin").unlink()
    message = refusal("merge", model, "--adapter", adapter)
    assert f"{index} names the shard pytorch_model-00002-of-00002.bin for " in message
    index.unlink()
    assert refusal("merge", model, "--adapter", adapter).startswith(
        f"{model} has no pytorch_model.bin.index.json and no pytorch_model.bin, but pytorch_model-00001-of-00002.bin."
    )


def test_a_training_checkpoint_with_the_model_inside_is_refused_with_the_way_out(
    refusal: Refusal, tmp_path: Path
) -> None:
    torch.save({"state_dict": llama_tensors(), "epoch": 3}, tmp_path / "last.pt")
    message = refusal("merge", tmp_path / "last.pt", "--adapter", write_lora(tmp_path / "lora"))
    assert message == (
        f"{tmp_path / 'last.pt'} holds its tensors inside state_dict, not in one plain dict.\n"
        "It is a checkpoint of a training, which holds more than the model.\n"
        'Save the model\'s own dict of tensors: torch.save(torch.load(..., weights_only=True)["state_dict"], ...)'
    )


def refused(path: Path) -> str:
    with pytest.raises(CordaConvertError) as refused:
        PickleFile(path)
    return str(refused.value)


def test_the_format_of_before_torch_1_6_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"x": random(2, 2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    message = refused(tmp_path / "old.bin")
    assert "it is no zip archive, which torch.save writes since torch 1.6" in message
    assert "old pickle format" in message


def test_names_that_are_no_text_and_tensors_in_conjugate_form_are_refused(tmp_path: Path) -> None:
    torch.save({1: random(2)}, tmp_path / "x.pt")
    assert "names are no text: 1" in refused(tmp_path / "x.pt")
    torch.save({"x": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "x.pt")
    assert "sparse, quantized" in refused(tmp_path / "x.pt")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], *, compressed: Iterable[str] = ()) -> Path:
    """The archive with other records."""
    import zipfile

    with zipfile.ZipFile(path) as source, zipfile.ZipFile(path.with_name("rewritten.pt"), "w") as target:
        for entry in source.infolist():
            kind = (
                zipfile.ZIP_DEFLATED if any(entry.filename.endswith(end) for end in compressed) else zipfile.ZIP_STORED
            )
            target.writestr(entry.filename, change(entry.filename, source.read(entry)), kind)
    return path.with_name("rewritten.pt")


def test_a_tensor_that_reaches_outside_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save({"x": random(4, 4), "y": random(4, 4)}, tmp_path / "x.pt")
    shorter = rewritten(tmp_path / "x.pt", lambda name, data: data[:32] if name.endswith("data/0") else data)
    message = refused(shorter)
    assert message == (
        f"{shorter}: x needs 64 bytes of its storage, which has 32.\nThe file is damaged.\n"
        "Get the file again from where it came."
    )


def test_compressed_archives_and_another_byte_order_are_refused(tmp_path: Path) -> None:
    torch.save({"x": random(4, 4)}, tmp_path / "x.pt")
    assert "is compressed" in refused(rewritten(tmp_path / "x.pt", lambda _, data: data, compressed=["data/0"]))
    big = rewritten(tmp_path / "x.pt", lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert "another byte order" in refused(big)


def test_storages_of_another_device_are_read_without_it(tmp_path: Path) -> None:
    tensors = {"x": random(4, 4), "y": random(3)}
    torch.save(tensors, tmp_path / "x.pt")
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    moved = rewritten(tmp_path / "x.pt", lambda name, data: data.replace(cpu, cuda))
    file = PickleFile(moved)
    assert all(same_bits(read_tensor(TensorRef(file, file.specs[name])), tensor) for name, tensor in tensors.items())
    file.close()


def saved(path: Path) -> Mapping[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return loaded


def test_index_metadata_of_pickles_is_carried_over(tmp_path: Path) -> None:
    model = as_pickles(write_checkpoint(tmp_path / "model", shards=2), tmp_path / "pickled")
    index = json.loads((model / "pytorch_model.bin.index.json").read_text())
    index["metadata"]["by"] = "somebody"
    write_json(model / "pytorch_model.bin.index.json", index)
    merge(model, adapter=write_lora(tmp_path / "lora"), output=tmp_path / "merged")
    metadata = read_json(tmp_path / "merged" / "model.safetensors.index.json")["metadata"]
    size = sum(tensor.nbytes for path in model.glob("*.bin") for tensor in saved(path).values())
    assert metadata == {"by": "somebody", "total_size": size}
