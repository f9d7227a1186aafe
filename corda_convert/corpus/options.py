"""What text to read, and how to cut it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corda_convert.errors import CordaConvertError, InputNotFound, UnsupportedInput, raise_problems


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """What text to read, and how to cut it into samples.

    Attributes:
        files: .jsonl, .json, .txt or .parquet.
        field: the fields of a record that are its text, joined by line breaks; a field with braces is a template, such as
            `Question: {question} Answer: {answer}`. Dots lead into nested values (`answers.0.text`). Empty means `text`.
            With `chat`: the fields of the user's and of the assistant's turn, or the one field that holds messages.
        chat: render each record with the tokenizer's chat template.
        seq_len: tokens of a sample, at most; with packing exactly, but for the last.
        samples: how many samples, at most.
        seed: decides the order in which records are taken.
        preset: a known data set instead of files (`presets.PRESETS`).
        pack: lay texts end to end and cut them to `seq_len`; otherwise each record is a sample, cut off at `seq_len`.
            None: as the preset says, else packed.
    """

    files: tuple[Path, ...] = ()
    field: tuple[str, ...] = ()
    chat: bool = False
    seq_len: int = 2048
    samples: int = 256
    seed: int = 0
    preset: str | None = None
    pack: bool | None = None

    def check(self) -> None:
        """Raises what is wrong with these options, all of it together."""
        raise_problems(self._problems())

    def _problems(self) -> list[CordaConvertError]:
        from corda_convert.corpus.presets import find_preset
        from corda_convert.corpus.rendering import field_problem

        problems: list[CordaConvertError] = []
        if bool(self.files) == bool(self.preset):
            what = "Both files and a preset are" if self.files else "Neither a file nor a preset is"
            problems.append(
                UnsupportedInput(f"{what} given as text.", next_step="Give one: --data FILE or --preset NAME.")
            )
        for count, option, least in ((self.seq_len, "--seq-len", 2), (self.samples, "--samples", 1)):
            if count < least:
                problems.append(UnsupportedInput(f"{option} is {count}; it is {least} at least."))
        if self.chat and len(self.field) > 2:
            problems.append(
                UnsupportedInput(
                    f"With --chat, {len(self.field)} fields are given: {', '.join(self.field)}.",
                    next_step="Give one that holds messages, or two: the user's turn and the assistant's.",
                )
            )
        if self.preset is not None:
            try:
                find_preset(self.preset)
            except CordaConvertError as unknown:
                problems.append(unknown)
            if self.field:
                problems.append(UnsupportedInput("--field is for files; a preset knows its own fields."))
        elif self.field and self.files and all(file.suffix.lower() == ".txt" for file in self.files):
            problems.append(UnsupportedInput("--field is given, but a .txt file has no fields."))
        problems += [
            UnsupportedInput(f"--field {field!r} is no name or template: {why}.")
            for field in self.field
            if (why := field_problem(field)) is not None
        ]
        problems += [problem for file in self.files if (problem := missing_file(file)) is not None]
        return problems


def missing_file(file: Path) -> CordaConvertError | None:
    """Why a file of text cannot be there, or None."""
    if file.is_file():
        return None
    if file.is_dir():
        return InputNotFound(f"{file} is a folder, not a file of text.", next_step="Name its files one by one.")
    return InputNotFound(f"There is no file of text {file}.")


def limited_seq_len(seq_len: int, config: Any) -> tuple[int, str | None]:
    """`seq_len`, or what the model's positions allow if that is less, and a warning then.

    `config` is the model's configuration; the text part of a model of several counts.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = next(
        (value for name in _LENGTHS if isinstance(value := getattr(text, name, None), int) and value > 0), seq_len
    )
    if seq_len <= longest:
        return seq_len, None
    return longest, f"Samples are {longest} tokens long, not {seq_len}: the model has no more positions."


def check_token_ids(samples: Sequence[Sequence[int]], config: Any) -> None:
    """Raises `UnsupportedInput` where a token's number is beyond the model's vocabulary."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = getattr(text, "vocab_size", None)
    highest = max((max(sample) for sample in samples if sample), default=0)
    if isinstance(rows, int) and highest >= rows:
        raise UnsupportedInput(
            f"The tokenizer gives token {highest}, and the model's vocabulary ends at {rows - 1}.",
            why="The tokenizer beside the weights is another model's, or was extended without them.",
            next_step="Put the model's own tokenizer beside its weights.",
        )


_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
