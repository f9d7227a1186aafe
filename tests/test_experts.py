"""LoRA on parameters: experts in stacks and routers, their nesting, orientation and patterns, against PEFT and float64."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from building import read_json, write_adapter, write_checkpoint, write_json
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from corda_convert import MergeOptions, RunOptions, merge
from corda_convert.adapters import expert_columns
from corda_convert.checkpoint.safetensors_file import SafetensorsFile
from corda_convert.plan.model import Plan

Refusal = Callable[..., str]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:The following (rank|alpha)_pattern keys did not match"
    ),  # PEFT counts modules only
]

MOE = "model.layers.0.mlp"
QWEN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"


def saved(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model on disk, and as transformers loads it."""
    model = tiny(family).to(dtype)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype)


def trained(model: PreTrainedModel, folder: Path, targets: tuple[str, ...], **options: Any) -> PeftModel:
    """An adapter on those parameters with random factors, saved."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [], "target_parameters": [*targets], **options})
    adapted = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)
    adapted.save_pretrained(folder)
    return adapted


def merged(tmp_path: Path, model: PreTrainedModel, rounding: Any = "peft") -> dict[str, Tensor]:
    """The run-time parameters of the merged model."""
    output = tmp_path / "output"
    merge(tmp_path / "base", adapter=tmp_path / "adapter", output=output, options=MergeOptions(rounding=rounding))
    loaded: dict[str, Tensor] = type(model).from_pretrained(output, dtype=model.dtype).state_dict()
    return loaded


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> list[str]:
    """The parameters that the merge changed, after their bits were found to be PEFT's."""
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    return [name for name in base if not torch.equal(ours[name], base[name])]


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


# What PEFT 0.21 makes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_and_experts_in_one_adapter_with_patterns_and_rslora(tmp_path: Path, dtype: torch.dtype) -> None:
    base = saved("qwen3_moe", tmp_path / "base", dtype)
    options = {
        "use_rslora": True,
        "rank_pattern": {"mlp.experts.gate_up_proj": 3, "layers.1.mlp.gate.weight": 1},
        "alpha_pattern": {"down_proj": 5, "layers.0.mlp.gate.weight": 7},
    }
    adapted = trained(base, tmp_path / "adapter", QWEN, **options)
    ours = merged(tmp_path, base)
    changed = assert_same(ours, adapted.merge_and_unload().state_dict(), base.state_dict())
    assert changed == [name for name in base.state_dict() if name.endswith(QWEN)]
    receipt = read_json(tmp_path / "output" / "corda_convert.json")
    facts = {t["name"]: t["changes"][0] for t in receipt["tensors"] if t["action"] == "folded"}
    gate_up = {"module": f"{MOE}.experts.gate_up_proj", "kind": "lora_parameter", "rank": 3, "scaling": 3 / 3**0.5}
    assert facts[f"{MOE}.experts.2.up_proj.weight"] == gate_up
    assert facts[f"{MOE}.gate.weight"]["scaling"] == 7 / 2**0.5


@pytest.mark.parametrize(
    "targets", [("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"), ("down_proj",)]
)
def test_each_of_a_modules_parameters_has_its_own_wrapper(tmp_path: Path, targets: tuple[str, ...]) -> None:
    base = saved("gpt_oss", tmp_path / "base")
    adapted = trained(base, tmp_path / "adapter", targets)
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum("layers.0" in key and "lora_A" in key for key in keys) == len(targets)
    ours = merged(tmp_path, base)
    changed = assert_same(ours, adapted.merge_and_unload().state_dict(), base.state_dict())
    assert changed == [name for name in base.state_dict() if name.rpartition(".")[2] in targets]


def test_layers_below_a_wrapped_module_are_found(tmp_path: Path) -> None:
    base = saved("gemma3", tmp_path / "base")
    head = "vision_tower.head"
    adapted = trained(base, tmp_path / "adapter", (f"{head}.probe",), target_modules=[f"{head}.mlp.fc1", "q_proj"])
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert f"base_model.model.model.{head}.base_layer.mlp.fc1.lora_A.weight" in keys
    ours = merged(tmp_path, base)
    theirs = adapted.merge_and_unload().state_dict()
    name = f"model.{head}.mlp.fc1"
    A, B = (keys[f"base_model.model.model.{head}.base_layer.mlp.fc1.lora_{side}.weight"] for side in "AB")
    theirs[f"{name}.weight"] = base.state_dict()[f"{name}.weight"] + B @ A * 1.5  # PEFT does not get to it
    theirs[f"{name}.bias"] = base.state_dict()[f"{name}.bias"]
    changed = assert_same(ours, {name: theirs[name] for name in ours}, base.state_dict())
    assert {f"model.{head}.probe", f"{name}.weight"} < set(changed)


