"""A transformers model run one block at a time, over all samples before the next block.

The model's own forward drives each block: the blocks before it hand on what they are given, its input is replaced by the
stored hidden states, and the forward ends behind it. So masks, position embeddings and flags are the model's own, whatever
kind of layer it is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from corda_convert.errors import CordaConvertError, NotFinite, UnsupportedInput
from corda_convert.streaming.architecture import Architecture
from corda_convert.streaming.blocks import Blocks, find_blocks
from corda_convert.streaming.hidden_states import HiddenStates, InMemory, OnDisk
from corda_convert.streaming.taps import InputTaps, Use
from corda_convert.streaming.threads import ModelThreads, noted_state
from corda_convert.streaming.weights import WeightSource, names_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of equal length that are run together, none of them padded.

    Attributes:
        numbers: the samples' places among all, for messages.
        input_ids: (samples, tokens).
    """

    numbers: tuple[int, ...]
    input_ids: Tensor

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


def make_batches(samples: Sequence[Sequence[int]], batch_tokens: int) -> list[Batch]:
    """Samples of equal length together, as many as have up to `batch_tokens` tokens (one sample at least)."""
    import torch

    of_length: dict[int, list[int]] = {}
    for number, sample in enumerate(samples):
        of_length.setdefault(len(sample), []).append(number)
    groups: list[list[int]] = []
    for length, numbers in of_length.items():
        count = max(1, batch_tokens // max(length, 1))
        groups += [numbers[begin : begin + count] for begin in range(0, len(numbers), count)]
    return [Batch(tuple(group), torch.tensor([list(samples[number]) for number in group])) for group in groups]


Form = tuple[bool, ...] | None
"""What a block gives: a tensor, or a tuple with the hidden states first; of its other members which are tensors."""


class _Reached(Exception):
    """The forward has come as far as it is wanted; `output` is what was computed there."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class _NeedsEmbedding(Exception):
    """A block takes more from the tokens than its hidden states."""


class LayerStream:
    """Runs the samples through the embedding, one block after the other, and the head.

    Only what is running is on the device: the embedding, or one block, or the head. Call `embed`, then `run_block` for
    each block in order, then `logits` where they are wanted. `close` ends it.

    Attributes:
        blocks: the model's blocks.
        batches: what is run.
        hidden_states: what stands between two blocks.
    """

    def __init__(
        self,
        architecture: Architecture,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        offload: Path | None = None,
        threads: ModelThreads | None = None,
    ) -> None:
        """`offload`: a folder where hidden states are kept instead of in host memory; `threads` run several batches at once.

        Raises `UnsupportedInput` where the blocks cannot be found, or the checkpoint lacks parameters of one.
        """
        model = architecture.model
        self.blocks: Blocks = find_blocks(model)
        self.batches = tuple(batches)
        self.hidden_states: HiddenStates = (
            InMemory() if offload is None else OnDisk(offload, [batch.tokens for batch in batches])
        )
        self._model = model
        self._device = device
        self._threads = threads or ModelThreads(device, 1)
        self._at_once = self._threads.at_once
        self._filling = threading.Lock()
        self._running = threading.local()
        self.weights = WeightSource(architecture, device)
        for index, block in enumerate(self.blocks.modules):
            self.weights.check(self.blocks.name(index), block)
        for level in (model.config, model.config.get_text_config()):
            level.use_cache = False
        self._next = -1
        self._forms: list[Form] = []
        self._is_embedding_needed = False
        self._embedding: Any = None
        self._handles = self._fill_on_use()

    def embed(self, after: Callable[[int, Tensor], None] | None = None) -> None:
        """Runs what stands before the first block. `after` gets each batch's place and the hidden states."""
        self._expect(-1)
        self._embedding = self._model.get_input_embeddings()
        self._fill_embedding()
        for place, batch in enumerate(self.batches):
            states = self._forward(batch, {0: _reached})
            self.hidden_states.put(place, states)
            if after is not None:
                after(place, states)
        self._replace_embedding()

    def run_block(
        self, index: int, after: Callable[[int, Tensor], None] | None = None, taps: InputTaps | None = None
    ) -> None:
        """Runs all batches through one block, whose number is that after the last one.

        `taps` see every batch, one after the other; `after` gets each batch's place and what the block gave. Raises
        `NotFinite` where that is NaN or Inf, and `UnsupportedInput` where the block cannot be run alone.
        """
        self._expect(index)
        block = self.blocks.modules[index]
        self.weights.fill_all(self.blocks.name(index), block)
        for places in self._waves():
            ran = self._run_wave(index, block, places, taps)
            for place in places:
                if ran is None:
                    with self._threads.share():
                        output = self._run(index, block, place)
                else:
                    output, uses = ran.pop(0)
                    if taps is not None:
                        taps.see_again(uses)
                    del uses
                self._check_finite(output, self.blocks.name(index), place)
                self.hidden_states.put(place, output)
                if after is not None:
                    after(place, output)
        self.weights.empty(block)

    def _waves(self) -> Iterator[list[int]]:
        """Places of batches that are run at once, all of one shape: some models keep tables for the length that runs."""
        wave: list[int] = []
        for place, batch in enumerate(self.batches):
            is_like = not wave or self.batches[wave[0]].input_ids.shape == batch.input_ids.shape
            if wave and (len(wave) == self._at_once or not is_like):
                yield wave
                wave = []
            wave.append(place)
        if wave:
            yield wave

    def _run_wave(
        self, index: int, block: Any, places: list[int], taps: InputTaps | None
    ) -> list[tuple[Tensor, list[Use]]] | None:
        """What the block gives for each of some batches that run at once, and the inputs to be seen.

        None where that does not go: one batch at a time, or a model that overwrites inputs of its modules or keeps a state.
        """
        if self._at_once == 1:
            return None

        def run(place: int) -> tuple[Tensor, list[Use]]:
            self._running.place = place
            if taps is None:
                return self._forward_of(self.batches[place]), []
            with taps.noting() as uses:
                return self._forward_of(self.batches[place]), uses

        call = partial(self._call, index, block)
        with self._replaced({index: lambda args, kwargs: call(self._running.place, args, kwargs)}):
            try:
                ran = self._run_at_once(run, places)
            except _NeedsEmbedding:
                self._is_embedding_needed = True
                self._restore_embedding()
                ran = self._run_at_once(run, places)
        if ran is not None and all(InputTaps.are_unchanged(uses) for _, uses in ran):
            return ran
        self._at_once = 1
        return None

    def _run_at_once(self, run: Callable[[int], _T], places: list[int]) -> list[_T] | None:
        """None where modules kept something of a batch meanwhile: then neither what they gave counts, nor that they failed."""
        with noted_state() as state:
            try:
                ran = self._threads.each(run, places)
            except _NeedsEmbedding:
                raise
            except Exception:  # a module outside the block may lack what another batch took away
                if not state:
                    raise
        return None if state else ran

    def logits(self, place: int) -> Tensor:
        """The model's output for a batch, after the last block: logits (samples, tokens, vocabulary), on the device.

        Of a model without a head, the last hidden states.
        """
        if self._next != len(self.blocks.modules):
            raise ValueError(f"block {self._next} comes next, not the head")
        batch = self.batches[place]
        states = self.hidden_states.take(place, self._device)
        last = len(self.blocks.modules) - 1
        with self._threads.share():
            output = self._forward(batch, {last: lambda *_: _in_form(states, self._forms[last])}, is_stopped=False)
        found = getattr(output, "logits", None)
        final: Tensor = found if found is not None else output[0]
        return final

    def close(self) -> None:
        """Lets go of hidden states and weights."""
        for handle in self._handles:
            handle.remove()
        self.hidden_states.close()

    def _expect(self, index: int) -> None:
        if index != self._next:
            raise ValueError(f"block {self._next} comes next, not {index}")
        self._next += 1

    def _run(self, index: int, block: Any, place: int) -> Tensor:
        """A batch through a block by itself, with the true embedding before it if the block turns out to need that."""
        call = partial(self._call, index, block, place)
        try:
            output: Tensor = self._forward(self.batches[place], {index: call})
        except _NeedsEmbedding:
            self._is_embedding_needed = True
            self._restore_embedding()
            output = self._forward(self.batches[place], {index: call})
        return output

    def _call(self, index: int, block: Any, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import torch

        states = self.hidden_states.take(place, self._device)
        if self._at_once > 1:
            states = states.clone()  # a block that overwrites them may have to run again
        others = (args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"})
        if place < self._threads.at_once and _holds_nan(others):
            if not self._is_embedding_needed:
                raise _NeedsEmbedding
            raise self._not_alone(index, "it takes more from the block before it than hidden states")
        given = (states, *args[1:]) if args else args
        named = {**kwargs, "hidden_states": states} if not args else kwargs
        try:
            output = type(block).forward(block, *given, **named)
        except (CordaConvertError, MemoryError):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":
                raise
            raise self._not_alone(index, (str(error) or repr(error)).splitlines()[0]) from error
        form = None if isinstance(output, torch.Tensor) else tuple(isinstance(one, torch.Tensor) for one in output[1:])
        with self._filling:
            if len(self._forms) == index:
                self._forms.append(form)
        raise _Reached(output if form is None else output[0])

    def _not_alone(self, index: int, reason: str) -> UnsupportedInput:
        return UnsupportedInput(
            f"{self.blocks.name(index)} cannot be run by itself: {reason}.",
            next_step="Run the model with --whole-model, which holds all of it in memory.",
        )

    def _forward(
        self,
        batch: Batch,
        calls: dict[int, Callable[[tuple[Any, ...], dict[str, Any]], Any]],
        *,
        is_stopped: bool = True,
    ) -> Any:
        """The model's forward with other calls in the place of some blocks; the others hand on what they are given."""
        with self._replaced(calls):
            return self._forward_of(batch, is_stopped=is_stopped)

    def _forward_of(self, batch: Batch, *, is_stopped: bool = True) -> Any:
        """The forward with the calls that are in the blocks' places."""
        import torch

        with torch.no_grad():
            try:
                output = self._model(input_ids=batch.input_ids.to(self._device))
            except _Reached as reached:
                return reached.output
        if is_stopped:
            raise UnsupportedInput(
                f"{type(self._model).__name__} does not run its blocks in their order.",
                next_step="Run it with --whole-model, which holds all of it in memory.",
            )
        return output

    @contextlib.contextmanager
    def _replaced(self, calls: dict[int, Callable[[tuple[Any, ...], dict[str, Any]], Any]]) -> Iterator[None]:
        try:
            for index, block in enumerate(self.blocks.modules):
                form = self._forms[index] if index < len(self._forms) else None
                block.forward = _stand_in(calls.get(index, partial(_hand_on, form)))
            yield
        finally:
            for block in self.blocks.modules:
                vars(block).pop("forward", None)

    def _fill_on_use(self) -> list[Any]:
        """Modules outside the blocks are loaded when they are first called."""
        inside = {id(part) for block in self.blocks.modules for part in block.modules()}
        names = names_of(self._model.named_modules())
        handles = []
        for module in self._model.modules():
            owns = any(True for _ in module.parameters(recurse=False)) or any(
                True for _ in module.buffers(recurse=False)
            )
            if id(module) not in inside and owns:
                fill = partial(self._fill, names[id(module)])
                handles.append(module.register_forward_pre_hook(fill))
        return handles

    def _fill(self, name: str, module: Any, _args: Any) -> None:
        with self._filling:
            self.weights.fill(name, module)

    def _replace_embedding(self) -> None:
        """Puts NaN in the embedding's place: what a block takes beside its hidden states shows whether it depends on it."""
        self._model.set_input_embeddings(_nan_embedding(self._embedding))
        self.weights.empty(self._embedding)

    def _restore_embedding(self) -> None:
        self._model.set_input_embeddings(self._embedding)
        self._fill_embedding()

    def _fill_embedding(self) -> None:
        """Before it is called: models send their inputs to the device where it is."""
        self.weights.fill(names_of(self._model.named_modules())[id(self._embedding)], self._embedding)

    def _check_finite(self, output: Tensor, name: str, place: int) -> None:
        from corda_convert.linalg.finite import is_finite

        if is_finite(output):
            return
        samples = self.batches[place].numbers
        row = next((row for row, states in enumerate(output) if not is_finite(states)), 0)
        raise NotFinite(
            f"{name} gives NaN or Inf for sample {samples[row]}.",
            why="The model is damaged, or its numbers leave the range of the dtype.",
            next_step="Try --dtype float32, or bfloat16 instead of float16.",
        )


def _reached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise _Reached(args[0] if args else kwargs["hidden_states"])


def _hand_on(form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _in_form(args[0] if args else kwargs["hidden_states"], form)


def _in_form(states: Tensor, form: Form) -> Any:
    """As a block gives them. Its other tensors are not known: NaN tells where one is used."""
    import torch

    if form is None:
        return states
    return states, *(torch.tensor(torch.nan) if is_tensor else None for is_tensor in form)


def _stand_in(call: Callable[[tuple[Any, ...], dict[str, Any]], Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: call(args, kwargs)


def _holds_nan(value: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(value.isnan().any())
    if isinstance(value, dict):
        return any(map(_holds_nan, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_holds_nan, value))


def _nan_embedding(embedding: Any) -> Any:
    import torch

    class NanEmbedding(torch.nn.Module):
        """Of the embedding's width and dtype."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty_like(embedding.weight[:1]), requires_grad=False)

        def forward(self, input_ids: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
            return self.weight.new_full((*input_ids.shape, self.weight.shape[-1]), torch.nan)

    return NanEmbedding()
