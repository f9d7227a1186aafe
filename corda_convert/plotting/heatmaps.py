"""Covariances side by side, as the CorDA paper's Figure 4 shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from corda_convert.plotting.pictures import SEQUENTIAL, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECADES = 4.0
"""The colours span so many powers of ten below the largest value at most; what is smaller has the darkest."""


@dataclass(frozen=True, slots=True)
class Heatmap:
    """A covariance in cells.

    Attributes:
        values: rows of cells; each the mean of |C| over the cell, relative to the mean of C's diagonal.
        side: d_in, the side of C.
    """

    values: Sequence[Sequence[float]]
    side: int


def covariances_figure(rows: Sequence[tuple[str, Sequence[Heatmap]]], columns: Sequence[str]) -> Figure:
    """A row for each layer, a column for each file, all in the same colours on a scale of logarithms.

    `rows` are names of layers with a heatmap for each of `columns`. Outliers stand out as bright lines: an input that is
    large crosses all others.
    """
    from matplotlib.colors import LogNorm

    with drawing():
        width, height = 1.6 + 2.5 * len(columns), 0.9 + 2.35 * len(rows)
        figure, axes = new_figure(len(rows), len(columns), width=width, height=height)
        low, high = _limits([heatmap for _, heatmaps in rows for heatmap in heatmaps])
        image: Any = None
        for (layer, heatmaps), in_row in zip(rows, axes, strict=True):
            for place, (heatmap, ax) in enumerate(zip(heatmaps, in_row, strict=True)):
                image = ax.imshow(
                    [[max(value, low) for value in row] for row in heatmap.values],
                    norm=LogNorm(low, high),
                    cmap=SEQUENTIAL,
                    extent=(0, heatmap.side, heatmap.side, 0),
                    interpolation="nearest",
                )
                ax.grid(visible=False)
                ax.set_xticks([0, heatmap.side // 2, heatmap.side])
                ax.set_yticks([0, heatmap.side // 2, heatmap.side])
                ax.set_title(f"{columns[place]}\n{layer}", fontsize=8)
                ax.set_ylabel("input" if place == 0 else "")
                ax.set_xlabel("input" if ax in axes[-1] else "")
        bar = figure.colorbar(image, ax=[ax for row in axes for ax in row], shrink=0.9, aspect=30)
        bar.set_label("mean |C| of a cell / mean of C's diagonal")
        return figure


def _limits(heatmaps: Sequence[Heatmap]) -> tuple[float, float]:
    """The scale's ends: from the smallest positive value, but no more than `DECADES` below the largest."""
    values = [value for heatmap in heatmaps for row in heatmap.values for value in row if value > 0]
    high = max(values, default=1.0)
    low = max(min(values, default=0.1), high / 10**DECADES)
    return (low, high) if low < high else (high / 10, high)
