"""Seeing what goes into modules while a model runs: each distinct input once, whoever reads it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from corda_convert.errors import UnsupportedInput

if TYPE_CHECKING:
    from torch import Tensor

Sink = Callable[[str, "Tensor"], None]
"""Takes a name and an input (…, width)."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """An input of the batch that runs; it is held, so that no other comes to lie at its address."""

    leader: str
    tensor: Tensor
    version: int

    def is_same(self, tensor: Tensor) -> bool:
        mine = self.tensor
        if mine is tensor:
            return mine._version == self.version
        return (
            mine.data_ptr() == tensor.data_ptr()
            and mine.numel() == tensor.numel()
            and mine.shape[-1] == tensor.shape[-1]
            and mine.is_contiguous() == tensor.is_contiguous()
            and tensor._version == self.version
        )


@dataclass(frozen=True, slots=True)
class Use:
    """A module's input, which was to be seen later, and what version of the tensor it was."""

    name: str
    tensor: Tensor
    version: int


class InputTaps:
    """Hooks on modules. An input that several read goes to the sink once, under the name of the first of them.

    The sink is called at once, or, for what runs in `noting`, in `see_again`.

    Attributes:
        leaders: each module that has run, and the module whose name its input has.
    """

    def __init__(self, modules: Mapping[str, Any], sink: Sink) -> None:
        self.leaders: dict[str, str] = {}
        self._sink = sink
        self._seen: list[_Seen] = []
        self._noted = threading.local()
        self._handles = [module.register_forward_pre_hook(partial(self._see, name)) for name, module in modules.items()]

    def end_batch(self) -> None:
        """Forgets the inputs of the batch that ran."""
        self._seen.clear()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._seen.clear()

    @contextmanager
    def noting(self) -> Iterator[list[Use]]:
        """Inputs that this thread's modules are given inside are noted, rather than seen."""
        uses: list[Use] = []
        self._noted.uses = uses
        try:
            yield uses
        finally:
            del self._noted.uses

    @staticmethod
    def are_unchanged(uses: Iterable[Use]) -> bool:
        """Whether no input was overwritten since it was noted."""
        return all(use.tensor._version == use.version for use in uses)

    def see_again(self, uses: Iterable[Use]) -> None:
        """Sees a batch's inputs that were noted, in the order of their use."""
        for use in uses:
            self._see_now(use.name, use.tensor)

    def _see(self, name: str, _module: Any, args: Sequence[Any]) -> None:
        tensor: Tensor = args[0]
        uses: list[Use] | None = getattr(self._noted, "uses", None)
        if uses is None:
            self._see_now(name, tensor)
        else:
            uses.append(Use(name, tensor, tensor._version))

    def _see_now(self, name: str, tensor: Tensor) -> None:
        known = next((seen.leader for seen in self._seen if seen.is_same(tensor)), None)
        leader = self.leaders.setdefault(name, known or name)
        if leader != (known or name):
            raise UnsupportedInput(
                f"{name} has not the same input as {leader} in every batch.",
                next_step="Collect it by itself: leave the other out with --exclude.",
            )
        if known is None:
            self._seen.append(_Seen(name, tensor, tensor._version))
            self._sink(name, tensor)


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """What the experts of one stack were multiplied with: the number of the expert, and its rows (n, d_in)."""

    stack: str
    expert: int
    rows: Tensor


def expert_taps(stacks: Mapping[str, Any], sink: Callable[[ExpertInputs], None]) -> Any:
    """A context in which every product with a matrix of a stack of experts is seen.

    `stacks` are the modules that own parameters (E, d1, d2), by the parameter's name; their weights may come later. It works
    for modules that multiply with one expert's matrix after the other, or with all in one batched product, which is what
    transformers' `eager` experts do.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    products = _products()

    class Taps(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Iterable[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func in products and len(args) >= 2 and isinstance(args[1], torch.Tensor):
                for name, module in stacks.items():
                    parameter = module._parameters[name.rpartition(".")[2]]
                    if parameter.untyped_storage().data_ptr() == args[1].untyped_storage().data_ptr():
                        for seen in _matched(name, parameter, args[0], args[1]):
                            sink(seen)
            return func(*args, **(kwargs or {}))

    return Taps()


def _matched(name: str, parameter: Tensor, inputs: Tensor, matrix: Tensor) -> list[ExpertInputs]:
    if matrix.ndim == 3:
        return [ExpertInputs(name, expert, inputs[expert]) for expert in range(parameter.shape[0])]
    size = parameter.shape[1] * parameter.shape[2]
    expert = (matrix.storage_offset() - parameter.storage_offset()) // size
    return [ExpertInputs(name, expert, inputs.reshape(-1, inputs.shape[-1]))]


def _products() -> frozenset[Any]:
    import torch

    tensor = torch.Tensor
    functions: list[Any] = [torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm]
    return frozenset([*functions, tensor.matmul, tensor.__matmul__, tensor.mm, tensor.bmm])
