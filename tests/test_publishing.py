"""`--push-to` and `push` from the command line, by the real Hub client over HTTP, to a Hub server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Hub, running_hub

ROOT = Path(__file__).parent.parent
TO_LORA = ["to-lora", "fixtures/adapters/corda", "--init", "fixtures/residual/corda_init"]
MERGE = ["merge", "fixtures/model", "--adapter", "fixtures/adapters/lora"]
DECOMPOSE = [
    *("decompose", "fixtures/model", "--cov", "fixtures/covariances/knowledge.safetensors"),
    *("--mode", "kpm", "--rank", "4"),
]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as server:
        yield server


def run(hub: Hub, home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "corda_convert", *map(str, arguments)],
        cwd=ROOT,
        env=hub.environment(home),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", [TO_LORA, MERGE, DECOMPOSE], ids=["to-lora", "merge", "decompose"])
def test_each_command_publishes_its_output_in_one_private_commit(command: list[str], hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    done = run(hub, tmp_path / "home", *command, "-o", output, "--push-to", "alice/model", "--private", "--json")
    assert done.returncode == 0, done.stderr
    receipt = json.loads(done.stdout)
    repository = hub.repositories["alice/model"]
    assert repository.private
    published = {name: content for name, content in repository.files("main").items() if name != ".gitattributes"}
    assert published == contents(output)
    assert receipt["published"]["repo_id"] == "alice/model"
    assert receipt["published"]["files"] == len(published)
    assert "alice/model" in published["README.md"].decode()
    weights = [
        request.path for request in hub.requests if "/lfs-storage/" in request.path or "objects/batch" in request.path
    ]
    assert weights
    if command[0] == "decompose":
        assert {"corda_init/adapter_config.json", "corda_init/adapter_model.safetensors"} <= published.keys()
        assert json.loads(published["corda_init/adapter_config.json"])["base_model_name_or_path"] == "alice/model"


def test_push_publishes_a_finished_folder_and_says_where(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert run(hub, tmp_path / "home", *TO_LORA, "-o", output).returncode == 0
    done = run(hub, tmp_path / "home", "push", output, "alice/lora")
    assert done.returncode == 0, done.stderr
    assert "Published 4 files" in done.stdout
    assert hub.endpoint in done.stdout
    assert not hub.repositories["alice/lora"].private
    assert contents(output).items() <= hub.repositories["alice/lora"].files("main").items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json was changed"),
        (lambda folder: (folder / "notes.txt").write_text("x"), "notes.txt was added"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
        (lambda folder: (folder / "corda_convert.json").unlink(), "holds no corda_convert.json"),
        (lambda folder: (folder / "corda_convert.json").write_text("{"), "not valid JSON"),
    ],
)
def test_push_refuses_a_folder_that_is_not_what_its_receipt_says(change, said: str, hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert run(hub, tmp_path / "home", *TO_LORA, "-o", output).returncode == 0
    change(output)
    done = run(hub, tmp_path / "home", "push", output, "alice/lora")
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "alice/lora" not in hub.repositories


def test_without_a_token_nothing_is_computed(hub: Hub, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "corda_convert", *TO_LORA, "-o", tmp_path / "output", "--push-to", "alice/model"],
        cwd=ROOT,
        env=hub.environment(tmp_path / "home", token=None),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "hf auth login" in done.stderr
    assert not (tmp_path / "output").exists()
    assert "alice/model" not in hub.repositories


def test_a_failed_push_leaves_the_output_and_says_how_to_go_on(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    hub.fail_next("commit/", status=500)
    done = run(hub, tmp_path / "home", *TO_LORA, "-o", output, "--push-to", "alice/model")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"corda-convert push {output} alice/model" in done.stderr
    assert (output / "corda_convert.json").is_file()
    again = run(hub, tmp_path / "home", "push", output, "alice/model")
    assert again.returncode == 0, again.stderr
    assert contents(output).items() <= hub.repositories["alice/model"].files("main").items()
