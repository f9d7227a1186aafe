"""Several adapters in one merge: sums, scales, order, conflicts; and what rounding takes of a change."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    HIDDEN,
    LINEARS,
    MODEL,
    UP,
    VOCABULARY,
    llama_tensors,
    lora_config,
    lora_tensors,
    random,
    read_json,
    write_adapter,
    write_checkpoint,
    write_lora,
    write_miss,
)
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from corda_convert import MergeOptions, RunOptions, merge
from corda_convert.operations.rounding import rounding_warnings

Refusal = Callable[..., str]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's own use
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def delta(adapter: Path, name: str) -> torch.Tensor | float:
    """`s·B·A` of a fixture adapter in float64, by its config's own patterns."""
    config, tensors = read_json(adapter / "adapter_config.json"), load_file(adapter / "adapter_model.safetensors")
    module = name.removesuffix(".weight")
    key = f"base_model.model.{module}.lora_"
    if f"{key}A.weight" not in tensors:
        return 0.0
    A, B = tensors[f"{key}A.weight"].double(), tensors[f"{key}B.weight"].double()
    matching = [value for key, value in config["alpha_pattern"].items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)]
    alpha = matching[0] if matching else config["lora_alpha"]
    return (alpha / A.shape[0] ** 0.5 if config["use_rslora"] else alpha / A.shape[0]) * B @ A


def merged_by_peft(base: Path, adapters: Sequence[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), str(adapters[0]), adapter_name="0"
    )
    for place, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(str(adapter), adapter_name=str(place))
    names = [str(place) for place in range(len(adapters))]
    return dict(model.merge_and_unload(adapter_names=names).state_dict())


# Sums


@pytest.mark.parametrize("scales", [(), (0.5, -1.0), (-0.3, 1.7)])
def test_a_sum_is_within_one_ulp_of_float64(scales: tuple[float, ...], tmp_path: Path) -> None:
    adapters = [ADAPTERS / "lora", ADAPTERS / "lora_patterns"]
    merge(MODEL, adapter=adapters, output=tmp_path / "out", options=MergeOptions(scales=scales))
    exact, total = 0, 0
    for name, tensor in weights(tmp_path / "out").items():
        before = weights(MODEL)[name].double()
        expected = before.clone()
        for adapter, scale in zip(adapters, scales or (1.0, 1.0), strict=True):
            expected += scale * delta(adapter, name)
        magnitude = torch.maximum(expected.abs(), before.abs()).clamp(min=1e-30)
        ulp = torch.exp2(torch.floor(torch.log2(magnitude)) - 7)
        assert float(((tensor.double() - expected).abs() / ulp).max()) <= 1.0
        exact, total = exact + int((tensor == expected.to(torch.bfloat16)).sum()), total + tensor.numel()
    assert exact / total > 0.999


def test_a_sum_in_float32_is_what_peft_makes_of_the_same_adapters(tmp_path: Path) -> None:
    adapters = [ADAPTERS / "lora", ADAPTERS / "lora_patterns"]
    merge(MODEL, adapter=adapters, output=tmp_path / "out", run=RunOptions(dtype="float32"))
    expected = merged_by_peft(MODEL, adapters, torch.float32)
    for name, tensor in weights(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-7, atol=2e-8)


def test_peft_rounding_gives_the_bits_of_peft_in_the_order_given(tmp_path: Path) -> None:
    adapters = [ADAPTERS / "lora", ADAPTERS / "lora_patterns"]
    for order in (adapters, adapters[::-1]):
        output = tmp_path / order[0].name
        outcome = merge(MODEL, adapter=order, output=output, options=MergeOptions(rounding="peft"))
        expected = merged_by_peft(MODEL, order, torch.bfloat16)
        assert [name for name, tensor in weights(output).items() if not torch.equal(tensor, expected[name])] == []
        assert outcome.receipt["order_matters"] is True
    assert weight_bytes(tmp_path / "lora") != weight_bytes(tmp_path / "lora_patterns")


