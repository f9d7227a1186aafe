"""Merge, decompose and to-lora beside PEFT itself, on the trained fixture."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from corda_convert import DecomposeOptions, MergeOptions, RunOptions, decompose, merge, to_lora
from corda_convert.linalg.subspace import subspace_distance

FIXTURES = Path(__file__).parent.parent / "fixtures"
MODEL = FIXTURES / "model"
RESIDUAL = FIXTURES / "residual"
KNOWLEDGE = FIXTURES / "covariances" / "knowledge.safetensors"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:.*path_initial_model_for_weight_conversion"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
]


def load_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def logits(model: torch.nn.Module) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = (FIXTURES / "data" / "english.eval.txt").read_text(encoding="utf-8")[:1500]
    ids = tokenizer(text[:700], return_tensors="pt").input_ids
    assert 100 < ids.shape[1] <= 256
    with torch.no_grad():
        return model(ids).logits.float()


def peft_merged(base: Path, adapter: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load_model(base, dtype), str(adapter))
    return dict(model.merge_and_unload().state_dict())


def float32_copy(folder: Path, target: Path) -> Path:
    """The fixture in float32, as a user would have it who keeps full precision."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("corda_init"))
    for path in target.glob("model*.safetensors"):
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return target


ADAPTERS = ["lora", "lora_patterns", "lora_modules_to_save", "miss_balance", "miss_mini", "miss_bat"]


