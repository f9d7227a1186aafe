"""What is summed of one layer input over all samples: its covariance and its mean absolute values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from corda_convert.errors import NotFinite
from corda_convert.linalg.gram import (
    Spare,
    add_absolute,
    add_gram,
    add_group,
    is_exact_as_given,
    is_exact_in_bfloat16,
    symmetric,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.distributed import Ranks
    from corda_convert.linalg.threads import Team

Normalization = Literal["peft", "none"]
Precision = Literal["float32", "float64"]

LEAST_ROWS = 128
"""Samples of fewer tokens are multiplied together, divided by their largest entries before, rather than each by itself."""


@dataclass(slots=True)
class InputStatistics:
    """The sums for one input of `width` numbers.

    Products are added up in float32 over a group of samples, and groups in float64, so that neither the number of samples
    costs accuracy nor the number of processes changes the result. With `precision` float64 all is computed in it.

    Attributes:
        name: the module whose input it is.
        tokens: how many went in.
    """

    name: str
    width: int
    device: torch.device
    normalization: Normalization
    precision: Precision
    team: Team
    spare: Spare
    tokens: int = 0
    _group: Tensor = field(init=False)
    _total: Tensor = field(init=False)
    _absolute: Tensor = field(init=False)
    _is_group_empty: bool = field(init=False, default=True)
    _is_total_empty: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        import torch

        shape = (self.width, self.width)
        self._total = self.spare.take(shape, torch.float64, self.device)
        is_double = self.precision == "float64"
        self._group = self._total if is_double else self.spare.take(shape, torch.float32, self.device)
        self._absolute = torch.zeros(self.width, dtype=torch.float64, device=self.device)

    def add(self, inputs: Tensor, numbers: tuple[int, ...]) -> None:
        """Adds samples (samples, tokens, width), whose numbers are for messages. Raises `NotFinite`."""
        import torch

        if not inputs.numel():
            return
        peaks = self._peaks(inputs, numbers)
        self.tokens += inputs.shape[0] * inputs.shape[1]
        if self.precision == "float32" and is_exact_as_given(inputs):
            self._absolute += inputs.flatten(0, 1).abs().sum(dim=0, dtype=torch.float32)
            for sample, peak in zip(inputs, peaks, strict=True):
                self._add_gram(sample, peak**-2)
            return
        rows = self._converted(inputs)
        if self.precision == "float32" and inputs.shape[1] >= LEAST_ROWS and is_exact_in_bfloat16(inputs):
            for sample, peak in zip(rows, peaks, strict=True):
                self._add_gram(sample, peak**-2, are_bfloat16=True)
        elif self.normalization == "peft":
            self._add_gram((rows / rows.new_tensor(peaks).view(-1, 1, 1)).flatten(0, 1))
        else:
            self._add_gram(rows.flatten(0, 1))

    def _add_gram(self, rows: Tensor, factor: float = 1.0, *, are_bfloat16: bool = False) -> None:
        is_first = self._is_group_empty
        add_gram(self.team, self._group, rows, factor, are_bfloat16=are_bfloat16, is_first=is_first)
        self._is_group_empty = False

    def _converted(self, inputs: Tensor) -> Tensor:
        """The inputs in the dtype of the sums. Their absolute values are added on the way."""
        if inputs.dtype == self._group.dtype:
            add_absolute(self.team, self._absolute, inputs.flatten(0, 1))
            return inputs
        rows = self.spare.rows(tuple(inputs.shape), self._group.dtype, self.device)
        add_absolute(self.team, self._absolute, inputs.flatten(0, 1), rows.flatten(0, 1))
        return rows

    def end_group(self) -> None:
        """Adds the group's sum to the total."""
        if self._is_group_empty:
            return
        if self._group is not self._total:
            add_group(self.team, self._total, self._group, is_first=self._is_total_empty)
            self._is_group_empty = True
        self._is_total_empty = False

    def gather(self, ranks: Ranks) -> None:
        """Adds up the totals of all processes, in each of them."""
        self.tokens = sum(ranks.exchange(self.tokens))
        if self._is_total_empty:
            self._total.zero_()
        ranks.add_up(self._total)
        ranks.add_up(self._absolute)

    def covariance(self, samples: int) -> Tensor:
        """Float32 (width, width) on the CPU; with `normalization` peft the sum over the number of samples."""
        import torch

        from corda_convert.linalg.finite import is_finite

        divisor = samples if self.normalization == "peft" else 1
        cpu = torch.device("cpu")
        if self._total.device == cpu:
            upper = self._total
        else:
            self._total /= divisor
            upper, divisor = self._total.to(cpu, torch.float32), 1
        is_free = self._group is not self._total and self._group.device == cpu
        covariance = self._group if is_free else self.spare.take((self.width, self.width), torch.float32, cpu)
        symmetric(self.team, upper, covariance, divisor)
        self.spare.give(self._total)
        if not is_finite(covariance):
            raise NotFinite(
                f"The covariance of {self.name} leaves float32's range.",
                next_step="Divide samples by their largest entry with --normalize peft.",
            )
        return covariance

    def mean_abs(self) -> Tensor:
        """Float32 (width,) on the CPU."""
        return (self._absolute / max(self.tokens, 1)).float().cpu()

    def _peaks(self, inputs: Tensor, numbers: tuple[int, ...]) -> list[float]:
        """By what each sample is divided: PEFT takes the absolute value of the largest entry. A sample of zeros stays."""
        import math

        import torch

        peaks = []
        for number, sample in zip(numbers, inputs, strict=True):
            least, most = (float(bound) for bound in torch.aminmax(sample))  # a NaN shows in both
            if not (math.isfinite(least) and math.isfinite(most)):
                raise NotFinite(
                    f"The input of {self.name} holds NaN or Inf for sample {number}.",
                    why="The model is damaged, or its numbers leave the range of the dtype.",
                    next_step="Try --dtype float32, or bfloat16 instead of float16.",
                )
            if self.normalization == "peft" and most == 0.0 and least < 0.0:
                raise NotFinite(
                    f"The largest entry of the input of {self.name} is zero for sample {number}, and PEFT's normalization "
                    "divides by it.",
                    next_step="Collect with --normalize none.",
                )
            peaks.append(abs(most) if self.normalization == "peft" and most != 0.0 else 1.0)
        return peaks
