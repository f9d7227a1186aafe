"""Perplexity against the number of discarded components, as the CorDA paper's Figure 2 shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from corda_convert.plotting.pictures import STROKES, drawing, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class TruncationCurves:
    """What perplexity does on one text.

    Attributes:
        text: what it was measured on.
        whole: the model as it is; None where that was not measured.
        curves: by label, discarded components of each layer and the perplexity without them.
    """

    text: str
    whole: float | None
    curves: Mapping[str, Sequence[tuple[int, float]]]


def truncation_figure(panels: Sequence[TruncationCurves]) -> Figure:
    """A panel for each text, a curve for each method; an axis is logarithmic from a factor of 5 between its ends on."""
    from matplotlib.ticker import LogLocator, NullFormatter

    with drawing():
        figure, axes = new_figure(1, len(panels), width=1.0 + 3.8 * len(panels), height=3.6)
        labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
        strokes = {label: STROKES[place % len(STROKES)] for place, label in enumerate(labels)}
        for panel, ax in zip(panels, axes[0], strict=True):
            values = [value for points in panel.curves.values() for _, value in points]
            for label, points in panel.curves.items():
                stroke = strokes[label]
                ax.plot(
                    [discarded for discarded, _ in points],
                    [value for _, value in points],
                    color=stroke.color,
                    linestyle=stroke.dash,
                    marker=stroke.marker,
                    label=label,
                )
            if panel.whole is not None:
                values.append(panel.whole)
                ax.axhline(panel.whole, color="#555555", linewidth=1, label="nothing discarded")
            if max(values) > 5 * min(values):
                ax.set_yscale("log")
                ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
                ax.yaxis.set_major_formatter("{x:,.6g}")
                ax.yaxis.set_minor_formatter(NullFormatter())
            counts = sorted({discarded for points in panel.curves.values() for discarded, _ in points})
            if counts and counts[-1] > 5 * counts[0]:
                ax.set_xscale("log", base=2)
                ax.set_xticks(counts, [f"{count:,}" for count in counts])
                ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_title(panel.text)
            ax.set_xlabel("smallest components discarded in each layer")
        axes[0][0].set_ylabel("perplexity")
        handles = {
            label: handle for ax in axes[0] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        figure.legend(
            list(handles.values()), list(handles), loc="outside lower center", ncols=min(len(handles), 3 * len(panels))
        )
        return figure