def test_experts_of_one_parameter_lie_in_several_shards(tmp_path: Path) -> None:
    base = saved("qwen3_moe", tmp_path / "whole")
    tensors = on_disk(tmp_path / "whole")
    apart = {name: tensors[name] for shard in range(5) for name in sorted(tensors)[shard::5]}
    write_checkpoint(tmp_path / "base", apart, shards=3, config=read_json(tmp_path / "whole" / "config.json"))
    places = read_json(tmp_path / "base" / "model.safetensors.index.json")["weight_map"]
    assert len({places[f"{MOE}.experts.{expert}.up_proj.weight"] for expert in range(4)}) == 3
    adapted = trained(base, tmp_path / "adapter", QWEN)
    assert_same(merged(tmp_path, base), adapted.merge_and_unload().state_dict(), base.state_dict())
    assert read_json(tmp_path / "output" / "model.safetensors.index.json")["weight_map"] == places


def test_a_matrix_of_a_linear_layer_may_be_targeted_as_a_parameter(tmp_path: Path) -> None:
    base = saved("gpt2", tmp_path / "base")
    targets = ("attn.c_attn.weight", "mlp.c_proj.weight")  # Conv1D: PEFT takes it as it lies here
    adapted = trained(base, tmp_path / "adapter", targets)
    changed = assert_same(merged(tmp_path, base), adapted.merge_and_unload().state_dict(), base.state_dict())
    assert changed == [name for name in base.state_dict() if name.endswith(targets)]


def test_by_default_the_sum_is_rounded_once(tmp_path: Path) -> None:
    base = saved("qwen3_moe", tmp_path / "base", torch.bfloat16)
    trained(base, tmp_path / "adapter", QWEN)
    exact = {name: t.double() for name, t in base.state_dict().items()}
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours = merged(tmp_path, base, "nearest")
    for layer in range(2):
        experts = f"model.layers.{layer}.mlp.experts"
        for key, parameter in ((f"{experts}.base_layer", "gate_up_proj"), (experts, "down_proj")):
            A, B = (factors[f"base_model.model.{key}.lora_{side}.weight"].double() for side in "AB")
            stack = torch.stack([1.5 * B[:, e::4] @ A[2 * e : 2 * e + 2] for e in range(4)])
            name = f"{experts}.{parameter}"
            assert torch.equal(ours[name], (exact[name] + stack).to(torch.bfloat16))


# Stacks of square matrices, by version: PEFT changed its mind twice

SQUARE = "down_proj"  # of the tiny gpt-oss, whose module says is_transposed


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
@pytest.mark.parametrize(
    ("version", "is_transposed_means"),
    [(None, (True, True)), ("0.17.1", (True, True)), ("0.18.1", (True, True)), ("0.18.0.dev0", (True, True)),
     ("0.19.0", (False, True)), ("0.19.1", (True, False)), ("0.21.2", (True, False)), ("0.22.0.dev0", (True, False))],
)  # fmt: skip
def test_a_stack_of_square_matrices_lies_as_in_the_peft_of_the_training(
    tmp_path: Path, family: str, version: str | None, is_transposed_means: tuple[bool, bool]
) -> None:
    base = square(family, tmp_path / "base")
    name = next(name for name in base.state_dict() if name.endswith("down_proj"))
    weight = base.state_dict()[name].double()
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(8, 32, generator=generator), torch.randn(32, 8, generator=generator)
    key = f"base_model.model.{name.rpartition('.')[0]}.lora_"
    adapter = write_adapter(tmp_path / "adapter", {f"{key}A.weight": A, f"{key}B.weight": B}, config(version))
    output = tmp_path / "output"
    merge(tmp_path / "base", adapter=adapter, output=output)
    ours = type(base).from_pretrained(output).state_dict()[name].double()
    stack = torch.stack([2 * B[:, e::4].double() @ A[2 * e : 2 * e + 2].double() for e in range(4)])
    is_input_first = is_transposed_means[0 if family == "gpt_oss" else 1]
    expected = weight + (stack.transpose(1, 2) if is_input_first else stack)
    assert torch.allclose(ours, expected, atol=1e-5)
    assert not torch.allclose(ours, weight + stack if is_input_first else weight + stack.transpose(1, 2), atol=1e-2)


