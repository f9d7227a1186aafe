"""The paper in miniature: every beginning is the base model's function, and right answers are those of generating."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from building import FIXTURES, MODEL

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def paper(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, in the repository's root, whose paths the fixtures' programs take."""
    root = FIXTURES.parent
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(FIXTURES))
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("paper")


def test_every_adapter_begins_with_the_function_of_the_base(paper: Any, tmp_path: Path) -> None:
    import training

    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = training.load_model(MODEL)(input_ids=ids).logits
        for name in paper.BEGINNINGS:
            model = paper.beginning(name, tmp_path)
            trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            assert trainable == 71_424, name
            torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=2e-4)


def test_right_answers_are_those_that_generating_gives(paper: Any) -> None:
    import training

    model, tokenizer = training.load_model(MODEL), training.load_tokenizer()
    known = training.read_samples(FIXTURES / "data" / "knowledge.eval.jsonl")
    problems = training.read_samples(FIXTURES / "data" / "task.eval.jsonl")
    wrong = [type(known[0])(sample.question, known[place - 1].answer) for place, sample in enumerate(known[:4])]
    samples = [*known[:10], *problems[:3], *wrong]
    expected = training.right_answers(model, tokenizer, samples)
    assert 0 < expected < 1
    assert paper.right_answers(model, tokenizer, samples) == expected


def test_the_table_and_the_picture_are_made_of_what_is_finished(
    paper: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {f"{text}_perplexity": 2.0 for text in paper.TEXTS} | {"task_right": 0.5, "knowledge_right": 1.0}
    (tmp_path / "tuning-before.json").write_text(json.dumps(measured), encoding="utf-8")
    for name in paper.BEGINNINGS:
        for seed in (1, 2):
            run = {"steps": 7, "seed": seed, "last_loss": 0.1, **measured, "task_perplexity": 1.0 + seed}
            (tmp_path / f"tuning-{name.replace(' ', '-')}-{seed}-7.json").write_text(json.dumps(run), encoding="utf-8")
    paper.main(["tuning", "--seeds", "2", "--steps", "7", "--work", str(tmp_path), "--figures", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "over 2 seeds, 7 steps, rank 8" in printed
    assert "| CorDA kpm | 2.5 ± 0.71 | 2 ± 0 |" in printed
    svg = (tmp_path / "paper-tuning.svg").read_text(encoding="utf-8")
    for label in (*paper.BEGINNINGS, "before training", "perplexity of the task, learnt"):
        assert label in svg
