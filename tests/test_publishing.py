"""`--push-to` and `push` from the command line, by the real Hub client over HTTP, to a Hub server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Account, Hub, running_hub

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


def run(
    hub: Hub, home: Path, *arguments: str | Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "corda_convert", *map(str, arguments)],
        cwd=ROOT,
        env=hub.environment(home) if environment is None else environment,
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


def test_a_branch_and_a_pull_request_from_the_command_line(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    options = ["--push-to", "alice/model", "--revision", "v2", "--create-pr", "--commit-message", "A better one"]
    done = run(hub, tmp_path / "home", *TO_LORA, "-o", output, *options, "--json")
    assert done.returncode == 0, done.stderr
    published = json.loads(done.stdout)["published"]
    repository = hub.repositories["alice/model"]
    made = repository.commits[published["commit"]]
    assert published["pull_request"] == f"{hub.endpoint}/alice/model/discussions/1"
    assert repository.branches["refs/pr/1"] == made.oid
    assert made.title == "A better one"
    assert "Converted corda with corda_init to LoRA → alice/model" in made.description
    assert "84 concatenated" in made.description
    assert str(tmp_path) not in made.description

    again = run(hub, tmp_path / "home", "push", output, "alice/model", "--revision", "v2", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["url"] == f"{hub.endpoint}/alice/model/tree/v2"
    assert repository.files("v2") == contents(output)
    third = run(hub, tmp_path / "home", "push", output, "alice/model", "--revision", "v2")
    assert "has all 4 files" in third.stdout


@pytest.mark.parametrize("option", [["--private"], ["--revision", "v2"], ["--create-pr"], ["--commit-message", "x"]])
def test_options_of_publishing_without_a_repository_are_wrong_usage(option: list[str], command, tmp_path: Path) -> None:
    ran = command(*TO_LORA, "-o", tmp_path / "output", *option)
    assert ran.status == 2
    assert f"{option[0]} is about publishing: give --push-to, too." in ran.err


PASSWORD = "pass%40word-of-the-mirror"


def test_no_token_is_ever_shown_or_written(hub: Hub, tmp_path: Path) -> None:
    """Three secrets: a token in the environment, one in the token file, and a password in the endpoint's address."""
    home, output, secret = tmp_path / "home", tmp_path / "output", "a-token-of-no-known-form"
    hub.accounts[secret] = hub.accounts[hub.token]
    in_file = hub.add_account(Account("alice"))
    home.mkdir()
    (home / "token").write_text(in_file + "\n")
    plain, by_file = hub.environment(home, token=secret), hub.environment(home, token=None)
    guarded = plain | {"HF_ENDPOINT": hub.endpoint.replace("//", f"//mirror:{PASSWORD}@")}
    attempts = [
        ([*TO_LORA, "-o", output, "--push-to", "alice/model", "-v"], plain, "/commit/", 403),
        (["push", output, "alice/model"], plain, "/api/repos/create", 500),
        (["push", output, "alice/model", "--revision", "v2"], by_file, "/branch/", 403),
        (["push", output, "alice/other", "--json"], by_file, "/api/whoami", 401),
        (["push", output, "alice/model"], guarded, "/api/whoami", 500),
        ([*TO_LORA, "-o", tmp_path / "second", "--push-to", "alice/model"], guarded, "/api/whoami", 403),
    ]
    printed = []
    for arguments, environment, path, status in attempts:
        known = in_file if environment is by_file else secret
        hub.fail_next(path, status=status, message=f"no: {known} {environment['HF_ENDPOINT']}")
        done = run(hub, home, *arguments, environment=environment)
        assert done.returncode == 1, done.stdout
        assert done.stderr.count("Error: ") == 1, done.stderr
        printed += [done.stdout, done.stderr]
    hub.repositories["alice/model"].lfs_objects.clear()
    hub.fail_next("/lfs-storage/", status=503)
    done = run(hub, home, "push", output, "alice/model", environment=by_file)
    assert done.returncode == 0, done.stderr
    assert "Retrying" in done.stderr, "the client logs the address that it asks again"
    repository = hub.repositories["alice/model"]
    written = b"".join([*contents(output).values(), *repository.files().values()]).decode("latin-1")
    written += "".join(commit.title + commit.description for commit in repository.history())
    everything = "".join([*printed, done.stdout, done.stderr, written])
    for hidden in (secret, in_file, PASSWORD, "pass@word-of-the-mirror", "Signature="):
        assert hidden not in everything
    assert "hf_***" in "".join(printed)
