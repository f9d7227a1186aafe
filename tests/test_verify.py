"""`verify`: every output is found right, whatever is altered in one is found, and no receipt tells where things lay."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    MODEL,
    RESIDUAL,
    files_below,
    read_json,
    write_checkpoint,
    write_json,
    write_lora,
)
from conftest import Ran
from hub_server import Hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_hub_reading import hub  # noqa: F401 - a fixture
from test_lora_variants import CASES, adapter_of, base_of
from transformers import PreTrainedModel

from corda_convert import MergeOptions, RunOptions, decompose, merge, to_lora
from corda_convert.operations.decompose import DecomposeOptions
from corda_convert.operations.from_cache import CacheOptions, decompose_from_cache
from corda_convert.operations.to_lora import ToLoraOptions
from corda_convert.operations.verify import Verification, VerifyOptions, verify
from corda_convert.operations.verify_ulps import Exact, measure

Command = Callable[..., Ran]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TASK = COVARIANCES.with_name("task.safetensors")
INITIAL = RESIDUAL / "corda_init"
CORDA, LORA, PATTERNS = ADAPTERS / "corda", ADAPTERS / "lora", ADAPTERS / "lora_patterns"
FEW = ("down_proj", "q_proj")


def _decompose(folder: Path, **options: Any) -> None:
    covariances = None if options.get("method") == "svd" else TASK
    decompose(
        MODEL,
        output=folder,
        covariances=covariances,
        options=DecomposeOptions(**{"mode": "kpm", "rank": 8, "targets": FEW, **options}),
    )


def _from_cache(folder: Path) -> None:
    cache = folder.with_suffix(".pt")
    _decompose(folder.with_name("init"), residual=False, write_cache=cache)
    decompose_from_cache(MODEL, cache=cache, output=folder, options=CacheOptions("kpm"))


Made = tuple[Callable[[Path], object], VerifyOptions, set[str]]
"""How an output is made, what it is verified against, and the kinds of tensors that are then computed again."""

OUTPUTS: dict[str, Made] = {
    "merge": (
        lambda folder: merge(MODEL, adapter=LORA, output=folder),
        VerifyOptions(against=MODEL, adapters=[LORA]),
        {"copied", "folded"},
    ),
    "merge with --init": (
        lambda folder: merge(MODEL, adapter=CORDA, output=folder, options=MergeOptions(init=INITIAL)),
        VerifyOptions(against=MODEL, adapters=[CORDA], init=[INITIAL]),
        {"copied", "folded"},
    ),
    "merge into the residual, in float32": (
        lambda folder: merge(RESIDUAL, adapter=CORDA, output=folder, run=RunOptions(dtype="float32")),
        VerifyOptions(against=RESIDUAL, adapters=[CORDA]),
        {"cast", "folded"},
    ),
    "merge of two": (
        lambda folder: merge(MODEL, adapter=[PATTERNS, LORA], output=folder, options=MergeOptions(scales=[0.5, -1])),
        VerifyOptions(against=MODEL, adapters=[PATTERNS, LORA], scales=[0.5, -1]),
        {"copied", "folded"},
    ),
    "merge as PEFT rounds": (
        lambda folder: merge(MODEL, adapter=PATTERNS, output=folder, options=MergeOptions(rounding="peft")),
        VerifyOptions(against=MODEL, adapters=[PATTERNS]),
        {"copied", "folded"},
    ),
    "merge of a saved module": (
        lambda folder: merge(MODEL, adapter=ADAPTERS / "lora_modules_to_save", output=folder),
        VerifyOptions(against=MODEL, adapters=[ADAPTERS / "lora_modules_to_save"]),
        {"copied", "folded", "replaced"},
    ),
    **{
        f"merge of {name}": (
            lambda folder, name=name: merge(MODEL, adapter=ADAPTERS / name, output=folder),
            VerifyOptions(against=MODEL, adapters=[ADAPTERS / name]),
            {"copied", "folded"},
        )
        for name in ("miss_balance", "miss_mini", "miss_bat", "bone_bat")
    },
    "merge --subtract": (
        lambda folder: merge(MODEL, output=folder, options=MergeOptions(subtract=INITIAL)),
        VerifyOptions(against=MODEL, init=[INITIAL]),
        {"copied", "folded", "carried"},
    ),
    "decompose": (_decompose, VerifyOptions(against=MODEL, covariances=TASK), {"copied", "decomposed", "factors"}),
    "decompose by svd-llm": (
        lambda folder: _decompose(folder, method="svd-llm", mode="ipm", rslora=True, alpha=16),
        VerifyOptions(against=MODEL, covariances=TASK),
        {"copied", "decomposed", "factors"},
    ),
    "decompose by asvd": (
        lambda folder: _decompose(folder, method="asvd", asvd_alpha=0.7, mode="ipm"),
        VerifyOptions(against=MODEL, covariances=TASK),
        {"copied", "decomposed", "factors"},
    ),
    "decompose by svd": (
        lambda folder: _decompose(folder, method="svd", mode="ipm"),
        VerifyOptions(against=MODEL),
        {"copied", "decomposed", "factors"},
    ),
    "decompose without residual": (
        lambda folder: _decompose(folder, residual=False),
        VerifyOptions(against=MODEL, covariances=TASK),
        {"factors"},
    ),
    "decompose --truncate": (
        lambda folder: _decompose(folder, truncate=4, rank=None, mode=None),
        VerifyOptions(against=MODEL),
        {"copied", "truncated"},
    ),
    "decompose --from-cache": (_from_cache, VerifyOptions(against=MODEL), {"copied", "folded", "factors"}),
    "to-lora": (
        lambda folder: to_lora(CORDA, init=INITIAL, output=folder),
        VerifyOptions(adapters=[CORDA], init=[INITIAL]),
        {"concatenated"},
    ),
    "to-lora of a lower rank": (
        lambda folder: to_lora(CORDA, init=INITIAL, output=folder, options=ToLoraOptions(rank=4)),
        VerifyOptions(adapters=[CORDA], init=[INITIAL]),
        {"reduced"},
    ),
    "to-lora for the outputs": (
        lambda folder: to_lora(CORDA, init=INITIAL, output=folder, options=ToLoraOptions(rank=4, weight_by=TASK)),
        VerifyOptions(adapters=[CORDA], init=[INITIAL], covariances=TASK),
        {"reduced"},
    ),
    "to-lora of several": (
        lambda folder: to_lora([LORA, PATTERNS], output=folder, options=ToLoraOptions(scales=[0.5, -1])),
        VerifyOptions(adapters=[LORA, PATTERNS]),
        {"concatenated"},
    ),
    "to-lora of blocks": (
        lambda folder: to_lora(ADAPTERS / "miss_balance", output=folder, options=ToLoraOptions(base=str(MODEL))),
        VerifyOptions(against=MODEL, adapters=[ADAPTERS / "miss_balance"]),
        {"concatenated"},
    ),
    "to-lora of bat": (
        lambda folder: to_lora(ADAPTERS / "miss_bat", output=folder, options=ToLoraOptions(base=str(MODEL), rank=8)),
        VerifyOptions(against=MODEL, adapters=[ADAPTERS / "miss_bat"]),
        {"extracted"},
    ),
    "to-lora of two checkpoints": (
        lambda folder: to_lora(output=folder, options=ToLoraOptions(from_checkpoints=(MODEL, RESIDUAL), rank=4)),
        VerifyOptions(against=MODEL, residual=RESIDUAL),
        {"extracted"},
    ),
    "to-lora with a saved module": (
        lambda folder: to_lora(
            ADAPTERS / "lora_modules_to_save", output=folder, options=ToLoraOptions(rank=2), run=RunOptions(dtype="bfloat16")
        ),
        VerifyOptions(adapters=[ADAPTERS / "lora_modules_to_save"]),
        {"reduced", "carried"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of this name, made once. It must not be altered."""
    root = tmp_path_factory.mktemp("outputs")

    def make(name: str) -> Path:
        folder = root / name.replace(" ", "-")
        if not folder.exists():
            OUTPUTS[name][0](folder)
        return folder

    return make