def test_every_order_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    """In float32 a sum of four terms depends on their order, if nobody sees to it."""
    adapters = [(write_lora(tmp_path / f"lora{seed}", rank=4, seed=seed), scale)
                for seed, scale in ((100, 0.3), (700, -1.1))]  # fmt: skip
    adapters += [(write_lora(tmp_path / "same_name" / "lora100", rank=2, seed=5), 1.0)]
    adapters += [(write_miss(tmp_path / "miss"), 0.7)]
    outputs = []
    for number, order in enumerate(list(itertools.permutations(adapters))[::5]):
        output = tmp_path / f"out{number}"
        options = MergeOptions(scales=[scale for _, scale in order])
        outcome = merge(model, adapter=[path for path, _ in order], output=output, options=options)
        assert [(each["name"], each["scale"]) for each in outcome.receipt["adapters"]] == [
            (path.name, scale) for path, scale in order
        ]
        assert outcome.receipt["order_matters"] is False
        outputs.append(weight_bytes(output))
    assert len(outputs) == 5
    assert all(output == outputs[0] for output in outputs)
    name = f"{UP}.weight"
    sums = []
    for order in itertools.permutations(range(3)):
        total = llama_tensors()[name].clone()
        for place in order:
            path, scale = adapters[place]
            tensors = load_file(path / "adapter_model.safetensors")
            key = f"base_model.model.{UP}.lora_"
            total += (tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]) * (2 * scale)
        sums.append(total)
    assert any(not torch.equal(total, sums[0]) for total in sums)  # what the fixed order is for


def test_the_fixed_order_is_by_content_and_not_by_name(model: Path, tmp_path: Path) -> None:
    first, second, third = (lora_tensors(rank=3, seed=seed) for seed in (1, 2, 3))
    outputs = []
    for place, names in enumerate(itertools.permutations("abc")):
        folder = tmp_path / str(place)
        adapters = [
            write_adapter(folder / name, tensors, lora_config(3))
            for name, tensors in zip(names, (first, second, third), strict=True)
        ]
        merge(model, adapter=sorted(adapters), output=folder / "out")
        outputs.append(weight_bytes(folder / "out"))
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("adapter", ["lora_patterns", "miss_balance", "miss_mini", "miss_bat", "bone_bat"])
def test_a_scale_goes_so_far_from_the_base_to_the_merged_model(adapter: str, tmp_path: Path) -> None:
    run = RunOptions(dtype="float32")
    merge(MODEL, adapter=ADAPTERS / adapter, output=tmp_path / "whole", run=run)
    merge(MODEL, adapter=ADAPTERS / adapter, output=tmp_path / "part", options=MergeOptions(scales=(-0.3,)), run=run)
    for name, tensor in weights(tmp_path / "part").items():
        before, whole = weights(MODEL)[name].double(), weights(tmp_path / "whole")[name].double()
        torch.testing.assert_close(tensor.double(), before - 0.3 * (whole - before), rtol=1e-6, atol=1e-6)
    assert weight_bytes(tmp_path / "part") != weight_bytes(tmp_path / "whole")


def test_taking_an_adapter_out_again_gives_the_base_back(model: Path, tmp_path: Path) -> None:
    adapter, copy = write_lora(tmp_path / "lora"), write_lora(tmp_path / "copy")
    merge(model, adapter=[adapter, copy], output=tmp_path / "out", options=MergeOptions(scales=(1, -1)))
    merge(model, adapter=adapter, output=tmp_path / "with")
    merge(tmp_path / "with", adapter=adapter, output=tmp_path / "without", options=MergeOptions(scales=(-1,)))
    for name, tensor in llama_tensors().items():
        for output in ("out", "without"):
            torch.testing.assert_close(weights(tmp_path / output)[name], tensor, rtol=0, atol=1e-5)


# Changes that depend on the weight


