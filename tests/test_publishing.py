"""`--push-to` and `push` from the command line, by the real Hub client over HTTP, to a Hub server on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import Hub, running_hub
from huggingface_hub import ModelCard, ModelCardData

from corda_convert.cli import cli

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
        timeout=600,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Published:
    """What the three commands have published on one Hub, from a base model with a licence."""

    hub: Hub
    folder: Path
    receipts: dict[str, dict[str, Any]]


def publishing(name: str) -> list[str]:
    return ["-o", name, "--json", "--push-to", f"alice/{name}", "--private"]


BASE_CARD = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: en\n---\n\n# Base\n"
NAMES = ["to-lora", "merge", "decompose"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("published")
    shutil.copytree(ROOT / "fixtures" / "model", folder / "base")
    (folder / "base" / "README.md").write_text(BASE_CARD)
    (folder / "base" / "LICENSE").write_text("Be nice.")
    with running_hub() as server:
        receipts = {}
        for command in (["--base", "base"], [], []):
            name, *arguments = (TO_LORA, MERGE, DECOMPOSE)[len(receipts)]
            placed = [str(ROOT / each) if each.startswith("fixtures/") else each for each in arguments]
            placed = ["base" if each == str(ROOT / "fixtures/model") else each for each in placed]
            done = subprocess.run(
                [sys.executable, "-m", "corda_convert", name, *placed, *command, *publishing(name)],
                cwd=folder,
                env=server.environment(folder / "home") | {"PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            receipts[name] = json.loads(done.stdout)
        yield Published(server, folder, receipts)


@pytest.mark.parametrize("name", NAMES)
def test_each_command_publishes_its_output_in_one_private_commit(name: str, published: Published) -> None:
    repository = published.hub.repositories[f"alice/{name}"]
    assert repository.private
    assert len(repository.history()) == 1
    files = repository.files("main")
    assert files == contents(published.folder / name)
    facts = published.receipts[name]["published"]
    assert facts["repo_id"] == f"alice/{name}"
    assert facts["files"] == len(files)
    assert facts["commit"] == repository.branches["main"]
    assert any(file.lfs for file in repository.resolve("main").files.values())
    if name == "decompose":
        assert {"corda_init/adapter_config.json", "corda_init/adapter_model.safetensors"} <= files.keys()
        assert json.loads(files["corda_init/adapter_config.json"])["base_model_name_or_path"] == "alice/decompose"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_one_for_the_hub(name: str, published: Published) -> None:
    card = ModelCard.load(published.folder / name / "README.md")
    library = "peft" if name == "to-lora" else "transformers"
    assert card.data.library_name == library
    assert card.data.tags[0] == "corda-convert"
    assert (card.data.license, card.data.license_name) == ("other", "llama3")
    assert card.data.get("license_link") == (None if name == "to-lora" else "LICENSE")
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    assert card.text.lstrip().startswith(f"# alice/{name}\n")
    assert str(published.folder) not in card.content
    rows = re.findall(r"^\| `model\.layers\.\*\.(\S+)` \| (\d+) \|", card.text, re.M)
    assert dict(rows).keys() == {module.removeprefix("model.layers.0.") for module in layer_modules()}
    assert {number for _, number in rows} == {"6"}


def layer_modules() -> list[str]:
    index = json.loads((ROOT / "fixtures/model/model.safetensors.index.json").read_text())
    names = [name.removesuffix(".weight") for name in index["weight_map"]]
    return [name for name in names if name.startswith("model.layers.0.") and name.endswith("_proj")]


SNIPPETS = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
tokens = torch.tensor([[1, 5, 9, 30, 2]])
base = AutoModelForCausalLM.from_pretrained("base")(tokens).logits.float()
found = {}
for name, snippet in json.loads(sys.argv[1]).items():
    names = {}
    exec(snippet, names)
    with torch.no_grad():
        found[name] = (names["model"](tokens).logits.float() - base).abs().max().item()
print(json.dumps(found))
"""


