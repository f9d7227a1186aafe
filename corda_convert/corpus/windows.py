"""A stream of tokens → windows that slide over it, each with the tokens that it is to score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from corda_convert.errors import UnsupportedInput


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens that are run together.

    Attributes:
        token_ids: what is run.
        scored: so many of its last tokens are scored, given all before them in the window.
    """

    token_ids: Sequence[int]
    scored: int


def sliding_windows(stream: Sequence[int], window: int, stride: int) -> list[Window]:
    """Windows of `window` tokens that begin every `stride` tokens, up to the stream's end.

    Every token is scored once, in the first window that has it, given what stands before it there; the first token of a
    window that nothing overlaps is context alone. Raises `UnsupportedInput` for a window below 2, or a stride that is
    not from 1 to the window.
    """
    if window < 2 or not 1 <= stride <= window:
        raise UnsupportedInput(
            f"A window of {window} tokens every {stride}: a window has 2 at least, and a stride is from 1 to the window.",
            next_step="Choose another --window or --stride.",
        )
    found: list[Window] = []
    done = 0
    for begin in range(0, len(stream), stride):
        end = min(begin + window, len(stream))
        scored = min(end - done, end - begin - 1)
        if scored > 0:
            found.append(Window(stream[begin:end], scored))
        done = end
        if end == len(stream):
            break
    return found
