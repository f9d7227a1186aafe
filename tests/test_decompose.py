"""What `decompose` can be asked for, beside PEFT, which must load it, and beside decompositions made here in float64."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    COVARIANCES,
    FIXTURES,
    HIDDEN,
    LINEARS,
    MODEL,
    UP,
    covariance_tensors,
    files_below,
    random,
    read_json,
    write_checkpoint,
    write_covariances,
    write_json,
)
from conftest import Ran
from families import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from corda_convert import CordaConvertError, DecomposeOptions, RunOptions, decompose

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]

Command = Callable[..., Ran]
Refusal = Callable[..., str]

SVD: dict[str, Any] = {"mode": "ipm", "rank": 4, "method": "svd"}
ATTENTION = r"model\.layers\.[01]\.self_attn\.(q|k)_proj"
METHODS = ("corda", "svd", "asvd", "svd-llm")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", shards=2)


def scales(modules: Mapping[str, tuple[int, int]] = LINEARS) -> dict[str, Tensor]:
    return {
        f"{module}.mean_abs": random(d_in, seed=500 + place).abs() + 0.1
        for place, (module, (_, d_in)) in enumerate(modules.items())
    }


@pytest.fixture
def covariances(tmp_path: Path) -> Path:
    """Covariances and mean absolute inputs of the tiny Llama."""
    return write_covariances(tmp_path / "covariances.safetensors", covariance_tensors() | scales())


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in sorted(folder.glob("model*.safetensors")) for name, t in load_file(path).items()}


def layers_of(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's layers by the path of the module that they wrap."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def beside(residual: Path, model_class: Any = AutoModelForCausalLM) -> PeftModel:
    """The residual with its initial adapter, as PEFT loads them."""
    loaded = model_class.from_pretrained(residual)
    return PeftModel.from_pretrained(loaded, residual, subfolder="corda_init", is_trainable=True).eval()


IDS = torch.arange(3, 23)[None]


@torch.no_grad()
def logits(model: nn.Module, **more: Tensor) -> Tensor:
    return model(input_ids=IDS, **more).logits


def gives_back(model: nn.Module, base: nn.Module, **more: Tensor) -> bool:
    """Whether two models compute the same up to float32's rounding, which large random weights amplify."""
    expected = logits(base.eval(), **more)
    return float((logits(model.eval(), **more) - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def decomposed(receipt: Mapping[str, Any]) -> list[str]:
    """The modules that the receipt tells of."""
    return [entry["module"] for entry in receipt["tensors"] if "module" in entry]


def saved(family: str, folder: Path) -> PreTrainedModel:
    model = tiny(family)
    model.save_pretrained(folder)
    return model


# Which modules: PEFT's own matching

SELECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ends": ({"targets": ("q_proj", "mlp.up_proj")}, {"target_modules": ["q_proj", "mlp.up_proj"]}),
    "a whole path": ({"targets": (UP,)}, {"target_modules": [UP]}),
    "an end that is only a part of a name": ({"targets": ("k_proj",)}, {"target_modules": ["k_proj"]}),
    "an expression": ({"targets": ATTENTION}, {"target_modules": ATTENTION}),
    "an expression among several": ({"targets": (ATTENTION,)}, {"target_modules": ATTENTION}),
    "all-linear": ({"targets": "all-linear"}, {"target_modules": "all-linear"}),
    "ALL-LINEAR": ({"targets": ("ALL-linear",)}, {"target_modules": "ALL-linear"}),
    "nothing named": ({}, {"target_modules": "all-linear"}),
    "the head, too": ({"targets": ("lm_head", "q_proj")}, {"target_modules": ["lm_head", "q_proj"]}),
    "excluded ends": (
        {"excluded": ("o_proj", "layers.0.mlp.up_proj")},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    ),
    "excluded by an expression": (
        {"targets": ("q_proj", "down_proj"), "excluded": r".*\.layers\.1\..*"},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*\.layers\.1\..*"},
    ),
    "the head excluded, which is no target": (
        {"excluded": ("lm_head",)},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_the_chosen_modules_are_those_that_peft_chooses(model: Path, tmp_path: Path, name: str) -> None:
    ours, theirs = SELECTIONS[name]
    outcome = decompose(model, output=tmp_path / "out", options=DecomposeOptions(**SVD, **ours))
    base = AutoModelForCausalLM.from_pretrained(model)
    expected = layers_of(get_peft_model(copy.deepcopy(base), LoraConfig(r=4, **theirs)))
    assert set(decomposed(outcome.receipt)) == set(expected)
    assert 0 < len(expected) <= len(LINEARS) + 1
    together = beside(tmp_path / "out")
    assert set(layers_of(together)) == set(expected)
    assert gives_back(together, base)


def test_one_string_is_an_expression_for_the_whole_path_as_in_peft(model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(base, LoraConfig(target_modules="q_proj"))
    with pytest.raises(CordaConvertError, match="--target 'q_proj' matches no Linear layer"):
        decompose(model, output=tmp_path / "out", options=DecomposeOptions(**SVD, targets="q_proj"))


FAMILY_TARGETS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{}, {"targets": ("c_proj",)}, {"targets": ("attn.c_proj", "c_attn")}, {"excluded": ("mlp.c_proj",)}],
    "t5": [{}, {"targets": ("q", "v")}, {"targets": r"decoder\..*\.wo"}, {"excluded": ("EncDecAttention.k",)}],
    "bert": [
        {},
        {"targets": ("dense",)},
        {"targets": ("query", "output.dense")},
        {"targets": ("classifier", "value"), "rank_pattern": {"classifier": 2}},
    ],
    "llama_tied": [{}, {"targets": ("q_proj",), "excluded": r".*0\..*"}],
}


@pytest.mark.parametrize(
    ("family", "selection"), [(family, each) for family, several in FAMILY_TARGETS.items() for each in several]
)
def test_peft_finds_exactly_the_modules_that_were_decomposed(
    tmp_path: Path, family: str, selection: dict[str, Any]
) -> None:
    """The list or expression that is written selects no other module, on Linear and Conv1D, with and without a decoder."""
    base = saved(family, tmp_path / "base")
    outcome = decompose(tmp_path / "base", output=tmp_path / "out", options=DecomposeOptions(**SVD, **selection))
    together = beside(tmp_path / "out", type(base))
    modules = decomposed(outcome.receipt)
    assert set(layers_of(together)) == set(modules)
    kinds = {name: type(module) for name, module in base.named_modules() if type(module) in (nn.Linear, Conv1D)}
    heads = {name for name, module in base.named_modules() if module is base.get_output_embeddings()} | {"classifier"}
    if not selection:
        assert set(modules) == kinds.keys() - heads
    more = {"decoder_input_ids": IDS + 5} if family == "t5" else {}
    assert gives_back(together, base, **more)
    tensors = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(modules)


class _Ambiguous(nn.Module):
    """Modules whose paths end alike: `fc` and `inner.fc`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})


def test_modules_whose_whole_path_is_the_end_of_another_are_selected_by_an_expression() -> None:
    from corda_convert.checkpoint.structure import ModelStructure, Parameter
    from corda_convert.operations.initial_config import target_modules

    parameters = {f"{name}.weight": Parameter((4, 4), "linear") for name in ("fc", "inner.fc")}
    structure = ModelStructure(
        "M", {"fc": "linear", "inner.fc": "linear"}, {}, frozenset(), None, parameters=parameters
    )
    for modules in (["fc"], ["inner.fc"], ["fc", "inner.fc"]):
        written = target_modules(structure, modules)
        adapted = get_peft_model(_Ambiguous(), LoraConfig(r=2, target_modules=written))
        assert sorted(layers_of(adapted)) == modules
    assert target_modules(structure, ["fc"]) == "fc"


class _Nested(nn.Module):
    """A Linear that is called as a module which holds another one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.ModuleDict({"dense": nn.Linear(4, 4)})
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})