def test_the_snippets_of_the_cards_run_on_what_was_published(published: Published) -> None:
    cards = {name: (published.folder / name / "README.md").read_text() for name in NAMES}
    snippets = {name: re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0] for name, card in cards.items()}
    assert all(f'"alice/{name}"' in snippet for name, snippet in snippets.items())
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS, json.dumps(snippets)],
        cwd=published.folder,
        env=published.hub.environment(published.folder / "readers-home"),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    changes = json.loads(done.stdout.splitlines()[-1])
    assert changes["decompose"] < 0.25, "residual and initial adapter are the base model, up to bfloat16"
    assert changes["merge"] > 2
    assert changes["to-lora"] > 2


def test_push_publishes_a_finished_folder_and_says_where(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert run(hub, tmp_path / "home", *TO_LORA, "-o", output).returncode == 0
    done = run(hub, tmp_path / "home", "push", output, "alice/lora")
    assert done.returncode == 0, done.stderr
    assert "Published 4 files" in done.stdout
    assert hub.endpoint in done.stdout
    assert not hub.repositories["alice/lora"].private
    sealed, there = contents(output), hub.repositories["alice/lora"].files("main")
    assert {name for name in sealed if sealed[name] != there[name]} == {"README.md", "corda_convert.json"}
    assert '"alice/lora"' in there["README.md"].decode()
    assert '"output"' not in there["README.md"].decode()
    receipt = json.loads(there["corda_convert.json"])
    assert receipt["published_as"] == "alice/lora"
    for entry in receipt["files"]:
        content = there[entry["name"]]
        assert (entry["bytes"], entry["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


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
        timeout=600,
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
    assert repository.files("main") == {}
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
    in_file = "another-token-of-no-known-form"
    hub.accounts |= dict.fromkeys((secret, in_file), hub.accounts[hub.token])
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
    for hidden in (secret, in_file, PASSWORD, "pass@word-of-the-mirror", "mirror:", "mirror@", "Signature="):
        assert hidden not in everything
    assert "hf_***" in "".join(printed)


def test_a_residual_that_is_pushed_later_names_its_repository(hub: Hub, tmp_path: Path) -> None:
    output = tmp_path / "output"
    assert run(hub, tmp_path / "home", *DECOMPOSE, "-o", output).returncode == 0
    before = contents(output)
    assert run(hub, tmp_path / "home", "push", output, "alice/residual").returncode == 0
    there = hub.repositories["alice/residual"].files("main")
    config = json.loads(there["corda_init/adapter_config.json"])
    assert config == {
        **json.loads(before["corda_init/adapter_config.json"]),
        "base_model_name_or_path": "alice/residual",
    }
    assert str(tmp_path) not in "".join(content.decode("latin-1") for content in there.values())
    assert contents(output) == before


def test_the_example_workflow_is_started_by_hand_and_its_commands_parse() -> None:
    text = (ROOT / ".github/workflows/publish.yml").read_text()
    workflow = yaml.safe_load(text)
    assert list(workflow[True]) == ["workflow_dispatch"], "YAML takes `on` for a truth value"
    steps = workflow["jobs"]["publish"]["steps"]
    assert [step["name"] for step in steps if "HF_TOKEN" in step.get("env", {})] == ["Publish"]
    assert "secrets." not in text.replace("${{ secrets.HF_TOKEN }}", "")
    commands = [line for step in steps for line in str(step.get("run", "")).splitlines() if "corda-convert" in line]
    commands += re.findall(r"^corda-convert .*", (ROOT / "docs/publishing.md").read_text(), re.M)
    assert {shlex.split(command)[1] for command in commands} >= {"merge", "verify", "push"}
    for command in commands:
        _, name, *arguments = shlex.split(command.partition(" > ")[0])
        with cli.commands[name].make_context(name, arguments):
            pass
