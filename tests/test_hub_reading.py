"""Models and adapters from a Hub on loopback: the real client, over HTTP, in the process of the command line."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from building import (
    ADAPTERS,
    COVARIANCES,
    LLAMA_CONFIG,
    MODEL,
    RESIDUAL,
    files_below,
    llama_tensors,
    read_json,
    safetensors_bytes,
    weight_files,
    write_checkpoint,
    write_json,
    write_lora,
)
from conftest import Ran, assert_no_leftovers
from hub_client import hub_for_this_process
from hub_server import Account, Hub, HubError, Repository, Request, StoredFile, running_hub
from huggingface_hub import constants

from corda_convert import hub_ranges
from corda_convert.errors import UnsupportedInput
from corda_convert.hub_reading import located
from corda_convert.hub_streaming import MOST_FILES
from corda_convert.operations.options import RunOptions
from corda_convert.operations.streaming import check_streaming
from corda_convert.operations.transforms import FoldTransform

# The client's own way of handing a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Command = Callable[..., Ran]
BASE = "acme/base"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub, and the client of this process set to it, its cache empty."""
    monkeypatch.setattr(hub_ranges, "_FIRST_WAIT_SECONDS", 0.01)
    with hub_for_this_process(tmp_path / "home", monkeypatch) as server:
        yield server


@pytest.fixture
def base(tmp_path: Path, hub: Hub) -> Path:
    """A model of three shards here, and the same on the Hub as `acme/base`."""
    folder = write_checkpoint(tmp_path / "base", shards=3)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    hub.add_repository(BASE).add_folder(folder)
    return folder


@pytest.fixture
def lora(tmp_path: Path, hub: Hub) -> Path:
    """An adapter here, and the same on the Hub as `acme/lora`."""
    folder = write_lora(tmp_path / "lora")
    hub.add_repository("acme/lora").add_folder(folder)
    return folder


def shards_sent(hub: Hub, repo_id: str = BASE) -> int:
    return sum(
        nbytes for path, nbytes in hub.sent.items() if repo_id in path and path.endswith((".safetensors", ".bin"))
    )


def message(ran: Ran) -> str:
    """Of a refusal: nothing else was printed."""
    assert ran.status == 1, ran
    assert ran.out == ""
    assert ran.err.startswith("Error: ")
    assert ran.err.count("Error: ") == 1, ran.err
    assert "Traceback" not in ran.err
    return ran.err.removeprefix("Error: ").rstrip("\n")


def test_a_merge_of_names_is_that_of_the_folders(
    hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path
) -> None:
    done("merge", base, "--adapter", lora, "-o", tmp_path / "here")
    ran = done("merge", BASE, "--adapter", "acme/lora@main", "-o", tmp_path / "there", "--json")
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {path.name for path in (tmp_path / "here").iterdir()}

    commit = hub.repositories[BASE].branches["main"]
    model, adapter = json.loads(ran.out)["inputs"]
    assert (model["name"], model["revision"], model["commit"]) == (BASE, "main", commit)
    assert (adapter["name"], adapter["revision"]) == ("acme/lora", "main")
    stored = hub.repositories[BASE].resolve("main").files
    assert {file["name"]: file["sha256"] for file in model["files"]} == {
        name: file.sha256 for name, file in stored.items() if name.endswith(".safetensors")
    }
    card = (tmp_path / "there" / "README.md").read_text()
    assert "base_model: acme/base\n" in card
    assert "license: apache-2.0\n" in card


def test_a_second_run_downloads_nothing_again(hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path) -> None:
    done("merge", BASE, "--adapter", "acme/lora", "-o", tmp_path / "one")
    sent = hub.sent_of("/resolve/")
    done("merge", BASE, "--adapter", "acme/lora", "-o", tmp_path / "two")
    assert hub.sent_of("/resolve/") == sent
    assert weight_files(tmp_path / "two") == weight_files(tmp_path / "one")


