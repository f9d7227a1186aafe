"""Names and layouts of checkpoints, against what transformers saves and loads.

Every element of a tiny model has a value of its own. transformers writes the files; a layout is right if it puts the
same values together from the parameters.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import transformers
from building import read_json, write_json
from families import FAMILIES, RARE_FAMILIES, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, T5ForConditionalGeneration

from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.layout import DiskLayout, matrix_shape
from corda_convert.checkpoint.structure import ModelStructure, read_structure

FILE = "model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def numbered(family: str) -> PreTrainedModel:
    """The family's tiny model, where every element of every floating-point parameter has a value of its own."""
    model = tiny(family)
    offset = 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(offset, offset + parameter.numel()).reshape(parameter.shape))
            offset += parameter.numel()
    assert offset < 2**24  # float32 holds all of them
    return model


def structure_of(folder: Path, wanted: tuple[str, ...] = ()) -> ModelStructure:
    checkpoint = read_checkpoint(folder)
    structure = read_structure(folder, checkpoint.config, checkpoint.tensors, wanted)
    checkpoint.close()
    assert structure is not None
    return structure


def assembled(layout: DiskLayout, parameters: Mapping[str, Tensor]) -> Tensor:
    """The disk's matrix, put together from the parameters by the layout's pieces."""
    matrix = torch.full(layout.matrix, float("nan"), dtype=torch.float64)
    for piece in layout.pieces:
        parameter = parameters[piece.parameter]
        whole = (
            parameter.reshape(matrix_shape(tuple(parameter.shape))) if piece.expert is None else parameter[piece.expert]
        )
        block = whole[piece.first : piece.first + piece.count]
        block = block.T if piece.transposed else block
        assert block.shape == (piece.rows, layout.matrix[1])
        assert matrix[piece.row : piece.row + piece.rows].isnan().all(), "two pieces overlap"
        matrix[piece.row : piece.row + piece.rows] = block
    return matrix


def assert_layouts(folder: Path, model: PreTrainedModel, structure: ModelStructure) -> None:
    """The files are what the layouts make of the model's parameters, and nothing of the model is left out."""
    parameters = model.state_dict()
    disk = load_file(folder / FILE)
    assert set(structure.layouts) == set(disk)
    assert not structure.unsupported
    for name, tensor in disk.items():
        layout = structure.layouts[name]
        assert torch.equal(assembled(layout, parameters), tensor.double().reshape(layout.matrix)), name
    assert {name: tuple(tensor.shape) for name, tensor in parameters.items()} == {
        name: parameter.shape for name, parameter in structure.parameters.items()
    }
    covered: dict[str, int] = {}
    for layout in structure.layouts.values():
        for piece in layout.pieces:
            assert (piece.expert is not None) == structure.parameters[piece.parameter].is_stack
            covered[piece.parameter] = covered.get(piece.parameter, 0) + piece.rows * layout.matrix[1]
    missing = {name for name, tensor in parameters.items() if covered.get(name) != tensor.numel()}
    assert missing <= set(structure.ties), "a parameter lies on disk in part or not at all"


def assert_loads(folder: Path, model: PreTrainedModel) -> None:
    """transformers reads the files as this model."""
    loaded = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("family", [family for family in (*FAMILIES, *RARE_FAMILIES) if family != "inkling2"])
def test_every_saved_tensor_is_what_its_layout_makes_of_the_parameters(tmp_path: Path, family: str) -> None:
    model = numbered(family)
    model.save_pretrained(tmp_path)
    assert_loads(tmp_path, model)
    structure = structure_of(tmp_path)
    assert structure.class_name == type(model).__name__
    assert_layouts(tmp_path, model, structure)


def test_a_tensor_that_is_joined_with_others_is_not_plain(tmp_path: Path) -> None:
    tiny("olmo_hybrid").save_pretrained(tmp_path)
    layouts = structure_of(tmp_path).layouts
    joined = {
        name: (layout.pieces[0].first, layout.matrix[0]) for name, layout in layouts.items() if not layout.is_plain
    }
    query, key, value = (f"model.layers.0.linear_attn.{letter}_conv1d.weight" for letter in "qkv")
    rows = load_file(tmp_path / FILE)[query].shape[0]
    value_rows = load_file(tmp_path / FILE)[value].shape[0]
    assert joined == {query: (0, rows), key: (rows, rows), value: (2 * rows, value_rows)}


