"""Damaged files of every kind that the program reads: one clear refusal and nothing written, or a right result.

No traceback, no hang, no memory beyond a bound. CORDA_CONVERT_FUZZ is the number of cases of all kinds together.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from building import UP, llama_tensors, random, write_checkpoint, write_lora
from conftest import Ran, assert_no_leftovers
from fuzzing.mutations import DEEP, Draw
from fuzzing.workspace import TARGETS, Workspace, bounded_memory
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from corda_convert.adapters.patterns import is_quick
from corda_convert.output.digests import WrittenDigest
from corda_convert.output.journal import Journal, take_over

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # torch's and transformers' own, about what the damage makes of configs

Command = Callable[..., Ran]
Refusal = Callable[..., str]

CASES = int(os.environ.get("CORDA_CONVERT_FUZZ", "300"))
EACH = -(-CASES // len(TARGETS))
MOST_BYTES = 3 << 30
"""Address space that a case may take beyond what the test program has: far more than the inputs' few kilobytes need."""

NUMBERS = st.integers(0, 2**32 - 1)
DAMAGE: st.SearchStrategy[list[Draw]] = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    made = Workspace(tmp_path_factory.mktemp("fuzz") / "inputs")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_HUB_OFFLINE", "1")
        patched.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        yield made


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}: {EACH} cases") for name in TARGETS])
def test_a_damaged_file_is_refused_or_what_comes_out_is_right(workspace: Workspace, name: str) -> None:
    target = TARGETS[name]
    ran = 0

    @seed(20261121)
    @settings(max_examples=EACH, database=None, suppress_health_check=list(HealthCheck), report_multiple_bugs=False)
    @given(st.sampled_from(target.commands), DAMAGE)
    def cases(command: str, draws: list[Draw]) -> None:
        nonlocal ran
        ran += 1
        workspace.case(name, command, draws)

    with bounded_memory(MOST_BYTES):
        cases()
    assert ran >= min(EACH, 10)
    print(f"{name}: {ran} cases")


def test_undamaged_files_are_accepted(workspace: Workspace) -> None:
    """Otherwise every refusal above could be for another reason."""
    before = workspace.found.accepted
    commands = sorted({command for target in TARGETS.values() for command in target.commands} - {"push"})
    for command in commands:
        workspace.case(next(name for name, target in TARGETS.items() if command in target.commands), command, [])
    assert workspace.found.accepted == before + len(commands)


# What was found in this way


