"""The data sets of the CorDA paper, by name, through the `datasets` library.

Of sets about knowledge the questions are taken, laid end to end; of sets about tasks instruction and response, a record each
(arXiv:2406.05223, §4.1 and the authors' scripts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corda_convert.corpus.records import Record, Rows, missing_library
from corda_convert.errors import InputNotFound, UnsupportedInput


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a data set: its split, and its files where the repository has no configuration that names them."""

    split: str
    files: str | None = None


@dataclass(frozen=True, slots=True)
class Preset:
    """A data set.

    Attributes:
        repository: on the Hub, or a local folder.
        configuration: the name of one of its configurations.
        calibration: the part that covariances are collected on.
        evaluation: the part that perplexity is measured on; None where it is not customary.
        fields: the fields that are its text: one of running text or questions, or instruction and response.
        skip_with: records in which this field is not empty are left out (the authors leave out alpaca's `input`).
        pack: whether texts are laid end to end.
    """

    repository: str
    calibration: Part
    fields: tuple[str, ...]
    configuration: str | None = None
    evaluation: Part | None = None
    revision: str | None = None
    skip_with: str | None = None
    pack: bool = True


_TRAIN = Part("train")

PRESETS: Mapping[str, Preset] = {
    "wikitext2": Preset("Salesforce/wikitext", _TRAIN, ("text",), "wikitext-2-raw-v1", Part("test")),
    "c4": Preset(
        "allenai/c4",
        Part("train", "en/c4-train.00000-of-01024.json.gz"),
        ("text",),
        evaluation=Part("validation", "en/c4-validation.00000-of-00008.json.gz"),
    ),
    "ptb": Preset(
        "ptb-text-only/ptb_text_only",
        Part("train", "penn_treebank/train/*.parquet"),
        ("sentence",),
        evaluation=Part("validation", "penn_treebank/validation/*.parquet"),
        revision="refs/convert/parquet",
    ),
    "triviaqa": Preset("mandarjoshi/trivia_qa", _TRAIN, ("question",), "rc.nocontext"),
    "nqopen": Preset("google-research-datasets/nq_open", _TRAIN, ("question",)),
    "metamath": Preset("meta-math/MetaMathQA", _TRAIN, ("query", "response"), pack=False),
    "codefeedback": Preset("m-a-p/CodeFeedback-Filtered-Instruction", _TRAIN, ("query", "answer"), pack=False),
    "wizardlm-evol-instruct": Preset(
        "WizardLMTeam/WizardLM_evol_instruct_V2_196k",
        _TRAIN,
        ("conversations.0.value", "conversations.1.value"),
        pack=False,
    ),
    "alpaca": Preset("tatsu-lab/alpaca", _TRAIN, ("instruction", "output"), skip_with="input", pack=False),
}


def find_preset(name: str) -> Preset:
    """A data set by its name, in any case. Raises `InputNotFound` listing the names."""
    found = PRESETS.get(name.lower())
    if found is None:
        raise InputNotFound(f"There is no preset {name}.", next_step=f"Known: {', '.join(PRESETS)}")
    return found


def read_preset(name: str, *, evaluation: bool = False) -> Sequence[Record]:
    """The records of a data set, downloaded where the cache does not have it.

    Raises `UnsupportedInput` without the library, or for evaluation on a set that has no part for it, and `InputNotFound` if
    it cannot be had.
    """
    preset = find_preset(name)
    part = preset.evaluation if evaluation else preset.calibration
    if part is None:
        known = ", ".join(known for known, other in PRESETS.items() if other.evaluation)
        raise UnsupportedInput(
            f"{name} has no part that perplexity is customarily measured on.",
            next_step=f"Give --data FILE, or one of: {known}",
        )
    try:
        import datasets
    except ImportError:
        raise missing_library(f"The preset {name} is read by the library datasets, which") from None
    files = None if part.files is None else {part.split: part.files}
    try:
        table = datasets.load_dataset(
            preset.repository, preset.configuration, data_files=files, split=part.split, revision=preset.revision
        )
    except Exception as error:  # the library lets through whatever its transports and readers raise
        raise InputNotFound(
            f"{preset.repository}, the data set of the preset {name}, cannot be loaded: {_first_line(error)}",
            next_step="Check the network and HF_TOKEN, or give the text as --data FILE.",
        ) from None
    return (
        _Kept(Rows(preset.repository, table), preset.skip_with) if preset.skip_with else Rows(preset.repository, table)
    )


class _Kept(Sequence[Record]):
    """The rows in which a field is empty."""

    def __init__(self, rows: Rows, skip_with: str) -> None:
        self._rows = rows
        self._numbers = [number for number, record in enumerate(rows) if not _has(record, skip_with)]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[self._numbers[index]]


def _has(record: Record, field: str) -> bool:
    return isinstance(record.value, Mapping) and bool(record.value.get(field))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
