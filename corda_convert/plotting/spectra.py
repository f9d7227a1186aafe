"""Singular values of layers, and which of them an adapter would take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

from corda_convert.plotting.pictures import STROKES, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST = 1e-12
"""Values below this times the largest are drawn at it: they are rounding."""

MOST_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """`rank` singular values at one end: `ipm` the largest, `kpm` the smallest."""

    rank: int
    mode: Literal["ipm", "kpm"]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """A layer's singular values by method, each in falling order."""

    layer: str
    shape: tuple[int, int]
    values: Mapping[str, Sequence[float]]


def layout_of(count: int) -> tuple[int, int, float, float]:
    """Rows, columns, width and height in inches of a figure with `count` panels."""
    columns = min(MOST_COLUMNS, count)
    rows = ceil(count / columns)
    return rows, columns, 1.2 + 3.1 * columns, 0.8 + 2.3 * rows


def spectra_figure(spectra: Sequence[Spectrum], cut: Cut | None) -> Figure:
    """A panel for each layer, a curve for each method, relative to its largest value; what is taken is shaded."""
    with drawing():
        rows, columns, width, height = layout_of(len(spectra))
        figure, axes = new_figure(rows, columns, width=width, height=height)
        places = [ax for row in axes for ax in row]
        for spectrum, ax in zip(spectra, places, strict=False):
            _draw(ax, spectrum, cut)
        for ax in places[len(spectra) :]:
            ax.set_visible(False)
        for number, ax in enumerate(places[: len(spectra)]):
            if number % columns == 0:
                ax.set_ylabel("singular value / largest")
            if number + columns >= len(spectra):
                ax.set_xlabel("component, from the largest")
        handles, labels = places[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 2 * columns))
        return figure


def _draw(ax: Axes, spectrum: Spectrum, cut: Cut | None) -> None:
    count = min(spectrum.shape)
    for stroke, (method, values) in zip(STROKES, spectrum.values.items(), strict=False):
        largest = max(values)
        relative = [max(value / largest, SMALLEST) if largest > 0 else SMALLEST for value in values]
        ax.plot(
            range(1, count + 1),
            relative,
            color=stroke.color,
            linestyle=stroke.dash,
            marker=stroke.marker,
            markevery=(0.04, 0.16),
            label=method,
        )
    if cut is not None:
        first, last = (0.5, cut.rank + 0.5) if cut.mode == "ipm" else (count - cut.rank + 0.5, count + 0.5)
        ax.axvspan(first, last, color="#999999", alpha=0.3, linewidth=0, label=f"taken: {cut.mode}, rank {cut.rank}")
    ax.set_yscale("log")
    ax.set_xlim(0.5, count + 0.5)
    ax.set_title(f"{spectrum.layer}  {spectrum.shape[0]}×{spectrum.shape[1]}", fontsize=8)
