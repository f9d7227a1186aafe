"""Reading: headers against the safetensors library, pickles against torch, names and structure against transformers."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import (
    HIDDEN,
    INNER,
    LINEARS,
    LLAMA_CONFIG,
    UP,
    covariance,
    covariance_tensors,
    lora_config,
    random,
    write_adapter,
    write_checkpoint,
    write_covariances,
    write_lora,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from corda_convert import MergeOptions, merge
from corda_convert.adapters import read_adapter
from corda_convert.adapters.factors import Adapter
from corda_convert.checkpoint.covariances import read_covariances
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.names import NameMap, Target
from corda_convert.checkpoint.pickle_file import PickleFile
from corda_convert.checkpoint.safetensors_file import SafetensorsFile, read_header
from corda_convert.checkpoint.structure import ModelStructure, read_structure
from corda_convert.checkpoint.tensors import DTYPE_BITS, TensorRef, read_tensor
from corda_convert.errors import UnsupportedInput
from corda_convert.operations.edits import fit_changes

TORCH_DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip

OTHER_DTYPES = {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1}


def read_all(path: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(path)
    tensors = {name: read_tensor(TensorRef(file, spec)) for name, spec in file.specs.items()}
    file.close()
    return tensors


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return first.contiguous().view(-1).view(torch.uint8).equal(second.contiguous().view(-1).view(torch.uint8))


# Headers


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_is_read_as_the_safetensors_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(24 * 8, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = raw.view(dtype).reshape(2, 3, -1)
    save_file({"first": tensor, "second": tensor[1].clone()}, tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    found = read_all(tmp_path / "x.safetensors")
    assert found.keys() == expected.keys() == {"first", "second"}
    assert all(same_bits(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_dtypes_that_torch_may_lack_are_described(tmp_path: Path, dtype: str) -> None:
    header = {"x": {"dtype": dtype, "shape": [3, 4], "data_offsets": [0, 12 * OTHER_DTYPES[dtype]]}}
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))
    with safe_open(path, "pt") as stream:  # the library knows it too
        assert stream.get_slice("x").get_shape() == [3, 4]
    spec = read_header(path).specs["x"]
    assert (spec.dtype, spec.shape, spec.nbytes, spec.row_nbytes) == (dtype, (3, 4), 12, 4)


def test_the_library_writes_no_dtype_that_is_not_known(tmp_path: Path) -> None:
    """The list is the format's own, from the library's error message for a dtype that there is not."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 57) + b'{"x":{"dtype":"NONE","shape":[1],"data_offsets":[0,4]}}  ' + bytes(4))
    with pytest.raises(Exception, match="unknown variant `NONE`") as raised, safe_open(path, "pt"):
        pass
    listed = {part for part in str(raised.value).split("`")[3::2] if part.replace("_", "").isalnum()}
    assert len(listed) > 10
    assert listed <= set(DTYPE_BITS)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2), (), (1,), (1, 1, 1)])