def test_a_linear_weight_that_is_no_matrix_is_refused_by_decompose(refusal: Refusal, tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"].reshape(-1)
    model = write_checkpoint(tmp_path / "model", tensors)
    message = refusal("decompose", model, "--method", "svd", "--mode", "ipm", "--rank", 2)
    assert message == f"{UP}.weight is (384,); the weight of a Linear layer is a matrix."


@pytest.mark.parametrize("init", [0.5, "corda2", "pissa_niter", [], 1])
def test_a_way_to_begin_that_peft_does_not_know_is_refused(refusal: Refusal, tmp_path: Path, init: object) -> None:
    lora = write_lora(tmp_path / "lora", init_lora_weights=init)
    message = refusal("merge", write_checkpoint(tmp_path / "model"), "--adapter", lora)
    assert f"says init_lora_weights={init!r}, which this version does not know" in message


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva", "mica"])
def test_ways_to_begin_that_leave_no_residual_are_merged(command: Command, tmp_path: Path, init: object) -> None:
    lora = write_lora(tmp_path / "lora", init_lora_weights=init)
    ran = command("merge", write_checkpoint(tmp_path / "model"), "--adapter", lora, "--dry-run", "-o", tmp_path / "out")
    assert ran.status == 0, ran.err


def test_a_rank_beyond_all_numbers_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", r=10**400)
    assert "a positive integer was expected" in refusal("to-lora", lora, "--rank", 2)


@pytest.mark.parametrize("damage", ["deep", "a device", "a folder", "a list"])
def test_an_odd_identity_of_unfinished_work_is_none(done: Command, tmp_path: Path, damage: str) -> None:
    model, lora = write_checkpoint(tmp_path / "model"), write_lora(tmp_path / "lora")
    work = tmp_path / ".out.corda-convert-partial"
    (work / "journal").mkdir(parents=True)
    identity = work / "identity.json"
    if damage == "a device":
        identity.symlink_to("/dev/zero")
    elif damage == "a folder":
        identity.mkdir()
    else:
        identity.write_text(DEEP if damage == "deep" else "[1]")
    done("merge", model, "--adapter", lora, "-o", tmp_path / "out")
    assert_no_leftovers(tmp_path)


def test_a_note_that_was_changed_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a" * 10)
    digest = WrittenDigest(10)
    digest.update(0, b"a" * 10)
    path = tmp_path / "journal" / "1.jsonl"
    with Journal(path) as notes:
        notes.add(10, {"job": {"norm": 1.5}})
        notes.commit({"x": digest}, {})
    written = path.read_text()
    assert take_over(tmp_path / "journal", tmp_path, {"x": 10}).facts == {"job": {"norm": 1.5}}
    for path in (tmp_path / "journal").iterdir():
        path.unlink()
    path.write_text(written.replace("1.5", "2.5"))
    assert take_over(tmp_path / "journal", tmp_path, {"x": 10}).facts == {}


def test_a_storage_of_another_length_than_described_is_refused(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({UP: random(4, 4)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content + b"1234" * name.endswith("data/0"))
    ran = command("inspect", path)
    assert ran.status == 1
    assert f"the storage of {UP} has 68 bytes; its description says 64" in ran.err


def test_numbers_that_are_marked_as_a_folder_are_refused(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({UP: random(4, 4)}, path)
    content = bytearray(path.read_bytes())
    entry = content.rfind(b"PK\x01\x02", 0, content.rfind(b"data/0"))
    content[entry + 38] |= 0x10
    path.write_bytes(content)
    ran = command("inspect", path)
    assert ran.status == 1
    assert "/data/0 is marked as a folder" in ran.err


def test_an_archive_whose_record_has_no_beginning_is_refused(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({UP: random(4, 4)}, path)
    content = bytearray(path.read_bytes())
    content[content.rfind(b"PK\x03\x04", 0, content.find(b"data/0"))] ^= 1
    path.write_bytes(content)
    ran = command("inspect", path)
    assert ran.status == 1
    assert "/data/0 does not begin where its index says" in ran.err


def test_half_a_character_in_a_config_is_refused_and_a_whole_one_is_kept(
    command: Command, refusal: Refusal, tmp_path: Path
) -> None:
    half = write_lora(tmp_path / "half", revision="\ud83d")
    assert "surrogates not allowed" in refusal("to-lora", half, "--rank", 2)
    whole = write_lora(tmp_path / "whole", revision="\U0001f600")
    ran = command("to-lora", whole, "--rank", 2, "-o", tmp_path / "out")
    assert ran.status == 0, ran.err


SLOW = ("([a-z0-9_.]+)*!", "(a|a)*x", "(?:a?){40}x", "((.*))+x", ".*.*.*.*x", "(q*)*?x", r"(\w+\.)+x")
QUICK = (
    "q_proj",
    r"layers\.[0-9]+\.mlp",
    "(q|k)_proj",
    r".*\.(up|down)_proj",
    r"(model\.)?layers\.(1[0-9]|2)\..*",
    "[(*+]+a",
)


@pytest.mark.parametrize("pattern", SLOW)
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_could_match_for_ever_is_refused(
    refusal: Refusal, tmp_path: Path, pattern: str, option: str
) -> None:
    lora = write_lora(tmp_path / "lora", **{option: {pattern: 4}})
    message = refusal("merge", write_checkpoint(tmp_path / "model"), "--adapter", lora)
    assert message.startswith(f"adapter_config.json: to match the pattern {pattern!r} could take for ever.")


@pytest.mark.parametrize("pattern", QUICK)
def test_the_usual_patterns_are_quick(pattern: str) -> None:
    assert is_quick(pattern)
