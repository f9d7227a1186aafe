"""The benchmarks' inputs, and what they judge with; not how fast anything is."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    return imported


@pytest.fixture
def inputs(tmp_path: Path, module: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A small model and adapter as the benchmark makes them, tensors in several blocks and shards."""
    make = module("make_checkpoint")
    monkeypatch.setattr(make, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(make, "SHARD_BYTES", 9000)
    shape = make.LlamaShape(
        hidden=32, intermediate=48, vocabulary=70, heads=4, kv_heads=2, head_dim=8, layers=2, lm_head=True
    )
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    make.make(model, lambda folder: make.write_model(folder, shape))
    make.make(adapter, lambda folder: make.write_adapter(folder, shape, "all", model.name))
    return model, adapter


def merged_by_peft(inputs: tuple[Path, Path], output: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(inputs[0], dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    PeftModel.from_pretrained(model, inputs[1]).merge_and_unload().save_pretrained(output)
    return load_file(output / "model.safetensors")


def judged(module: Any, capsys: pytest.CaptureFixture[str], inputs: tuple[Path, Path], output: Path) -> dict[str, Any]:
    capsys.readouterr()
    module("merge_error").main(str(inputs[0]), str(inputs[1]), "cpu", str(output))
    return dict(json.loads(capsys.readouterr().out)[str(output)])


def test_inputs_have_the_tensors_that_transformers_and_peft_expect(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    merged = merged_by_peft(inputs, tmp_path / "merged")
    base = {name: tensor for file in inputs[0].glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert len(list(inputs[0].glob("*.safetensors"))) > 2
    touched = {name for name in base if not torch.equal(base[name], merged[name])}
    assert touched == {name for name in base if "proj" in name or name == "lm_head.weight"}


def test_rounded_merges_are_a_quarter_of_an_ulp_off_on_average_and_a_wrong_element_is_counted(
    inputs: tuple[Path, Path], tmp_path: Path, module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    merged = merged_by_peft(inputs, output)
    right = judged(module, capsys, inputs, output)
    assert 0.24 < right["mean"] < 0.26
    assert right["other_copied_tensors"] == 0
    weight = merged["lm_head.weight"].view(torch.int16)
    weight[3, 5] += 2
    merged["model.norm.weight"][1] = 2.0
    save_file(merged, output / "model.safetensors")
    wrong = judged(module, capsys, inputs, output)
    assert wrong["beyond_half"] == right["beyond_half"] + 1
    assert wrong["largest"] >= 1.5
    assert wrong["other_copied_tensors"] == 1
    assert module("compare_models").compare(output, output)["differing_elements"] == 0


def test_errors_are_in_units_of_the_last_place_of_bf16(module: Any) -> None:
    exact = torch.tensor([1.0, 1.5, -3.0, 0.0, 2.0**-130], dtype=torch.float64)
    stored = torch.tensor([1.0078125, 1.5, -2.984375, 0.0, 0.0], dtype=torch.bfloat16)
    units = module("merge_error").ulps(stored, exact).tolist()
    assert units == [1.0, 0.0, 1.0, 0.0, 2.0**-130 / 2.0**-133]
    assert module("merge_error").ulps(torch.tensor([torch.nan]).bfloat16(), exact[:1]).item() == torch.inf


def test_a_timeline_counts_what_is_busy_together(module: Any) -> None:
    timeline = module("timeline")
    assert timeline.busy_seconds([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5)]) == 3.5
    read, compute, write = [(0.0, 2.0), (2.0, 3.0)], [(1.0, 4.0), (1.5, 2.0)], [(2.5, 5.0)]
    assert timeline.overlap_seconds([read, compute, write], 1) == 5.0
    assert timeline.overlap_seconds([read, compute, write], 2) == 3.0
    assert timeline.overlap_seconds([read, compute, write], 3) == 0.5


def test_a_traced_merge_tells_of_every_stage(inputs: tuple[Path, Path], tmp_path: Path, module: Any) -> None:
    record = tmp_path / "trace.json"
    arguments = ["merge", str(inputs[0]), "--adapter", str(inputs[1]), "-o", str(tmp_path / "merged"), "-q"]
    program = [sys.executable, str(BENCHMARKS / "merge_traced.py"), repr(time.perf_counter()), str(record)]
    subprocess.run([*program, *arguments], check=True)
    trace = json.loads(record.read_text())
    timeline = module("timeline")
    assert {stage for stage, *_ in trace["busy"]} == set(timeline.STAGES)
    begin, end = trace["engine"]
    assert 0 < begin < end < trace["end"]
    for lane in timeline.lanes(trace):
        assert all(before[1] <= after[0] for before, after in zip(lane.busy, lane.busy[1:], strict=False))
        if lane.stage != timeline.AHEAD:
            assert all(begin <= first <= last <= end for first, last in lane.busy)
    picture = ElementTree.fromstring(timeline.svg(trace, 2, "a < b"))
    assert {lane.name for lane in timeline.lanes(trace)} <= {text.text for text in picture.iter() if text.text}
    assert "of 2 cores were in use" in timeline.text(trace, 2)


def test_converted_loras_are_judged_against_the_change_that_they_stand_for(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    module: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, checkpoint = module("make_lora_inputs"), module("make_checkpoint")
    shape = checkpoint.LlamaShape(hidden=32, intermediate=48, vocabulary=70, heads=4, kv_heads=2, head_dim=8, layers=2)
    model, initial = inputs
    monkeypatch.setattr(make, "MISS_RANK", 8)
    for part, write in {
        "trained": lambda folder: make.write_trained(folder, initial),
        "balance": lambda folder: make.write_blocks(folder, shape, model.name, "balance"),
        "bat": lambda folder: make.write_blocks(folder, shape, model.name, "bat"),
        "tuned": lambda folder: make.write_tuned(folder, model),
    }.items():
        checkpoint.make(tmp_path / part, write)
    options = {
        "residual": ["trained", "--init", initial, "--as-is"],
        "balance": ["balance", "--base", model],
        "bat": ["bat", "--base", model, "--rank", "32"],
        "tuned": ["--from-checkpoints", model, "tuned", "--rank", "32"],
    }
    for kind, arguments in options.items():
        program = [sys.executable, "-m", "corda_convert", "to-lora", *map(str, arguments), "-o", f"out-{kind}", "-q"]
        subprocess.run(program, check=True, cwd=tmp_path, capture_output=True)
        source = tmp_path / ("trained" if kind == "residual" else kind)
        output = tmp_path / f"out-{kind}"
        capsys.readouterr()
        module("to_lora_error").main(kind, str(model), str(source), str(initial), str(output))
        right = json.loads(capsys.readouterr().out)[str(output)]
        assert right["worst"] < 1e-6, kind
        file = output / "adapter_model.safetensors"
        wrong = load_file(file)
        wrong["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"] *= 1.1
        save_file(wrong, file)
        module("to_lora_error").main(kind, str(model), str(source), str(initial), str(output))
        assert json.loads(capsys.readouterr().out)[str(output)]["worst"] == pytest.approx(0.1, rel=0.01), kind