def test_a_dry_run_and_inspect_download_no_weights(
    hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path
) -> None:
    here = done("merge", base, "--adapter", lora, "-o", tmp_path / "out", "--dry-run", "--json")
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in base.glob("*.safetensors"))
    there = done("merge", BASE, "--adapter", lora, "-o", tmp_path / "out", "--dry-run", "--json")
    plan, same = (json.loads(ran.out)["plan"] for ran in (there, here))
    for either in (plan, same):
        del either["memory_bytes"]
    assert plan == same
    assert "not downloaded for a dry run" in there.err
    described = json.loads(done("inspect", BASE, "--json").out)
    assert (described["path"], described["kind"], described["bytes"]) == (
        BASE,
        "checkpoint",
        sum(path.stat().st_size for path in base.glob("*.safetensors")),
    )
    adapted = json.loads(done("inspect", "acme/lora", "--base", BASE, "--json").out)
    assert adapted["base"]["fits"] and adapted["base"]["name"] == BASE
    assert not list((tmp_path / "home").rglob("model*.safetensors"))
    assert 0 < shards_sent(hub) <= 3 * 3 * (1 << 16)
    assert headers < 3 * (1 << 16)  # else the line above would allow too much


def test_only_headers_are_sent_of_large_files(
    hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corda_convert.hub_reading._HEAD_BYTES", 64)
    done("merge", BASE, "--adapter", lora, "-o", tmp_path / "out", "--dry-run")
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in base.glob("*.safetensors"))
    assert shards_sent(hub) == headers


def test_what_does_not_fit_is_refused_before_any_weight_is_sent(
    hub: Hub, base: Path, refusal: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corda_convert.hub_reading._HEAD_BYTES", 64)
    stranger = write_lora(tmp_path / "stranger", {"model.layers.7.self_attn.q_proj": (16, 16)})
    hub.add_repository("acme/stranger").add_folder(stranger)
    assert "model.layers.7" in refusal("merge", BASE, "--adapter", "acme/stranger")
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in base.glob("*.safetensors"))
    assert shards_sent(hub) == headers


def test_an_adapter_that_does_not_belong_is_told_by_parts_of_the_weights(
    hub: Hub, refusal: Callable[..., str], command: Command, tmp_path: Path
) -> None:
    hub.add_repository("acme/model").add_folder(MODEL)
    hub.add_repository("acme/corda").add_folder(ADAPTERS / "corda")
    expected = message(command("merge", MODEL, "--adapter", ADAPTERS / "corda", "-o", tmp_path / "out"))
    found = refusal("merge", "acme/model", "--adapter", "acme/corda")
    assert found.replace("acme/", "") == expected
    assert not list((tmp_path / "home").rglob("model*.safetensors"))  # it was asked for in parts


def test_the_initial_adapter_lies_inside_the_residual(hub: Hub, done: Command, tmp_path: Path) -> None:
    hub.add_repository("acme/model").add_folder(MODEL)
    hub.add_repository("acme/residual").add_folder(RESIDUAL)
    hub.add_repository("acme/corda").add_folder(ADAPTERS / "corda")
    done("to-lora", ADAPTERS / "corda", "--init", RESIDUAL / "corda_init", "--base", "acme/model", "-o", tmp_path / "a")
    there = ("acme/corda", "--init", "acme/residual@main/corda_init", "--base", "acme/model@main", "-o", tmp_path / "b")
    done("to-lora", *there)
    assert weight_files(tmp_path / "b") == weight_files(tmp_path / "a")
    assert read_json(tmp_path / "b" / "adapter_config.json")["base_model_name_or_path"] == "acme/model"
    assert not shards_sent(hub, "acme/model")
    done("merge", MODEL, "--adapter", ADAPTERS / "corda", "--residual", RESIDUAL, "-o", tmp_path / "c")
    done("merge", "acme/model", "--adapter", "acme/corda", "--residual", "acme/residual", "-o", tmp_path / "d")
    assert weight_files(tmp_path / "d") == weight_files(tmp_path / "c")
    done("merge", "acme/residual", "--adapter", "acme/corda", "-o", tmp_path / "e")  # A is compared with the init's


def test_decompose_takes_a_model_and_covariances_of_the_hub(hub: Hub, done: Command, tmp_path: Path) -> None:
    hub.add_repository("acme/model").add_folder(MODEL)
    hub.add_repository("acme/covs").add_folder(COVARIANCES.parent)
    chosen = ("--mode", "kpm", "--rank", 2, "--target", "q_proj")
    done("decompose", MODEL, "--cov", COVARIANCES, *chosen, "-o", tmp_path / "here")
    done("decompose", "acme/model", "--cov", f"acme/covs/{COVARIANCES.name}", *chosen, "-o", tmp_path / "there")
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")
    reduced = ("to-lora", ADAPTERS / "lora", "--rank", 2, "--weight-by")
    done(*reduced, COVARIANCES, "-o", tmp_path / "lora-here")
    done(*reduced, f"acme/covs/{COVARIANCES.name}", "-o", tmp_path / "lora-there")
    assert weight_files(tmp_path / "lora-there") == weight_files(tmp_path / "lora-here")