@pytest.mark.parametrize("rounding", ["nearest", "peft"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merging_into_bfloat16_gives_the_bits_of_peft(adapter: str, rounding: str, tmp_path: Path) -> None:
    merge(
        MODEL, adapter=FIXTURES / "adapters" / adapter, output=tmp_path / "out", options=MergeOptions(rounding=rounding)
    )
    expected = peft_merged(MODEL, FIXTURES / "adapters" / adapter, torch.bfloat16)
    actual = weights(tmp_path / "out")
    assert actual.keys() == expected.keys()
    differing = [name for name in actual if not torch.equal(actual[name], expected[name])]
    assert differing == []
    assert any(not torch.equal(actual[name], tensor) for name, tensor in weights(MODEL).items())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_merging_into_float32_gives_the_bits_of_peft(adapter: str, tmp_path: Path) -> None:
    base = float32_copy(MODEL, tmp_path / "base")
    merge(base, adapter=FIXTURES / "adapters" / adapter, output=tmp_path / "out")
    expected = peft_merged(base, FIXTURES / "adapters" / adapter, torch.float32)
    actual = weights(tmp_path / "out")
    assert actual.keys() == expected.keys()
    assert [name for name in actual if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize(("bone", "miss"), [("bone", "balance"), ("bone_bat", "bat")])
def test_a_bone_adapter_merges_like_the_same_blocks_as_miss(bone: str, miss: str, tmp_path: Path) -> None:
    """PEFT dropped Bone; MiSS has the same tensors under another name, and PEFT can still merge those."""
    source = FIXTURES / "adapters" / bone
    renamed = tmp_path / "as_miss"
    renamed.mkdir()
    tensors = {
        name.replace(".bone_", ".miss_"): value
        for name, value in load_file(source / "adapter_model.safetensors").items()
    }
    save_file(tensors, renamed / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    template = json.loads((FIXTURES / "adapters" / f"miss_{miss}" / "adapter_config.json").read_text())
    (renamed / "adapter_config.json").write_text(json.dumps(template | {"r": config["r"]}))
    merge(MODEL, adapter=source, output=tmp_path / "out")
    expected = peft_merged(MODEL, renamed, torch.bfloat16)
    assert [name for name, tensor in weights(tmp_path / "out").items() if not torch.equal(tensor, expected[name])] == []


def test_a_residual_adapter_merges_into_its_residual_with_the_bits_of_peft(tmp_path: Path) -> None:
    merge(RESIDUAL, adapter=FIXTURES / "adapters" / "corda", output=tmp_path / "out")
    expected = peft_merged(RESIDUAL, FIXTURES / "adapters" / "corda", torch.bfloat16)
    assert [name for name, tensor in weights(tmp_path / "out").items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("adapter", ["lora", "lora_patterns", "corda"])
def test_merging_is_within_one_bfloat16_ulp_of_float64(adapter: str, tmp_path: Path) -> None:
    """The ulp is that of the larger of weight and result: where the two cancel, float32 cannot do better, nor does PEFT."""
    folder = FIXTURES / "adapters" / adapter
    init = RESIDUAL / "corda_init" if adapter == "corda" else None
    merge(MODEL, adapter=folder, output=tmp_path / "out", options=MergeOptions(init=init))
    config = json.loads((folder / "adapter_config.json").read_text())
    factors, before = load_file(folder / "adapter_model.safetensors"), weights(MODEL)
    initial = load_file(init / "adapter_model.safetensors") if init else {}
    worst, exact, total = 0.0, 0, 0
    for name, tensor in weights(tmp_path / "out").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" not in factors:
            assert torch.equal(tensor, before[name])
            continue
        A, B = factors[f"{key}.lora_A.weight"].double(), factors[f"{key}.lora_B.weight"].double()
        r = A.shape[0]
        module, patterns = name.removesuffix(".weight"), config["alpha_pattern"]
        matching = [value for key, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)]
        alpha = matching[0] if matching else config["lora_alpha"]
        scaling = alpha / r**0.5 if config["use_rslora"] else alpha / r
        product = B @ A
        if initial:
            product -= initial[f"{key}.lora_B.weight"].double() @ initial[f"{key}.lora_A.weight"].double()
        expected = before[name].double() + scaling * product
        magnitude = torch.maximum(expected.abs(), before[name].double().abs())
        ulp = torch.exp2(torch.floor(torch.log2(magnitude.clamp(min=1e-30))) - 7)
        worst = max(worst, float(((tensor.double() - expected).abs() / ulp).max()))
        exact += int((tensor == expected.to(torch.bfloat16)).sum())
        total += tensor.numel()
    assert worst <= 1.0
    assert exact / total > 0.999


def test_an_untrained_adapter_with_init_gives_the_base_back_bit_for_bit(tmp_path: Path) -> None:
    init = RESIDUAL / "corda_init"
    merge(MODEL, adapter=init, output=tmp_path / "out", options=MergeOptions(init=init))
    for path in MODEL.glob("model*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_an_untrained_adapter_keeps_the_sign_of_zero(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    for path in base.glob("model*.safetensors"):
        tensors = load_file(path)
        for tensor in tensors.values():
            tensor.view(-1)[::7] = -0.0
        save_file(tensors, path, {"format": "pt"})
    init = RESIDUAL / "corda_init"
    options = MergeOptions(init=init, as_is=True)
    merge(base, adapter=init, output=tmp_path / "out", options=options)
    for path in base.glob("model*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_merged_and_residual_folders_load_with_tokenizer_and_chat_template(tmp_path: Path) -> None:
    merge(MODEL, adapter=FIXTURES / "adapters" / "lora", output=tmp_path / "merged")
    decompose(MODEL, covariances=KNOWLEDGE, output=tmp_path / "residual", options=DecomposeOptions(mode="kpm", rank=8))
    messages = [{"role": "user", "content": "What is the capital?"}]
    expected = AutoTokenizer.from_pretrained(MODEL).apply_chat_template(messages, tokenize=False)
    for folder in (tmp_path / "merged", tmp_path / "residual"):
        model = load_model(folder, torch.bfloat16)
        assert model.generation_config.to_dict() == load_model(MODEL, torch.bfloat16).generation_config.to_dict()
        assert AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False) == expected


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
@pytest.mark.parametrize("method", ["corda", "svd"])
def test_residual_and_adapter_equal_the_base(mode: str, method: str, tmp_path: Path) -> None:
    options = DecomposeOptions(mode=mode, rank=8, alpha=4, method=method)
    covariances = KNOWLEDGE if method == "corda" else None
    decompose(MODEL, covariances=covariances, output=tmp_path / "bf16", options=options)
    run = RunOptions(dtype="float32")
    decompose(MODEL, covariances=covariances, output=tmp_path / "fp32", options=options, run=run)
    base = weights(MODEL)
    factors = load_file(tmp_path / "fp32" / "corda_init" / "adapter_model.safetensors")
    decomposed = 0
    for name, residual in weights(tmp_path / "fp32").items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        total = residual.double()
        if f"{key}.lora_A.weight" in factors:
            delta = 0.5 * factors[f"{key}.lora_B.weight"].double() @ factors[f"{key}.lora_A.weight"].double()
            assert float(delta.norm()) > 0
            total = total + delta
            decomposed += 1
        error = float((total - base[name].double()).norm() / base[name].double().norm())
        assert error <= 1e-6
    assert decomposed == len(factors) // 2 == 7 * json.loads((MODEL / "config.json").read_text())["num_hidden_layers"]

    reference = logits(load_model(MODEL, torch.float32))
    together = PeftModel.from_pretrained(
        load_model(tmp_path / "fp32", torch.float32), str(tmp_path / "fp32" / "corda_init")
    )
    assert float((logits(together) - reference).abs().max()) <= 1e-4
    rounded = PeftModel.from_pretrained(
        load_model(tmp_path / "bf16", torch.float32), str(tmp_path / "bf16" / "corda_init")
    )
    error = logits(rounded) - reference
    bfloat16_error = logits(load_model(MODEL, torch.bfloat16)) - reference  # what the base itself loses in bfloat16
    assert float(error.abs().max()) <= float(bfloat16_error.abs().max())
    assert float(error.norm()) <= 0.5 * float(bfloat16_error.norm())


@pytest.mark.parametrize("mode", ["kpm", "ipm"])
def test_damp_peft_finds_the_subspace_of_peft_and_a_better_one(mode: str, tmp_path: Path) -> None:
    """PEFT's `preprocess_corda` and ours, both against a float64 SVD with the damping that PEFT's rule ends with."""
    model = load_model(MODEL, torch.float32)
    covariance_file = FIXTURES / "covariances" / "knowledge.peft.pt"
    corda = CordaConfig(
        corda_method=mode, covariance_file=str(covariance_file), prune_temporary_fields=True, verbose=False
    )
    config = LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, init_lora_weights="corda", corda_config=corda)
    preprocess_corda(model, config)
    eigens = {name: module.eigens for name, module in model.named_modules() if hasattr(module, "eigens")}
    options = DecomposeOptions(mode=mode, rank=8, damp="peft")
    outcome = decompose(MODEL, covariances=covariance_file, output=tmp_path / "out", options=options)
    damping = {
        entry["module"]: entry["damping"]["amount"] for entry in outcome.receipt["tensors"] if "damping" in entry
    }
    factors = load_file(tmp_path / "out" / "corda_init" / "adapter_model.safetensors")
    covariances = torch.load(covariance_file, weights_only=True)
    base = weights(MODEL)
    assert eigens.keys() == damping.keys()
    ours, theirs, matching = [], [], []
    for name, found in eigens.items():
        weight = base[f"{name}.weight"].double()
        damped = covariances[name].double() + damping[name] * torch.eye(weight.shape[1], dtype=torch.float64)
        U, _, _ = torch.linalg.svd(weight @ damped, full_matrices=False)
        chosen = U[:, :8] if mode == "ipm" else U[:, -8:]
        A, B = (factors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        ours.append(subspace_distance(B, chosen))
        theirs.append(subspace_distance(found.U_WC, chosen))
        exact = chosen @ (chosen.T @ weight)
        peft_product = (found.U_WC * found.S_WC).double() @ found.V_WC.double().T
        ours_error = float((B @ A - exact).norm() / exact.norm())
        peft_error = float((peft_product - exact).norm() / exact.norm())
        matching.append((ours_error, peft_error, float((B @ A - peft_product).norm() / exact.norm())))
    print(f"{mode}: largest subspace error: ours {max(ours):.1e}, PEFT {max(theirs):.1e}")
    assert max(ours) <= 1e-5
    assert max(ours) < max(theirs)
    for ours_error, peft_error, difference in matching:
        assert ours_error <= 1e-5
        assert difference <= 1.01 * peft_error + 1e-5


def test_the_initial_adapter_trains_with_peft_and_converts_to_the_same_delta(tmp_path: Path) -> None:
    residual = tmp_path / "residual"
    decompose(MODEL, covariances=KNOWLEDGE, output=residual, options=DecomposeOptions(mode="kpm", rank=4, alpha=8))
    model = PeftModel.from_pretrained(
        load_model(residual, torch.float32), str(residual), subfolder="corda_init", is_trainable=True
    )
    tokenizer = AutoTokenizer.from_pretrained(residual)
    ids = tokenizer("The river of the north is cold and wide.", return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=str(copied_init(residual, tmp_path))
        )
    to_lora(tmp_path / "trained", init=residual / "corda_init", output=tmp_path / "ours")
    expected, actual = deltas(tmp_path / "converted"), deltas(tmp_path / "ours")
    assert expected.keys() == actual.keys()
    assert expected
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    ours, theirs = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "converted"))
    assert {key: ours[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")} == {
        key: theirs[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
    }

    trained = logits(PeftModel.from_pretrained(load_model(residual, torch.float32), str(tmp_path / "trained")))
    converted = logits(PeftModel.from_pretrained(load_model(MODEL, torch.float32), str(tmp_path / "ours")))
    merge(
        MODEL,
        adapter=tmp_path / "trained",
        output=tmp_path / "merged",
        options=MergeOptions(init=residual / "corda_init"),
        run=RunOptions(dtype="float32"),
    )
    merged = logits(load_model(tmp_path / "merged", torch.float32))
    assert float((converted - merged).abs().max()) <= 1e-3
    assert float((converted - trained).abs().max()) <= 2**-7 * float(trained.abs().max())


def copied_init(residual: Path, tmp_path: Path) -> Path:
    """PEFT rewrites the config of the initial adapter that it is given; it gets a copy."""
    shutil.copytree(residual / "corda_init", tmp_path / "copy" / "corda_init")
    return tmp_path / "copy" / "corda_init"


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module as PEFT computes it on loading."""
    model = PeftModel.from_pretrained(load_model(MODEL, torch.float32), str(folder))
    return {
        name: module.get_delta_weight("default") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
def test_to_lora_with_rslora_and_patterns_keeps_the_delta(use_rslora: bool, patterns: bool, tmp_path: Path) -> None:
    """PEFT refuses rsLoRA together with patterns; there float64 is the oracle, elsewhere too."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        use_rslora=use_rslora,
        rank_pattern={"down_proj": 3, "layers.0.self_attn.q_proj": 5} if patterns else {},
        alpha_pattern={"layers.1.mlp.down_proj": 7.5} if patterns else {},
        modules_to_save=["lm_head"],
    )
    torch.manual_seed(0)
    model = get_peft_model(load_model(MODEL, torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path / "init", path_initial_model_for_weight_conversion=None)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    expected = {
        name.replace("base_model.model.base_model.model", "base_model.model"): after - before
        for (name, after), before in zip(
            deltas64(tmp_path / "trained").items(), deltas64(tmp_path / "init").values(), strict=True
        )
    }
    outcome = to_lora(tmp_path / "trained", init=tmp_path / "init", output=tmp_path / "out")
    assert outcome.receipt["scaling_baked_in"] == (use_rslora and patterns)
    actual = deltas64(tmp_path / "out")
    assert actual.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((actual[name] - delta).norm() / delta.norm()) <= 1e-6, name
    saved = "base_model.model.lm_head.weight"
    trained = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert torch.equal(load_file(tmp_path / "out" / "adapter_model.safetensors")[saved], trained[saved])


def deltas64(folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(load_model(MODEL, torch.float32), str(folder))
    return {
        name: module.scaling["default"]
        * module.lora_B["default"].weight.double()
        @ module.lora_A["default"].weight.double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
