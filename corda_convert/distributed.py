"""One run on several processes that torchrun started: what they tell each other, and that all stop when one does.

Each process takes the same steps. Between two of them a process may work for hours, so it is waited for with the help of a
store of keys, where every process leaves a sign of life; values are exchanged by torch.distributed (gloo) when all are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from corda_convert.errors import CordaConvertError, RunStopped, UnsupportedInput

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined,unused-ignore]

_T = TypeVar("_T")

CONNECT_SECONDS = 300
"""All processes must be there by then."""

SILENT_SECONDS = 60
"""A process without a sign of life for so long is taken for dead. Where torchrun watches it, that is known sooner."""

EXCHANGE_SECONDS = 600
"""For an exchange of values when all processes have come to it."""

_PULSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Which of how many processes this is, over all machines and on this one."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def place_in(environment: Mapping[str, str]) -> Place | None:
    """The place that torchrun gave this process; None for a process alone. Raises `UnsupportedInput`."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    try:
        rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        place = Place(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    except ValueError:
        place = None
    if place is None or not 0 <= place.rank < place.size or not 0 <= place.local_rank < place.local_size:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
        raise UnsupportedInput(
            f"The environment names no place among several processes: {given}.",
            next_step="Start with torchrun, or unset RANK and WORLD_SIZE to run alone.",
        )
    return place if place.size > 1 else None


class Ranks(Protocol):
    """The processes of one run, of which this is number `rank`. Number 0 speaks to the user, and makes the output."""

    @property
    def place(self) -> Place: ...

    def exchange(self, value: _T) -> list[_T]:
        """Waits for all processes. Returns the values that they brought, by rank. Raises as `check` does."""
        ...

    def add_up(self, tensor: Tensor) -> None:
        """Waits for all processes, and puts the sum of their tensors in the place of each. Raises as `check` does."""
        ...

    def check(self) -> None:
        """Raises a `CordaConvertError` once another process has failed, and `RunStopped` if it stopped or is gone."""
        ...

    def leaving(self) -> contextlib.AbstractContextManager[None]:
        """When what is done inside fails, tells the others; rank 0 waits after a refusal until none of them writes."""
        ...


class Alone:
    """One process."""

    place = Place(0, 1, 0, 1)

    def exchange(self, value: _T) -> list[_T]:
        return [value]

    def add_up(self, tensor: Tensor) -> None:
        """The sum is what it is."""

    def check(self) -> None:
        """There is nobody else."""

    def leaving(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Group:
    """Several processes, connected as the environment says."""

    def __init__(self, place: Place) -> None:
        """Waits for all processes. Raises `RunStopped` if they do not come together."""
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # lost connections are told in our words
        import torch.distributed as dist

        self.place = place
        if not dist.is_available():
            raise UnsupportedInput("This build of torch has no torch.distributed.", next_step="Run one process.")
        from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined,unused-ignore]

        try:
            timeout = timedelta(seconds=CONNECT_SECONDS)
            self._store: Store = next(rendezvous("env://", timeout=timeout))[0]
            dist.init_process_group(
                "gloo",
                store=PrefixStore("gloo", self._store),
                rank=place.rank,
                world_size=place.size,
                timeout=timedelta(seconds=EXCHANGE_SECONDS),
            )
        except (RuntimeError, ValueError) as error:
            raise RunStopped(
                f"The {place.size} processes of this run did not come together: {str(error).splitlines()[0]}",
                next_step="Start all of them with torchrun, or unset RANK and WORLD_SIZE to run alone.",
            ) from None
        self._step = 0
        self._has_left = False
        self._trouble: CordaConvertError | None = None
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    def exchange(self, value: _T) -> list[_T]:
        import torch.distributed as dist

        self._meet()
        values: list[Any] = [None] * self.place.size
        with self._connection():
            dist.all_gather_object(values, value)
        return values

    def add_up(self, tensor: Tensor) -> None:
        import torch.distributed as dist

        self._meet()
        host = tensor.cpu()
        with self._connection():
            dist.all_reduce(host)
        tensor.copy_(host)

    def check(self) -> None:
        if self._trouble is not None:
            raise self._trouble

    @contextlib.contextmanager
    def leaving(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._leave(error)
            is_refusal = isinstance(error, CordaConvertError) and not isinstance(error, RunStopped)
            if is_refusal and self.place.rank == 0:
                self._wait_while(lambda: not self._all("left"), SILENT_SECONDS)
            raise

    def end(self, error: BaseException | None) -> None:
        """The last step: tells the others of a failure; rank 0 after it has told the user, the others before they end.

        Never fails.
        """
        self._leave(error)
        if self.place.rank == 0:
            self._set("told", "")
            if not isinstance(error, RunStopped):  # the store may be this process's own
                self._wait_while(lambda: not self._all("gone"), 5)
        elif error is not None:
            self._wait_while(lambda: not self._has("told"), SILENT_SECONDS)
        self._set(f"gone/{self.place.rank}", "")
        self._ended.set()
        self._watcher.join()

    def _leave(self, error: BaseException | None) -> None:
        if self._has_left:
            return
        self._has_left = True
        if error is not None and error is not self._trouble:
            told = {
                "host": socket.gethostname(),
                "text": str(error) or type(error).__name__,
                "refused": isinstance(error, CordaConvertError) and not isinstance(error, RunStopped),
            }
            self._set(f"failed/{self.place.rank}", json.dumps(told))
            self._set("failed", "")
        self._set(f"left/{self.place.rank}", "")

    def _meet(self) -> None:
        """Waits until all processes have come to this step."""
        self._step += 1
        with self._connection():
            self._store.set(f"at/{self._step}/{self.place.rank}", "")
        self._wait([f"at/{self._step}/{rank}" for rank in range(self.place.size)])

    def _wait(self, keys: list[str]) -> None:
        pause = 0.01
        while True:
            self.check()
            with self._connection():
                if self._store.check(keys):
                    return
            time.sleep(pause)
            pause = min(2 * pause, 0.2)

    def _wait_while(self, is_open: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < until and is_open():
                time.sleep(0.05)

    def _all(self, what: str) -> bool:
        """Whether all others have set their key."""
        return all(self._has(f"{what}/{rank}") for rank in range(self.place.size) if rank != self.place.rank)

    def _has(self, key: str) -> bool:
        return bool(self._store.check([key]))

    def _set(self, key: str, value: str) -> None:
        with contextlib.suppress(RuntimeError):  # nobody is left to read it
            self._store.set(key, value)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[None]:
        """What is done inside raises what is known of the others, where the connection to them fails."""
        try:
            yield
        except RuntimeError as error:
            self._ended.wait(2 * _PULSE_SECONDS)  # the reason may be on its way
            self.check()
            raise _lost(f"The connection to the other processes is lost: {str(error).splitlines()[0]}") from None

    def _watch(self) -> None:
        """Gives signs of life, and looks for those of the others, until this process ends."""
        beats = 0
        last: dict[int, tuple[bytes, float]] = {}
        while not self._ended.wait(_PULSE_SECONDS):
            beats += 1
            try:
                self._store.set(f"beat/{self.place.rank}", str(beats))
                self._trouble = self._trouble or self._failure() or self._silence(last)
            except RuntimeError as error:
                self._trouble = self._trouble or _lost(
                    f"The connection to the other processes is lost: {str(error).splitlines()[0]}"
                )
                return

    def _failure(self) -> CordaConvertError | None:
        """What the others have failed with: the first refusal, or else the first reason to stop."""
        if not self._has("failed"):
            return None
        others = [rank for rank in range(self.place.size) if rank != self.place.rank and self._has(f"failed/{rank}")]
        told = [(rank, json.loads(self._store.get(f"failed/{rank}"))) for rank in others]
        for rank, failure in sorted(told, key=lambda each: not each[1]["refused"]):
            kind = CordaConvertError if failure["refused"] else RunStopped
            return kind(f"Rank {rank} on {failure['host']}: {failure['text']}")
        return None

    def _silence(self, last: dict[int, tuple[bytes, float]]) -> CordaConvertError | None:
        """A process of which nothing was heard: rank 0 looks at all others, the others look at rank 0."""
        now = time.monotonic()
        for rank in range(1, self.place.size) if self.place.rank == 0 else (0,):
            beat = self._store.get(f"beat/{rank}") if self._has(f"beat/{rank}") else b""
            if last.get(rank, (None, 0.0))[0] != beat:
                last[rank] = (beat, now)
            elif now - last[rank][1] > SILENT_SECONDS and not self._has(f"gone/{rank}"):
                return _lost(f"Nothing was heard of rank {rank} for {SILENT_SECONDS} seconds.")
        return None


def _lost(what: str) -> RunStopped:
    return RunStopped(what, why="A process was killed, or its machine is gone.")


def threads_of_this_process(place: Place, threads: int) -> int:
    """The threads that a process may take: its part of the machine's, unless the user has said how many."""
    return threads if "OMP_NUM_THREADS" in os.environ else max(1, threads // place.local_size)
