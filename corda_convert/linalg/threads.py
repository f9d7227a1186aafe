"""CPU threads: each works alone on a panel of a matrix, so that the bits of a result do not depend on how many there are.

torch's own threads divide one product among themselves by their number, and so round differently with each.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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


def take_threads(count: int) -> None:
    """So many of torch's threads for the thread that calls it.

    Asked for their number first: torch would else give it, when it first computes, what any thread had set last.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


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
        if self._size > 1:  # the thread that asks works, too
            self._pool = ThreadPoolExecutor(self._size - 1, "linalg", initializer=take_threads, initargs=(1,))
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
        """Calls it with each of the items, several at once. Raises what a call that failed raised."""
        if self._pool is None or len(items) < 2:
            for item in items:
                function(item)
            return
        left = deque(items)
        helpers = min(self._size, len(items)) - 1
        others = [self._pool.submit(_work_off, function, left) for _ in range(helpers)]
        try:
            _work_off(function, left)
        except BaseException:
            left.clear()
            raise
        finally:
            wait(others)
        for other in others:
            other.result()


def _work_off(function: Callable[[_T], object], left: deque[_T]) -> None:
    """Takes one item after the other until there is none: a thread that wakes up late finds less to do."""
    while True:
        try:
            item = left.popleft()
        except IndexError:
            return
        function(item)
