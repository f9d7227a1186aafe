"""Regular expressions of strangers: which of them are sure to be matched in short time."""

from __future__ import annotations

import re

from corda_convert.adapters.source import CONFIG_FILE
from corda_convert.errors import AdapterMismatch

MOST_REPETITIONS = 3
"""So many in one pattern cost a few million steps on a name of a hundred characters, each further one twenty times more."""

_SINGLE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_GROUP_KIND = re.compile(r"\(\?(?:P<\w+>|[:=!]|<[=!])")


def is_quick(pattern: str, *, most: int = MOST_REPETITIONS) -> bool:
    """Whether the pattern repeats nothing that has a choice inside, and has `most` repetitions.

    Python's matcher tries all ways, and there are exponentially many to match `(a+)+`.
    """
    plain = _GROUP_KIND.sub("(", _SINGLE.sub("x", pattern))
    has_choice = [False]
    repetitions = 0
    for place, character in enumerate(plain):
        repeats = plain[place + 1 : place + 2] in ("*", "+", "{")
        if character == "(":
            has_choice.append(False)
        elif character == ")" and len(has_choice) > 1:
            inside = has_choice.pop()
            if inside and repeats:
                return False
            has_choice[-1] |= inside
        elif character in "*+{?|":
            has_choice[-1] = True
        repetitions += character in "*+{"
    return repetitions <= most


def check_pattern(pattern: str, *, most: int = MOST_REPETITIONS) -> None:
    """Raises `AdapterMismatch` unless the pattern is quick."""
    if not is_quick(pattern, most=most):
        raise AdapterMismatch(
            f"{CONFIG_FILE}: to match the pattern {pattern[:200]!r} could take for ever.",
            why=f"It repeats what can match in several ways, or has more than {most} repetitions.",
            next_step="Write it more simply.",
        )
