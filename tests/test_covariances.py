"""Covariance files: what PEFT and the CorDA authors' scripts write, ours, and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import families
import pytest
import torch
from building import (
    COVARIANCES,
    LINEARS,
    MODEL,
    UP,
    covariance,
    covariance_tensors,
    files_below,
    random,
    weight_files,
    write_checkpoint,
    write_covariances,
)
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_convert import DecomposeOptions, decompose
from corda_convert.checkpoint.covariances import Covariances, at_run_time, read_covariances
from corda_convert.checkpoint.folder import read_checkpoint
from corda_convert.checkpoint.names import NameMap
from corda_convert.checkpoint.structure import read_structure
from corda_convert.checkpoint.tensors import TensorRef, read_tensor
from corda_convert.errors import CordaConvertError, CovarianceMismatch, MalformedFile, UnsupportedInput

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GATE = UP.replace("up_proj", "gate_proj")


def value(ref: TensorRef | None) -> torch.Tensor:
    assert ref is not None
    return read_tensor(ref)


def refused(kind: type[CordaConvertError], path: Path) -> str:
    with pytest.raises(kind) as caught:
        read_covariances(path)
    return str(caught.value)


# PEFT's covariance_file


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_covariance_file_of_peft_is_read_in_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """`use_float16_for_covariance` keeps the dtype of the activations, whatever that is."""
    file = tmp_path / "covariances.pt"
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)
    corda = CordaConfig(covariance_file=str(file), corda_method="kpm", use_float16_for_covariance=True)
    config = LoraConfig(r=4, init_lora_weights="corda", corda_config=corda, target_modules=["up_proj", "down_proj"])
    tokens = AutoTokenizer.from_pretrained(MODEL)("The capital of the country is a city.", return_tensors="pt")
    preprocess_corda(model, config, run_model=lambda: model(**tokens))
    expected = torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in expected.values()} == {dtype}
    found = read_covariances(file)
    assert found.matrices.keys() == expected.keys()
    for module, tensor in expected.items():
        assert torch.equal(value(found.find(module)), tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_covariance_counts_by_its_numbers_and_not_by_its_dtype(
    dtype: torch.dtype, suffix: str, tmp_path: Path
) -> None:
    rounded = {name: tensor.to(torch.bfloat16).to(torch.float16) for name, tensor in covariance_tensors().items()}
    model = write_checkpoint(tmp_path / "model")
    outputs = []
    for kind in (torch.float32, dtype):
        tensors = {name: tensor.float().to(dtype).to(kind) for name, tensor in rounded.items()}
        file = write_covariances(tmp_path / f"{kind}.{suffix}", tensors)
        outputs.append(tmp_path / f"out-{kind}")
        decompose(model, output=outputs[-1], options=DecomposeOptions("kpm", 4), covariances=file)
    assert weight_files(outputs[0]) == weight_files(outputs[1])
    assert len(weight_files(outputs[0])) == 2


def test_tensors_that_were_saved_on_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    """`torch.save` writes where each storage lay; PEFT saves matrices that are still on the model's device."""
    import zipfile

    tensor = covariance(6)
    torch.save({UP: tensor}, tmp_path / "cpu.pt")
    with zipfile.ZipFile(tmp_path / "cpu.pt") as source, zipfile.ZipFile(tmp_path / "gpu.pt", "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:7")
            target.writestr(entry, content)
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tmp_path / "gpu.pt", weights_only=True)
    assert torch.equal(value(read_covariances(tmp_path / "gpu.pt").find(UP)), tensor)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
    ids=["DataParallel", "compile", "both"],
)
def test_names_lose_what_wrappers_add_to_them(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = families.tiny("llama")
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wrapped = [name for name, module in wrap(model).named_modules() if isinstance(module, nn.Linear)]
    assert wrapped != modules
    tensors = {name: covariance(4, seed=place) for place, name in enumerate(wrapped)}
    found = read_covariances(write_covariances(tmp_path / "c.pt", tensors))
    assert list(found.matrices) == modules
    assert torch.equal(value(found.find(modules[3])), tensors[wrapped[3]])


def test_names_of_a_model_with_an_adapter_are_those_of_the_model(tmp_path: Path) -> None:
    from peft import get_peft_model

    model = families.tiny("llama")
    modules = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    layers = [
        name
        for name, module in adapted.named_modules()
        if isinstance(module, nn.Linear) and not name.rpartition(".")[0].endswith(("lora_A", "lora_B"))
    ]
    assert any(name.endswith("up_proj.base_layer") for name in layers)
    found = read_covariances(write_covariances(tmp_path / "c.pt", dict.fromkeys(layers, covariance(4))))
    assert set(found.matrices) == modules


def test_two_matrices_for_one_module_are_refused(tmp_path: Path) -> None:
    file = write_covariances(tmp_path / "c.pt", {UP: covariance(4), f"base_model.model.{UP}": covariance(4)})
    assert refused(MalformedFile, file) == (f"{file}: base_model.model.{UP} and {UP} are both for the inputs of {UP}.")


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Touches:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({UP: Touches()}, tmp_path / "c.pt")
    assert "is not a file of plain tensors that can be loaded safely" in refused(MalformedFile, tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_a_cache_file_of_peft_is_no_covariance_file(tmp_path: Path) -> None:
    cache = {f"{UP}.eigens.S_WC": random(2), f"{UP}.eigens.U_WC": random(6, 2), f"{UP}.eigens.V_WC": random(4, 2)}
    assert refused(CovarianceMismatch, write_covariances(tmp_path / "cache.pt", cache)) == (
        f"{tmp_path / 'cache.pt'} holds tensors that are no covariances: {UP}.eigens.U_WC F32 (6, 2), {UP}.eigens.V_WC F32 "
        "(4, 2).\nIt is the cache_file of PEFT's CorDA, which holds a finished decomposition.\nGive it with --from-cache."
    )


# Names of other versions of the model


def named(covariances: Covariances, folder: Path) -> Covariances:
    checkpoint = read_checkpoint(folder)
    return at_run_time(
        covariances, NameMap(checkpoint, read_structure(checkpoint.root, checkpoint.config, checkpoint.tensors))
    )


def test_names_of_transformers_4_are_found_by_those_of_the_present_one(tmp_path: Path) -> None:
    model = families.tiny("llava")
    model.save_pretrained(tmp_path / "model")
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name]
    older = {
        name.replace("model.language_model.", "language_model.model.").replace(
            "model.vision_tower.", "vision_tower."
        ): name
        for name in modules
    }
    assert not set(older) & set(modules)
    tensors = {name: covariance(4, seed=place) for place, name in enumerate(older)}
    found = named(read_covariances(write_covariances(tmp_path / "c.pt", tensors)), tmp_path / "model")
    for old, new in older.items():
        assert torch.equal(value(found.find(new)), tensors[old])


def test_names_of_the_model_without_its_head_are_found_with_it(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in covariance_tensors().items()}
    scale = random(16).abs()
    del tensors[UP.removeprefix("model.")]
    metadata = {"aliases": json.dumps({UP.removeprefix("model."): GATE.removeprefix("model.")})}
    file = write_covariances(
        tmp_path / "c.safetensors", tensors | {f"{GATE.removeprefix('model.')}.mean_abs": scale}, metadata
    )
    found = named(read_covariances(file), model)
    for module in LINEARS:
        stored = GATE if module == UP else module
        assert torch.equal(value(found.find(module)), tensors[stored.removeprefix("model.")])
    assert torch.equal(value(found.find_scale(UP)), scale)


def test_names_of_the_model_itself_are_left_alone(tmp_path: Path) -> None:
    found = read_covariances(write_covariances(tmp_path / "c.pt"))
    assert named(found, write_checkpoint(tmp_path / "model")).aliases == {}


# Mean absolute inputs


def test_a_vector_beside_a_matrix_is_the_mean_of_absolute_inputs_of_all_that_share_it(tmp_path: Path) -> None:
    tensors = covariance_tensors({GATE: LINEARS[GATE]})
    vector = random(16).abs()
    metadata = {"aliases": json.dumps({UP: GATE}), "samples": "3", "tokens": "70"}
    file = write_covariances(tmp_path / "c.safetensors", tensors | {f"{GATE}.mean_abs": vector}, metadata)
    found = read_covariances(file)
    assert list(found.matrices) == list(found.scales) == [GATE]
    for module in (GATE, UP):
        assert torch.equal(value(found.find_scale(module)), vector)
        assert torch.equal(value(found.find(module)), tensors[GATE])
    assert found.find_scale("model.layers.0.mlp.up_proj") is None
    assert (found.count("samples"), found.count("tokens")) == (3, 70)


@pytest.mark.parametrize("text", ["", "many", "-3", "1e9", "9" * 5000, "³"])
def test_a_count_that_is_none_is_not_known(text: str, tmp_path: Path) -> None:
    found = read_covariances(write_covariances(tmp_path / "c.safetensors", {UP: covariance(4)}, {"tokens": text}))
    assert found.count("tokens") is None
    assert found.count("samples") is None


def test_the_scaling_cache_of_the_authors_is_read(tmp_path: Path) -> None:
    """It holds one vector in the model's dtype for every Linear, the head too: the sum of each sample's means."""
    modules = [*LINEARS, "lm_head"]
    vectors = {module: random(8, seed=place).abs().half() for place, module in enumerate(modules)}
    found = read_covariances(write_covariances(tmp_path / "llama_calib_input_distribution_abs_mean.pt", vectors))
    assert found.matrices == {}
    for module in modules:
        assert found.find(module) is None
        assert torch.equal(value(found.find_scale(module)), vectors[module])


def test_a_sum_of_means_decomposes_as_the_mean_does(tmp_path: Path) -> None:
    """Only the ratios of the inputs count for the residual, also in the 16 bits that the authors' scripts write."""
    model = write_checkpoint(tmp_path / "model")
    means = {module: random(d_in, seed=place).abs().half() for place, (module, (_, d_in)) in enumerate(LINEARS.items())}
    ours = write_covariances(
        tmp_path / "c.safetensors", {f"{name}.mean_abs": mean.float() for name, mean in means.items()}
    )
    sums = {name: 16 * mean for name, mean in means.items()} | {"lm_head": random(16).abs().half()}
    theirs = write_covariances(tmp_path / "model_calib_input_distribution_abs_mean.pt", sums)
    for file in (ours, theirs):
        options = DecomposeOptions("ipm", 4, method="asvd")
        decompose(model, output=tmp_path / f"out{file.suffix}", options=options, covariances=file)
    found, expected = (weight_files(tmp_path / f"out.{suffix}") for suffix in ("pt", "safetensors"))
    assert found["model.safetensors"] == expected["model.safetensors"]
    theirs_B, ours_B = (
        load_file(tmp_path / f"out.{suffix}" / "corda_init" / "adapter_model.safetensors")[
            f"base_model.model.{UP}.lora_B.weight"
        ]
        for suffix in ("pt", "safetensors")
    )
    assert torch.equal(theirs_B, 2 * ours_B)  # singular values are 4 times as large; B takes their root, A the inverse
    plain = decompose(model, output=tmp_path / "svd", options=DecomposeOptions("ipm", 4, method="svd"))
    assert weight_files(plain.output)["model.safetensors"] != found["model.safetensors"]


def test_the_fixtures_hold_the_mean_absolute_inputs_of_their_text() -> None:
    """Computed here with hooks on the whole model; the file has them from its generator."""
    from transformers import PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    found = read_covariances(COVARIANCES)
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def note(name: str) -> Callable[[nn.Module, tuple[torch.Tensor], torch.Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor], _output: torch.Tensor) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().abs().sum(dim=(0, 1))

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    modules = [name for name in linears if name != "lm_head"]
    for name in modules:
        linears[name].register_forward_hook(note(name))
    samples = (MODEL.parent / "data" / "knowledge.txt").read_text(encoding="utf-8").splitlines()
    with torch.no_grad():
        for sample in samples:
            tokens += model(**tokenizer(sample, return_tensors="pt")).logits.shape[1]
    assert tokens == found.count("tokens")
    for name in modules:
        torch.testing.assert_close(value(found.find_scale(name)).double(), sums[name] / tokens, rtol=1e-4, atol=1e-7)


def test_a_vector_of_another_length_than_its_matrix_is_refused(tmp_path: Path) -> None:
    file = write_covariances(tmp_path / "c.safetensors", {UP: covariance(4), f"{UP}.mean_abs": random(5)})
    assert refused(CovarianceMismatch, file) == (
        f"{file}: mean absolute inputs and covariances do not fit together: {UP}.mean_abs (5,) beside (4, 4).\n"
        "Both must have one entry for each input of the layer."
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {f"{UP}.mean_abs": covariance(4)},
        {f"{UP}.mean_abs": random(4).to(torch.int32)},
        {UP: torch.tensor(1.0)},
        {UP: random(2, 4, 4)},
        {UP: covariance(4).to(torch.complex64)},
    ],
    ids=["square mean_abs", "integers", "scalar", "3D", "complex"],
)
def test_other_tensors_are_refused(tensors: Mapping[str, torch.Tensor], tmp_path: Path) -> None:
    file = write_covariances(tmp_path / "c.pt", tensors)
    assert refused(CovarianceMismatch, file).startswith(f"{file} holds tensors that are no covariances: {UP}")


