"""Everything that this program refuses, as one family of exceptions.

Leaf code raises with fields; only `cli` catches the family and prints it. A message has three parts: what does not
fit (tensor, file, expected, found), the likely cause where it is known, and the next command to type.
"""

from __future__ import annotations

from collections.abc import Iterable


class CordaConvertError(Exception):
    """A refusal or a failure that the user can act on.

    Args:
        what: what does not fit, with the tensor, the file, what was expected and what was found.
        why: the likely cause, where it is known.
        next_step: what to do or to type next.
    """

    def __init__(self, what: str, *, why: str | None = None, next_step: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.next_step) if part)


class InputNotFound(CordaConvertError):
    """A file or folder that was named does not exist or is not of the kind that was asked for."""


class MalformedFile(CordaConvertError):
    """A file is truncated, inconsistent, or not what its name says."""


class UnsupportedInput(CordaConvertError):
    """A well-formed input of a kind that this version does not handle."""


class AdapterMismatch(CordaConvertError):
    """The adapter, its initial adapter and the model do not belong together."""


class CovarianceMismatch(CordaConvertError):
    """Covariances are missing, have another shape, or belong to another model."""


class NotFinite(CordaConvertError):
    """NaN or Inf in an input, or in a result."""


class OutputRefused(CordaConvertError):
    """The output folder cannot be written without destroying something, or there is no room for it."""


class MemoryBudgetExceeded(CordaConvertError):
    """The plan needs more memory than `--max-memory` allows."""


class PublishFailed(CordaConvertError):
    """The Hub refused or did not answer."""


class RunStopped(CordaConvertError):
    """The run stopped for a reason that is not in its inputs: the same command may go on with what is finished."""


class DownloadFailed(RunStopped):
    """The Hub refused to give something, did not answer, or sent something else."""


class PlanRefused(CordaConvertError):
    """Several problems of one plan, reported together."""

    def __init__(self, problems: Iterable[CordaConvertError]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        super().__init__(f"{count} problems, nothing was written:" if count != 1 else "1 problem, nothing was written:")

    def __str__(self) -> str:
        return "\n\n".join([self.what, *(str(problem) for problem in self.problems)])


def raise_problems(problems: Iterable[CordaConvertError]) -> None:
    """Raises nothing for no problem, the problem itself for one, and `PlanRefused` for several."""
    found = tuple(single for problem in problems for single in getattr(problem, "problems", (problem,)))
    if len(found) == 1:
        raise found[0]
    if found:
        raise PlanRefused(found)


def some(names: Iterable[str], most: int = 5) -> str:
    """The first few names, and how many more."""
    listed = list(names)
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")