def test_the_first_pass_of_a_rank_budget_has_its_weights(hub: Hub, done: Command, tmp_path: Path) -> None:
    hub.add_repository("acme/model").add_folder(MODEL)
    chosen = ("--method", "svd", "--mode", "ipm", "--rank-budget", "2k", "--target", "q_proj")
    done("decompose", MODEL, *chosen, "-o", tmp_path / "here")
    done("decompose", "acme/model", *chosen, "-o", tmp_path / "there")
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")


def test_a_fine_tune_of_the_hub_becomes_a_lora(hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path) -> None:
    done("merge", base, "--adapter", lora, "-o", tmp_path / "tuned")
    hub.add_repository("acme/tuned").add_folder(tmp_path / "tuned")
    done("to-lora", "--from-checkpoints", base, tmp_path / "tuned", "--rank", 4, "-o", tmp_path / "here")
    done("to-lora", "--from-checkpoints", BASE, "acme/tuned", "--rank", 4, "-o", tmp_path / "there")
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")
    assert read_json(tmp_path / "there" / "adapter_config.json")["base_model_name_or_path"] == BASE


def test_a_path_here_wins_over_the_hub(
    hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "acme" / "base")
    done("merge", BASE, "--adapter", lora, "-o", tmp_path / "out")
    assert hub.requests == []


