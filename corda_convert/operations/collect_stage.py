"""What is collected while one part of a model runs: sums for each distinct input, and who reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.errors import UnsupportedInput
from corda_convert.operations.collect_statistics import InputStatistics
from corda_convert.operations.experts_targets import OUTWARD
from corda_convert.streaming.taps import ExpertInputs, InputTaps, expert_taps

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.distributed import Ranks
    from corda_convert.linalg.gram import Spare
    from corda_convert.linalg.threads import Team
    from corda_convert.operations.collect_options import CollectOptions
    from corda_convert.streaming.stream import Batch


@dataclass(frozen=True, slots=True)
class StageResult:
    """What one part of the model gave.

    Attributes:
        tensors: matrices, and vectors with `.mean_abs`, by name.
        aliases: module → the module that its input is stored under.
        tokens: how many went into each matrix.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    tokens: dict[str, int]


class Stage:
    """The sums of one part of a model, while it runs."""

    def __init__(
        self,
        modules: Mapping[str, Any],
        stacks: Mapping[str, Any],
        *,
        options: CollectOptions,
        device: torch.device,
        batches: tuple[Batch, ...],
        group_ends: frozenset[int],
        team: Team,
        spare: Spare,
    ) -> None:
        """`modules` are the Linear layers, `stacks` the modules that hold each stack of experts, by the parameter's name.

        `group_ends` are the places of the batches after which groups end.
        """
        self._options = options
        self._device = device
        self._batches = batches
        self._group_ends = group_ends
        self._team = team
        self._spare = spare
        self._place = 0
        self._sums: dict[str, InputStatistics] = {}
        self._outward: dict[str, list[Tensor]] = {}
        self._stacks = stacks
        inward = {name: module for name, module in stacks.items() if name.rpartition(".")[2] not in OUTWARD}
        hooked = dict(modules)
        if options.experts == "shared":
            hooked |= {name.rpartition(".")[0]: module for name, module in inward.items()}
        self.taps = InputTaps(hooked, self._add)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Experts' products are seen inside."""
        with expert_taps(self._stacks, self._add_expert) if self._stacks else contextlib.nullcontext():
            yield

    def end_batch(self, place: int, _states: object = None) -> None:
        """A batch has run; the next one begins."""
        for name, rows in self._outward.items():
            import torch

            self._add(name, torch.cat(rows).unsqueeze(0))
        self._outward.clear()
        self.taps.end_batch()
        if place in self._group_ends:
            for sums in self._sums.values():
                sums.end_group()
        self._place = place + 1

    def finish(self, samples: int, ranks: Ranks) -> StageResult:
        """Adds up the sums of all processes. Removes the hooks. `samples` are those of all."""
        self.taps.remove()
        known = ranks.exchange((dict(self.taps.leaders), {name: sums.width for name, sums in self._sums.items()}))
        leaders = self._agreed([leaders for leaders, _ in known])
        widths = {name: width for _, found in known for name, width in found.items()}
        result = StageResult({}, {name: leader for name, leader in leaders.items() if name != leader}, {})
        for name, width in widths.items():
            sums = self._sums.pop(name, None) or self._new(name, width)
            sums.gather(ranks)
            if ranks.place.rank == 0:
                result.tensors[name] = sums.covariance(samples)
                result.tensors[f"{name}.mean_abs"] = sums.mean_abs()
            result.tokens[name] = sums.tokens
        return result

    @staticmethod
    def _agreed(found: list[dict[str, str]]) -> dict[str, str]:
        agreed: dict[str, str] = {}
        for leaders in found:
            for name, leader in leaders.items():
                if agreed.setdefault(name, leader) != leader:
                    raise UnsupportedInput(
                        f"{name} has not the same input as {leader} in every batch.",
                        next_step="Collect it by itself: leave the other out with --exclude.",
                    )
        return agreed

    def _add(self, name: str, inputs: Tensor) -> None:
        from corda_convert.linalg.threads import one_thread

        batch = self._batches[self._place]
        count = len(batch.numbers)
        width = inputs.shape[-1]
        if count > 1 and inputs.numel() != batch.tokens * width:
            raise UnsupportedInput(
                f"{name} has {inputs.numel() // width} rows for {count} samples of {batch.tokens // count} tokens.",
                next_step="Run each sample by itself: --batch-tokens 1.",
            )
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = self._new(name, width)
        with one_thread():  # the model may be running on several
            rows = inputs.detach().reshape(count, -1, width)
            sums.add(rows, batch.numbers, ends_group=self._place in self._group_ends)

    def _new(self, name: str, width: int) -> InputStatistics:
        options = self._options
        return InputStatistics(
            name, width, self._device, options.normalization, options.precision, self._team, self._spare
        )

    def _add_expert(self, seen: ExpertInputs) -> None:
        module, _, parameter = seen.stack.rpartition(".")
        is_outward = parameter in OUTWARD
        if self._options.experts == "each":
            self._add(f"{module}.{seen.expert}.{parameter}" if is_outward else f"{module}.{seen.expert}", seen.rows)
        elif is_outward:
            self._outward.setdefault(seen.stack, []).append(seen.rows)
