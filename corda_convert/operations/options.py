"""What every command takes, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.distributed import Alone, Ranks
from corda_convert.errors import UnsupportedInput

if TYPE_CHECKING:
    import torch

    from corda_convert.hub import Publication
    from corda_convert.plan.model import Plan

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""`--dtype`, and the safetensors name behind it."""

Paths = Path | str | Sequence[Path | str]
"""One path or several."""


def paths_of(paths: Paths | None) -> tuple[Path, ...]:
    """Them all; none for None."""
    if paths is None:
        return ()
    return (Path(paths),) if isinstance(paths, (str, Path)) else tuple(Path(path) for path in paths)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options that mean the same for every command.

    Attributes:
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; auto takes CUDA where there is one.
        dtype: dtype of the output's floating-point tensors (`float32`, `bfloat16`, `float16`); None keeps each one's own.
        max_memory_bytes: bound on the process's memory, the program itself included; None for no bound.
        dry_run: plan and check everything, write nothing.
        overwrite: replace an output folder that this program made.
        stream: fetch the files of a model on the Hub one after the other, and delete each when nothing more is read of it.
        push_to: Hub repository to publish the output to, `owner/name`.
        private: make that repository private.
        revision: branch of that repository, made if there is none of that name; None for the default one.
        create_pr: open a pull request there instead of committing.
        commit_message: first line of the commit; None for one that names the command.
        progress: show a progress bar on stderr.
        ranks: the processes that share the work, each of which runs the same command; the command line takes torchrun's.
    """

    device: str = "auto"
    dtype: str | None = None
    max_memory_bytes: int | None = None
    dry_run: bool = False
    overwrite: bool = False
    stream: bool = False
    push_to: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    progress: bool = False
    ranks: Ranks = Alone()  # noqa: RUF009 - it has no state

    def torch_device(self) -> torch.device:
        """The device of this process. Raises `UnsupportedInput` for one that is not there."""
        return resolve_device(self.device, self.ranks.place.local_rank if self.ranks.place.size > 1 else None)

    @property
    def output_dtype(self) -> str | None:
        """The safetensors dtype name, or None. Raises `UnsupportedInput`."""
        if self.dtype is None:
            return None
        if self.dtype not in DTYPES:
            raise UnsupportedInput(f"Unknown dtype {self.dtype!r}.", next_step=f"Choose one of {', '.join(DTYPES)}.")
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did, or would do.

    Attributes:
        output: the output folder.
        plan: files, bytes and memory, known before any work.
        receipt: the content of `corda_convert.json`; for a dry run, the same with what is planned.
        publication: where it was pushed, if it was.
        warnings: what the user should look at although the run went on.
    """

    output: Path
    plan: Plan
    receipt: dict[str, Any]
    publication: Publication | None = None
    warnings: tuple[str, ...] = ()


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """The torch device of `--device`. Raises `UnsupportedInput` for one that is not there.

    With `local_rank`, the number of a process on its machine, `auto` and `cuda` are that process's own GPU.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None and torch.cuda.is_available():
        name = f"cuda:{local_rank % torch.cuda.device_count()}"  # a scheduler may show each process its own GPU alone
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedInput(
            f"Unknown device {name!r}.", next_step="Choose auto, cpu, cuda, cuda:N or mps."
        ) from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UnsupportedInput(f"Unknown device {name!r}.", next_step="Choose auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedInput(
            f"There is no device {name}: torch sees {torch.cuda.device_count()} CUDA devices.",
            next_step="Use --device cpu, or install a CUDA build of torch.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UnsupportedInput("There is no device mps here.", next_step="Use --device cpu.")
    return device
