"""RWKV-PEFT's files: each kind merged into a `.pth` base, compared with float64; and `.pth` as a format of the output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from building import LINEARS, UP, llama_tensors, random, read_json, weight_files, write_checkpoint, write_lora
from safetensors.torch import load_file

from corda_convert import CordaConvertError, MergeOptions, RunOptions, merge

Refusal = Callable[..., str]

WIDTH, RANK, BLOCK = 16, 3, 4

SHAPES = {
    f"blocks.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "att.receptance": (WIDTH, WIDTH),
        "att.output": (WIDTH, WIDTH),
        "ffn.key": (4 * WIDTH, WIDTH),
        "ffn.value": (WIDTH, 4 * WIDTH),
    }.items()
}
"""The Linears of a small RWKV-7: name and (d_out, d_in)."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*SwigPy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def rwkv_tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    tensors = {"emb.weight": random(40, WIDTH, seed=1, dtype=dtype)}
    for place, (name, shape) in enumerate(SHAPES.items()):
        tensors[f"{name}.weight"] = random(*shape, seed=10 + place, dtype=dtype)
    for layer in range(2):
        tensors |= {
            f"blocks.{layer}.ln1.weight": random(WIDTH, seed=30 + layer, dtype=dtype),
            f"blocks.{layer}.att.x_r": random(1, 1, WIDTH, seed=40 + layer, dtype=dtype),
            f"blocks.{layer}.att.w1": random(WIDTH, 8, seed=50 + layer, dtype=dtype),
        }
    return tensors | {"head.weight": random(40, WIDTH, seed=2, dtype=dtype)}