def test_what_begins_with_a_dot_is_never_a_name_on_the_hub(
    hub: Hub, base: Path, lora: Path, done: Command, refusal: Callable[..., str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = len(hub.requests)
    missing = f"No such model: {tmp_path / BASE}"
    assert refusal("merge", f"./{BASE}", "--adapter", lora).startswith(missing)
    assert refusal("decompose", f"./{BASE}", "--method", "svd", "--mode", "ipm", "--rank", 2).startswith(missing)
    assert refusal("merge", base, "--adapter", "./acme/lora").startswith("No such adapter: ")
    assert located("./acme/base", "model") == Path("acme/base")
    assert len(hub.requests) == before
    done("merge", "./base", "--adapter", "./lora", "-o", "./out")
    assert json.loads((tmp_path / "out" / "corda_convert.json").read_text())["options"]["model"] == "base"


def test_a_revision_is_taken(hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path) -> None:
    repository = hub.repositories[BASE]
    first = repository.branches["main"]
    repository.branches["v1"] = repository.branches["feature/x"] = first
    other = write_checkpoint(tmp_path / "other", {"lm_head.weight": torch.zeros(2, 2)}, config=None)
    repository.add_folder(other)
    done("merge", base, "--adapter", lora, "-o", tmp_path / "here")
    for place, revision in enumerate(("v1", first, "feature%2Fx")):
        output = tmp_path / f"out-{place}"
        done("merge", f"{BASE}@{revision}", "--adapter", lora, "-o", output)
        assert weight_files(output) == weight_files(tmp_path / "here")
        assert read_json(output / "corda_convert.json")["inputs"][0]["commit"] == first


def test_side_files_come_along_and_other_weights_do_not(
    hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path
) -> None:
    extra = tmp_path / "extra"
    for name in ("modeling_own.py", "sub/vocab.txt", "original/consolidated.00.pth", "model.gguf", ".hidden/x.json"):
        (extra / name).parent.mkdir(parents=True, exist_ok=True)
        (extra / name).write_bytes(b"raise SystemExit('run')\n")
    hub.repositories[BASE].add_folder(extra)
    shutil.copytree(extra, base, dirs_exist_ok=True)
    done("merge", base, "--adapter", lora, "-o", tmp_path / "here")
    done("merge", BASE, "--adapter", lora, "-o", tmp_path / "there")
    here, there = (
        {name: content for name, content in files_below(tmp_path / place).items() if name not in GENERATED}
        for place in ("here", "there")
    )
    assert there == here
    left = [read_json(tmp_path / place / "corda_convert.json")["not_carried_over"] for place in ("here", "there")]
    assert left[1] == left[0]
    assert hub.sent_of("consolidated") == hub.sent_of("gguf") == 0


GENERATED = {"README.md", "corda_convert.json"}


def test_pickled_models_are_downloaded(hub: Hub, lora: Path, done: Command, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    write_json(folder / "config.json", LLAMA_CONFIG)
    torch.save(llama_tensors(), folder / "pytorch_model.bin")
    hub.add_repository("acme/pickled").add_folder(folder)
    done("merge", folder, "--adapter", lora, "-o", tmp_path / "here")
    done("merge", "acme/pickled", "--adapter", lora, "-o", tmp_path / "there")
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")


def test_a_name_that_is_nowhere_is_refused_in_both_readings(
    hub: Hub, base: Path, lora: Path, refusal: Callable[..., str]
) -> None:
    expected = (
        "No such model: acme/bse\n"
        "It is no path here, and the Hub has no repository of that name that you may see.\n"
        "Check the path or the name. If the repository is private, log in with: hf auth login"
    )
    assert refusal("merge", "acme/bse", "--adapter", lora) == expected
    assert refusal("merge", BASE, "--adapter", "acme/bse") == expected.replace("model", "adapter")
    assert refusal("merge", "/acme/bse", "--adapter", lora) == "No such model: /acme/bse\nCheck the path."
    assert refusal("merge", "../acme/bse", "--adapter", lora) == "No such model: ../acme/bse\nCheck the path."


def test_a_wrong_revision_or_folder_is_refused(hub: Hub, base: Path, lora: Path, refusal: Callable[..., str]) -> None:
    assert refusal("merge", f"{BASE}@v9", "--adapter", lora) == (
        f"{BASE} has no revision v9.\nIt has main.\n"
        "Give one of its branches, tags or commits after the @, or leave it out."
    )
    assert refusal("merge", f"{BASE}@main/nowhere", "--adapter", lora).startswith(
        f"{BASE} has no folder or file nowhere at main.\nIt has: "
    )
    hub.add_repository("acme/residual").add_folder(RESIDUAL)
    assert refusal("merge", BASE, "--adapter", "acme/residual") == (
        "acme/residual holds no adapter_config.json, so it is no adapter of PEFT.\n"
        "It has adapters inside: acme/residual/corda_init."
    )
    assert "holds an adapter, not a model" in refusal("merge", "acme/lora", "--adapter", lora)


def test_gated_and_private_repositories(
    hub: Hub, base: Path, lora: Path, refusal: Callable[..., str], done: Command, tmp_path: Path, monkeypatch
) -> None:
    hub.repositories[BASE].gated = True
    for token in (None, hub.add_account(Account("bob"))):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        text = refusal("merge", BASE, "--adapter", lora)
        assert text.startswith(f"{BASE} is gated: its owner wants to be asked for access.\n")
        assert text.endswith("Ask for it on the repository's page on the Hub, then log in with: hf auth login")
        assert "hf_" not in text
    hub.repositories[BASE].gated, hub.repositories[BASE].private = False, True
    assert refusal("merge", BASE, "--adapter", lora).startswith(f"No such model: {BASE}\n")
    monkeypatch.setenv("HF_TOKEN", hub.add_account(Account("carol", organizations=("acme",))))
    done("merge", BASE, "--adapter", lora, "-o", tmp_path / "mine")


def test_a_token_that_the_hub_does_not_know(
    hub: Hub, base: Path, lora: Path, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    text = refusal("merge", BASE, "--adapter", lora)
    assert text.splitlines()[0] == f"{BASE} cannot be read from the Hub."
    assert text.endswith("Log in with: hf auth login")
    assert "xxx" not in text


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (403, "Use a token that may read it: hf auth login"),
        (429, "Wait some minutes; with a token the Hub allows more requests: hf auth login"),
        (500, "The Hub itself has a problem; try again later."),
    ],
)
def test_refusals_of_the_hub(
    hub: Hub, base: Path, lora: Path, refusal: Callable[..., str], status: int, advice: str
) -> None:
    hub.fail_next("/api/models/", status=status, times=99, message="no")
    text = refusal("merge", BASE, "--adapter", lora)
    assert text.startswith(f"{BASE} cannot be read from the Hub.\n")
    assert text.endswith(advice)


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors"])
def test_a_file_that_the_hub_does_not_give(
    hub: Hub, base: Path, lora: Path, refusal: Callable[..., str], name: str
) -> None:
    hub.fail_next(name, status=403, times=99, message="no")
    text = refusal("merge", BASE, "--adapter", lora)
    assert text.startswith(f"{BASE} cannot be read from the Hub.\n")
    assert text.endswith("Use a token that may read it: hf auth login")


def test_parts_are_asked_for_again(hub: Hub, base: Path, lora: Path, done: Command, tmp_path: Path) -> None:
    hub.fail_next("00001-of-00003.safetensors", status=503, times=2, method="GET")
    hub.cut_next("00002-of-00003.safetensors", 100, times=2)
    done("merge", base, "--adapter", lora, "-o", tmp_path / "here")
    done("merge", BASE, "--adapter", lora, "-o", tmp_path / "there")
    assert weight_files(tmp_path / "there") == weight_files(tmp_path / "here")


def test_without_a_network(
    hub: Hub, base: Path, lora: Path, refusal: Callable[..., str], done: Command, tmp_path: Path, monkeypatch
) -> None:
    done("merge", BASE, "--adapter", "acme/lora", "-o", tmp_path / "before")
    with running_hub() as gone:
        nowhere = gone.endpoint
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    text = refusal("merge", BASE, "--adapter", lora)
    assert text.startswith(f"{BASE} cannot be read from the Hub.\n")
    assert f"If {BASE} is meant to be a model here, check the path." in text
    assert "HF_HUB_OFFLINE=1" in text
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done("merge", BASE, "--adapter", "acme/lora", "-o", tmp_path / "after")
    assert weight_files(tmp_path / "after") == weight_files(tmp_path / "before")
    assert refusal("merge", "acme/other", "--adapter", lora) == (
        "No such model: acme/other\n"
        "It is no path here, and not in the Hub's cache; HF_HUB_OFFLINE is set, so the Hub is not asked.\n"
        "Unset HF_HUB_OFFLINE, or check the path."
    )


def damage(repository: Repository, name: str) -> None:
    """Changes the last byte of a file, but not the digest that the Hub states of it."""
    files = dict(repository.resolve("main").files)
    content = files[name].content

    class Damaged(StoredFile):
        sha256 = property(lambda self: hashlib.sha256(content).hexdigest())

    files[name] = Damaged(content[:-1] + bytes([content[-1] ^ 1]), lfs=True)
    repository.add_commit("main", "damage", files)


def test_a_file_that_is_not_what_the_hub_states_is_refused_and_removed(
    hub: Hub, base: Path, lora: Path, command: Command, tmp_path: Path
) -> None:
    name = "model-00002-of-00003.safetensors"
    damage(hub.repositories[BASE], name)
    text = message(command("merge", BASE, "--adapter", lora, "-o", tmp_path / "out"))
    assert text.startswith(f"{name} of {BASE} was not downloaded as the Hub has it")
    assert not list((tmp_path / "home").rglob(name))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff" * 8 + b"x" * 100, "truncated"),
        ((1 << 60).to_bytes(8, "little") + b"x" * 100, "truncated"),
        (safetensors_bytes("{"), "no valid safetensors header"),
        (b"123", "truncated"),
        (b"", "truncated"),
    ],
)
def test_headers_of_strangers_are_checked(
    hub: Hub, lora: Path, refusal: Callable[..., str], content: bytes, expected: str
) -> None:
    repository = hub.add_repository("acme/odd")
    repository.add_commit("main", "odd", {"model.safetensors": StoredFile(content, lfs=True)})
    assert expected in refusal("merge", "acme/odd", "--adapter", lora)


