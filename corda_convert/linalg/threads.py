"""CPU threads: each works alone on a panel of a matrix, so that the bits of a result do not depend on how many there are.

torch's own threads divide one product among themselves by their number, and so round differently with each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

_T = TypeVar("_T")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread for what is done inside: for small problems several would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Team:
    """As many threads as torch would take on a CPU, one on another device. Used in a with statement.

    Inside it torch itself takes one thread.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cpu = device.type == "cpu"
        self._size = torch.get_num_threads() if self.is_cpu else 1
        self._stack = contextlib.ExitStack()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Team:
        self._stack.enter_context(one_thread())
        if self._size > 1:
            self._pool = ThreadPoolExecutor(self._size, "linalg", initializer=torch.set_num_threads, initargs=(1,))
            self._stack.enter_context(self._pool)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def each(self, function: Callable[[slice], object], count: int, step: int) -> None:
        """Calls it with slices of `step` that cover `count`, several at once; on another device with one slice."""
        if not self.is_cpu:
            step = max(count, 1)
        self.all(function, [slice(begin, min(begin + step, count)) for begin in range(0, count, step)])

    def all(self, function: Callable[[_T], object], items: Sequence[_T]) -> None:
        """Calls it with each of the items, several at once. Raises what the first call that failed raised."""
        if self._pool is None or len(items) < 2:
            for item in items:
                function(item)
            return
        for future in [self._pool.submit(function, item) for item in items]:
            future.result()