def test_tensors_without_elements_or_dimensions_are_read(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"before": random(3), "x": random(*shape) if shape else torch.tensor(2.5), "z": random(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = read_all(tmp_path / "x.safetensors")
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


def test_metadata_order_and_extents_are_those_of_the_file(tmp_path: Path) -> None:
    tensors = {"z": random(2, 2), "a": random(5).to(torch.float16), "ü·{}": random(3)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, {"format": "pt", "note": "größer"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "größer"}
    assert header.file_bytes == path.stat().st_size
    position = header.data_begin
    for name, extent in header.extents.items():
        assert extent.begin == position
        assert header.specs[name].nbytes == extent.nbytes == tensors[name].nbytes
        position += extent.nbytes
    assert position == header.file_bytes


def test_a_header_with_tensors_in_another_order_than_their_data_is_read_in_the_order_of_the_data(
    tmp_path: Path,
) -> None:
    header = {
        "second": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "first": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2f", 1.0, 2.0))
    found = read_all(path)
    assert list(found) == ["first", "second"]
    assert {name: float(tensor) for name, tensor in found.items()} == {"first": 1.0, "second": 2.0}


@given(st.data())
def test_any_part_of_a_tensor_is_read_in_place(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.safetensors"
    content = {"a": bytes(range(100)), "b": bytes(range(100, 200))}
    save_file({name: torch.tensor(list(value), dtype=torch.uint8) for name, value in content.items()}, path)
    name = data.draw(st.sampled_from("ab"))
    begin = data.draw(st.integers(0, 100))
    view = bytearray(data.draw(st.integers(0, 100 - begin)))
    file = SafetensorsFile(path)
    file.read_into(name, begin, memoryview(view))
    file.close()
    assert bytes(view) == content[name][begin : begin + len(view)]


def test_a_read_past_the_end_of_a_tensor_is_an_error_and_not_its_neighbour(tmp_path: Path) -> None:
    save_file({"a": random(4), "b": random(4)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is past its 16 bytes"):
        file.read_into("a", 8, memoryview(bytearray(9)))


# Pickles


@pytest.mark.parametrize(
    "dtype", [d for d in TORCH_DTYPES if d not in (torch.uint16, torch.uint32, torch.uint64)], ids=str
)
def test_a_pickle_is_read_as_torch_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(24 * 8, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    whole = raw.view(dtype).reshape(4, -1)
    tensors = {"whole": whole, "transposed": whole.T, "rows": whole[1:3], "scalar": whole[0, 0], "none": whole[:0]}
    torch.save(tensors, tmp_path / "x.pt")
    expected = torch.load(tmp_path / "x.pt", weights_only=True)
    file = PickleFile(tmp_path / "x.pt")
    assert file.specs.keys() == expected.keys()
    for name, spec in file.specs.items():
        assert same_bits(read_tensor(TensorRef(file, spec)), expected[name].contiguous())
    file.close()


def test_parts_of_a_pickled_tensor_are_read(tmp_path: Path) -> None:
    tensor = random(6, 5)
    torch.save({"x": tensor.T}, tmp_path / "x.pt")
    view = bytearray(2 * 6 * 4)
    PickleFile(tmp_path / "x.pt").read_into("x", 3 * 6 * 4, memoryview(view))
    assert same_bits(torch.frombuffer(view, dtype=torch.float32).reshape(2, 6), tensor.T[3:5].contiguous())


def test_pickled_parameters_are_read_as_tensors(tmp_path: Path) -> None:
    torch.save({"x": nn.Parameter(random(3, 3))}, tmp_path / "x.bin")
    file = PickleFile(tmp_path / "x.bin")
    found = read_tensor(TensorRef(file, file.specs["x"]))
    assert same_bits(found, random(3, 3))
    assert not found.requires_grad


def test_an_adapter_in_a_pickle_is_the_same_adapter(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "lora")
    before = contents(read_adapter(folder))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    after = contents(read_adapter(folder))
    assert before.keys() == after.keys()
    assert len(after) == 2 * len(LINEARS)
    assert all(same_bits(after[key], before[key]) for key in before)


def contents(adapter: Adapter) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (factors.module_name, operand): read_tensor(ref)
        for factors in adapter.modules
        for operand, ref in factors.tensors().items()
    }


# Covariances


def test_an_alias_finds_the_matrix_that_is_stored_under_another_module(tmp_path: Path) -> None:
    tensors = covariance_tensors()
    gate = UP.replace("up_proj", "gate_proj")
    del tensors[UP]
    metadata = {"aliases": json.dumps({UP: gate}), "samples": "3"}
    found = read_covariances(write_covariances(tmp_path / "c.safetensors", tensors, metadata))
    assert found.find(UP) is found.matrices[gate]
    assert found.find(gate) is found.matrices[gate]
    assert found.find("model.layers.9.mlp.up_proj") is None
    assert found.metadata["samples"] == "3"


def test_pickled_covariances_and_sharded_ones_hold_the_same_matrices(tmp_path: Path) -> None:
    tensors = covariance_tensors()
    single = read_covariances(write_covariances(tmp_path / "c.safetensors", tensors))
    pickled = read_covariances(write_covariances(tmp_path / "c.pt", tensors))
    sharded = read_covariances(write_checkpoint(tmp_path / "folder", tensors, shards=3, config=None))
    for name, tensor in tensors.items():
        for covariances in (single, pickled, sharded):
            ref = covariances.find(name)
            assert ref is not None
            assert same_bits(read_tensor(ref), tensor)
    assert len(sharded.files) == 3


# Structure


def build(model_class: str, config: Any, folder: Path) -> nn.Module:
    """A randomly initialized model of a few thousand parameters, saved as transformers saves it."""
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    model.save_pretrained(folder)
    return model


MODELS = {
    "LlamaForCausalLM": transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False),
    "Qwen2ForCausalLM": transformers.Qwen2Config(
        hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True),
    "GPT2LMHeadModel": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16),
    "OPTForCausalLM": transformers.OPTConfig(
        hidden_size=16, ffn_dim=24, vocab_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, word_embed_proj_dim=8),
    "BertForSequenceClassification": transformers.BertConfig(
        hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16),
    "BertModel": transformers.BertConfig(
        hidden_size=16, intermediate_size=24, vocab_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16),
}  # fmt: skip


def structure_of(folder: Path) -> tuple[NameMap, ModelStructure]:
    checkpoint = read_checkpoint(folder)
    structure = read_structure(folder, checkpoint.config, checkpoint.tensors)
    assert structure is not None
    return NameMap(checkpoint, structure), structure


@pytest.mark.parametrize("model_class", MODELS)
def test_the_default_targets_are_every_linear_but_the_head(tmp_path: Path, model_class: str) -> None:
    model = build(model_class, MODELS[model_class], tmp_path)
    names, structure = structure_of(tmp_path)
    expected = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in ("lm_head", "classifier")
    ]
    assert list(structure.linear_modules()) == expected
    assert len(expected) >= 7
    for module in expected:
        tensor_name = names.parameter(f"{module}.weight")
        assert tensor_name is not None
        weight = model.get_submodule(module).weight
        assert same_bits(read_tensor(names.checkpoint.tensors[tensor_name]), weight.detach())
        is_transposed = isinstance(model.get_submodule(module), Conv1D)
        target = names.target(f"{module}.weight")
        assert target is not None
        assert target.kind == ("conv1d" if is_transposed else "linear")


@pytest.mark.parametrize("model_class", ["GPT2LMHeadModel", "Qwen2ForCausalLM"])
def test_a_tied_head_is_known_as_tied(tmp_path: Path, model_class: str) -> None:
    build(model_class, MODELS[model_class], tmp_path)
    names, structure = structure_of(tmp_path)
    embedding = {"GPT2LMHeadModel": "transformer.wte", "Qwen2ForCausalLM": "model.embed_tokens"}[model_class]
    tensor_name = names.parameter(f"{embedding}.weight")
    assert tensor_name is not None
    assert names.is_tied(tensor_name)
    target = names.target(f"{embedding}.weight")
    assert target is not None
    assert target.kind == "embedding"
    assert structure.output_embedding == "lm_head"
    untied = names.parameter(f"{structure.linear_modules()[0]}.weight")
    assert untied is not None
    assert not names.is_tied(untied)


def test_a_folder_without_a_config_or_of_an_unknown_architecture_has_no_structure(tmp_path: Path) -> None:
    for config in (None, {"architectures": ["NoSuchModel"], "model_type": "no_such_type"}, {"hidden_size": 3}):
        assert read_structure(tmp_path, config, []) is None


def test_code_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "it-ran"
    config = {
        "model_type": "made_up",
        "architectures": ["MadeUp"],
        "auto_map": {"AutoConfig": "modeling.MadeUpConfig", "AutoModelForCausalLM": "modeling.MadeUp"},
    }
    folder = write_checkpoint(tmp_path / "model", config=config)
    (folder / "modeling.py").write_text(f"open({str(target)!r}, 'w')\n")
    checkpoint = read_checkpoint(folder)
    assert read_structure(folder, checkpoint.config, checkpoint.tensors) is None
    assert not target.exists()


# Names


def test_gpt2_saved_without_its_prefix_is_found_by_run_time_and_by_disk_names(tmp_path: Path) -> None:
    model = build("GPT2LMHeadModel", MODELS["GPT2LMHeadModel"], tmp_path / "model")
    bare = {
        name.removeprefix("transformer."): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    assert "h.0.attn.c_attn.weight" in bare
    save_file(bare, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    names, structure = structure_of(tmp_path / "model")
    assert "transformer.h.0.attn.c_attn" in structure.linear_modules()
    for module in ("transformer.h.1.mlp.c_fc", "h.1.mlp.c_fc"):
        placements, missing = placed(names, module)
        assert missing == []
        assert placements[module].tensor_name == "h.1.mlp.c_fc.weight"
        assert placements[module].kind == "conv1d"


def placed(names: NameMap, *modules: str) -> tuple[dict[str, Target], list[str]]:
    """Where the modules' weights lie, and which modules find none."""
    targets = names.find([[f"{module}.weight"] for module in modules])
    found = {module: target for module, target in zip(modules, targets, strict=True) if target is not None}
    return found, [module for module in modules if module not in found]


def map_of(tmp_path: Path, *modules: str) -> NameMap:
    tensors = {f"{module}.weight": random(4, 6) for module in modules}
    return NameMap(read_checkpoint(write_checkpoint(tmp_path / "model", tensors, config=None)), None)


def test_one_prefix_that_fits_all_modules_is_substituted_without_a_class(tmp_path: Path) -> None:
    names = map_of(tmp_path, "backbone.layers.0.fc", "backbone.layers.1.fc", "head")
    placements, missing = placed(names, "model.layers.0.fc", "model.layers.1.fc")
    assert missing == []
    assert {module: placement.tensor_name for module, placement in placements.items()} == {
        "model.layers.0.fc": "backbone.layers.0.fc.weight",
        "model.layers.1.fc": "backbone.layers.1.fc.weight",
    }
    assert all(placement.kind is None for placement in placements.values())


def test_a_prefix_may_be_added_or_removed(tmp_path: Path) -> None:
    names = map_of(tmp_path, "language_model.model.layers.0.fc", "language_model.model.layers.1.fc")
    placements, missing = placed(names, "model.layers.0.fc", "model.layers.1.fc")
    assert missing == []
    assert placements["model.layers.1.fc"].tensor_name == "language_model.model.layers.1.fc.weight"
    names = map_of(tmp_path, "layers.0.fc", "layers.1.fc")
    placements, missing = placed(names, "model.layers.0.fc", "model.layers.1.fc")
    assert missing == []
    assert placements["model.layers.1.fc"].tensor_name == "layers.1.fc.weight"


def test_two_prefixes_that_both_fit_are_not_guessed_between(tmp_path: Path) -> None:
    names = map_of(tmp_path, "encoder.layers.0.fc", "decoder.layers.0.fc")
    placements, missing = placed(names, "model.layers.0.fc")
    assert (placements, missing) == ({}, ["model.layers.0.fc"])


def test_a_prefix_that_fits_only_some_modules_is_not_substituted(tmp_path: Path) -> None:
    names = map_of(tmp_path, "backbone.layers.0.fc", "backbone.layers.1.gate")
    placements, missing = placed(names, "model.layers.0.fc", "model.layers.1.fc")
    assert (placements, missing) == ({}, ["model.layers.0.fc", "model.layers.1.fc"])


def test_a_prefix_is_not_substituted_where_some_modules_are_found_as_they_are(tmp_path: Path) -> None:
    names = map_of(tmp_path, "model.layers.0.fc", "backbone.layers.1.fc")
    placements, missing = placed(names, "model.layers.0.fc", "model.layers.1.fc")
    assert (list(placements), missing) == (["model.layers.0.fc"], ["model.layers.1.fc"])


def test_a_substitution_that_takes_two_modules_to_one_tensor_is_none(tmp_path: Path) -> None:
    names = map_of(tmp_path, "layers.0.fc")
    placements, missing = placed(names, "a.layers.0.fc", "b.layers.0.fc")
    assert (placements, missing) == ({}, ["a.layers.0.fc", "b.layers.0.fc"])


def test_one_prefix_is_substituted_for_weights_and_biases_alike(tmp_path: Path) -> None:
    tensors = {"old.0.fc.weight": random(4, 6), "old.0.fc.bias": random(4), "head.bias": random(4)}
    model = write_checkpoint(tmp_path / "model", tensors, config=None)
    A, B, b = random(4, 6, seed=1), random(4, 4, seed=2), random(4, seed=3)
    key = "base_model.model.model.layers.0.fc.lora_"
    factors = {f"{key}A.weight": A, f"{key}B.weight": B, f"{key}B.bias": b}
    adapter = write_adapter(tmp_path / "lora", factors, lora_config(lora_bias=True))
    merge(model, adapter=adapter, output=tmp_path / "output", options=MergeOptions(as_is=True))
    merged = load_file(tmp_path / "output" / "model.safetensors")
    assert torch.allclose(merged["old.0.fc.weight"], tensors["old.0.fc.weight"] + 2 * B @ A, atol=1e-5)
    assert torch.allclose(merged["old.0.fc.bias"], tensors["old.0.fc.bias"] + 2 * b, atol=1e-5)
    assert torch.equal(merged["head.bias"], tensors["head.bias"])


def test_a_parameter_with_several_names_takes_the_prefix_with_the_first_that_is_there(tmp_path: Path) -> None:
    tensors = {"old.a.weight": random(4, 6), "old.b.kernel": random(4, 6), "old.b.bias": random(4)}
    names = NameMap(read_checkpoint(write_checkpoint(tmp_path / "model", tensors, config=None)), None)
    found = names.find([["new.a.weight"], ["new.b.weight", "new.b.kernel"], ["new.b.bias"]])
    assert [target and target.tensor_name for target in found] == ["old.a.weight", "old.b.kernel", "old.b.bias"]
    assert names.find([["new.a.weight"], ["new.b.weight"]]) == [None, None]
    assert names.find([["new.a.weight"], []]) == [None, None]


def test_a_square_weight_of_unknown_orientation_is_refused(tmp_path: Path) -> None:
    square = "model.layers.0.self_attn.o_proj"
    assert LINEARS[square] == (HIDDEN, HIDDEN)
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "model", config=None))
    adapter = read_adapter(write_lora(tmp_path / "lora", {square: LINEARS[square]}))
    with pytest.raises(UnsupportedInput) as refused:
        fit_changes(adapter, NameMap(checkpoint, None))
    assert str(refused.value) == (
        f"{square}.weight is square, and without the model's class it is not known whether it is stored as (d_out, d_in) or "
        "transposed.\nPut the model's config.json beside its weights, of an architecture that transformers knows."
    )


@pytest.mark.parametrize(("stored", "layout"), [((INNER, HIDDEN), "out_in"), ((HIDDEN, INNER), "in_out")])
def test_the_orientation_of_a_rectangular_weight_follows_from_its_shape(
    tmp_path: Path, stored: tuple[int, int], layout: str
) -> None:
    model = write_checkpoint(tmp_path / "model", {f"{UP}.weight": random(*stored)}, config=None)
    adapter = read_adapter(write_lora(tmp_path / "lora", {UP: (INNER, HIDDEN)}))
    (fitted,) = fit_changes(adapter, NameMap(read_checkpoint(model), None))
    assert (fitted.change.module_name, fitted.target.tensor_name, fitted.layout) == (UP, f"{UP}.weight", layout)


def test_a_single_file_is_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    checkpoint = read_checkpoint(folder / "model.safetensors")
    assert (checkpoint.is_folder, checkpoint.config, checkpoint.index_metadata) == (False, None, None)
    assert checkpoint.tensors.keys() == read_checkpoint(folder).tensors.keys()
    assert read_checkpoint(folder).config == LLAMA_CONFIG


def test_a_sharded_checkpoint_has_the_tensors_of_all_shards(tmp_path: Path) -> None:
    single = read_checkpoint(write_checkpoint(tmp_path / "single"))
    sharded = read_checkpoint(write_checkpoint(tmp_path / "sharded", shards=3))
    assert sharded.nbytes == single.nbytes
    assert {name: ref.shape for name, ref in sharded.tensors.items()} == {
        name: ref.shape for name, ref in single.tensors.items()
    }
    assert [shard.path.name for shard in sharded.shards] == [f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3)]
    assert covariance(3).shape == (3, 3)