def test_a_module_that_only_holds_others_is_not_selected() -> None:
    from corda_convert.checkpoint.structure import ModelStructure, Parameter
    from corda_convert.operations.initial_config import target_modules

    layers = {"fc.dense": "linear", "inner.fc": "linear"}
    parameters = {f"{name}.weight": Parameter((4, 4), "linear") for name in layers}
    structure = ModelStructure("M", layers, {}, frozenset(), None, parameters=parameters)
    adapted = get_peft_model(_Nested(), LoraConfig(r=2, target_modules=target_modules(structure, ["inner.fc"])))
    assert list(layers_of(adapted)) == ["inner.fc"]


def test_patterns_of_modules_whose_whole_path_is_the_end_of_another_keep_them_apart() -> None:
    from corda_convert.operations.initial_config import _pattern

    for wanted in ({"fc": 2, "inner.fc": 3}, {"fc": 2, "inner.fc": 4}, {"fc": 4, "inner.fc": 3}):
        pattern = _pattern({}, 4, wanted)
        config = LoraConfig(r=4, rank_pattern=pattern, target_modules=["fc", "inner.fc"])
        layers = layers_of(get_peft_model(_Ambiguous(), config))
        assert {name: layer.r["default"] for name, layer in layers.items()} == wanted


def test_a_tied_head_is_refused_where_it_is_named_and_left_where_all_are_meant(
    refusal: Refusal, tmp_path: Path
) -> None:
    saved("llama_tied", tmp_path / "base")
    arguments = ("decompose", tmp_path / "base", "--method", "svd", "--mode", "ipm", "--rank", 4)
    assert refusal(*arguments, "--target", "lm_head", "--target", "q_proj") == (
        "lm_head shares its weight with model.embed_tokens.weight, which a residual would change too.\n"
        "Leave it out with --exclude."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--exclude", "gone"), "--exclude 'gone' matches no Linear layer."),
        (("--exclude", "("), "--exclude '(' is no name and no regular expression"),
        (("--exclude", ".*"), "--exclude leaves out every layer that was chosen."),
        (("--target", "model.embed_tokens"), "--target 'model.embed_tokens' matches no Linear layer."),
        (("--target", "proj"), "--target 'proj' matches no Linear layer."),
    ],
)
def test_names_that_mean_nothing_are_refused(
    refusal: Refusal, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert refusal("decompose", model, "--method", "svd", "--mode", "ipm", "--rank", 4, *arguments).startswith(message)


def test_layers_that_are_stored_joined_are_refused_by_name_and_otherwise_left_with_a_note(
    done: Command, refusal: Refusal, tmp_path: Path
) -> None:
    saved("dinov2", tmp_path / "base")
    arguments = ("decompose", tmp_path / "base", "--method", "svd", "--mode", "ipm", "--rank", 2)
    base = tiny("dinov2")
    linears = {name for name, module in base.named_modules() if type(module) is nn.Linear}
    joined = sorted(name for name in linears if name.endswith(("gate_proj", "up_proj")))
    if not joined or any("gate_proj" in name for name in weights(tmp_path / "base")):
        pytest.skip("this version of transformers has them as they are on disk")
    ran = done(*arguments, "-o", tmp_path / "out")
    assert ran.err.startswith(f"Note: {len(joined)} Linear layers stay as they are")
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    assert set(decomposed(receipt)) == linears - set(joined)
    assert f"{joined[0]} is not on disk as one tensor of its own." in refusal(*arguments, "--target", joined[0])


def test_layers_that_peft_takes_for_the_experts_are_left_to_truncation(
    done: Command, refusal: Refusal, tmp_path: Path
) -> None:
    """PEFT looks for the experts' joined parameters under `gate_proj`, and would adapt no shared expert of that name."""
    base = saved("deepseek_v3", tmp_path / "base")
    arguments = ("decompose", tmp_path / "base", "--method", "svd")
    ran = done(*arguments, "--mode", "ipm", "--rank", 2, "-o", tmp_path / "out")
    assert ran.err.startswith("Note: 6 Linear layers stay as they are, ")
    together = beside(tmp_path / "out", type(base))
    modules = decomposed(read_json(tmp_path / "out" / "corda_convert.json"))
    assert set(layers_of(together)) == set(modules)
    assert gives_back(together, base)
    message = refusal(*arguments, "--mode", "ipm", "--rank", 2, "--target", "shared_experts.up_proj")
    assert message.startswith("PEFT cannot adapt model.layers.1.mlp.shared_experts.up_proj: in this architecture")
    ran = done(*arguments, "--truncate", 2, "-o", tmp_path / "dense")
    assert "Linear layers stay" not in ran.err
    assert len(decomposed(read_json(tmp_path / "dense" / "corda_convert.json"))) == len(modules) + 6


# Ranks and scalings

PATTERNS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "alpha": 3},
    "rslora without alpha": {"rslora": True},
    "rank pattern": {"rank_pattern": {"up_proj": 2, r"layers\.0\..*_proj": 6}},
    "rank and alpha": {"alpha": 8, "rank_pattern": {"up_proj": 2}},
    "alpha pattern": {"alpha": 6, "alpha_pattern": {"mlp.down_proj": 1.5, "q_proj": 12}},
    "both": {"rank_pattern": {"up_proj": 2, "q_proj": 7}, "alpha_pattern": {"q_proj": 5, r".*\.1\..*": 2}},
    "both with rslora": {"rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {UP: 2.5}},
    "overlapping, the first counts": {"rank_pattern": {"up_proj": 2, ".*_proj": 5}},
    "overlapping the other way round": {"alpha": 1, "alpha_pattern": {r"z?.*\.up_proj": 2, "up_proj|q_proj": 3}},
}
FIRST_ALPHA: dict[str, Callable[[int], float]] = {
    "rslora": lambda rank: 3,
    "rank and alpha": lambda rank: 8,
    "alpha pattern": lambda rank: 6,
    "overlapping the other way round": lambda rank: 1,
}