@pytest.fixture
def altered(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an output, to be altered."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made(name), tmp_path / "altered"))

    return copy


def against(name: str, **changes: Any) -> VerifyOptions:
    options = OUTPUTS[name][1]
    given = {field: getattr(options, field) for field in VerifyOptions.__slots__}
    return VerifyOptions(**{**given, "seed": 1, **changes})


def cache_of(made: Callable[[str], Path], name: str) -> dict[str, Any]:
    """What `against` takes beside for an output that was made of a cache."""
    return {"init": [made(name).with_suffix(".pt")]} if name == "decompose --from-cache" else {}


def problems(found: Verification) -> list[str]:
    assert found.is_fine == (not found.facts["problems"]) == found.facts["is_fine"]
    return [str(problem["what"]) for problem in found.facts["problems"]]


def place_of(folder: Path, name: str) -> tuple[Path, int, int]:
    """The file that holds a tensor, and where in it."""
    (entry,) = [entry for entry in read_json(folder / "corda_convert.json")["tensors"] if entry["name"] == name]
    path = folder / entry["file"]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    return path, 8 + length + begin, 8 + length + end


def change_bytes(folder: Path, name: str, change: Callable[[bytearray], object]) -> None:
    path, begin, end = place_of(folder, name)
    content = bytearray(path.read_bytes())
    own = content[begin:end]
    change(own)
    content[begin:end] = own
    path.write_bytes(content)


def flip(content: bytearray, *, bit: int = 0, number: int = 0, size: int = 2) -> None:
    """Flips a bit of one little-endian number."""
    content[number * size + bit // 8] ^= 1 << bit % 8


def reseal(folder: Path, **changes: Any) -> None:
    """Writes the digests of the files as they are now into the receipt."""
    receipt = read_json(folder / "corda_convert.json") | changes
    for entry in receipt["files"]:
        content = (folder / entry["name"]).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / "corda_convert.json", receipt)


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_every_command_wrote_is_fine_and_its_numbers_are_right(name: str, made: Callable[[str], Path]) -> None:
    found = verify(made(name), options=against(name, sample=6, **cache_of(made, name)))
    assert problems(found) == []
    recomputed = found.facts["recomputed"]
    assert recomputed["kinds"].keys() == OUTPUTS[name][2]
    assert recomputed["not_recomputed"] == {}
    for kind, facts in recomputed["kinds"].items():
        assert facts["checked"] == min(6, facts["of"]) and facts["wrong"] == 0
        assert facts["how"] == {
            "bits" if kind in ("copied", "carried", "replaced", "cast") else "exact": facts["checked"]
        }
        if (
            kind in ("folded", "decomposed")
            and read_json(made(name) / "corda_convert.json")["options"].get("rounding") != "peft"
        ):
            assert 0.45 < facts["largest_error_ulp"] < (0.51 if "float32" not in name else 5)
    if name.startswith("to-lora"):
        tensors = read_json(made(name) / "corda_convert.json")["tensors"]
        assert sum(facts["of"] for facts in recomputed["kinds"].values()) == sum(
            "with" not in each for each in tensors
        ) or (recomputed["kinds"].keys() == {"concatenated"})


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name != "merge as PEFT rounds"])
def test_a_wrong_number_behind_a_new_digest_is_found_in_what_every_command_wrote(
    name: str, made: Callable[[str], Path], altered: Callable[[str], Path]
) -> None:
    folder = altered(name)
    tensors = read_json(folder / "corda_convert.json")["tensors"]
    changed = next(entry for entry in tensors if entry["action"] != "copied" and len(entry["shape"]) == 2)
    size = {"F32": 4, "BF16": 2}[changed["dtype"]]
    bit = 18 if size == 4 else 6  # a sixteenth of the number, or so
    change_bytes(
        folder, changed["name"], lambda content: [flip(content, bit=bit, number=n, size=size) for n in range(40)]
    )
    reseal(folder)
    assert problems(verify(folder)) == []
    found = problems(verify(folder, options=against(name, sample=None, **cache_of(made, name))))
    module = changed["name"].removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".lora_A")
    assert found and all(module in problem for problem in found)