def square(family: str, folder: Path) -> PreTrainedModel:
    """A tiny model whose down_proj is square, with `is_transposed` (gpt-oss) or without."""
    model = tiny(family)
    if family == "granitemoe":
        model.config.intermediate_size = 32
        torch.manual_seed(0)
        model = type(model)(model.config)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def config(version: str | None, **changes: Any) -> dict[str, Any]:
    written = {} if version is None else {"peft_version": version}
    return {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [], "target_parameters": ["experts.down_proj"],
        "init_lora_weights": True, "bias": "none", **written, **changes,
    }  # fmt: skip


# What is refused


def gpt_oss(tmp_path: Path, **changes: Any) -> tuple[Path, Path]:
    """The tiny gpt-oss, and an adapter on both stacks of its first layer."""
    tiny("gpt_oss").save_pretrained(tmp_path / "base")
    key = f"base_model.model.{MOE}.experts"
    tensors = {
        f"{key}.lora_A.weight": torch.ones(8, 32), f"{key}.lora_B.weight": torch.ones(32, 8),
        f"{key}.base_layer.lora_A.weight": torch.ones(8, 32), f"{key}.base_layer.lora_B.weight": torch.ones(64, 8),
    }  # fmt: skip
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    options = config("0.21.2", **{"target_parameters": targets, **changes})
    return tmp_path / "base", write_adapter(tmp_path / "adapter", tensors, options)


def change_tensors(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    write_adapter(adapter, tensors, read_json(adapter / "adapter_config.json"))


@pytest.mark.parametrize("version", ["0.18.2.dev0", "0.19.0.dev0", "0.19.1.dev0", "main", "0.18.7"])
def test_a_version_that_does_not_tell_the_orientation_is_refused(
    refusal: Refusal, tmp_path: Path, version: str
) -> None:
    base, adapter = gpt_oss(tmp_path, peft_version=version)
    assert refusal("merge", base, "--adapter", adapter) == (
        f"{MOE}.experts.down_proj is a stack of square matrices: whether LoRA on it is transposed depends on the version of "
        f"PEFT, and adapter_config.json says {version!r}.\n"
        "Write the released version of PEFT that the training used as peft_version into the config."
    )


def test_a_wrapper_that_is_missing_is_noticed(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path)
    for side in "AB":
        change_tensors(adapter, lambda tensors: tensors.pop(f"base_model.model.{MOE}.experts.lora_{side}.weight"))  # noqa: B023
    assert refusal("merge", base, "--adapter", adapter) == (
        f"adapter: {MOE}.experts.base_layer has LoRA factors, but {MOE}.experts has none.\nThe adapter file is incomplete."
    )


def test_fewer_wrappers_than_targeted_parameters_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path)
    for side in "AB":
        key = f"base_model.model.{MOE}.experts.base_layer.lora_{side}.weight"
        change_tensors(adapter, lambda tensors: tensors.pop(key))  # noqa: B023
    assert refusal("merge", base, "--adapter", adapter) == (
        f"1 of 1 adapted modules find no weight in base: {MOE}.experts.\nThe adapter was trained on another model."
    )


def test_half_a_pair_of_factors_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path)
    change_tensors(adapter, lambda tensors: tensors.pop(f"base_model.model.{MOE}.experts.lora_A.weight"))
    assert refusal("merge", base, "--adapter", adapter) == (
        f"adapter: {MOE}.experts has lora_B but no lora_A.\nThe adapter file is incomplete."
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_for_another_number_of_experts_is_refused(refusal: Refusal, tmp_path: Path, rank: int) -> None:
    base, adapter = gpt_oss(tmp_path, rank_pattern={"down_proj": rank})
    assert refusal("merge", base, "--adapter", adapter) == (
        f"{MOE}.experts.down_proj has lora_A (8, 32) and lora_B (32, 8); adapter_config.json says rank {rank} for each of 4 "
        f"experts, so ({4 * rank}, d_in) and (d_out, {4 * rank}) were expected.\n"
        "The config and the weights are not of one adapter, or the model has another number of experts."
    )


def test_factors_of_another_shape_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path)
    key = f"base_model.model.{MOE}.experts.base_layer.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors.update({key: torch.ones(48, 8)}))
    assert refusal("merge", base, "--adapter", adapter) == (
        f"Adapter does not fit {MOE}.experts.gate_up_proj: it is (4, 32, 64), lora_B gives 48 rows and lora_A 32 columns."
    )