def test_names_that_leave_the_folder_are_refused(hub: Hub, lora: Path, refusal: Callable[..., str]) -> None:
    repository = hub.add_repository("acme/odd")
    repository.add_commit("main", "odd", {"../../evil.json": StoredFile(b"{}"), "config.json": StoredFile(b"{}")})
    assert refusal("merge", "acme/odd", "--adapter", lora) == (
        "acme/odd lists the file '../../evil.json', which would lie outside its folder.\nDo not trust this repository."
    )


SHARDS = 7


@pytest.fixture
def large(tmp_path: Path, hub: Hub) -> Path:
    """A model of seven shards here, and the same on the Hub as `acme/large`."""
    folder = write_checkpoint(tmp_path / "large", shards=SHARDS)
    hub.add_repository("acme/large").add_folder(folder)
    return folder


@dataclass
class Disk:
    """What lay in the input folder of a run, and in the cache, whenever a shard was asked for up to its end."""

    model: Path
    work: Path
    cache: Path
    most: int = 0
    asked: list[str] = field(default_factory=list)

    def look(self, request: Request) -> None:
        name = request.path.rpartition("/")[2]
        last = request.headers.get("range", "").rpartition("-")[2]
        if name.startswith("model-") and last == str((self.model / name).stat().st_size - 1):
            self.asked.append(name)
            self.most = max(self.most, len(list(self.work.glob("input/*.safetensors*"))))
            assert not list(self.cache.rglob("model-*.safetensors"))