@pytest.mark.parametrize(
    "case",
    ["dora with patterns", "dora on Embedding", "dora on Conv1D", "dora on Conv2d", "lora_bias", "MultiheadAttention",
     "tokens by module", "dora and a saved module"],
)  # fmt: skip
def test_every_kind_of_change_is_computed_again(case: str, tmp_path: Path) -> None:
    family, config, _ = CASES[case]
    base = base_of(family, tmp_path / "base", torch.bfloat16)
    adapter = adapter_of(base, config, tmp_path / "adapter", torch.bfloat16)
    output = tmp_path / "output"
    merge(base, adapter=adapter, output=output, options=MergeOptions(as_is=True))
    options = VerifyOptions(against=base, adapters=[adapter], sample=None)
    found = verify(output, options=options)
    assert problems(found) == []
    assert found.facts["recomputed"]["kinds"]["folded"]["how"].keys() == {"exact"}
    entries = read_json(output / "corda_convert.json")["tensors"]
    folded = [entry for entry in entries if entry["action"] == "folded"]
    for entry in folded:  # the last number of each, by two units of its last place
        change_bytes(output, entry["name"], lambda content: flip(content, bit=1, number=len(content) // 2 - 1))
    reseal(output)
    wrong = problems(verify(output, options=options))
    assert [problem.split()[0] for problem in wrong] == [entry["name"] for entry in folded]


def test_experts_are_computed_again(tmp_path: Path) -> None:
    from families import tiny

    model: PreTrainedModel = tiny("qwen3_moe").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=parameters))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", adapter=tmp_path / "adapter", output=tmp_path / "output")
    options = VerifyOptions(against=tmp_path / "base", adapters=[tmp_path / "adapter"], sample=None)
    found = verify(tmp_path / "output", options=options)
    assert problems(found) == []
    assert found.facts["recomputed"]["kinds"]["folded"]["how"].keys() == {"exact"}
    assert 0.45 < found.facts["recomputed"]["kinds"]["folded"]["largest_error_ulp"] < 0.51


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def add(path: Path) -> None:
    path.write_text("new", encoding="utf-8")


SHARD, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
Q_PROJ, K_PROJ = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"

DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit of a weight": (
        lambda folder: change_bytes(folder, Q_PROJ, flip),
        [f"{SHARD} was changed: its SHA-256 is "],
    ),
    "a bit of a side file": (
        lambda folder: (folder / "tokenizer.json").write_bytes(
            (folder / "tokenizer.json").read_bytes().replace(b"a", b"b", 1)
        ),
        ["tokenizer.json was changed: "],
    ),
    "a truncated shard": (
        lambda folder: cut(folder / SHARD),
        [f"{SHARD} has 990,732 bytes, the receipt says 990,832."],
    ),
    "a missing shard": (lambda folder: (folder / SECOND).unlink(), [f"{SECOND} is missing."]),
    "a file more": (lambda folder: add(folder / "more.txt"), ["more.txt was added: "]),
    "a link to nothing": (
        lambda folder: [(folder / "config.json").unlink(), (folder / "config.json").symlink_to("nowhere")],
        ["config.json is no file."],
    ),
    "three at once": (
        lambda folder: [cut(folder / SHARD), (folder / SECOND).unlink(), add(folder / "more.txt")],
        [f"{SECOND} is missing.", "more.txt was added: ", f"{SHARD} has 990,732 bytes"],
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_named(damage: str, altered: Callable[[str], Path], command: Command) -> None:
    folder = altered("merge")
    damaging, expected = DAMAGES[damage]
    damaging(folder)
    ran = command("verify", folder)
    assert ran.status == 1 and ran.err == ""
    wrong = [line.removeprefix("  wrong    ") for line in ran.out.splitlines() if line.startswith("  wrong")]
    assert len(wrong) == len(expected)
    assert all(line.startswith(start) for line, start in zip(wrong, expected, strict=True)), wrong


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = read_json(folder / "model.safetensors.index.json")
    change(index)
    write_json(folder / "model.safetensors.index.json", index)


def swap_bytes(folder: Path, first: str, second: str) -> None:
    (one, a, b), (other, c, d) = place_of(folder, first), place_of(folder, second)
    contents = one.read_bytes()[a:b], other.read_bytes()[c:d]
    change_bytes(folder, first, lambda content: content.__setitem__(slice(None), contents[1]))
    change_bytes(folder, second, lambda content: content.__setitem__(slice(None), contents[0]))


def rename_in_header(folder: Path) -> None:
    path = folder / SHARD
    path.write_bytes(path.read_bytes().replace(b"0.self_attn.q_proj", b"0.self_attn.p_proj", 1))


def write_number(name: str, number: bytes) -> Callable[[Path], object]:
    return lambda folder: change_bytes(folder, name, lambda content: content.__setitem__(slice(6, 8), number))


RESEALED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a tensor that the index lacks": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].pop(Q_PROJ)),
        [f"model.safetensors.index.json does not name 1 tensors of its shards: {Q_PROJ}."],
    ),
    "a tensor in the wrong shard": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].update({Q_PROJ: SECOND})),
        [f"model.safetensors.index.json names the wrong shard for 1 tensors: {Q_PROJ}."],
    ),
    "a tensor that nobody knows": (
        lambda folder: edit_index(folder, lambda index: index["weight_map"].update({"x": SECOND})),
        ["model.safetensors.index.json names 1 tensors that the receipt does not know: x."],
    ),
    "a total size": (
        lambda folder: edit_index(folder, lambda index: index.update({"metadata": {"total_size": 57}})),
        ["model.safetensors.index.json has the total_size 57; the tensors have 1,728,960 bytes."],
    ),
    "an index that is none": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("[]"),
        ["model.safetensors.index.json is not a JSON object."],
    ),
    "another name in a header": (
        rename_in_header,
        [
            f"{SHARD} lacks 1 tensors that the receipt puts there: {Q_PROJ}.",
            f"{SHARD} holds 1 tensors that the receipt does not know: model.layers.0.self_attn.p_proj.weight.",
        ],
    ),
    "a NaN": (write_number(Q_PROJ, b"\xc0\x7f"), [f"1 tensors in {SHARD} hold NaN or Inf: {Q_PROJ}."]),
    "an infinity in a copied tensor": (
        write_number("model.norm.weight", b"\x80\xff"),
        [f"1 tensors in {SECOND} hold NaN or Inf: model.norm.weight."],
    ),
}


@pytest.mark.parametrize("damage", RESEALED)
def test_what_a_new_digest_hides_is_named(damage: str, altered: Callable[[str], Path]) -> None:
    folder = altered("merge")
    damaging, expected = RESEALED[damage]
    damaging(folder)
    reseal(folder)
    found = problems(verify(folder))
    assert [what.removeprefix(f"{folder}/") for what in found] == expected


def test_a_damaged_initial_adapter_is_named(altered: Callable[[str], Path]) -> None:
    folder = altered("decompose")
    write_json(folder / "corda_init/adapter_config.json", {"peft_type": "LORA", "r": 7, "lora_alpha": 7})
    reseal(folder)
    found = problems(verify(folder))
    assert len(found) == 12 and all("has lora_A (8, " in problem and "says rank 7" in problem for problem in found)


@pytest.mark.parametrize(
    ("name", "alter", "changed"),
    [
        ("merge", lambda folder: swap_bytes(folder, Q_PROJ, K_PROJ), [Q_PROJ, K_PROJ]),
        ("merge", lambda folder: swap_bytes(folder, "model.norm.weight", "model.layers.0.input_layernorm.weight"),
         ["model.layers.0.input_layernorm.weight", "model.norm.weight"]),
        ("merge", lambda folder: change_bytes(folder, Q_PROJ, flip), [Q_PROJ]),
        ("decompose", lambda folder: change_bytes(folder, Q_PROJ, lambda content: flip(content, bit=1)), [Q_PROJ]),
    ],
)  # fmt: skip
def test_only_the_inputs_show_that_numbers_are_wrong(
    name: str, alter: Callable[[Path], object], changed: list[str], altered: Callable[[str], Path]
) -> None:
    folder = altered(name)
    alter(folder)
    reseal(folder)
    assert problems(verify(folder)) == []
    found = problems(verify(folder, options=against(name, sample=None)))
    assert [problem.split()[0] for problem in found] == changed


def test_another_scale_than_the_receipt_tells_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "merged"
    merge(MODEL, adapter=LORA, output=folder, options=MergeOptions(scales=[1.05]))
    options = read_json(folder / "corda_convert.json")["options"]
    reseal(folder, options={**options, "scales": []})
    assert problems(verify(folder)) == []
    found = verify(folder, options=against("merge", sample=8))
    assert found.facts["recomputed"]["kinds"]["folded"]["wrong"] == 8
    assert all("(folded) is wrong: off by" in problem for problem in problems(found))