def test_without_the_models_class_parameters_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path)
    write_json(base / "config.json", {"model_type": "made_up"})
    assert refusal("merge", base, "--adapter", adapter).endswith(
        f"{MOE}.experts: without the model's class it is not known how LoRA on a parameter is meant.\n"
        "Put the model's config.json beside its weights, of an architecture that transformers knows."
    )


def test_a_residual_initialization_of_parameters_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path, init_lora_weights="pissa")
    assert refusal("merge", base, "--adapter", adapter) == (
        f"adapter has LoRA on parameters ({MOE}.experts) with init_lora_weights='pissa': what is left of a parameter beside "
        "its initial factors is not known.\nPEFT initializes layers in this way, and no stacks of experts."
    )


@pytest.mark.parametrize("targets", ["experts.down_proj", [1], {"a": 1}])
def test_target_parameters_that_are_no_list_of_names_are_refused(
    refusal: Refusal, tmp_path: Path, targets: object
) -> None:
    base, adapter = gpt_oss(tmp_path, target_parameters=targets)
    assert refusal("merge", base, "--adapter", adapter) == (
        f"adapter_config.json: target_parameters is {targets!r}, a list of names was expected."
    )


def test_target_parameters_without_factors_of_any_are_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path, target_parameters=["experts_of_another_name.down_proj"])
    assert "has target_parameters, but there are no factors of a parameter." in refusal(
        "merge", base, "--adapter", adapter
    )


def test_nan_in_the_factors_of_experts_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    base, adapter = gpt_oss(tmp_path)
    key = f"base_model.model.{MOE}.experts.base_layer.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors[key][5].fill_(torch.nan))
    assert refusal("merge", base, "--adapter", adapter).startswith(
        f"{key} in {adapter / 'adapter_model.safetensors'} holds NaN or Inf."
    )


# Adapters of transformers 4, where every expert was a layer of its own: names, rank and alpha as trained

OLD_NAMES = {
    "qwen3_moe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj", "mlp.gate"),
    "mixtral": (*(f"block_sparse_moe.experts.{{}}.w{part}" for part in (1, 2, 3)), "block_sparse_moe.gate"),
    "olmoe": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.down_proj", "self_attn.q_proj"),
    "deepseek_v3": (
        "mlp.experts.{}.up_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.down_proj",
        "mlp.gate",
    ),
}