def dora_tensors(modules: Mapping[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    norms = {
        f"base_model.model.{module}.lora_magnitude_vector": random(d_out, seed=seed).abs() + 1
        for module, (d_out, _) in modules.items()
    }
    return lora_tensors(modules, seed=seed) | norms


def write_dora(folder: Path, seed: int = 40) -> Path:
    return write_adapter(folder, dora_tensors({UP: LINEARS[UP]}, seed), lora_config(use_dora=True))


def write_bat(folder: Path) -> Path:
    block = random(LINEARS[UP][0] // 4, 4, 4, seed=9) / 8
    config = {"peft_type": "MISS", "r": 4, "init_weights": "bat"}
    return write_adapter(folder, {f"base_model.model.{UP}.miss_block": block}, config)


@pytest.mark.parametrize("kind", ["dora", "bat"])
def test_what_depends_on_the_weight_is_applied_in_the_order_given(kind: str, model: Path, tmp_path: Path) -> None:
    """As if each adapter had been merged into the result of the one before: in float32, to the bit."""
    special = write_dora(tmp_path / "dora") if kind == "dora" else write_bat(tmp_path / "bat")
    adapters = [write_lora(tmp_path / "first", seed=7), special, write_lora(tmp_path / "last", seed=8)]
    outputs = []
    for number, order in enumerate((adapters, adapters[::-1])):
        step = model
        for place, adapter in enumerate(order):
            merge(step, adapter=adapter, output=tmp_path / f"{number}{place}")
            step = tmp_path / f"{number}{place}"
        outcome = merge(model, adapter=order, output=tmp_path / f"out{number}")
        assert outcome.receipt["order_matters"] is True
        assert weight_bytes(tmp_path / f"out{number}") == weight_bytes(step)
        outputs.append(weight_bytes(step))
    assert outputs[0] != outputs[1]


def test_two_dora_adapters_are_applied_one_after_the_other(model: Path, tmp_path: Path) -> None:
    adapters = [write_dora(tmp_path / "a", 40), write_dora(tmp_path / "b", 60)]
    merge(model, adapter=adapters[0], output=tmp_path / "step")
    merge(tmp_path / "step", adapter=adapters[1], output=tmp_path / "expected")
    merge(model, adapter=adapters, output=tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "expected")


# Conflicts


def head_saved(folder: Path, value: float, **config: Any) -> Path:
    saved = {"base_model.model.lm_head.weight": torch.full((VOCABULARY, HIDDEN), value)}
    modules = {UP: LINEARS[UP]}
    return write_adapter(folder, lora_tensors(modules) | saved, lora_config(modules_to_save=["lm_head"], **config))


def with_tokens(folder: Path, indices: list[int]) -> Path:
    rows = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": random(len(indices), HIDDEN)}
    config = lora_config(trainable_token_indices={"embed_tokens": indices})
    return write_adapter(folder, lora_tensors({UP: LINEARS[UP]}) | rows, config)


def test_adapters_that_replace_a_parameter_with_the_same_values_go_together(model: Path, tmp_path: Path) -> None:
    adapters = [head_saved(tmp_path / "a", 1.5), head_saved(tmp_path / "b", 1.5, lora_alpha=3)]
    merge(model, adapter=adapters, output=tmp_path / "out")
    assert torch.equal(weights(tmp_path / "out")["lm_head.weight"], torch.full((VOCABULARY, HIDDEN), 1.5))


def test_adapters_that_replace_a_parameter_with_other_values_are_refused(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    first, second = head_saved(tmp_path / "a", 1.5), head_saved(tmp_path / "b", 1.25)
    message = refusal("merge", model, "--adapter", first, "--adapter", second)
    assert re.match(r"[ab] replaces lm_head\.weight with other values than an adapter before it\.", message)


def test_a_change_of_a_parameter_that_another_adapter_replaces_is_refused(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    lora = write_lora(tmp_path / "lora", {"lm_head": (VOCABULARY, HIDDEN)})
    assert refusal("merge", model, "--adapter", lora, "--adapter", head_saved(tmp_path / "head", 1.0)) == (
        "head replaces lm_head.weight, which lora changes: that is for another weight.\n"
        "Merge one of them, or one after the other if that is meant."
    )


def test_two_adapters_that_replace_rows_of_one_parameter_are_refused(
    refusal: Refusal, model: Path, tmp_path: Path
) -> None:
    first, second = with_tokens(tmp_path / "first", [3, 5]), with_tokens(tmp_path / "second", [7])
    assert refusal("merge", model, "--adapter", first, "--adapter", second) == (
        "first, second each replace rows of model.embed_tokens.weight: the last one would win.\n"
        "Merge one of them, or one after the other if that is meant."
    )


def test_problems_of_all_adapters_are_reported_together(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    wrong = [write_lora(tmp_path / name, {module: (3, 5)}) for name, module in (("a", UP), ("b", "model.norm"))]
    message = refusal("merge", model, "--adapter", wrong[0], "--adapter", wrong[1])
    assert message.startswith("2 problems, nothing was written:")


# Scales

ONLY_SUMS = (
    "A scale multiplies what is added to a weight. DoRA sets norms; modules_to_save, trained biases and tokens take the "
    "place of the model's.\n"
    "Leave out its --scale, or scale a plain LoRA."
)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda folder: head_saved(folder, 1.0), "it replaces lm_head.weight."),
        (write_dora, f"the change of {UP} is no multiple of anything."),
        (lambda folder: with_tokens(folder, [3]), "the change of model.embed_tokens is no multiple of anything."),
    ],
    ids=["modules_to_save", "dora", "tokens"],
)
def test_what_is_no_sum_has_no_scale(
    refusal: Refusal, write: Callable[[Path], Path], reason: str, model: Path, tmp_path: Path
) -> None:
    adapter = write(tmp_path / "adapter")
    message = refusal("merge", model, "--adapter", adapter, "--scale", "0.5")
    assert message == f"adapter cannot be taken 0.5 times: {reason}\n{ONLY_SUMS}"
    merge(model, adapter=adapter, output=tmp_path / "once", options=MergeOptions(scales=(1,)))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        (
            ("0.5",),
            "There are 1 scales for 2 adapters.\nGive as many --scale as --adapter, in the same order, or none.",
        ),
        (("1", "0"), "The scale of b is 0; a finite number other than 0 was expected.\nLeave b out."),
        (("nan", "1"), "The scale of a is nan; a finite number other than 0 was expected."),
        (("1", "-inf"), "The scale of b is -inf; a finite number other than 0 was expected."),
    ],
)
def test_a_scale_that_means_nothing_is_refused(
    refusal: Refusal, scales: tuple[str, ...], message: str, model: Path, tmp_path: Path
) -> None:
    adapters = [write_lora(tmp_path / name, seed=place) for place, name in enumerate("ab")]
    given = [argument for adapter in adapters for argument in ("--adapter", adapter)]
    assert refusal("merge", model, *given, *[part for scale in scales for part in ("--scale", scale)]) == message


def test_an_adapter_given_twice_is_refused(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora")
    assert refusal("merge", model, "--adapter", lora, "--adapter", tmp_path / "." / "lora") == (
        "lora is given twice.\nGive an adapter once; --scale 2 takes it twice."
    )


def test_nothing_to_merge_is_refused(model: Path, tmp_path: Path) -> None:
    from corda_convert import CordaConvertError

    with pytest.raises(CordaConvertError, match=r"There is nothing to merge\."):
        merge(model, output=tmp_path / "out")


def test_the_command_line_shows_each_adapter_with_its_scale(
    done: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    lora, other = write_lora(tmp_path / "lora"), write_lora(tmp_path / "other", rank=2, seed=3)
    ran = done("merge", model, "--adapter", lora, "--scale", "0.5", "--adapter", other, "--scale", "-1",
               "-o", tmp_path / "out")  # fmt: skip
    lines = ran.out.splitlines()
    assert lines[0] == f"Merged lora, other into model → {tmp_path / 'out'}"
    assert lines[2:4] == [
        "  adapter  lora × 0.5: lora, 14 modules, rank 4, alpha 8, scaling 2",
        "  adapter  other × -1: lora, 14 modules, rank 2, alpha 4, scaling 2",
    ]
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    assert receipt["options"]["adapters"] == ["lora", "other"]
    assert receipt["options"]["scales"] == [0.5, -1.0]
    assert [source["role"] for source in receipt["inputs"]] == ["model", "adapter", "adapter"]
    changes = next(entry["changes"] for entry in receipt["tensors"] if entry["name"] == f"{UP}.weight")
    assert sorted(change["scale"] for change in changes) == [-1.0, 0.5]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        "`model` with the lora adapter `lora` (× 0.5) and the lora adapter `other` (× -1) merged into its weights."
        in card
    )
    dry = done("merge", model, "--adapter", lora, "--scale", "0.5", "-o", tmp_path / "dry", "--dry-run")
    assert "  adapter  lora, 14 modules, rank 4, alpha 8, scaling 2, × 0.5\n" in dry.out
    bat = done("merge", model, "--adapter", write_bat(tmp_path / "bat"), "--adapter", lora, "-o", tmp_path / "bat_out")
    assert "  order    as given: " in bat.out


# What rounding takes of a change


def small_change(folder: Path, size: float) -> Path:
    tensors = {name: tensor * size if ".lora_B." in name else tensor for name, tensor in lora_tensors(rank=4).items()}
    return write_adapter(folder, tensors, lora_config(4))


@pytest.fixture
def half_model(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", llama_tensors(dtype=torch.bfloat16))


def test_a_change_below_the_resolution_is_reported_with_its_numbers(
    done: Callable[..., Any], half_model: Path, tmp_path: Path
) -> None:
    adapter = small_change(tmp_path / "lora", 1e-4)
    ran = done("merge", half_model, "--adapter", adapter, "-o", tmp_path / "out", "-v")
    receipt = read_json(tmp_path / "out" / "corda_convert.json")
    (warning,) = receipt["warnings"]
    assert ran.err == f"Note: {warning}\n"
    lost, whole, losses = 0.0, 0.0, {}
    for entry in receipt["tensors"]:
        if entry["action"] != "folded":
            continue
        before, after = (
            llama_tensors(dtype=torch.bfloat16)[entry["name"]].double(),
            weights(tmp_path / "out")[entry["name"]],
        )
        key = f"base_model.model.{entry['name'].removesuffix('.weight')}.lora_"
        factors = load_file(adapter / "adapter_model.safetensors")
        change = 2 * factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
        error = before + change - after.double()
        losses[entry["name"]] = float(error.norm() / change.norm())
        assert entry["rounding_loss"] == pytest.approx(losses[entry["name"]], rel=1e-3)
        assert entry["relative_change"] == pytest.approx(float(change.norm() / before.norm()), rel=1e-3)
        lost, whole = lost + float(error.norm()) ** 2, whole + float(change.norm()) ** 2
    total, worst = (lost / whole) ** 0.5, max(losses, key=losses.__getitem__)
    assert 0.7 < total <= 1.0
    above = sum(loss**2 > 0.5 for loss in losses.values())
    assert warning == (
        f"Most of the change is below the resolution of BF16: ‖rounding‖/‖ΔW‖ is {total:.2g} over 14 tensors, above 0.7 in "
        f"{above} of them; the worst is {worst} with {losses[worst]:.2g}. --dtype float32 keeps it."
    )
    assert f"{total:.1%} of the change" in ran.out
    assert f"rounding {losses[worst]:.1%} of Δ" in ran.out


@pytest.mark.parametrize(("size", "dtype"), [(1.0, None), (1e-4, "float32")])
def test_a_change_that_the_dtype_holds_is_not_warned_of(
    size: float, dtype: str | None, half_model: Path, tmp_path: Path
) -> None:
    adapter = small_change(tmp_path / "lora", size)
    outcome = merge(half_model, adapter=adapter, output=tmp_path / "out", run=RunOptions(dtype=dtype))
    assert outcome.warnings == ()
    folded = [entry for entry in outcome.receipt["tensors"] if entry["action"] == "folded"]
    assert len(folded) == 14
    assert all(entry["rounding_loss"] < 0.1 for entry in folded)


def test_a_warning_after_the_run_is_in_the_json_too(done: Callable[..., Any], half_model: Path, tmp_path: Path) -> None:
    adapter = small_change(tmp_path / "lora", 1e-5)
    ran = done("merge", half_model, "--adapter", adapter, "-o", tmp_path / "out", "--json")
    assert "below the resolution of BF16" in json.loads(ran.out)["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [([(2, 0.1), (2, 0.1), (2, 0.1)], False), ([(2, 0.9), (2, 0.1), (2, 0.1)], False), ([(2, 0.7)], False),
     ([(2, 0.72)], True), ([(9, 0.9), (1, 0.1), (1, 0.1)], True), ([(9, 0.1), (1, 0.9), (1, 0.9)], True), ([], False)],
)  # fmt: skip
def test_a_warning_needs_most_of_the_change_or_most_of_the_tensors(
    changes: list[tuple[float, float]], expected: bool
) -> None:
    tensors = [
        {"name": f"t{place}", "dtype": "BF16", "delta_norm": delta, "rounding_norm": delta * loss}
        for place, (delta, loss) in enumerate(changes)
    ]
    untouched = [{"name": "copied", "dtype": "BF16", "action": "copied"}]
    same = [{"name": "zero", "dtype": "BF16", "delta_norm": 0.0, "rounding_norm": 0.0}]
    assert bool(rounding_warnings([*tensors, *untouched, *same])) == expected