def expected_of(options: Mapping[str, Any], module: str, name: str) -> tuple[int, float]:
    """Rank and scaling of a module, by PEFT's documentation: the first pattern that the end of its path matches counts."""

    def first(patterns: Mapping[str, float], default: float) -> float:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    rank = int(first(options.get("rank_pattern", {}), 4))
    alpha = first(options.get("alpha_pattern", {}), FIRST_ALPHA.get(name, lambda own: own)(rank))
    return rank, alpha / (rank**0.5 if options.get("rslora") else rank)


@pytest.mark.parametrize("name", PATTERNS)
def test_peft_loads_the_same_ranks_and_scalings_and_they_outlast_its_saving(
    model: Path, tmp_path: Path, name: str
) -> None:
    """PEFT sorts the patterns when it saves, so that another one may come first; the model must be the base both times."""
    options = {**SVD, **PATTERNS[name]}
    decompose(model, output=tmp_path / "out", options=DecomposeOptions(**options))
    expected = {module: expected_of(options, module, name) for module in LINEARS}
    assert len(set(expected.values())) > 1 or "rslora" in name
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    together = beside(tmp_path / "out")
    for _ in range(2):
        found = {
            module: (layer.r["default"], layer.scaling["default"]) for module, layer in layers_of(together).items()
        }
        assert found.keys() == expected.keys()
        for module, (rank, scaling) in expected.items():
            assert found[module] == (rank, pytest.approx(scaling, rel=1e-12)), module
        assert gives_back(together, base)
        together.save_pretrained(tmp_path / "again")
        residual = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        together = PeftModel.from_pretrained(residual, tmp_path / "again").eval()
    assert not gives_back(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), base)