def test_a_config_that_scales_a_converted_lora_otherwise_is_found(altered: Callable[[str], Path]) -> None:
    folder = altered("to-lora")
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", {**config, "lora_alpha": config["lora_alpha"] * 2})
    reseal(folder)
    assert problems(verify(folder)) == []
    assert len(problems(verify(folder, options=against("to-lora", sample=3)))) == 3


def test_components_of_the_other_end_are_found(altered: Callable[[str], Path]) -> None:
    folder = altered("decompose")
    options = read_json(folder / "corda_convert.json")["options"]
    reseal(folder, options={**options, "mode": "ipm"})
    found = problems(verify(folder, options=against("decompose", sample=3)))
    assert len(found) == 3
    assert all(
        problem.endswith("there are singular vectors further towards the wanted end (ipm).") for problem in found
    )


def test_factors_of_other_covariances_are_found(made: Callable[[str], Path], tmp_path: Path) -> None:
    other = tmp_path / TASK.name
    shutil.copy(COVARIANCES, other)
    found = problems(verify(made("decompose"), options=against("decompose", covariances=other, sample=2)))
    assert found[0].startswith(f"{other} is not the covariances that the receipt names: ")
    assert len(found) == 3 and all("columns of lora_B are no singular vectors" in problem for problem in found[1:])


def test_another_base_is_found_by_its_digest_and_by_its_numbers(made: Callable[[str], Path], tmp_path: Path) -> None:
    base = Path(shutil.copytree(MODEL, tmp_path / "model"))
    path = base / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")  # the last number of the last tensor
    found = problems(verify(made("merge"), options=against("merge", against=base, sample=None)))
    assert found[0] == f"{path} is not the model that the receipt names: its SHA-256 differs."
    assert len(found) == 2 and "is wrong" in found[1]


def test_a_base_with_fewer_or_more_tensors_is_named(
    made: Callable[[str], Path], altered: Callable[[str], Path]
) -> None:
    folder = altered("merge")
    path = folder / SHARD
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"embed_tokens", b"embed_tokenz")
    path.write_bytes(content[:8] + header + content[8 + length :])
    edit_index(folder, lambda index: index["weight_map"].update({"model.embed_tokenz.weight": SHARD}))
    edit_index(folder, lambda index: index["weight_map"].pop("model.embed_tokens.weight"))
    receipt = (folder / "corda_convert.json").read_text(encoding="utf-8")
    (folder / "corda_convert.json").write_text(receipt.replace("embed_tokens", "embed_tokenz"), encoding="utf-8")
    reseal(folder)
    assert problems(verify(folder)) == []
    assert problems(verify(folder, options=against("merge", sample=1)))[:2] == [
        "1 tensors that these inputs give are not in the output: model.embed_tokens.weight.",
        "1 tensors of the output come from none of these inputs: model.embed_tokenz.weight.",
    ]


def test_what_an_input_itself_holds_is_told_and_no_problem(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.full((16,), float("-inf"))}
    base = write_checkpoint(tmp_path / "base", {**load_file(MODEL / SHARD), **tensors}, config=None)
    adapter = write_lora(tmp_path / "adapter", {"model.layers.0.mlp.gate_proj": (176, 96)})
    merge(base, adapter=adapter, output=tmp_path / "output", options=MergeOptions(as_is=True))
    options = VerifyOptions(against=base, adapters=[adapter], sample=None)
    assert problems(verify(tmp_path / "output")) == [
        "1 tensors in model.safetensors hold NaN or Inf: model.norm.weight."
    ]
    found = verify(tmp_path / "output", options=options)
    assert problems(found) == []
    assert found.facts["from_input_not_finite"] == ["model.norm.weight"]