def write_base(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(rwkv_tensors(dtype), folder / "rwkv-base.pth")
    return folder / "rwkv-base.pth"


def write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    torch.save(dict(tensors), path)
    return path


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, torch.Tensor]:
    merge(base, adapter=adapter, output=output, options=MergeOptions(**options))
    loaded: dict[str, torch.Tensor] = torch.load(output / base.name, weights_only=True)
    return loaded


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert ((found.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001 + 1e-6).all()
    assert (found == exact.bfloat16()).double().mean() > 0.99


def assert_only_changed(found: Mapping[str, torch.Tensor], changed: set[str]) -> None:
    base = rwkv_tensors()
    assert list(found) == list(base)
    assert {name for name in base if not torch.equal(found[name], base[name])} == changed


def lora_file(path: Path, *, seed: int = 100) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {}
    for place, (name, (d_out, d_in)) in enumerate(SHAPES.items()):
        tensors[f"{name}.lora_A"] = random(RANK, d_in, seed=seed + 2 * place, dtype=torch.bfloat16)
        tensors[f"{name}.lora_B"] = random(d_out, RANK, seed=seed + 2 * place + 1, dtype=torch.bfloat16)
    return write_file(path, tensors), tensors


def block_tensors(part: str, *, bat: bool, rank: int = BLOCK, seed: int = 200) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": random(
            *((d_in // rank, rank, rank) if bat else (rank, d_out)), seed=seed + place, dtype=torch.bfloat16
        )
        for place, (name, (d_out, d_in)) in enumerate(SHAPES.items())
    }


def product(tensors: Mapping[str, torch.Tensor], name: str, prefix: str = "lora_") -> torch.Tensor:
    return tensors[f"{name}.{prefix}B"].double() @ tensors[f"{name}.{prefix}A"].double()


def pissa_files(folder: Path, *, wrapper: str = "model.", moved: float = 0.05) -> tuple[Path, Path, dict[str, Any]]:
    """The factors of a PiSSA training before and after: float32 ones of the top of the base's spectrum."""
    initial, trained = {}, {}
    for place, name in enumerate(SHAPES):
        U, S, Vh = torch.linalg.svd(rwkv_tensors()[f"{name}.weight"].float(), full_matrices=False)
        root = S[:RANK].sqrt()
        initial |= {f"{name}.init_lora_A": root[:, None] * Vh[:RANK], f"{name}.init_lora_B": U[:, :RANK] * root}
        for part in "AB":
            first = initial[f"{name}.init_lora_{part}"]
            trained[f"{name}.lora_{part}"] = first + moved * random(*first.shape, seed=300 + place)
    write_file(folder / "init_pissa.pth", {f"{wrapper}{name}": tensor for name, tensor in initial.items()})
    return write_file(folder / "rwkv-0.pth", trained), folder / "init_pissa.pth", initial | trained


# Blocks


@pytest.mark.parametrize("part", ["disha", "bone"])
@pytest.mark.parametrize("rank", [4, 5])
def test_a_balance_block_acts_on_the_inputs_summed_in_chunks(tmp_path: Path, part: str, rank: int) -> None:
    tensors = block_tensors(part, bat=False, rank=rank)
    found = merged(write_base(tmp_path), write_file(tmp_path / "rwkv-0.pth", tensors), tmp_path / "out")
    assert_only_changed(found, {f"{name}.weight" for name in SHAPES})
    for name, (_, d_in) in SHAPES.items():
        chunks = torch.nn.functional.pad(torch.eye(d_in, dtype=torch.float64), (0, -d_in % rank)).view(d_in, -1, rank)
        exact = rwkv_tensors()[f"{name}.weight"].double() + (chunks.sum(1) @ tensors[f"{name}.{part}"].double()).T
        assert_rounded_once(found[f"{name}.weight"], exact)


@pytest.mark.parametrize("part", ["disha", "bone"])
def test_a_bat_block_belongs_to_each_chunk_of_inputs(tmp_path: Path, part: str) -> None:
    tensors = block_tensors(part, bat=True)
    found = merged(write_base(tmp_path), write_file(tmp_path / "rwkv-0.pth", tensors), tmp_path / "out")
    assert_only_changed(found, {f"{name}.weight" for name in SHAPES})
    for name, (d_out, d_in) in SHAPES.items():
        weight, blocks = rwkv_tensors()[f"{name}.weight"].double(), tensors[f"{name}.{part}"].double()
        exact = weight.clone()
        for i in range(0, d_out, BLOCK):
            for j in range(0, d_in, BLOCK):
                own = blocks[j // BLOCK]
                exact[i : i + BLOCK, j : j + BLOCK] += weight[i : i + BLOCK, j : j + BLOCK] @ own + own
        assert_rounded_once(found[f"{name}.weight"], exact)


def test_a_large_bat_weight_is_folded_in_parts_with_the_norm_of_its_change(tmp_path: Path) -> None:
    weight, blocks = random(2048, 1024, seed=1), random(16, 64, 64, seed=2)
    base = write_file(tmp_path / "base.pth", {"blocks.0.ffn.key.weight": weight})
    adapter = write_file(tmp_path / "a.pth", {"blocks.0.ffn.key.disha": blocks})
    outcome = merge(base, adapter=adapter, output=tmp_path / "out")
    found = torch.load(tmp_path / "out" / "base.pth", weights_only=True)["blocks.0.ffn.key.weight"]
    own = weight.double().view(32, 64, 16, 64)
    change = (torch.einsum("aibj,bjk->aibk", own, blocks.double()) + blocks.double().transpose(0, 1)).reshape(
        2048, 1024
    )
    torch.testing.assert_close(found.double(), weight.double() + change, rtol=1e-5, atol=1e-4)
    assert outcome.receipt["tensors"][0]["delta_norm"] == pytest.approx(float(change.norm()), rel=1e-5)
    assert outcome.receipt["tensors"][0]["changes"][0]["mode"] == "input-bat"


def test_the_order_of_bat_blocks_matters_and_that_of_balance_blocks_does_not(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    for bat, expected in ((True, True), (False, False)):
        first = write_file(tmp_path / "one.pth", block_tensors("disha", bat=bat))
        second = write_file(tmp_path / "two.pth", block_tensors("disha", bat=bat, seed=250))
        both = merge(base, adapter=[first, second], output=tmp_path / f"both-{bat}")
        turned = merge(base, adapter=[second, first], output=tmp_path / f"turned-{bat}")
        assert both.receipt["order_matters"] is expected
        found = [torch.load(each.output / base.name, weights_only=True) for each in (both, turned)]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0]) is not expected


# LoRA and PiSSA


def test_lora_is_scaled_by_alpha_over_the_rank_of_the_file(tmp_path: Path) -> None:
    adapter, tensors = lora_file(tmp_path / "rwkv-0.pth")
    found = merged(write_base(tmp_path), adapter, tmp_path / "out", alpha=7)
    assert_only_changed(found, {f"{name}.weight" for name in SHAPES})
    for name in SHAPES:
        exact = rwkv_tensors()[f"{name}.weight"].double() + 7 / RANK * product(tensors, name)
        assert_rounded_once(found[f"{name}.weight"], exact)
    (described,) = read_json(tmp_path / "out" / "corda_convert.json")["adapters"]
    assert (described["kind"], described["alpha"], described["ranks"]) == ("lora", 7, [RANK])


def test_lora_without_alpha_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    adapter, _ = lora_file(tmp_path / "rwkv-0.pth")
    assert refusal("merge", write_base(tmp_path), "--adapter", adapter) == (
        "rwkv-0.pth does not tell how its LoRA factors are scaled.\n"
        "RWKV-PEFT saves neither lora_alpha nor whether it was LoRA or PiSSA.\n"
        "For LoRA say --alpha with the lora_alpha of the training; for PiSSA give its init_pissa.pth as --init."
    )


@pytest.mark.parametrize("wrapper", ["model.", ""])
def test_pissa_is_not_scaled_and_takes_its_initial_factors_out(tmp_path: Path, wrapper: str) -> None:
    trained, initial, tensors = pissa_files(tmp_path, wrapper=wrapper)
    found = merged(write_base(tmp_path), trained, tmp_path / "out", init=initial)
    assert_only_changed(found, {f"{name}.weight" for name in SHAPES})
    for name in SHAPES:
        change = product(tensors, name) - product(tensors, name, "init_lora_")
        assert_rounded_once(found[f"{name}.weight"], rwkv_tensors()[f"{name}.weight"].double() + change)


def test_untrained_pissa_gives_the_base_back(tmp_path: Path) -> None:
    trained, initial, _ = pissa_files(tmp_path, moved=0.0)
    assert_only_changed(merged(write_base(tmp_path), trained, tmp_path / "out", init=initial), set())


def test_pissa_taken_for_lora_is_told_by_its_numbers(tmp_path: Path, refusal: Refusal) -> None:
    trained, _, _ = pissa_files(tmp_path)
    message = refusal("merge", write_base(tmp_path), "--adapter", trained, "--alpha", RANK)
    assert "rwkv-0.pth was trained beside a residual, and rwkv-base is not that residual" in message


def test_the_initial_factors_of_another_training_are_refused(tmp_path: Path, refusal: Refusal) -> None:
    _, initial, _ = pissa_files(tmp_path)
    other, _ = lora_file(tmp_path / "other.pth")
    message = refusal("merge", write_base(tmp_path), "--adapter", other, "--init", initial)
    assert message.startswith("other.pth was not trained from the initial adapter init_pissa.pth")


# Full tensors


def test_full_tensors_take_the_place_of_the_bases_in_its_dtype(tmp_path: Path) -> None:
    name, _ = next(iter(SHAPES.items()))
    norm, weight = random(WIDTH, seed=70), random(WIDTH, WIDTH, seed=71)
    block = random(BLOCK, WIDTH, seed=72)
    adapter = write_file(
        tmp_path / "rwkv-0.pth", {f"{name}.disha": block, f"{name}.weight": weight, "blocks.1.ln1.weight": norm}
    )
    found = merged(write_base(tmp_path), adapter, tmp_path / "out")
    assert_only_changed(found, {f"{name}.weight", "blocks.1.ln1.weight"})
    assert torch.equal(found["blocks.1.ln1.weight"], norm.bfloat16())
    exact = weight.double() + block.T.double().repeat(1, WIDTH // BLOCK)
    assert_rounded_once(found[f"{name}.weight"], exact)


def test_a_full_tensor_that_the_base_lacks_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    tensors = block_tensors("disha", bat=False) | {"blocks.0.att.time_state": random(2, 4, 4)}
    message = refusal("merge", write_base(tmp_path), "--adapter", write_file(tmp_path / "rwkv-0.pth", tensors))
    assert message == "rwkv-0.pth replaces blocks.0.att.time_state, which rwkv-base lacks."


def test_the_weight_of_a_pissa_module_is_refused(tmp_path: Path) -> None:
    trained, initial, tensors = pissa_files(tmp_path)
    name = next(iter(SHAPES))
    kept = {key: tensor for key, tensor in tensors.items() if "init" not in key}
    write_file(trained, kept | {f"{name}.weight": random(WIDTH, WIDTH)})
    with pytest.raises(CordaConvertError, match=f"rwkv-0.pth brings along the weight of {name}, which PiSSA adapts"):
        merge(write_base(tmp_path), adapter=trained, output=tmp_path / "out", options=MergeOptions(init=initial))


# Refusals

FIRST = "blocks.0.att.receptance"
KEY = "blocks.0.ffn.key"


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({f"{FIRST}.lora_A": (3, 16)}, ("--alpha", 8), f"{FIRST} has lora_A; lora_A and lora_B were expected."),
        ({f"{FIRST}.lora_A": (3, 16), f"{FIRST}.lora_B": (16, 4)}, ("--alpha", 8), "lora_A (3, 16) and lora_B (16, 4);"),
        ({f"{FIRST}.lora_A": (3, 16), f"{FIRST}.lora_B": (16, 3)}, ("--alpha", 0), "--alpha is 0; a finite number"),
        ({f"{FIRST}.lora_A": (3, 16), f"{FIRST}.lora_B": (16, 3)}, ("--alpha", "nan"), "--alpha is nan; a finite number"),
        ({f"{KEY}.lora_A": (3, 64), f"{KEY}.lora_B": (16, 3)}, ("--alpha", 8), "the weight is (64, 16), lora_B gives 16"),
        ({f"{FIRST}.lora_A": (3, 16), f"{FIRST}.lora_B": (16, 3), f"{FIRST}.disha": (4, 16)}, ("--alpha", 8),
         f"{FIRST} has disha and lora_A and lora_B;"),
        ({f"{FIRST}.disha": (4, 16), f"{FIRST}.bone": (4, 16)}, (), "stand for the same part of one module."),
        ({f"{FIRST}.disha": (4, 16)}, ("--alpha", 8), "--alpha is for LoRA files of RWKV-PEFT alone; there is none."),
        ({f"{FIRST}.disha": (4, 4, 2)}, (), f"the block of {FIRST} is (4, 4, 2); (r, d_out) or (d_in / r, r, r)"),
        ({f"{FIRST}.disha": (16,)}, (), f"the block of {FIRST} is (16,);"),
        ({f"{KEY}.disha": (4, 16)}, (), f"{KEY}: the weight is (64, 16), its balance block is (4, 16)."),
        ({f"{KEY}.bone": (16, 4, 4)}, (), f"{KEY}: the weight is (64, 16), its input-bat block is (16, 4, 4)."),
        ({"blocks.9.ffn.key.disha": (4, 64)}, (), "1 of 1 adapted modules find no weight in rwkv-base"),
        ({f"{FIRST}.init_lora_A": (3, 16), f"{FIRST}.init_lora_B": (16, 3)}, (), "Give it as --init"),
        ({"blocks.0.att.time_state": (2, 4, 4)}, (), "What its state tuning saves is no adapter."),
        ({"blocks.0.ln1.weight": (16,)}, (), "it has no tensor NAME.disha, NAME.bone or NAME.lora_A."),
        ({}, (), "adapts no module"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_name(
    tmp_path: Path,
    refusal: Refusal,
    tensors: Mapping[str, tuple[int, ...]],
    options: tuple[object, ...],
    message: str,
) -> None:
    adapter = write_file(tmp_path / "a.pth", {name: random(*shape) for name, shape in tensors.items()})
    assert message in refusal("merge", write_base(tmp_path), "--adapter", adapter, *options)


def test_all_problems_of_a_file_come_together(tmp_path: Path, refusal: Refusal) -> None:
    tensors = {f"{FIRST}.disha": random(16), f"{KEY}.disha": torch.zeros(4, 64, dtype=torch.int64)}
    message = refusal("merge", write_base(tmp_path), "--adapter", write_file(tmp_path / "a.pth", tensors))
    assert f"the block of {FIRST} is (16,)" in message
    assert f"{KEY}.disha of {KEY} has the dtype I64" in message


def test_alpha_and_initial_factors_contradict_each_other(tmp_path: Path, refusal: Refusal) -> None:
    trained, initial, _ = pissa_files(tmp_path)
    message = refusal("merge", write_base(tmp_path), "--adapter", trained, "--init", initial, "--alpha", 8)
    assert message.startswith(
        "--alpha is for RWKV-PEFT's LoRA, initial factors are for its PiSSA, which does not scale."
    )


def test_the_trained_file_is_no_initial_one(tmp_path: Path, refusal: Refusal) -> None:
    trained, _, _ = pissa_files(tmp_path)
    message = refusal("merge", write_base(tmp_path), "--adapter", trained, "--init", trained)
    assert message.startswith("rwkv-0.pth does not hold initial factors alone")


@pytest.mark.parametrize("suffix", [".safetensors", ".txt"])
def test_another_kind_of_file_is_no_adapter(tmp_path: Path, refusal: Refusal, suffix: str) -> None:
    (tmp_path / f"adapter{suffix}").write_bytes(b"")
    message = refusal("merge", write_base(tmp_path), "--adapter", tmp_path / f"adapter{suffix}")
    assert f"adapter{suffix} is no adapter: a folder of PEFT, or a file of RWKV-PEFT" in message


def test_a_file_of_peft_is_pointed_to_its_folder(tmp_path: Path, refusal: Refusal) -> None:
    key = f"base_model.model.{FIRST}.lora_A.weight"
    adapter = write_file(tmp_path / "adapter_model.bin", {key: random(3, 16)})
    message = refusal("merge", write_base(tmp_path), "--adapter", adapter)
    assert message.endswith("For an adapter of PEFT, give its folder.")


def test_only_merge_takes_files(tmp_path: Path, refusal: Refusal) -> None:
    trained, initial, _ = pissa_files(tmp_path)
    assert "is a file of RWKV-PEFT, which can be merged, but not" in refusal("to-lora", trained, "--init", initial)
    message = refusal("merge", write_base(tmp_path), "--subtract", initial)
    assert "is a file; the folder of an adapter was expected." in message


def test_poisoned_factors_are_named(tmp_path: Path, refusal: Refusal) -> None:
    tensors = block_tensors("disha", bat=True)
    tensors[f"{KEY}.disha"][0, 0, 0] = float("nan")
    adapter = write_file(tmp_path / "rwkv-0.pth", tensors)
    assert f"{KEY}.disha" in refusal("merge", write_base(tmp_path), "--adapter", adapter)


# The format of the output


def test_a_single_pth_becomes_one_of_the_same_name(tmp_path: Path) -> None:
    base = write_base(tmp_path)
    adapter = write_file(tmp_path / "rwkv-0.pth", block_tensors("disha", bat=False))
    merge(base, adapter=adapter, output=tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "corda_convert.json", "rwkv-base.pth"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert 'torch.load("rwkv-base.pth"' in card
    assert "library_name: pytorch" in card


def test_a_pt_keeps_its_suffix_and_a_bin_becomes_safetensors(tmp_path: Path) -> None:
    adapter, _ = lora_file(tmp_path / "rwkv-0.pth")
    for name, made in (("base.pt", "base.pt"), ("base.bin", "model.safetensors")):
        base = write_base(tmp_path).rename(tmp_path / name)
        merge(base, adapter=adapter, output=tmp_path / f"out-{name}", options=MergeOptions(alpha=8))
        assert (tmp_path / f"out-{name}" / made).is_file()
        assert f'("{made}"' in (tmp_path / f"out-{name}" / "README.md").read_text(encoding="utf-8")


def test_another_format_is_refused(tmp_path: Path) -> None:
    adapter, _ = lora_file(tmp_path / "rwkv-0.pth")
    with pytest.raises(CordaConvertError, match=r"Unknown format 'gguf'\.\nChoose one of safetensors, pth\."):
        merge(
            write_base(tmp_path),
            adapter=adapter,
            output=tmp_path / "out",
            options=MergeOptions(alpha=8, format="gguf"),  # type: ignore[arg-type]
        )


def test_the_format_can_be_chosen(tmp_path: Path, done: Callable[..., Any]) -> None:
    base = write_base(tmp_path)
    adapter, _ = lora_file(tmp_path / "rwkv-0.pth")
    expected = merged(base, adapter, tmp_path / "pth", alpha=8)
    done("merge", base, "--adapter", adapter, "--alpha", 8, "--format", "safetensors", "-o", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert 'load_file("model.safetensors")' in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_folder_becomes_one_pth_on_request(tmp_path: Path) -> None:
    model, adapter = write_checkpoint(tmp_path / "model", shards=3), write_lora(tmp_path / "lora")
    merge(model, adapter=adapter, output=tmp_path / "shards")
    merge(model, adapter=adapter, output=tmp_path / "one", options=MergeOptions(format="pth"))
    expected: dict[str, torch.Tensor] = {}
    for name in weight_files(tmp_path / "shards"):
        expected |= load_file(tmp_path / "shards" / name)
    found = torch.load(tmp_path / "one" / "model.pth", weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {"README.md", "config.json", "corda_convert.json", "model.pth"}


def test_a_pth_takes_adapters_of_peft_too(tmp_path: Path) -> None:
    tensors, adapter = llama_tensors(), write_lora(tmp_path / "lora", {UP: LINEARS[UP]})
    model = write_checkpoint(tmp_path / "model", tensors)
    merge(model, adapter=adapter, output=tmp_path / "expected")
    base = write_file(tmp_path / "llama.pth", tensors)
    found = merged(base, adapter, tmp_path / "found")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_dtype_can_be_chosen(tmp_path: Path) -> None:
    adapter, _ = lora_file(tmp_path / "rwkv-0.pth")
    options = MergeOptions(alpha=8)
    merge(
        write_base(tmp_path), adapter=adapter, output=tmp_path / "out", options=options, run=RunOptions(dtype="float32")
    )
    found = torch.load(tmp_path / "out" / "rwkv-base.pth", weights_only=True)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
