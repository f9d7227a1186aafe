"""Folders of covariances: sealed with a receipt, as other outputs are."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from building import FIXTURES, MODEL, read_json
from safetensors.torch import load_file
from test_collect import tiny

from corda_convert.errors import OutputRefused
from corda_convert.operations import collect_job, collect_work, collect_writing
from corda_convert.operations.inspect import inspect
from corda_convert.operations.verify import VerifyOptions, verify
from corda_convert.output import staging
from corda_convert.streaming.stream import LayerStream

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = FIXTURES / "data" / "task.jsonl"
TEXT = ("--data", TASK, "--field", "question", "--field", "answer", "--no-pack", "--samples", 9, "--target", "q_proj")
SHARDS = ("--max-shard-size", "100kB")
MADE: dict[str, tuple[object, ...]] = {
    "collected": ("collect", MODEL, *TEXT, *SHARDS),
    "converted": ("collect", "--from-peft", FIXTURES / "covariances" / "task.peft.pt", *SHARDS),
}
Command = Callable[..., Any]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def stopped_at(block: int) -> Callable[..., None]:
    """What `run_block` is to be, so that it is interrupted there."""
    run_block = LayerStream.run_block

    def stopping(stream: LayerStream, index: int, *rest: Any) -> None:
        if index == block:
            raise KeyboardInterrupt
        run_block(stream, index, *rest)

    return stopping


@pytest.mark.parametrize("action", MADE)
def test_a_folder_has_a_receipt_that_verify_and_inspect_take(action: str, done: Command, tmp_path: Path) -> None:
    folder = tmp_path / "covs"
    done(*MADE[action], "-o", folder)
    receipt = read_json(folder / "corda_convert.json")
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "corda_convert.json"}
    assert len(files) > 2
    assert {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in receipt["files"]} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()
    }
    stored = {
        (path.name, name, tuple(tensor.shape))
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert {(entry["file"], entry["name"], tuple(entry["shape"])) for entry in receipt["tensors"]} == stored
    assert {entry["action"] for entry in receipt["tensors"]} == {action}
    for source in receipt["inputs"]:
        path = MODEL if source["role"] == "model" else MADE[action][2] if action == "converted" else TASK
        assert source["name"] == Path(str(path)).name
        for file in source["files"]:
            content = (MODEL / file["name"] if source["role"] == "model" else Path(str(path))).read_bytes()
            assert file["bytes"] == len(content)
            assert file["sha256"] in (None, hashlib.sha256(content).hexdigest())
    assert verify(folder).facts["problems"] == []
    assert inspect(folder).facts["receipt"]["command"] == "collect"
    done("verify", folder)


def test_verify_finds_what_was_altered_and_says_what_it_does_not_compute(done: Command, tmp_path: Path) -> None:
    folder = tmp_path / "covs"
    done(*MADE["collected"], "-o", folder)
    found = verify(folder, options=VerifyOptions(against=MODEL))
    assert found.is_fine
    assert found.facts["recomputed"]["not_recomputed"] == {"collect": "What collect writes is not computed again."}
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-4:] = b"\x00\x00\x80\x7f"
    shard.write_bytes(content)
    (changed, not_finite) = verify(folder).facts["problems"]
    assert "was changed: its SHA-256" in changed["what"]
    assert "hold NaN or Inf" in not_finite["what"]
    assert not inspect(folder.rename(tmp_path / "other")).facts["receipt"]["missing_or_changed"]


def test_every_key_of_its_receipt_is_documented(done: Command, tmp_path: Path) -> None:
    documented = (Path(__file__).parent.parent / "docs/receipt.md").read_text(encoding="utf-8")
    for action, arguments in MADE.items():
        done(*arguments, "-o", tmp_path / action)
        receipt = read_json(tmp_path / action / "corda_convert.json")
        keys = {*receipt, *receipt["run"], *receipt["tool"], action}
        keys |= {key for entry in receipt["tensors"] for key in entry}
        keys |= {key for source in receipt["inputs"] for entry in (source, *source["files"]) for key in entry}
        keys |= {source["role"] for source in receipt["inputs"]} | (receipt.get("data") or {}).keys()
        assert [key for key in sorted(keys) if f"`{key}`" not in documented] == []


@pytest.mark.parametrize("action", MADE)
def test_a_folder_is_replaced_as_a_whole_or_stays(
    action: str, done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "covs"
    done(*MADE[action], "-o", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for place, name in ((collect_writing, "write_receipt"), (staging.Path, "rename")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            assert command(*MADE[action], "-o", folder, "--overwrite").status == 1
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["covs"]
    done(*MADE[action], "-o", folder, "--overwrite")
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    same = [name for name in before if name != "corda_convert.json"]
    assert again.keys() == before.keys()
    assert all(again[name] == before[name] for name in same)


def test_a_write_that_fails_beside_the_next_part_ends_the_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    class Failing(collect_work.ShardWriter):
        def write(self, offset: int, view: memoryview) -> None:
            written.append(self.path.name)
            if self.path.name == "draft-00003.safetensors":
                raise OutputRefused("The disk is full.")
            super().write(offset, view)

    monkeypatch.setattr(collect_work, "ShardWriter", Failing)
    ran = command(*MADE["collected"], "-o", tmp_path / "covs")
    assert (ran.status, "The disk is full." in ran.err) == (1, True)
    assert max(written) == "draft-00003.safetensors"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["covs.safetensors", "covs"])
def test_a_header_larger_than_its_room_is_written_before_a_copy(
    output: str, done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a"
    done(*MADE["collected"], "-o", folder / output)
    monkeypatch.setattr(collect_job, "MOST_HEADER", 512)
    done(*MADE["collected"], "-o", tmp_path / "b" / output)
    files = [path.relative_to(folder) for path in folder.rglob("*.safetensors")]
    assert len(files) == (1 if output.endswith(".safetensors") else 3)
    for file in files:
        one, other = (load_file(parent / file) for parent in (folder, tmp_path / "b"))
        assert {name: values.tolist() for name, values in one.items()} == {
            name: values.tolist() for name, values in other.items()
        }
        sizes = [len(parent.joinpath(file).read_bytes()) for parent in (folder, tmp_path / "b")]
        assert sizes[1] < sizes[0]
    if output == "covs":
        assert verify(tmp_path / "b" / output).is_fine


@pytest.mark.parametrize("output", ["covs.safetensors", "covs"])
def test_a_file_whose_header_was_foreseen_is_not_read_again(
    output: str, done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unwanted(collect_writing.ShardWriter):
        def __init__(self, path: Path, *_: object, **__: object) -> None:
            raise AssertionError(f"{path} is opened again")

    done(*MADE["collected"], "-o", tmp_path / "plain" / output)
    with monkeypatch.context() as patch:
        patch.setattr("corda_convert.operations.collect.expected_headers", lambda *_: {})
        done(*MADE["collected"], "-o", tmp_path / "late" / output)
    monkeypatch.setattr(collect_writing, "ShardWriter", Unwanted)
    done(*MADE["collected"], "-o", tmp_path / "foreseen" / output)
    for file in (tmp_path / "plain").rglob("*.safetensors"):
        inside = file.relative_to(tmp_path / "plain")
        assert file.read_bytes() == (tmp_path / "late" / inside).read_bytes()
        assert file.read_bytes() == (tmp_path / "foreseen" / inside).read_bytes()
    if output == "covs":
        assert verify(tmp_path / "late" / output).is_fine
        assert verify(tmp_path / "foreseen" / output).is_fine


def test_a_run_that_goes_on_knows_the_digest_of_what_was_there(
    done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "run_block", stopped_at(3))
        assert command(*MADE["collected"], "-o", tmp_path / "covs").status == 130
    done(*MADE["collected"], "-o", tmp_path / "covs")
    assert verify(tmp_path / "covs").is_fine
    done(*MADE["collected"], "-o", tmp_path / "straight")
    for file in (tmp_path / "straight").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "covs" / file.name).read_bytes()


def test_a_run_goes_on_with_other_shards(
    done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = (*MADE["collected"][:-1], "60kB")
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "run_block", stopped_at(5))
        assert command(*MADE["collected"], "-o", tmp_path / "covs").status == 130
    done(*smaller, "-o", tmp_path / "covs")
    done(*smaller, "-o", tmp_path / "straight")
    assert verify(tmp_path / "covs").is_fine
    names = [path.name for path in sorted((tmp_path / "straight").glob("*.safetensors"))]
    assert [path.name for path in sorted((tmp_path / "covs").glob("*.safetensors"))] == names
    assert all((tmp_path / "covs" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes() for name in names)


def test_a_disk_without_room_is_told_before_the_model_runs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: SimpleNamespace(free=6 * 97 * 96 * 4 - 1))
    monkeypatch.setattr(LayerStream, "embed", None)
    ran = command(*MADE["collected"], "-o", tmp_path / "covs")
    assert ran.status == 1
    assert "free." in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_head_is_collected_alone_and_after_a_run_that_stopped_before_it(
    done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3_moe", tmp_path / "model")
    text = ("collect", model, "--data", TASK, "--field", "question", "--no-pack", "--samples", 9, "--target", "lm_head")
    done(*text, "-o", tmp_path / "alone.safetensors")
    assert {name.removesuffix(".mean_abs") for name in load_file(tmp_path / "alone.safetensors")} == {"lm_head"}
    both = (*text, "--target", "q_proj", "-o")
    with monkeypatch.context() as patch:
        patch.setattr("corda_convert.operations.collect._run_head", interrupt)
        assert command(*both, tmp_path / "both.safetensors").status == 130
    done(*both, tmp_path / "both.safetensors")
    done(*both, tmp_path / "straight.safetensors")
    assert (tmp_path / "both.safetensors").read_bytes() == (tmp_path / "straight.safetensors").read_bytes()


@pytest.mark.parametrize("change", ["overwrite", "same"])
def test_what_a_kill_while_sealing_leaves_is_in_nobodys_way(
    change: str, done: Command, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(collect_writing, "put_in_place", interrupt)
        assert command(*MADE["collected"], "-o", tmp_path / "covs").status == 130
    (work,) = tmp_path.iterdir()
    assert (work / "output").is_dir()
    other = ("--normalize", "none", "--overwrite") if change == "overwrite" else ()
    done(*MADE["collected"], *other, "-o", tmp_path / "covs")
    assert verify(tmp_path / "covs").is_fine
    assert [path.name for path in tmp_path.iterdir()] == ["covs"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("q_proj", "k_proj"),
        lambda text: text.replace('"tokens": {', '"tokens": [', 1),
        lambda text: "[" * 100_000,
        lambda text: "[1]",
        lambda text: text[:-1],
    ],
)
@pytest.mark.parametrize("name", ["part-00002.json", "identity.json"])
def test_a_note_that_was_altered_counts_for_nothing(
    name: str,
    damage: Callable[[str], str],
    done: Command,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LayerStream, "run_block", stopped_at(4))
        assert command(*MADE["collected"], "-o", tmp_path / "covs").status == 130
    note = next(tmp_path.glob(f".covs*/{name}"))
    note.write_text(damage(note.read_text()))
    done(*MADE["collected"], "-o", tmp_path / "covs")
    done(*MADE["collected"], "-o", tmp_path / "straight")
    assert verify(tmp_path / "covs").is_fine
    for file in (tmp_path / "straight").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "covs" / file.name).read_bytes()


@pytest.mark.parametrize("name", ["identity.json", "part-00003.json", "README.md", "corda_convert.json"])
def test_a_disk_that_is_full_for_a_note_is_told_as_one(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text, replace_path = Path.write_text, Path.replace

    def full(path: Path, *given: Any, **named: Any) -> int:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return write_text(path, *given, **named)

    def full_before(path: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise OSError(28, "No space left on device")
        return replace_path(path, target)

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(Path, "replace", full_before)
    ran = command(*MADE["collected"], "-o", tmp_path / "covs")
    assert ran.status == 1
    assert "No space left on device" in ran.err
    assert "Free disk space" in ran.err
    assert list(tmp_path.iterdir()) == []
