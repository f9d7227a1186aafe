"""What is summed of one layer input over all samples: its covariance and its mean absolute values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from corda_convert.errors import NotFinite
from corda_convert.linalg.bfloat16_gram import add_gram_of_columns, columns_of, is_exact_in_bfloat16
from corda_convert.linalg.gram import Spare, add_absolute, add_gram, add_group, is_exact_as_given, symmetric

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
    _group: Tensor | None = field(init=False, default=None)
    _total: Tensor = field(init=False)
    _absolute: Tensor = field(init=False)
    _is_group_empty: bool = field(init=False, default=True)
    _is_total_empty: bool = field(init=False, default=True)

    def __post_init__(self) -> None:
        import torch

        shape = (self.width, self.width)
        self._total = self.spare.take(shape, torch.float64, self.device)
        self._absolute = torch.zeros(self.width, dtype=torch.float64, device=self.device)

    def add(self, inputs: Tensor, numbers: tuple[int, ...], *, ends_group: bool = False) -> None:
        """Adds samples (samples, tokens, width), whose numbers are for messages. Raises `NotFinite`.

        `ends_group` says that the group has no more of them: `end_group` then finds its sum added already, where that is
        faster.
        """
        import torch

        if not inputs.numel():
            return
        self.tokens += inputs.shape[0] * inputs.shape[1]
        if self.precision == "float32" and inputs.shape[1] >= LEAST_ROWS and is_exact_in_bfloat16(inputs):
            for place, (number, sample) in enumerate(zip(numbers, inputs, strict=True)):
                self._add_bfloat16(sample, number, ends_group=ends_group and place == len(inputs) - 1)
            return
        peaks = self._peaks(inputs, numbers)
        if self.precision == "float32" and is_exact_as_given(inputs):
            self._absolute += inputs.flatten(0, 1).abs().sum(dim=0, dtype=torch.float32)
            for sample, peak in zip(inputs, peaks, strict=True):
                self._add_gram(sample, peak**-2)
            return
        rows = self._converted(inputs)
        if self.normalization == "peft":
            self._add_gram((rows / rows.new_tensor(peaks).view(-1, 1, 1)).flatten(0, 1))
        else:
            self._add_gram(rows.flatten(0, 1))

    def _add_bfloat16(self, sample: Tensor, number: int, *, ends_group: bool) -> None:
        import torch

        tokens, width = sample.shape
        columns = columns_of(self.team, sample, self.spare.rows((width, tokens), torch.float32, self.device))
        peak = self._peak(number, columns.least, columns.most)
        self._absolute += columns.absolute
        is_first = self._is_group_empty
        add_gram_of_columns(
            self.team,
            columns,
            peak**-2,
            group=None if ends_group and is_first else self._sum_of_group(),
            is_first=is_first,
            total=self._total if ends_group else None,
            is_total_first=self._is_total_empty,
        )
        self._is_group_empty = ends_group
        self._is_total_empty = self._is_total_empty and not ends_group

    def _add_gram(self, rows: Tensor, factor: float = 1.0) -> None:
        add_gram(self.team, self._sum_of_group(), rows, factor, is_first=self._is_group_empty)
        self._is_group_empty = False

    def _sum_of_group(self) -> Tensor:
        """(width, width), with undefined values at first."""
        import torch

        if self._group is None:
            is_double = self.precision == "float64"
            shape = (self.width, self.width)
            self._group = self._total if is_double else self.spare.take(shape, torch.float32, self.device)
        return self._group

    def _converted(self, inputs: Tensor) -> Tensor:
        """The inputs in the dtype of the sums. Their absolute values are added on the way."""
        if inputs.dtype == self._dtype():
            add_absolute(self.team, self._absolute, inputs.flatten(0, 1))
            return inputs
        rows = self.spare.rows(tuple(inputs.shape), self._dtype(), self.device)
        add_absolute(self.team, self._absolute, inputs.flatten(0, 1), rows.flatten(0, 1))
        return rows

    def _dtype(self) -> torch.dtype:
        """That of the products."""
        import torch

        return torch.float64 if self.precision == "float64" else torch.float32

    def end_group(self) -> None:
        """Adds the group's sum to the total."""
        if self._is_group_empty:
            return
        if (group := self._sum_of_group()) is not self._total:
            add_group(self.team, self._total, group, is_first=self._is_total_empty)
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
        group = self._group
        if group is None or group is self._total or group.device != cpu:
            group = self.spare.take((self.width, self.width), torch.float32, cpu)
        covariance = group
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
        import torch

        peaks = []
        for number, sample in zip(numbers, inputs, strict=True):
            least, most = (float(bound) for bound in torch.aminmax(sample))
            peaks.append(self._peak(number, least, most))
        return peaks

    def _peak(self, number: int, least: float, most: float) -> float:
        """The same of one sample, by the bounds of its entries: a NaN shows in both."""
        import math

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
        return abs(most) if self.normalization == "peft" and most != 0.0 else 1.0