# Other layouts on disk


def _renamed(*pairs: tuple[str, str]) -> Callable[[str, Tensor], tuple[str, Tensor]]:
    """Replaces the first prefix that fits."""

    def change(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old), tensor
        return name, tensor

    return change


def _transposed_experts(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return name, tensor.transpose(1, 2) if ".mlp.experts." in name else tensor


def _old_norms(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"), tensor


OLD_VISION = _renamed(
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)

OLD_LAYOUTS = {
    "llava, prefixes of transformers 4": ("llava", OLD_VISION),
    "gemma3, prefixes of transformers 4": ("gemma3", OLD_VISION),
    "qwen2_5_vl, prefixes of transformers 4": (
        "qwen2_5_vl", _renamed(("model.language_model.", "model."), ("model.visual.", "visual."))),
    "gpt2 without the head's prefix": ("gpt2", _renamed(("transformer.", ""))),
    "bert, names of its first release": ("bert", _old_norms),
    "qwen3_vl_moe, experts as (E, d_in, d_out)": ("qwen3_vl_moe", _transposed_experts),
}  # fmt: skip


def saved_as(
    folder: Path, model: PreTrainedModel, change: Callable[[str, Tensor], tuple[str, Tensor]]
) -> dict[str, str]:
    """Saves the model with every parameter (not those that are tied) under another name or in another shape.

    Returns run-time name → disk name.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    ties = model.all_tied_weights_keys
    changed = {name: change(name, tensor) for name, tensor in model.state_dict().items() if name not in ties}
    save_file({name: tensor.contiguous() for name, tensor in changed.values()}, folder / FILE, {"format": "pt"})
    return {name: disk for name, (disk, _) in changed.items()}


@pytest.mark.parametrize("case", OLD_LAYOUTS)
def test_older_layouts_are_followed_as_transformers_loads_them(tmp_path: Path, case: str) -> None:
    family, change = OLD_LAYOUTS[case]
    model = numbered(family)
    disk_names = saved_as(tmp_path, model, change)
    assert_loads(tmp_path, model)
    structure = structure_of(tmp_path)
    assert_layouts(tmp_path, model, structure)
    assert {name: structure.rename(disk) for name, disk in disk_names.items()} == {name: name for name in disk_names}


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe", "granitemoe", "deepseek_v3", "gemma3", "llava"])
def test_a_checkpoint_with_run_time_names_is_followed(tmp_path: Path, family: str) -> None:
    model = numbered(family)
    saved_as(tmp_path, model, lambda name, tensor: (name, tensor))
    assert_loads(tmp_path, model)
    assert_layouts(tmp_path, model, structure_of(tmp_path))


def test_the_model_renames_modules_of_older_adapters(tmp_path: Path) -> None:
    tiny("mixtral").save_pretrained(tmp_path)
    structure = structure_of(tmp_path)
    assert structure.rename("model.layers.0.block_sparse_moe.gate.weight") == "model.layers.0.mlp.gate.weight"
    expert = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert structure.rename(expert) not in structure.parameters  # fusing is no renaming
    assert expert in structure.layouts
    assert structure.rename("model.layers.0.self_attn.q_proj.weight") == "model.layers.0.self_attn.q_proj.weight"


# Tensors that are not on disk

SAVED_WITHOUT_HEAD = {
    "llama_tied": "lm_head.weight",
    "gpt2": "lm_head.weight",
    "gemma3": "lm_head.weight",
    "t5": "lm_head.weight",
    "whisper": "proj_out.weight",
    "bert_masked": "cls.predictions.decoder.weight",
}


def untie(folder: Path) -> None:
    config = read_json(folder / "config.json")
    config["tie_word_embeddings"] = False
    if "text_config" in config:
        config["text_config"]["tie_word_embeddings"] = False
    write_json(folder / "config.json", config)


def assert_head_loads(folder: Path, model: PreTrainedModel, disk_name: str, head: str) -> None:
    """A head saved under this name, in a checkpoint that ties nothing, is the head that transformers loads."""
    untie(folder)
    value = torch.arange(64 * 32, dtype=torch.float32).reshape(64, 32)
    save_file({**load_file(folder / FILE), disk_name: value}, folder / FILE, {"format": "pt"})
    loaded = type(model).from_pretrained(folder, dtype=torch.float32).state_dict()
    assert torch.equal(loaded[head], value)
    structure = structure_of(folder)
    assert (head in structure.ties) == structure.ties_are_forced == isinstance(model, T5ForConditionalGeneration)
    assert structure.run_time_names[disk_name] == head


@pytest.mark.parametrize("family", SAVED_WITHOUT_HEAD)
def test_the_name_of_a_tied_head_is_one_that_loads_as_the_head(tmp_path: Path, family: str) -> None:
    model = numbered(family)
    model.save_pretrained(tmp_path)
    head = SAVED_WITHOUT_HEAD[family]
    structure = structure_of(tmp_path)
    assert head in structure.ties
    assert head not in structure.run_time_names.values()
    disk_name = structure.disk_name(head)
    assert disk_name is not None
    assert disk_name not in structure.layouts
    assert_head_loads(tmp_path, model, disk_name, head)


def test_the_name_of_a_tied_head_keeps_the_older_prefixes_of_its_checkpoint(tmp_path: Path) -> None:
    model = numbered("gemma3")
    saved_as(tmp_path, model, OLD_VISION)
    disk_name = structure_of(tmp_path).disk_name("lm_head.weight")
    assert disk_name == "language_model.lm_head.weight"
    assert_head_loads(tmp_path, model, disk_name, "lm_head.weight")


def test_every_name_that_is_on_disk_is_also_the_one_it_would_be_saved_under(tmp_path: Path) -> None:
    for family in ("qwen2_5_vl", "mixtral", "gpt2"):
        tiny(family).save_pretrained(tmp_path / family)
        structure = structure_of(tmp_path / family)
        names = structure.run_time_names
        assert {disk: structure.disk_name(name) for disk, name in names.items()} == {disk: disk for disk in names}
    assert structure.disk_name("no.such.parameter") is None


# Kinds


def test_the_kinds_of_modules_are_told_apart(tmp_path: Path) -> None:
    expected = {
        ("gpt2", "transformer.h.0.attn.c_attn.weight"): "conv1d",
        ("gpt2", "transformer.h.0.attn.c_attn.bias"): "conv1d",
        ("gpt2", "transformer.wte.weight"): "embedding",
        ("gpt2", "lm_head.weight"): "linear",
        ("gpt2", "transformer.ln_f.weight"): "other",
        ("whisper", "model.encoder.conv1.weight"): "conv",
        ("dinov2", "embeddings.patch_embeddings.projection.weight"): "conv",
        ("qwen2_5_vl", "model.visual.patch_embed.proj.weight"): "conv",
        ("gemma3", "model.vision_tower.head.attention.in_proj_weight"): "attention",
        ("gemma3", "model.vision_tower.head.attention.out_proj.weight"): "linear",
        ("qwen3_moe", "model.layers.0.mlp.experts.down_proj"): "parameter",
        ("qwen3_moe", "model.layers.0.mlp.gate.weight"): "parameter",
        ("deepseek_v3", "model.layers.1.mlp.gate.e_score_correction_bias"): "other",
    }
    structures = {}
    for family in {family for family, _ in expected}:
        tiny(family).save_pretrained(tmp_path / family)
        structures[family] = structure_of(tmp_path / family)
    found = {(family, name): structures[family].parameters[name].kind for family, name in expected}
    assert found == expected
    gpt2 = structures["gpt2"]
    assert gpt2.layers["transformer.h.0.attn.c_attn"] == "conv1d"
    assert "transformer.h.0.attn.c_attn.bias" not in gpt2.layers


@pytest.mark.parametrize(
    ("family", "expected"), [("gpt_oss", True), ("aria", True), ("llama4_text", False), ("qwen3_moe", False)]
)
def test_transposed_experts_are_known_as_such(tmp_path: Path, family: str, expected: bool) -> None:
    tiny(family).save_pretrained(tmp_path)
    stacks = [parameter for parameter in structure_of(tmp_path).parameters.values() if parameter.is_stack]
    assert len(stacks) >= 2
    assert {parameter.is_transposed for parameter in stacks} == {expected}


# What does not fit

STACK = "model.layers.0.mlp.experts"


def test_a_vocabulary_of_another_size_is_laid_out_by_the_disk(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["lm_head.weight"] = torch.zeros(70, 32)
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    structure = structure_of(tmp_path)
    assert structure.layouts["lm_head.weight"].matrix == (70, 32)
    assert structure.layouts["lm_head.weight"].pieces[0].count == 70
    assert structure.parameters["lm_head.weight"].shape == (64, 32)


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (("2.up",), "tensors of different shapes cannot be joined"),
        (("2.up", "2.gate"), f"this gives (3, 48, 32) for {STACK}.gate_up_proj, which is (4, 48, 32) in the model"),
    ],
)
def test_a_missing_expert_leaves_its_whole_stack_without_layout(
    tmp_path: Path, missing: tuple[str, ...], reason: str
) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    for expert in missing:
        del tensors[f"{STACK}.{expert}_proj.weight"]
    save_file(tensors, tmp_path / FILE, {"format": "pt"})
    structure = structure_of(tmp_path)
    stack = {name for name in tensors if name.startswith(f"{STACK}.") and "down_proj" not in name}
    assert len(stack) == 8 - len(missing)
    assert set(structure.layouts) == set(tensors) - stack
    assert stack < structure.converted
    operations = "MergeModulelist, Concatenate"
    whole = f"transformers loads it into {STACK}.gate_up_proj with {operations}: {reason}"
    assert structure.unsupported == dict.fromkeys(stack, whole)


def test_a_conversion_of_single_rows_is_named_as_unsupported(tmp_path: Path) -> None:
    tiny("inkling2").save_pretrained(tmp_path)
    structure = structure_of(tmp_path)
    stacks = {f"model.llm.layers.{layer}.mlp.experts.w13_weight" for layer in range(2)}
    assert set(structure.unsupported) == stacks
    assert stacks <= structure.converted
    assert set(structure.layouts) == set(load_file(tmp_path / FILE)) - stacks
    assert "with Interleave: " in structure.unsupported[min(stacks)]


def test_tensors_that_the_model_does_not_know_have_no_layout(tmp_path: Path) -> None:
    tiny("deepseek_v3").save_pretrained(tmp_path)
    extra = "model.layers.2.mlp.experts.0.gate_proj.weight"  # a layer for predicting further tokens
    save_file({**load_file(tmp_path / FILE), extra: torch.zeros(24, 32)}, tmp_path / FILE, {"format": "pt"})
    structure = structure_of(tmp_path)
    assert extra not in structure.layouts
    assert extra not in structure.unsupported


# The class


@pytest.mark.parametrize(
    ("family", "wanted", "expected"),
    [
        ("llama", (), "LlamaForCausalLM"),
        ("llama", ("model.layers.0.self_attn.q_proj", "lm_head"), "LlamaForCausalLM"),
        ("llama", ("model.layers.0.self_attn.q_proj", "score"), "LlamaForSequenceClassification"),
        ("llama", ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj.weight"), "LlamaForCausalLM"),
        ("llama", ("model.layers.0.self_attn.q_proj", "no.such.module"), "LlamaForCausalLM"),
        ("bert_masked", ("bert.encoder.layer.0.attention.self.query", "classifier"), "BertForSequenceClassification"),
        ("bert_masked", ("cls.predictions.transform.dense",), "BertForMaskedLM"),
        ("mixtral", ("model.layers.0.block_sparse_moe.gate", "score"), "MixtralForSequenceClassification"),
    ],
)
def test_the_class_that_has_what_the_adapter_names_is_taken(
    tmp_path: Path, family: str, wanted: tuple[str, ...], expected: str
) -> None:
    tiny(family).save_pretrained(tmp_path)
    assert structure_of(tmp_path, wanted).class_name == expected


def test_without_architectures_the_config_tells_the_class(tmp_path: Path) -> None:
    tiny("t5").save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", read_json(tmp_path / "config.json") | {"architectures": None})
    assert structure_of(tmp_path).class_name == "T5Model"
    assert structure_of(tmp_path, ("lm_head",)).class_name == "T5ForConditionalGeneration"