# The format's metadata


def test_a_later_version_of_the_format_is_refused_and_other_formats_have_none(tmp_path: Path) -> None:
    later = {"format": "corda_convert.covariances", "format_version": "2"}
    file = write_covariances(tmp_path / "c.safetensors", {UP: covariance(4)}, later)
    assert refused(UnsupportedInput, file) == (
        f"{file} has version 2 of the covariance format; this program reads version 1.\nUpdate corda-convert."
    )
    foreign = {"format": "pt", "format_version": "2"}
    assert read_covariances(write_covariances(tmp_path / "d.safetensors", {UP: covariance(4)}, foreign)).matrices


@pytest.mark.parametrize("text", ["[]", "{", '{"a": 1}', "[" * 100_000])
def test_aliases_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    file = write_covariances(tmp_path / "c.safetensors", {UP: covariance(4)}, {"aliases": text})
    assert refused(MalformedFile, file) == f"{file}: the metadata 'aliases' is not a JSON object of module names."


def test_shards_of_several_collections_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "folder", covariance_tensors(), shards=2, config=None)
    for place, file in enumerate(sorted(folder.glob("*.safetensors"))):
        names = list(covariance_tensors())[place * 7 : place * 7 + 7]
        write_covariances(file, {name: covariance(4) for name in names}, {"tokens": str(70 + place)})
    assert (
        refused(MalformedFile, folder)
        == f"{folder}: its files do not agree on tokens.\nThey are of several collections."
    )


def test_reading_changes_nothing(tmp_path: Path) -> None:
    file = write_covariances(tmp_path / "c.pt")
    before = files_below(tmp_path)
    read_covariances(file).close()
    assert files_below(tmp_path) == before
