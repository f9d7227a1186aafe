"""What is summed of one layer input over all samples: its covariance and its mean absolute values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from corda_convert.errors import NotFinite
from corda_convert.linalg.gram import (
    Workers,
    add_absolute,
    add_gram,
    is_exact_as_given,
    is_exact_in_bfloat16,
    mirror,
    panels,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from corda_convert.distributed import Ranks

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
    workers: Workers
    tokens: int = 0
    _group: Tensor = field(init=False)
    _total: Tensor = field(init=False)
    _absolute: Tensor = field(init=False)

    def __post_init__(self) -> None:
        import torch

        shape = (self.width, self.width)
        self._total = torch.zeros(shape, dtype=torch.float64, device=self.device)
        is_double = self.precision == "float64"
        self._group = self._total if is_double else torch.zeros(shape, dtype=torch.float32, device=self.device)
        self._absolute = torch.zeros(self.width, dtype=torch.float64, device=self.device)

    def add(self, inputs: Tensor, numbers: tuple[int, ...]) -> None:
        """Adds samples (samples, tokens, width), whose numbers are for messages. Raises `NotFinite`."""
        if not inputs.numel():
            return
        peaks = self._peaks(inputs, numbers)
        self.tokens += inputs.shape[0] * inputs.shape[1]
        if self.precision == "float32" and is_exact_as_given(inputs):
            self._add_absolute(inputs)
            for sample, peak in zip(inputs, peaks, strict=True):
                add_gram(self.workers, self._group, sample, peak**-2)
            return
        rows = inputs.to(self._group.dtype)
        self._add_absolute(rows)
        if self.precision == "float32" and inputs.shape[1] >= LEAST_ROWS and is_exact_in_bfloat16(inputs):
            for sample, peak in zip(rows, peaks, strict=True):
                add_gram(self.workers, self._group, sample, peak**-2, are_bfloat16=True)
            return
        if self.normalization == "peft":
            rows = rows / rows.new_tensor(peaks).view(-1, 1, 1)
        add_gram(self.workers, self._group, rows.flatten(0, 1))

    def _add_absolute(self, inputs: Tensor) -> None:
        import torch

        rows = inputs.flatten(0, 1)
        if rows.dtype == self._group.dtype:
            add_absolute(self.workers, self._absolute, rows)
        else:
            self._absolute += rows.abs().sum(dim=0, dtype=torch.float32)

    def end_group(self) -> None:
        """Adds the group's sum to the total."""
        if self._group is not self._total:
            for begin, end in panels(self.width):
                self._total[:end, begin:end] += self._group[:end, begin:end]
            self._group.zero_()

    def gather(self, ranks: Ranks) -> None:
        """Adds up the totals of all processes, in each of them."""
        self.tokens = sum(ranks.exchange(self.tokens))
        ranks.add_up(self._total)
        ranks.add_up(self._absolute)

    def covariance(self, samples: int) -> Tensor:
        """Float32 (width, width) on the CPU; with `normalization` peft the sum over the number of samples."""
        import torch

        if self.normalization == "peft":
            self._total /= samples
        covariance = self._total.to("cpu", torch.float32)
        mirror(covariance)
        if not bool(torch.isfinite(covariance).all()):
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