@pytest.fixture
def disk(hub: Hub, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    monkeypatch.setattr("corda_convert.hub_reading._HEAD_BYTES", 64)
    found = Disk(large, tmp_path / ".out.corda-convert-partial", tmp_path / "home")
    hub.before_answers.append(found.look)
    return found


def test_a_streamed_model_is_never_whole_on_the_disk(
    hub: Hub, large: Path, lora: Path, disk: Disk, done: Command, tmp_path: Path
) -> None:
    done("merge", large, "--adapter", lora, "-o", tmp_path / "here")
    ran = done("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", "--stream", "--json")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "here")
    assert 1 <= disk.most <= MOST_FILES < SHARDS
    (model, *_) = json.loads(ran.out)["inputs"]
    stored = hub.repositories["acme/large"].resolve("main").files
    assert {file["name"]: file["sha256"] for file in model["files"]} == {
        name: file.sha256 for name, file in stored.items() if name.endswith(".safetensors")
    }
    assert not list((tmp_path / "home").rglob("model-*.safetensors"))
    assert_no_leftovers(tmp_path)


def test_streaming_of_what_is_here_is_said_to_have_no_effect(
    hub: Hub, large: Path, lora: Path, done: Command, tmp_path: Path
) -> None:
    note = "Note: --stream has no effect: "
    arguments = ("--adapter", lora, "--stream", "--as-is", "-o")
    assert note in done("merge", large, *arguments, tmp_path / "planned", "--dry-run").err
    ran = done("merge", large, *arguments, tmp_path / "here", "--json")
    assert note in ran.err
    assert json.loads(ran.out)["warnings"] == []
    assert note not in done("merge", "acme/large", *arguments, tmp_path / "there").err
    assert note not in done("merge", large, "--adapter", lora, "-o", tmp_path / "plain").err


def test_streaming_is_refused_on_several_processes() -> None:
    ranks = SimpleNamespace(place=SimpleNamespace(size=2))
    with pytest.raises(UnsupportedInput, match="--stream is for a single process"):
        check_streaming(RunOptions(stream=True, ranks=ranks))  # type: ignore[arg-type]


