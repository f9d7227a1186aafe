"""The licence that a card carries over from the base model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from corda_convert.output.licence import Licence, licence_of


@pytest.mark.parametrize(
    ("front_matter", "found"),
    [
        ("license: apache-2.0", Licence("apache-2.0")),
        ("license: [mit]", Licence("mit")),
        ("license: other\nlicense_name: llama3\nlicense_link: LICENSE", Licence("other", "llama3", "LICENSE")),
        ("license: Our Own Terms, v2", Licence("other", "our-own-terms-v2")),
        ("license: 7", Licence()),
        ("license: {a: b}", Licence()),
        ("license: [mit, gpl-3.0]", Licence()),
        ("tags: [a]", Licence()),
        (": [", Licence()),
        ("- a list", Licence()),
        ("license: !!python/object/apply:os.getcwd []", Licence()),
        ("license: " + "[" * 5000, Licence()),
    ],
)
def test_the_front_matter_says_it(front_matter: str, found: Licence, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front_matter}\n---\n\n# Base\n")
    assert licence_of(tmp_path) == found
    data = ModelCardData(license=found.license, license_name=found.name, license_link=found.link)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n")
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        found.license,
        found.name,
        found.link,
    )


def test_without_a_card_the_config_says_it(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == Licence()
    (tmp_path / "config.json").write_text('{"license": "mit"}')
    assert licence_of(tmp_path) == Licence("mit")
    (tmp_path / "README.md").write_bytes(b"\xff\xfe no front matter")
    assert licence_of(tmp_path) == Licence("mit")


def test_a_link_to_a_file_of_the_base_becomes_an_address_or_goes() -> None:
    licence = Licence("other", "x", "LICENSE")
    assert licence.seen_from("acme/base").link == "https://huggingface.co/acme/base/blob/main/LICENSE"
    assert licence.seen_from(None) == Licence("other", "x")
    assert Licence("other", "x", "https://x.org/terms").seen_from(None).link == "https://x.org/terms"
