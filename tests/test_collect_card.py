"""The card of a folder of covariances: for the Hub, and with a snippet that runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from building import FIXTURES, MODEL, files_below, read_json
from conftest import Ran
from hub_server import Hub
from huggingface_hub import ModelCard
from test_hub_reading import hub  # noqa: F401 - a fixture

from corda_convert.operations.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")

Command = Callable[..., Ran]

TEXT = ("--data", FIXTURES / "data" / "task.jsonl", "--field", "question", "--no-pack", "--samples", 9)
PEFTS = FIXTURES / "covariances" / "task.peft.pt"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the model and its licence."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    base = tmp_path / "work" / "base"
    base.mkdir()
    for name, content in files_below(MODEL).items():
        (base / name).write_bytes(content)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return tmp_path / "work"


def test_the_card_is_one_for_the_hub_and_its_snippet_runs(done: Command, place: Path) -> None:
    done("collect", "base", *TEXT, "-o", "covs")
    card = ModelCard.load(place / "covs" / "README.md")
    assert card.data.to_dict() == {
        "library_name": "corda-convert",
        "license": "apache-2.0",
        "tags": ["corda-convert", "corda", "covariance"],
    }
    receipt = read_json(place / "covs" / "corda_convert.json")
    assert card.text.lstrip().startswith("# covs\n")
    assert (
        f"of `base` on {receipt['data']['description']} (9 samples, {receipt['data']['tokens']:,} tokens)" in card.text
    )
    assert str(place) not in card.content
    rows = re.findall(r"^\| `model\.layers\.\*\.(\S+)` \| (\d+) \|", card.text, re.M)
    assert sum(int(number) for _, number in rows) == receipt["summary"]["tensors"]["collected"]
    assert [entry["name"] for entry in receipt["files"]].count("README.md") == 1
    assert verify(place / "covs").is_fine
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(snippet.replace("rank=128", "rank=4"), {})
    assert (place / "residual" / "corda_init" / "adapter_model.safetensors").is_file()


def test_covariances_that_are_pushed_later_name_their_repository(
    done: Command,
    place: Path,
    hub: Hub,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    done("collect", "--from-peft", PEFTS, "-o", "covs")
    card = (place / "covs" / "README.md").read_text()
    assert f"They were converted from PEFT's covariance file `{PEFTS.name}`." in card
    done("push", "covs", "alice/covs")
    there = hub.repositories["alice/covs"].files("main")
    assert there["README.md"].decode() == card.replace("# covs\n", "# alice/covs\n").replace('"covs"', '"alice/covs"')
    assert b'covariances="alice/covs"' in there["README.md"]