def test_one_shard_comes_while_the_one_before_is_computed_and_the_one_before_that_goes_up(
    hub: Hub, large: Path, lora: Path, done: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the three waits for the other two: none could come to an end if they did not go on at the same time."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    together, met = threading.Barrier(3), []

    def meet(who: str) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(20)
            met.append(who)

    begin = FoldTransform.begin

    def begin_later(fold: FoldTransform, device: torch.device) -> object:
        if fold.weight.file.path.name == "model-00002-of-00007.safetensors" and not (met or together.broken):
            meet("computed")
        return begin(fold, device)

    monkeypatch.setattr(FoldTransform, "begin", begin_later)
    hub.interfere_next("model-00003-of-00007", method="GET")  # its header
    hub.interfere_next("model-00003-of-00007", method="GET", first=lambda: meet("downloaded"))
    hub.interfere_next("/lfs-storage/", method="PUT", first=lambda: meet("uploaded"))
    stream = ("--stream", "--push-to", "alice/merged", "--as-is")
    done("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", *stream)
    assert sorted(met) == ["computed", "downloaded", "uploaded"]
    done("merge", large, "--adapter", lora, "-o", tmp_path / "here")
    there = hub.repositories["alice/merged"].files()
    assert {name: there[name] for name in there if name.endswith(".safetensors")} == weight_files(tmp_path / "here")


def test_decompose_and_extraction_stream_too(
    hub: Hub, large: Path, lora: Path, disk: Disk, done: Command, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    chosen = ("--method", "svd", "--mode", "ipm", "--rank", 2)
    done("decompose", large, *chosen, "-o", tmp_path / "here")
    done("decompose", "acme/large", *chosen, "-o", tmp_path / "out", "--stream")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "here")
    assert 1 <= disk.most <= MOST_FILES
    done("merge", large, "--adapter", lora, "-o", tmp_path / "tuned")
    hub.add_repository("acme/tuned").add_folder(tmp_path / "tuned")
    done("to-lora", "--from-checkpoints", large, tmp_path / "tuned", "--rank", 4, "-o", tmp_path / "lora-here")
    shutil.rmtree(tmp_path / "out")
    done("to-lora", "--from-checkpoints", "acme/large", "acme/tuned", "--rank", 4, "--stream", "-o", tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "lora-here")
    assert disk.most <= 2 * MOST_FILES < 2 * SHARDS
    budget = ("--method", "svd", "--mode", "ipm", "--rank-budget", "3k")
    assert "does not go with --rank-budget" in refusal("decompose", "acme/large", *budget, "--stream")
    text = refusal("to-lora", "--from-checkpoints", "acme/large", "acme/tuned", "--rank", 4, "--dry-run")
    assert text.startswith("There is no dry run of --from-checkpoints for a model on the Hub.")


def test_a_lost_hub_stops_a_streamed_run_which_goes_on_later(
    hub: Hub, large: Path, lora: Path, disk: Disk, command: Command, done: Command, tmp_path: Path
) -> None:
    arguments = ("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", "--stream", "--as-is")
    done("merge", large, "--adapter", lora, "-o", tmp_path / "here")

    def break_off(request: Request) -> None:
        if disk.asked and "00006" in request.path:
            raise HubError(500, "gone")

    hub.before_answers.append(break_off)
    ran = command(*arguments)
    assert ran.status == 1
    assert ran.err.startswith("Error: acme/large cannot be read from the Hub.\n")
    assert "Run the same command again to go on" in ran.err
    assert not (tmp_path / "out").exists()
    hub.before_answers.remove(break_off)
    disk.asked.clear()
    receipt = json.loads(done(*arguments, "--json").out)
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "here")
    assert receipt["run"]["resumed"]["files"]
    assert not set(receipt["run"]["resumed"]["files"]) & set(disk.asked)
    assert {"model-00006-of-00007.safetensors", "model-00007-of-00007.safetensors"} <= set(disk.asked)
    assert all(file["sha256"] for file in receipt["inputs"][0]["files"])
    assert_no_leftovers(tmp_path)


def test_an_interrupted_streamed_run_goes_on(
    hub: Hub, large: Path, lora: Path, disk: Disk, command: Command, done: Command, tmp_path: Path
) -> None:
    arguments = ("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", "--stream", "--as-is")
    done("merge", large, "--adapter", lora, "-o", tmp_path / "here")

    over, ended_first = threading.Event(), []

    def interrupt(request: Request) -> None:
        if "00005" in request.path and disk.asked:
            hub.before_answers.remove(interrupt)
            os.kill(os.getpid(), signal.SIGINT)
            ended_first.append(over.wait(20))  # the Hub says nothing until then

    hub.before_answers.append(interrupt)
    ran = command(*arguments)
    over.set()
    assert ran.status == 130
    assert not (tmp_path / "out").exists()
    done(*arguments)
    assert ended_first == [True]
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "here")
    assert_no_leftovers(tmp_path)


def test_a_streamed_shard_that_is_not_what_the_hub_states_is_refused(
    hub: Hub, large: Path, lora: Path, command: Command, tmp_path: Path
) -> None:
    name = "model-00004-of-00007.safetensors"
    damage(hub.repositories["acme/large"], name)
    ran = command("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", "--stream")
    assert ran.status == 1
    assert ran.err.startswith(f"Error: {name} was not downloaded as the Hub has it: its SHA-256 is another one.\n")
    assert not (tmp_path / "out").exists()


def test_dropped_connections_are_taken_up_where_they_broke_off(
    hub: Hub, large: Path, lora: Path, done: Command, tmp_path: Path
) -> None:
    name = "model-00004-of-00007.safetensors"
    done("merge", large, "--adapter", lora, "-o", tmp_path / "here")
    done("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", "--dry-run")
    head = hub.sent_of(name)
    hub.cut_next(name, 10_000, times=1)  # the head
    hub.cut_next(name, 100, times=3)
    done("merge", "acme/large", "--adapter", lora, "-o", tmp_path / "out", "--stream", "--as-is")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "here")
    assert hub.sent_of(name) == 2 * head + (large / name).stat().st_size  # no byte was sent twice