def test_patterns_are_given_on_the_command_line(done: Command, model: Path, tmp_path: Path) -> None:
    done(
        *("decompose", model, "--method", "svd", "--mode", "kpm", "--rank", 4, "--rslora", "-o", tmp_path / "out"),
        *("--rank-pattern", "q_proj=2", "--rank-pattern", "mlp.up_proj=6", "--alpha-pattern", "x?q_proj=1.5"),
    )
    config = read_json(tmp_path / "out" / "corda_init" / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, True)
    assert config["rank_pattern"] == {"mlp.up_proj": 6, "q_proj": 2}
    layers = layers_of(beside(tmp_path / "out"))
    assert layers[UP].scaling["default"] == pytest.approx(6**0.5)
    assert layers["model.layers.0.self_attn.q_proj"].scaling["default"] == pytest.approx(1.5 / 2**0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--rank-pattern", "gone=3"),
            "--rank-pattern 'gone' is for none of the 14 modules.\n"
            "The modules end in: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj.",
        ),
        (("--alpha-pattern", "lm_head=3"), "--alpha-pattern 'lm_head' is for none of the 14 modules.\n"),
        (
            ("--rank-pattern", ".*_proj=3", "--rank-pattern", "q_proj=2"),
            "--rank-pattern 'q_proj' is for none of the 14 modules.\nThey match an earlier pattern, which counts.\n",
        ),
        (("--rank-pattern", "(=3"), "--rank-pattern '(' is no name and no regular expression: missing )"),
        (
            ("--rank-pattern", "k_proj=9"),
            "2 problems, nothing was written:\n\nRank 9 is above what model.layers.0.self",
        ),
        (("--alpha-pattern", "k_proj=-1"), "Alpha of k_proj is -1.0, a positive number was expected."),
    ],
)
def test_patterns_that_cannot_be_are_refused(
    refusal: Refusal, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert refusal("decompose", model, "--method", "svd", "--mode", "ipm", "--rank", 4, *arguments).startswith(message)


# Truncation, beside the formula of each method's paper


def context(C: Tensor, scale: Tensor, method: str, *, damp: float, power: float = 0.5) -> Tensor:
    """The T of a method, in float64."""
    C = C.double()
    if method == "corda":
        return C + damp * C.diagonal().mean() * torch.eye(C.shape[0], dtype=torch.float64)
    if method == "asvd":
        return torch.diag(scale.double() ** power)
    if method == "svd-llm":
        return torch.linalg.cholesky(C)
    return torch.eye(C.shape[0], dtype=torch.float64)


def truncated(W: Tensor, T: Tensor, count: int) -> Tensor:
    """`U_k Σ_k V_kᵀ T⁻¹`, all but the `count` smallest components of `W T`."""
    U, S, Vh = torch.linalg.svd(W.double() @ T, full_matrices=False)
    kept = len(S) - count
    return torch.linalg.solve(T.T, (U[:, :kept] * S[:kept] @ Vh[:kept]).T).T


@pytest.mark.parametrize("method", METHODS)
def test_truncation_is_the_reconstruction_of_all_but_the_smallest_components(
    done: Command, model: Path, covariances: Path, tmp_path: Path, method: str
) -> None:
    given = () if method == "svd" else ("--cov", covariances)
    power = ("--asvd-alpha", 0.8) if method == "asvd" else ()
    damp = ("--damp", 0) if method == "corda" else ()
    done("decompose", model, "--method", method, "--truncate", 3, *given, *power, *damp, "-o", tmp_path / "out")
    before, after, known = weights(model), weights(tmp_path / "out"), load_file(covariances)
    assert after.keys() == before.keys()
    for name, W in before.items():
        module = name.removesuffix(".weight")
        if module not in LINEARS:
            assert torch.equal(after[name], W)
            continue
        T = context(known[module], known[f"{module}.mean_abs"], method, damp=0, power=0.8)
        expected = truncated(W, T, 3)
        assert torch.allclose(after[name].double(), expected, atol=2e-6 * float(W.abs().max())), name
        assert int(torch.linalg.matrix_rank(after[name].double(), rtol=1e-5)) == min(W.shape) - 3
        assert float((after[name] - W).norm() / W.norm()) > 1e-3


def test_a_truncated_model_is_an_ordinary_one(done: Command, tmp_path: Path) -> None:
    done("decompose", MODEL, "--cov", COVARIANCES, "--truncate", 4, "--dtype", "float32", "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "corda_init").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float32
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    change = (logits(loaded) - logits(base)).abs().max()
    assert 1e-3 < float(change) < 0.5 * float(logits(base).abs().max())
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    assert receipt["summary"]["tensors"]["truncated"] == 42
    assert (receipt["options"]["truncate"], receipt["options"]["rank"], receipt["options"]["alpha"]) == (4, None, None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without the 4 smallest components in the context of its covariances" in card
    assert "corda_init" not in card
    assert "peft" not in card.lower()


def test_truncation_is_the_residual_of_the_smallest_components(model: Path, covariances: Path, tmp_path: Path) -> None:
    decompose(model, covariances=covariances, output=tmp_path / "dense", options=DecomposeOptions(truncate=3))
    decompose(
        model, covariances=covariances, output=tmp_path / "residual", options=DecomposeOptions(mode="kpm", rank=3)
    )
    dense, residual = weights(tmp_path / "dense"), weights(tmp_path / "residual")
    for name, tensor in dense.items():
        assert torch.allclose(tensor, residual[name], atol=1e-6), name


@pytest.mark.parametrize("output", ["truncated", "residual", "adapter alone"])
def test_conv1d_weights_are_decomposed_as_they_lie(done: Command, tmp_path: Path, output: str) -> None:
    base = saved("gpt2", tmp_path / "base").double()
    arguments = ("decompose", tmp_path / "base", "--method", "svd", "--target", "c_proj", "--exclude", "attn.c_proj")
    if output == "truncated":
        done(*arguments, "--truncate", 5, "-o", tmp_path / "out")
    elif output == "residual":
        done(*arguments, "--mode", "kpm", "--rank", 5, "-o", tmp_path / "out")
    else:
        done(*arguments, "--mode", "kpm", "--rank", 5, "--no-residual", "-o", tmp_path / "init")
        done("merge", tmp_path / "base", "--subtract", tmp_path / "init", "-o", tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    for name, W in base.state_dict().items():
        if name.endswith("mlp.c_proj.weight"):
            W = truncated(W.T, torch.eye(W.shape[0], dtype=torch.float64), 5).T
        assert torch.allclose(found.state_dict()[name], W, atol=1e-6), name


def test_a_truncation_that_leaves_nothing_is_refused(refusal: Refusal, model: Path) -> None:
    assert refusal("decompose", model, "--method", "svd", "--target", "k_proj", "--truncate", 8).splitlines()[2] == (
        f"--truncate 8 leaves nothing of model.layers.0.self_attn.k_proj: its weight is (8, {HIDDEN}), 8 components."
    )


# Methods


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("solver", ["auto", "dense", "krylov"])
def test_every_method_takes_the_components_of_its_own_context(
    model: Path, covariances: Path, tmp_path: Path, method: str, mode: str, solver: str
) -> None:
    options = DecomposeOptions(mode=mode, rank=4, method=method, alpha=2, damp=0.03, asvd_alpha=0.7, solver=solver)
    given = None if method == "svd" else covariances
    decompose(model, covariances=given, output=tmp_path / "out", options=options)
    factors = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    residual, base, known = weights(tmp_path / "out"), weights(model), load_file(covariances)
    for module in LINEARS:
        W = base[f"{module}.weight"].double()
        T = context(known[module], known[f"{module}.mean_abs"], method, damp=0.03, power=0.7)
        U, S, Vh = torch.linalg.svd(W @ T, full_matrices=False)
        chosen = slice(0, 4) if mode == "ipm" else slice(-4, None)
        expected = torch.linalg.solve(T.T, (U[:, chosen] * S[chosen] @ Vh[chosen]).T).T
        A, B = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        assert torch.allclose(0.5 * B @ A, expected, atol=3e-6 * float(W.abs().max())), module
        assert torch.allclose(residual[f"{module}.weight"].double(), W - expected, atol=3e-6 * float(W.abs().max()))


@pytest.mark.parametrize("end", ["ipm", "kpm"])
def test_the_solver_that_is_forced_is_the_one_that_runs(done: Command, tmp_path: Path, end: str) -> None:
    """A side of 96 is too small for Lanczos to be chosen."""
    solvers = {}
    for solver in ("auto", "dense", "krylov"):
        arguments = ("--method", "svd", "--mode", end, "--rank", 2, "--target", "q_proj", "--solver", solver)
        done("decompose", MODEL, *arguments, "-o", tmp_path / solver)
        receipt = read_json(tmp_path / solver / "corda_convert.json")
        solvers[solver] = {entry["solver"] for entry in receipt["tensors"] if "module" in entry}
    assert solvers["auto"] == solvers["dense"] == {"dense-eigh"}
    assert all("lanczos" in name for name in solvers["krylov"])


def test_asvd_without_mean_absolute_inputs_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    plain = write_covariances(tmp_path / "plain.safetensors")
    arguments = ("decompose", model, "--method", "asvd", "--mode", "kpm", "--rank", 4, "--cov")
    assert refusal(*arguments, plain) == (
        "The covariance file has no mean absolute inputs, which method asvd takes.\n"
        "It holds covariances only, or is of another model.\n"
        "Collect them too (vectors named MODULE.mean_abs), or choose --method corda or svd-llm."
    )
    partial = {name: tensor for name, tensor in scales().items() if not name.startswith(UP)}
    some = write_covariances(tmp_path / "some.safetensors", covariance_tensors() | partial)
    assert refusal(*arguments, some).startswith(f"No mean absolute inputs for 1 of 14 modules: {UP}.\n")
    assert refusal("decompose", model, "--method", "asvd", "--mode", "kpm", "--rank", 4).startswith(
        "Method asvd needs mean absolute inputs.\nGive them with --cov FILE"
    )


def test_every_missing_covariance_is_listed(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    one = write_covariances(tmp_path / "one.safetensors", {UP: covariance_tensors()[UP]})
    message = refusal("decompose", model, "--cov", one, "--mode", "kpm", "--rank", 4)
    assert message.startswith("No covariance for 13 of 14 modules: ")
    assert set(re.findall(r"model\.layers\.[\w.]+_proj", message)) == LINEARS.keys() - {UP}


def test_covariances_that_a_plain_svd_would_not_use_are_refused(
    refusal: Refusal, model: Path, covariances: Path
) -> None:
    assert refusal("decompose", model, "--method", "svd", "--cov", covariances, "--mode", "ipm", "--rank", 4) == (
        "Method svd takes no covariances.\nLeave out --cov, or choose --method corda, asvd, svd-llm."
    )


# What is reported


def test_the_receipt_tells_of_every_layer_what_was_taken_and_how_well(
    done: Command, model: Path, covariances: Path, tmp_path: Path
) -> None:
    import json

    arguments = ("decompose", model, "--cov", covariances, "--mode", "kpm", "--rank", 4, "--damp", 0.02)
    ran = done(*arguments, "--rank-pattern", "up_proj=3", "--json", "-o", tmp_path / "out")
    receipt = json.loads(ran.out)
    assert receipt == read_json(tmp_path / "out" / "corda_convert.json")
    layers = {entry["module"]: entry for entry in receipt["tensors"] if "module" in entry}
    assert layers.keys() == LINEARS.keys()
    base, after, known = weights(model), weights(tmp_path / "out"), load_file(covariances)
    factors = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    for module, layer in layers.items():
        W = base[f"{module}.weight"].double()
        T = context(known[module], known[f"{module}.mean_abs"], "corda", damp=0.02)
        S = torch.linalg.svdvals(W @ T)
        rank = 3 if module.endswith("up_proj") else 4
        assert (layer["action"], layer["rank"], layer["scaling"]) == ("decomposed", rank, 1.0)
        assert layer["solver"] == "dense-eigh"
        assert layer["fallback_from"] == []
        certificate = layer["certificate"]
        assert certificate["holds"]
        assert 0 <= certificate["residual"] < 1e-12
        assert 0 <= certificate["orthonormality"] < 1e-12
        cut = layer["singular_values"]
        assert cut["taken_largest"] == pytest.approx(float(S[-rank]), rel=1e-6)
        assert cut["taken_smallest"] == pytest.approx(float(S[-1]), rel=1e-5)
        assert cut["next"] == pytest.approx(float(S[-rank - 1]), rel=1e-6)
        assert cut["largest"] == pytest.approx(float(S[0]), rel=1e-9)
        assert layer["taken_share"] == pytest.approx(float(S[-rank:].square().sum() / S.square().sum()), rel=1e-5)
        A, B = (factors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        error = float((after[f"{module}.weight"].double() + B @ A - W).norm() / W.norm())
        assert layer["reconstruction_error"] == pytest.approx(error, rel=1e-3)
        assert 0 < error < 1e-7
        assert layer["seconds"] > 0


def test_the_summary_says_what_was_taken_and_what_comes_next(
    done: Command, model: Path, covariances: Path, tmp_path: Path
) -> None:
    arguments = ("decompose", model, "--cov", covariances, "--mode", "ipm", "--rank", 4, "--rank-pattern", "q_proj=2")
    ran = done(*arguments, "--no-residual", "-o", tmp_path / "init")
    lines = ran.out.splitlines()
    assert lines[0] == f"Decomposed model (corda, ipm, rank 4) → {tmp_path / 'init'}"
    (modules,) = [line for line in lines if line.startswith("  modules ")]
    found = re.fullmatch(r"  modules  14, rank 2, 4; took ([\d.]+) % to ([\d.]+) % of ‖W\(C\+λI\)‖²", modules)
    receipt = read_json(tmp_path / "init" / "corda_convert.json")
    layers = [entry for entry in receipt["tensors"] if "module" in entry]
    shares = sorted(layer["taken_share"] for layer in layers)
    assert found is not None
    assert [float(found[1]), float(found[2])] == pytest.approx([100 * shares[0], 100 * shares[-1]], rel=1e-2)
    (solver,) = [line for line in lines if line.startswith("  solver ")]
    worst = max(layers, key=lambda layer: layer["certificate"]["residual"])
    assert solver.startswith("  solver   dense-eigh for 14; worst residual ")
    assert solver.endswith(f", of {worst['module']}")
    assert lines[-1] == f"  next     corda-convert merge MODEL --subtract {tmp_path / 'init'} makes the residual"
    assert not [line for line in lines if line.startswith("  fallback")]


def test_the_summary_names_the_modules_that_needed_another_solver() -> None:
    from corda_convert.output.summary import describe_plan

    layer = {"module": "a", "rank": 2, "taken_share": 0.5, "solver": "dense-eigh"}
    layer["certificate"] = {"residual": 1e-14, "holds": True}
    fallen = {**layer, "module": "b", "fallback_from": ["shift-invert-lanczos", "inverse-lanczos-qr"]}
    fallen["certificate"] = {"residual": 2e-3, "holds": False}
    plan = dict.fromkeys(("read_bytes", "write_bytes", "memory_bytes", "buffer_bytes"), 1) | {"tensors": {}}
    receipt = {
        "command": "decompose",
        "options": {"model": "m", "method": "svd", "mode": "kpm", "rank": 2},
        "plan": {**plan, "worst_step": "b"},
        "tensors": [layer, fallen],
    }
    lines = describe_plan(receipt, Path("out")).splitlines()
    assert "  solver   dense-eigh for 2; worst residual 2.0e-03, of b" in lines
    assert "  fallback b (shift-invert-lanczos → inverse-lanczos-qr → dense-eigh)" in lines
    assert "  doubtful b: the certificate does not hold" in lines


@pytest.mark.parametrize("what", ["residual", "truncated", "adapter"])
def test_a_dry_run_plans_every_output_and_writes_nothing(done: Command, model: Path, tmp_path: Path, what: str) -> None:
    arguments = {
        "residual": ("--mode", "ipm", "--rank", 4),
        "truncated": ("--truncate", 4),
        "adapter": ("--mode", "ipm", "--rank", 4, "--no-residual"),
    }[what]
    ran = done("decompose", model, "--method", "svd", *arguments, "--dry-run", "-o", tmp_path / "out")
    verb = "truncate model (svd, without the 4 smallest components)" if what == "truncated" else "decompose model"
    assert ran.out.startswith(f"Would {verb}")
    assert not (tmp_path / "out").exists()


# The adapter alone


@pytest.mark.parametrize("dtype", [(), ("--dtype", "float32")])
def test_the_adapter_alone_and_its_residual_made_later_are_those_of_a_whole_decomposition(
    done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank", 8, "--rank-pattern", "q_proj=4")
    done(*arguments, "--no-residual", "-o", "init")
    assert sorted(path.name for path in Path("init").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "corda_convert.json",
    ]
    config = read_json(Path("init/adapter_config.json"))
    assert config["base_model_name_or_path"] == "init-residual"
    done("merge", MODEL, "--subtract", "init", *dtype, "-o", "init-residual")
    shutil.move("init-residual", "later")
    done(*arguments, *dtype, "-o", "init-residual")
    whole, later = files_below(Path("init-residual")), files_below(Path("later"))
    for name in ("README.md", "corda_convert.json"):
        del whole[name], later[name]
    assert whole == later
    assert Path("init/adapter_model.safetensors").read_bytes() == whole["corda_init/adapter_model.safetensors"]
    assert Path("init/adapter_config.json").read_bytes() == whole["corda_init/adapter_config.json"]


def test_the_card_of_an_adapter_alone_loads_it_beside_its_residual(
    done: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(model / "config.json", read_json(model / "config.json") | {"_name_or_path": "alice/tiny"})
    done("decompose", model, "--method", "svd", "--mode", "ipm", "--rank", 4, "--no-residual", "-o", "init")
    done("merge", model, "--subtract", "init", "-o", "init-residual")
    card = Path("init/README.md").read_text()
    for line in ("library_name: peft", "base_model: alice/tiny", "base_model_relation: adapter"):
        assert f"\n{line}\n" in card
    (snippet,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    scope: dict[str, Any] = {}
    exec(snippet, scope)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    assert gives_back(scope["model"], base)


# Usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "kpm"), "Missing option '--rank' (or '--rank-budget', or '--truncate')."),
        (("--rank", 4), "Missing option '--mode' (or '--truncate')."),
        (("--truncate", 4, "--mode", "kpm"), "--truncate makes no adapter; leave out --mode."),
        (("--truncate", 4, "--rank", 4, "--alpha", 2), "--truncate makes no adapter; leave out --rank, --alpha."),
        (("--truncate", 4, "--no-residual", "--rslora"), "leave out --rslora, --no-residual."),
        (("--truncate", 4, "--rank-pattern", "q=1", "--alpha-pattern", "q=1"), "--rank-pattern, --alpha-pattern."),
        (("--truncate", 4, "--write-cache", "cache.pt"), "--truncate makes no adapter; leave out --write-cache."),
        (("--truncate", 0), "0 is not in the range x>=1."),
        (("--mode", "kpm", "--rank", 4, "--method", "svd", "--damp", 0), "--damp is for --method corda."),
        (("--mode", "kpm", "--rank", 4, "--asvd-alpha", 1), "--asvd-alpha is for --method asvd."),
        (("--mode", "kpm", "--rank", 4, "--no-residual", "--dtype", "float32"), "--dtype is for the residual"),
        (("--mode", "kpm", "--rank", 4, "--rank-pattern", "q_proj"), "'q_proj' is not NAME=VALUE"),
        (("--mode", "kpm", "--rank", 4, "--rank-pattern", "=3"), "'=3' is not NAME=VALUE"),
        (("--mode", "kpm", "--rank", 4, "--rank-pattern", "q_proj=half"), "'half' is not a valid integer"),
        (("--mode", "kpm", "--rank", 4, "--rank-pattern", "q_proj=0"), "0 is not in the range x>=1."),
        (("--mode", "kpm", "--rank", 4, "--alpha-pattern", "q=1", "--alpha-pattern", "q=2"), "has a name twice."),
        (("--mode", "kpm", "--rank", 4, "--solver", "fast"), "'fast' is not one of"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    command: Command, model: Path, tmp_path: Path, arguments: Sequence[object], message: str
) -> None:
    ran = command("decompose", model, *arguments, "-o", tmp_path / "out")
    assert (ran.status, ran.out) == (2, "")
    assert message in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "kpm"}, "mode and rank (or rank_budget) are needed, or truncate."),
        ({"truncate": 2, "mode": "kpm", "residual": False}, "so it goes without mode, residual=False."),
        ({"mode": "kpm", "rank": 2, "method": "svd", "residual": False}, "--dtype is that of the residual's weights"),
        ({"mode": "kpm", "rank": 2, "method": "asvd", "asvd_alpha": -1.0}, "asvd's alpha is -1.0"),
        ({"mode": "kpm", "rank": 0, "method": "svd"}, "The rank is 0, at least 1 was expected."),
    ],
)
def test_the_same_is_refused_from_python(model: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CordaConvertError, match=re.escape(message)):
        decompose(model, output=tmp_path / "out", options=DecomposeOptions(**options), run=RunOptions(dtype="float32"))
    assert not (tmp_path / "out").exists()


# PEFT's cache file


def test_peft_starts_from_the_cache_with_the_very_factors(done: Command, tmp_path: Path) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    cache = tmp_path / "cache.pt"
    done(
        *("decompose", MODEL, "--cov", COVARIANCES, "--mode", "kpm", "--rank", 8, "--target", "q_proj", "--rslora"),
        *("--write-cache", cache, "--no-residual", "-o", tmp_path / "init"),
    )
    config = LoraConfig(
        r=8,
        lora_alpha=8,
        use_rslora=True,
        target_modules=["q_proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(cache_file=str(cache), corda_method="kpm"),
    )
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    preprocess_corda(base, config)
    begun = get_peft_model(base, config).state_dict()
    factors = load_file(tmp_path / "init" / "adapter_model.safetensors")
    assert len(factors) == 12
    for name, tensor in factors.items():
        assert torch.equal(begun[name.replace(".weight", ".default.weight")], tensor), name


@pytest.mark.parametrize("place", ["out/cache.pt", "taken.pt"])
def test_a_place_for_the_cache_that_cannot_be_is_refused_before_any_work(
    refusal: Refusal, command: Command, model: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "taken.pt").write_bytes(b"mine")
    arguments = ("decompose", model, "--method", "svd", "--mode", "ipm", "--rank", 4, "--write-cache", tmp_path / place)
    ran = command(*arguments, "-o", tmp_path / "out")
    assert (ran.status, ran.out) == (1, "")
    assert ("would lie inside the output" if place.startswith("out") else "taken.pt exists") in ran.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "taken.pt").read_bytes() == b"mine"


def test_modules_without_a_certificate_are_warned_of() -> None:
    from corda_convert.operations.certificates import certificate_warnings

    def entry(name: str, *, holds: bool, relative: float) -> dict[str, Any]:
        certificate = {"holds": holds, "relative_residual": relative}
        return {"name": f"{name}.weight", "module": name, "solver": "dense-svd", "certificate": certificate}

    good, bad, worse = (
        entry("a", holds=True, relative=3.0),
        entry("b", holds=False, relative=0.1),
        entry("c", holds=False, relative=2.0),
    )
    assert certificate_warnings([{"name": "norm"}, good]) == ()
    (warning,) = certificate_warnings([good, bad, worse])
    assert "2 modules" in warning
    assert "b, c" in warning
    assert "The worst is c" in warning


def test_a_covariance_of_one_triangle_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    covariances = load_file(FIXTURES / "covariances" / "knowledge.safetensors")
    odd = {name: tensor.triu().contiguous() if tensor.dim() == 2 else tensor for name, tensor in covariances.items()}
    save_file(odd, tmp_path / "covariances.safetensors")
    said = refusal(
        *("decompose", FIXTURES / "model", "--cov", tmp_path / "covariances.safetensors"),
        *("--mode", "ipm", "--rank", "4", "--target", "q_proj"),
    )
    assert "is not symmetric" in said