@pytest.mark.parametrize("family", OLD_NAMES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_that_were_layers_of_their_own_are_merged_with_their_own_scaling(
    tmp_path: Path, family: str, use_rslora: bool
) -> None:
    base = saved(family, tmp_path / "base")
    tensors = on_disk(tmp_path / "base")
    modules = list(dict.fromkeys(f"model.layers.1.{name.format(e)}" for name in OLD_NAMES[family] for e in (0, 3)))
    factors = {
        f"base_model.model.{module}.lora_{side}.weight": torch.randn(*shape)
        for module in modules
        for side, shape in factor_shapes(tensors[f"{module}.weight"]).items()
    }
    options = {"target_modules": modules, "target_parameters": None, "use_rslora": use_rslora, "lora_alpha": 3}
    write_adapter(tmp_path / "adapter", factors, config(None, **options))
    merge(tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "output")
    scaling = 3 / (2**0.5 if use_rslora else 2)
    after = on_disk(tmp_path / "output")
    for name, before in tensors.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        expected = before.double()
        if f"{module}.lora_A.weight" in factors:
            A, B = (factors[f"{module}.lora_{side}.weight"].double() for side in "AB")
            expected = expected + scaling * B @ A
        assert torch.allclose(after[name].double(), expected, atol=1e-5), name
    assert sum(not torch.equal(after[name], tensors[name]) for name in tensors) == len(modules)
    assert type(base).from_pretrained(tmp_path / "output").state_dict().keys() == base.state_dict().keys()


def factor_shapes(weight: Tensor) -> dict[str, tuple[int, int]]:
    return {"A": (2, weight.shape[1]), "B": (weight.shape[0], 2)}


@pytest.mark.parametrize("is_old", [True, False])
def test_experts_of_a_stack_that_is_not_whole_are_refused_with_the_reason(
    refusal: Refusal, tmp_path: Path, is_old: bool
) -> None:
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    tensors = on_disk(tmp_path / "base")
    del tensors[f"{MOE}.experts.1.up_proj.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    module = f"{MOE}.experts.0.gate_proj" if is_old else f"{MOE}.experts"
    targets = None if is_old else ["mlp.experts.gate_up_proj"]
    r, d_out = (2, 24) if is_old else (8, 48)
    key = f"base_model.model.{module}.lora_"
    factors = {f"{key}A.weight": torch.ones(r, 32), f"{key}B.weight": torch.ones(d_out, r)}
    adapter = write_adapter(tmp_path / "adapter", factors, config("0.21.2", target_parameters=targets))
    message = refusal("merge", tmp_path / "base", "--adapter", adapter)
    assert message.startswith(f"1 of 1 adapted modules find no weight in base: {module}")
    assert f"transformers loads it into {MOE}.experts.gate_up_proj with MergeModulelist, Concatenate: " in message


# Memory and reading


def plan_of(tmp_path: Path, experts: int) -> Plan:
    model = transformers.GptOssForCausalLM(
        transformers.GptOssConfig(
            hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, vocab_size=64, num_local_experts=experts, num_experts_per_tok=2,
        )
    ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(tmp_path / f"base-{experts}")
    width = 8 * experts
    key = f"base_model.model.{MOE}.experts"
    factors = {f"{key}.lora_A.weight": torch.ones(width, 256), f"{key}.lora_B.weight": torch.ones(256, width)}
    adapter = write_adapter(tmp_path / f"adapter-{experts}", factors, config("0.21.2", r=8))
    outcome = merge(
        tmp_path / f"base-{experts}", adapter=adapter, output=tmp_path / "output", run=RunOptions(dry_run=True)
    )
    return outcome.plan


def test_memory_does_not_grow_with_the_number_of_experts_in_one_tensor(tmp_path: Path) -> None:
    few, many = plan_of(tmp_path, 32), plan_of(tmp_path, 64)
    assert many.memory_bytes == few.memory_bytes
    assert many.read_bytes > 1.9 * few.read_bytes
    assert few.workspace_bytes > 2 * expert_columns._HELD_BYTES  # the columns that are held count


def test_columns_of_many_experts_are_read_with_one_pass_through_lora_b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    read_into = SafetensorsFile.read_into

    def counted(file: SafetensorsFile, name: str, begin: int, view: memoryview) -> None:
        read[name] += len(view)
        read_into(file, name, begin, view)

    monkeypatch.setattr(SafetensorsFile, "read_into", counted)
    base = saved("qwen3_moe", tmp_path / "base")
    trained(base, tmp_path / "adapter", QWEN)
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    read.clear()
    merged(tmp_path, base)
    experts = [name for name in factors if ".experts." in name and "lora_B" in name]
    assert len(experts) == 4
    assert {name: read[name] for name in experts} == {name: factors[name].nbytes for name in experts}


def test_columns_of_experts_are_read_again_in_groups_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_columns, "_HELD_BYTES", 24 * 2 * 4 * 2)  # two experts at a time, or one
    monkeypatch.setattr(expert_columns, "_READ_BYTES", 100)
    base = saved("qwen3_moe", tmp_path / "base")
    adapted = trained(base, tmp_path / "adapter", QWEN)
    assert_same(merged(tmp_path, base), adapted.merge_and_unload().state_dict(), base.state_dict())


@pytest.mark.parametrize("family", OLD_NAMES)
def test_experts_that_were_layers_of_their_own_are_found_in_the_stacks_of_a_newer_disk(
    tmp_path: Path, family: str
) -> None:
    base = saved(family, tmp_path / "base")
    tiny(family).save_pretrained(tmp_path / "stacked", save_original_format=False)
    tensors = on_disk(tmp_path / "base")
    stacked = [name for name, t in on_disk(tmp_path / "stacked").items() if t.ndim == 3]
    assert stacked
    modules = list(dict.fromkeys(f"model.layers.1.{name.format(e)}" for name in OLD_NAMES[family] for e in (0, 3)))
    factors = {
        f"base_model.model.{module}.lora_{side}.weight": torch.randn(*shape)
        for module in modules
        for side, shape in factor_shapes(tensors[f"{module}.weight"]).items()
    }
    adapter = write_adapter(tmp_path / "adapter", factors, config(None, target_modules=modules, target_parameters=None))
    expected = merged(tmp_path, base)
    merge(tmp_path / "stacked", adapter=adapter, output=tmp_path / "newer", options=MergeOptions(rounding="peft"))
    found = type(base).from_pretrained(tmp_path / "newer").state_dict()
    assert on_disk(tmp_path / "newer").keys() == on_disk(tmp_path / "stacked").keys()
    changed = assert_same(found, expected, base.state_dict())
    assert {name for name in changed if name in stacked}