def test_numbers_that_have_no_formula_are_run_again_and_said_to_be(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base")
    tensors = {name: tensor * 3 for name, tensor in load_file(base / "model.safetensors").items()}
    write_checkpoint(tmp_path / "weights", tensors)
    decompose(
        base, output=tmp_path / "init", options=DecomposeOptions(mode="ipm", method="svd", rank=4, residual=False)
    )
    shutil.copytree(tmp_path / "init", tmp_path / "trained")
    config = read_json(tmp_path / "trained/adapter_config.json")
    write_json(tmp_path / "trained/adapter_config.json", {**config, "init_lora_weights": "pissa"})
    config.pop("corda_config")
    merge(base, adapter=tmp_path / "trained", output=tmp_path / "output")
    options = VerifyOptions(against=base, adapters=[tmp_path / "trained"], sample=4)
    found = verify(tmp_path / "output", options=options)
    assert problems(found) == []
    assert found.facts["recomputed"]["kinds"]["folded"]["how"] == {"again": 4}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no receipt": (lambda folder: (folder / "corda_convert.json").unlink(), "holds no corda_convert.json"),
    "a receipt that was cut off": (lambda folder: cut(folder / "corda_convert.json"), "is not valid JSON"),
    "a receipt of a later version": (
        lambda folder: reseal(folder, format_version=2),
        "has the receipt version 2; this program knows 1.",
    ),
    "a receipt of something else": (lambda folder: reseal(folder, format="x"), "is no receipt of corda-convert."),
    "a receipt without inputs": (
        lambda folder: write_json(
            folder / "corda_convert.json",
            {key: value for key, value in read_json(folder / "corda_convert.json").items() if key != "inputs"},
        ),
        "corda_convert.json is damaged: it has no 'inputs'.",
    ),
    "a name that leaves the folder": (
        lambda folder: write_json(
            folder / "corda_convert.json",
            {**read_json(folder / "corda_convert.json"), "files": [{"name": "../x", "bytes": 1, "sha256": "0" * 64}]},
        ),
        "corda_convert.json is damaged: '../x' is no path of a file in the folder.",
    ),
    "a size that is none": (
        lambda folder: write_json(
            folder / "corda_convert.json",
            {**read_json(folder / "corda_convert.json"), "files": [{"name": "x", "bytes": -1, "sha256": "0" * 64}]},
        ),
        "corda_convert.json is damaged: -1 stands where a size was expected.",
    ),
    "no folder": (lambda folder: shutil.rmtree(folder), "No such folder: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_verified_is_refused_in_one_message(
    case: str, altered: Callable[[str], Path], command: Command
) -> None:
    folder = altered("to-lora")
    damaging, expected = REFUSED[case]
    damaging(folder)
    ran = command("verify", folder)
    assert ran.status == 1 and ran.out == ""
    assert ran.err.startswith("Error: ") and ran.err.count("Error: ") == 1 and expected in ran.err
    as_json = command("verify", folder, "--json")
    assert as_json.status == 1 and as_json.err == ""
    facts = json.loads(as_json.out)
    assert not facts["is_fine"] and expected in facts["problems"][0]["what"]


def test_inputs_that_the_receipt_does_not_name_are_refused(made: Callable[[str], Path], command: Command) -> None:
    given = ("verify", made("merge"), "--against", MODEL, "--adapter", LORA)
    for more, message in (
        (("--adapter", PATTERNS), f"{PATTERNS} is given with --adapter, and the receipt names 1 of that kind"),
        (("--cov", TASK), f"{TASK} is given with --cov, and the receipt names none of that kind"),
        (("--init", INITIAL), f"{INITIAL} is given with --init, and the receipt names none of that kind"),
    ):
        ran = command(*given, *more)
        assert (ran.status, ran.out) == (1, "")
        assert message in ran.err


def test_the_cache_that_was_decomposed_from_is_compared_and_its_factors_are_made_again(
    made: Callable[[str], Path], altered: Callable[[str], Path], command: Command, tmp_path: Path
) -> None:
    cache = cache_of(made, "decompose --from-cache")["init"][0]
    folder = altered("decompose --from-cache")
    given = ("verify", folder, "--against", MODEL)
    ran = command(*given)
    assert (ran.status, ran.out) == (1, "")
    assert f"The receipt names {cache.name} as its cache, and it is not given.\nGive it with --init." in ran.err
    ran = command(*given, "--init", cache, "--json")
    assert (ran.status, ran.err) == (0, "")
    facts = json.loads(ran.out)
    assert facts["inputs"][-1] == {"role": "cache", "name": cache.name, "by": "sha256", "same": True}
    vectors = torch.load(cache, weights_only=True)
    assert facts["recomputed"]["kinds"]["factors"]["of"] == len(vectors) // 3
    entry = next(name for name in vectors if name.endswith("V_WC"))
    vectors[entry][3, 5] *= 1 + 1e-5
    torch.save(vectors, tmp_path / cache.name)
    ran = command(*given, "--init", tmp_path / cache.name, "--sample", "all")
    assert (ran.status, ran.err) == (1, "")
    wrong = [line.removeprefix("  wrong    ") for line in ran.out.splitlines() if line.startswith("  wrong")]
    assert wrong[0].startswith(f"{tmp_path / cache.name} is not the cache that the receipt names: its SHA-256 differs.")
    assert [line.split(":")[0] for line in wrong[1:]] == [f"{entry.removesuffix('.eigens.V_WC')} (factors) is wrong"]
    del vectors[entry.replace("V_WC", "S_WC")], vectors[entry.replace("V_WC", "U_WC")], vectors[entry]
    torch.save(vectors, tmp_path / cache.name)
    ran = command(*given, "--init", tmp_path / cache.name)
    assert ran.status == 1 and "are not of the same modules: only one has" in ran.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_factors_of_a_cache_are_right_as_far_as_its_dtype_goes(
    made: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    vectors = torch.load(cache_of(made, "decompose --from-cache")["init"][0], weights_only=True)
    for name in [name for name in vectors if name.endswith("S_WC")]:  # with roots that are no whole numbers
        values = torch.rand(vectors[name].shape, generator=generator) + 0.5
        vectors[name] *= values.square()
        for other in ("U_WC", "V_WC"):
            vectors[name.replace("S_WC", other)] /= values
    cache = tmp_path / "cache.pt"
    torch.save({name: tensor.to(dtype) for name, tensor in vectors.items()}, cache)
    decompose_from_cache(MODEL, cache=cache, output=tmp_path / "made", options=CacheOptions("kpm", 7.0, rslora=True))
    options = VerifyOptions(against=MODEL, init=[cache], sample=None)
    found = verify(tmp_path / "made", options=options)
    assert found.is_fine and found.facts["recomputed"]["kinds"]["factors"]["checked"] == len(vectors) // 3
    entry = vectors[next(name for name in vectors if name.endswith("V_WC"))]
    entry.view(-1)[entry.abs().argmax()] *= 1 + 16 * torch.finfo(dtype).eps
    torch.save({name: tensor.to(dtype) for name, tensor in vectors.items()}, cache)
    assert any("(factors) is wrong" in problem for problem in problems(verify(tmp_path / "made", options=options)))


@pytest.mark.parametrize(
    ("stored", "expected", "is_right"),
    [
        ("nan", "1", False),
        ("1", "nan", False),
        ("inf", "1", False),
        ("inf", "-inf", False),
        ("nan", "nan", True),
        ("inf", "inf", True),
    ],
)
@pytest.mark.parametrize(("loss", "roundings"), [(0.0, 1), (0.0, 2), (1e-7, 0)])
def test_nan_is_no_rounding_of_a_number(
    stored: str, expected: str, is_right: bool, loss: float, roundings: int
) -> None:
    values = torch.tensor([1.0, float(expected)], dtype=torch.float64)
    found = measure(torch.tensor([1.0, float(stored)]), Exact(values, values.abs(), loss, roundings), "F32")
    assert found.is_right == is_right


def test_a_sample_of_nothing_is_wrong_usage(made: Callable[[str], Path], command: Command) -> None:
    ran = command("verify", made("merge"), "--sample", "all", "--seed", "3")
    assert ran.status == 2
    assert "--sample and --seed without --against MODEL" in ran.err


def test_inputs_that_are_not_given_are_named_together(made: Callable[[str], Path], command: Command) -> None:
    ran = command("verify", made("merge with --init"), "--against", MODEL)
    assert ran.status == 1
    assert "corda as its adapter, and it is not given.\nGive it with --adapter." in ran.err
    assert "corda_init as its init, and it is not given.\nGive it with --init." in ran.err
    ran = command("verify", made("merge"), "--against", MODEL, "--adapter", LORA, "--scale", "2")
    assert ran.status == 1 and "The receipt says the scales 1 each; --scale says 2." in ran.err


def test_the_command_tells_what_was_checked_and_the_worst_error(made: Callable[[str], Path], command: Command) -> None:
    arguments = ("verify", made("merge"), "--against", MODEL, "--adapter", LORA, "--seed", "5")
    ran = command(*arguments)
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"{made('merge')}: fine"
    assert lines[1:4] == [
        "  made by  merge",
        "  checked  9 files, 1.9 MB, 57 tensors: sizes, SHA-256, index, headers, NaN and Inf",
        "  inputs   3 of 3 files are those that the receipt names",
    ]
    assert lines[4:6] == [
        "  sample   16 of each kind, seed 5",
        "  numbers  15 of 15 copied; compared bit by bit",
    ]
    assert lines[6].startswith("  numbers  16 of 42 folded; in float64 by other code; largest error 0.5")
    assert command(*arguments).out == ran.out
    as_json = command(*arguments, "--json", "--sample", "all")
    facts = json.loads(as_json.out)
    assert as_json.status == 0 and facts["is_fine"] and facts["recomputed"]["kinds"]["folded"]["checked"] == 42
    assert command("verify", made("merge"), "-q").out == ""
    assert command("verify", made("merge"), "--sample", "none").status == 2


def test_of_a_truncated_model_it_is_told_what_lies_beyond_the_rank(
    made: Callable[[str], Path], command: Command
) -> None:
    ran = command("verify", made("decompose --truncate"), "--against", MODEL)
    (line,) = [line for line in ran.out.splitlines() if " truncated; " in line]
    share = float(line.partition("what is beyond the rank up to ")[2].removesuffix(" of the rounding"))
    assert 0.0 < share < 1.0


def test_without_inputs_torch_is_not_imported(made: Callable[[str], Path]) -> None:
    script = (
        "import sys; from corda_convert.operations.verify import verify; found = verify(sys.argv[1]);"
        "sys.exit(not found.is_fine or any(name in sys.modules for name in ('torch', 'transformers', 'huggingface_hub')))"
    )
    assert subprocess.run([sys.executable, "-c", script, made("decompose")], check=False).returncode == 0


def test_hidden_files_are_no_part_of_an_output(altered: Callable[[str], Path]) -> None:
    folder = altered("to-lora")
    add(folder / ".gitattributes")
    found = verify(folder)
    assert found.is_fine and found.facts["hidden_files"] == [".gitattributes"]


def test_pth_files_are_verified_too(tmp_path: Path) -> None:
    tensors = {f"blocks.0.{part}.weight": torch.randn(16, 16).bfloat16() for part in ("att.key", "ffn.key")}
    torch.save(tensors, tmp_path / "base.pth")
    torch.save({"blocks.0.att.key.bone": torch.randn(4, 16).bfloat16()}, tmp_path / "trained.pth")
    base, trained, output = tmp_path / "base.pth", tmp_path / "trained.pth", tmp_path / "output"
    merge(base, adapter=trained, output=output, options=MergeOptions(as_is=True))
    options = VerifyOptions(against=base, adapters=[trained], sample=None)
    found = verify(output, options=options)
    assert problems(found) == []
    assert {kind: facts["of"] for kind, facts in found.facts["recomputed"]["kinds"].items()} == {
        "copied": 1,
        "folded": 1,
    }
    (path,) = output.glob("*.pth")
    content = bytearray(path.read_bytes())
    place = content.index(bytes(load_bytes(path, "blocks.0.att.key.weight")))
    content[place + 6 : place + 8] = b"\x80\x7f"
    path.write_bytes(content)
    reseal(output)
    assert "hold NaN or Inf: blocks.0.att.key.weight" in problems(verify(output))[0]


def load_bytes(path: Path, name: str) -> bytes:
    tensor: torch.Tensor = torch.load(path, weights_only=True)[name]
    return tensor.view(torch.uint8).numpy().tobytes()


def keys_of(value: Any, path: str = "") -> set[str]:
    """Every key in a receipt, but those that are names of options, modules, tensors or files."""
    if isinstance(value, list):
        return {key for each in value for key in keys_of(each, path)}
    if not isinstance(value, dict) or path in ("options", "tensors", "ranks", "quantization"):
        return set()
    return {
        *value,
        *(key for name, each in value.items() for key in keys_of(each, name if path or name != "tensors" else "")),
    }


def test_every_key_of_receipts_and_of_verify_is_documented(made: Callable[[str], Path]) -> None:
    documented = (Path(__file__).parent.parent / "docs/receipt.md").read_text(encoding="utf-8")
    for name in OUTPUTS:
        receipt = read_json(made(name) / "corda_convert.json")
        found = verify(made(name), options=against(name, sample=1, **cache_of(made, name))).facts
        keys = keys_of(receipt) | found.keys() | found["recomputed"].keys() | {"what", "why", "next_step"}
        keys |= {key for facts in found["recomputed"]["kinds"].values() for key in facts}
        keys |= {entry["action"] for entry in receipt["tensors"]} | {each["role"] for each in receipt["inputs"]}
        assert [key for key in sorted(keys) if f"`{key}`" not in documented] == [], name


def test_no_output_tells_paths_of_the_machine_or_tokens(
    tmp_path: Path, done: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "hf_thisIsNoTokenOfAnybody"
    monkeypatch.setenv("HF_TOKEN", secret)
    place = Path(shutil.copytree(MODEL.parent, tmp_path / "private", ignore=shutil.ignore_patterns("*.py", "*.md")))
    model, residual, adapters = place / "model", place / "residual", place / "adapters"
    initial, knowledge = residual / "corda_init", place / "covariances/knowledge.safetensors"
    decomposing = ("decompose", model, "--cov", knowledge, "--mode", "kpm", "--rank", "8", "--target", "down_proj")
    commands: list[tuple[object, ...]] = [
        ("merge", model, "--adapter", adapters / "corda", "--init", initial),
        ("merge", model, "--adapter", adapters / "lora", "--adapter", adapters / "lora_patterns",),
        ("merge", model, "--adapter", adapters / "lora_modules_to_save"),
        ("merge", residual, "--adapter", adapters / "corda"),
        ("merge", model, "--subtract", initial),
        decomposing,
        (*decomposing, "--no-residual", "--write-cache", place / "cache.pt"),
        ("decompose", model, "--from-cache", place / "cache.pt", "--mode", "kpm"),
        ("decompose", model, "--cov", knowledge, "--truncate", "4", "--method", "svd-llm", "--target", "down_proj"),
        ("decompose", model, "--cov", knowledge, "--mode", "ipm", "--rank-budget", "9k", "--target", "down_proj"),
        ("to-lora", adapters / "corda", "--init", initial, "--base", model, "--rank", "4", "--weight-by", knowledge),
        ("to-lora", adapters / "corda", "--residual", residual, "--base", model),
        ("to-lora", adapters / "miss_bat", "--base", model, "--rank", "8", "--for", "vllm"),
        ("to-lora", "--from-checkpoints", model, residual, "--rank", "4"),
    ]  # fmt: skip
    for number, arguments in enumerate(commands):
        output = tmp_path / f"output-{number}"
        ran = done(*arguments, "-o", output, "--json")
        assert secret not in ran.out + ran.err
        assert str(tmp_path) not in ran.out, arguments
        for name, content in files_below(output).items():
            assert secret.encode() not in content
            if name.endswith("adapter_config.json"):  # PEFT loads the base from there
                config = json.loads(content)
                config.pop("base_model_name_or_path")
                content = json.dumps(config).encode()
            assert str(tmp_path).encode() not in content, (arguments, name)


def test_inputs_may_be_on_the_hub(hub: Hub, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    base, adapter = write_checkpoint(tmp_path / "base", shards=2), write_lora(tmp_path / "lora")
    for name, folder in (("acme/base", base), ("acme/lora", adapter)):
        hub.add_repository(name).add_folder(folder)
    merge(base, adapter=adapter, output=tmp_path / "output", options=MergeOptions(as_is=True))
    found = verify(tmp_path / "output", options=VerifyOptions(against="acme/base", adapters=["acme/lora"], sample=None))
    assert problems(found) == []
    assert all(each["same"] for each in found.facts["inputs"])
