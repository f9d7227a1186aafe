"""The hidden states between two blocks, of all samples: in host memory, or in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class HiddenStates(Protocol):
    """One tensor (samples, tokens, width) for each batch."""

    def put(self, batch: int, states: Tensor) -> None:
        """Keeps a batch's states, in the place of those before."""
        ...

    def take(self, batch: int, device: torch.device) -> Tensor:
        """A batch's states on the device. The stored ones may be changed through it on no account."""
        ...

    def close(self) -> None: ...


class InMemory:
    """In host memory. What the CPU computes is kept as it is."""

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}

    def put(self, batch: int, states: Tensor) -> None:
        held = self._states.get(batch)
        if states.device.type == "cpu":
            self._states[batch] = states
        elif held is None:
            self._states[batch] = states.to("cpu")
        else:
            held.copy_(states)

    def take(self, batch: int, device: torch.device) -> Tensor:
        return self._states[batch].to(device)

    def close(self) -> None:
        self._states.clear()


class OnDisk:
    """In one file without a name in a folder, which is gone when it is closed, or the process ends."""

    def __init__(self, folder: Path, sizes: Sequence[int]) -> None:
        """`sizes` are the tokens of each batch."""
        import tempfile

        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by close()
        self._places: dict[int, int] = {}
        self._forms: dict[int, tuple[tuple[int, ...], torch.dtype]] = {}
        self._sizes = sizes

    def put(self, batch: int, states: Tensor) -> None:
        import os

        host = states.to("cpu").contiguous()
        row = host.shape[-1] * host.element_size()
        self._forms[batch] = tuple(host.shape), host.dtype
        view = _bytes(host)
        place, done = sum(self._sizes[:batch]) * row, 0
        self._places[batch] = place
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], place + done)

    def take(self, batch: int, device: torch.device) -> Tensor:
        import os

        import torch

        shape, dtype = self._forms[batch]
        states = torch.empty(shape, dtype=dtype)
        view, done = _bytes(states), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], self._places[batch] + done)
            if count == 0:
                raise OSError(f"the file of hidden states ends at byte {self._places[batch] + done}")
            done += count
        return states.to(device)

    def close(self) -> None:
        self._file.close()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    memory: Any = tensor.view(torch.uint8).numpy()
    return memoryview(memory).cast("B")
