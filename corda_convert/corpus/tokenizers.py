"""The tokenizer that stands beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from corda_convert.errors import UnsupportedInput


def read_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model's folder. Raises `UnsupportedInput` where there is none that transformers reads."""
    from transformers import AutoTokenizer

    if not any(_has_vocabulary(path.name) for path in folder.iterdir()):
        raise _refusal(folder, "no vocabulary")  # transformers would make one without any words
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # a tokenizer's class may raise anything
        raise _refusal(folder, (str(error) or type(error).__name__).splitlines()[0]) from None


def _has_vocabulary(name: str) -> bool:
    return name.startswith(("tokenizer.", "vocab", "tekken")) or name.endswith((".model", ".tiktoken", ".vocab"))


def _refusal(folder: Path, why: str) -> UnsupportedInput:
    return UnsupportedInput(
        f"{folder} has no tokenizer that can be read: {why}",
        next_step="Put the tokenizer's files beside the weights: tokenizer.json and tokenizer_config.json.",
    )
