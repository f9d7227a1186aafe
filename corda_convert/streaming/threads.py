"""Several batches at once on a CPU, each on few of torch's threads: two that work together mostly wait for each other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")

AT_ONCE = 4
"""The most batches that run at once: each takes memory."""


def batches_at_once(device: torch.device, batches: int) -> int:
    """As many as torch has threads, up to `AT_ONCE`; 1 on another device than a CPU."""
    import torch

    return max(1, min(AT_ONCE, torch.get_num_threads(), batches)) if device.type == "cpu" else 1


class ModelThreads:
    """Runs several of so many batches at once, among which torch's threads are shared. Used in a with statement.

    Attributes:
        at_once: how many.
    """

    def __init__(self, device: torch.device, batches: int) -> None:
        import torch

        self.at_once = batches_at_once(device, batches)
        self._each = torch.get_num_threads() // self.at_once
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> ModelThreads:
        from corda_convert.linalg.threads import take_threads

        if self.at_once > 1:
            self._pool = ThreadPoolExecutor(self.at_once, "model", initializer=take_threads, initargs=(self._each,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    @contextlib.contextmanager
    def share(self) -> Iterator[None]:
        """As many of torch's threads as each batch has, for one that the caller runs inside: its bits depend on them."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._each)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def each(self, function: Callable[[int], _T], places: Sequence[int]) -> list[_T]:
        """What it gives for each, several at once. Waits for all. Raises what the first that failed raised."""
        if self._pool is None:
            with self.share():
                return [function(place) for place in places]
        futures = [self._pool.submit(function, place) for place in places]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


@contextlib.contextmanager
def noted_state() -> Iterator[list[str]]:
    """Attributes and buffers that modules are given inside, by whatever thread.

    A model that keeps in its modules what belongs to the batch that runs cannot run two at once: one would read what the
    other wrote.
    """
    import torch

    names: list[str] = []
    module: Any = torch.nn.Module
    before = {name: getattr(module, name) for name in ("__setattr__", "__delattr__", "register_buffer")}

    def noting(change: Callable[..., None]) -> Callable[..., None]:
        def note(self: Any, name: str, *values: Any, **options: Any) -> None:
            names.append(f"{type(self).__name__}.{name}")
            change(self, name, *values, **options)

        return note

    for name, change in before.items():
        setattr(module, name, noting(change))
    try:
        yield names
    finally:
        for name, change in before.items():
            setattr(module, name, change)
