"""Figures that look the same everywhere, and files with the same bytes for the same numbers."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corda_convert.errors import CordaConvertError, OutputRefused, UnsupportedInput, raise_problems

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg")

DOTS_PER_INCH = 150

MOST_PIXELS = 1 << 16

SEQUENTIAL = "cividis"
"""Read alike with and without red-green blindness, and in grey."""


@dataclass(frozen=True, slots=True)
class Stroke:
    """How a curve is drawn, so that it is told from others by more than its colour."""

    color: str
    marker: str
    dash: str | tuple[int, tuple[int, ...]]


STROKES = (
    Stroke("#0072B2", "o", "-"),
    Stroke("#D55E00", "s", "--"),
    Stroke("#009E73", "^", "-."),
    Stroke("#CC79A7", "D", ":"),
    Stroke("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    Stroke("#56B4E9", "P", "-"),
    Stroke("#000000", "X", "--"),
)
"""Okabe and Ito's colours (Color Universal Design, 2008), but for yellow, which is faint on white."""


def check_outputs(outputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raises, all together, `UnsupportedInput` for unknown endings or without matplotlib, `OutputRefused` for what is there."""
    problems: list[CordaConvertError] = []
    if not outputs:
        problems.append(UnsupportedInput("No file to draw into is given.", next_step="Name one: -o picture.png"))
    for output in outputs:
        if output.is_dir():
            problems.append(OutputRefused(f"{output} is a folder.", next_step="Name a file: -o picture.png"))
        elif output.suffix.lower() not in FORMATS:
            problems.append(
                UnsupportedInput(
                    f"{output} has neither the ending .png nor .svg.", next_step="Its ending chooses the format."
                )
            )
        elif output.exists() and not overwrite:
            problems.append(
                OutputRefused(f"{output} is there already.", next_step="Choose another name, or give --overwrite.")
            )
        elif not output.parent.is_dir():
            problems.append(OutputRefused(f"There is no folder {output.parent} for {output.name}."))
        elif not os.access(output.parent, os.W_OK):
            problems.append(OutputRefused(f"{output} cannot be written: {output.parent} is read-only for you."))
    problems += _missing_library()
    raise_problems(problems)


def _missing_library() -> list[CordaConvertError]:
    from importlib.util import find_spec

    try:
        is_there = find_spec("matplotlib") is not None
    except ValueError:  # an entry of sys.modules that is no module
        is_there = False
    missing = UnsupportedInput("matplotlib is not installed.", next_step="Install it with: pip install matplotlib")
    return [] if is_there else [missing]


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's settings are."""
    import matplotlib as mpl
    from matplotlib import style

    ours: dict[Any, Any] = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "axes.grid": True,
        "axes.grid.which": "major",
        "grid.alpha": 0.3,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 4,
        "lines.linewidth": 1.5,
        "legend.frameon": False,
        "svg.hashsalt": "corda-convert",
        "svg.fonttype": "none",
    }
    with style.context("default"), mpl.rc_context(ours):
        yield


def check_size(width: float, height: float) -> None:
    """Raises `UnsupportedInput` for a picture, in inches, of more pixels on a side than matplotlib draws."""
    if max(width, height) * DOTS_PER_INCH >= MOST_PIXELS:
        raise UnsupportedInput(
            f"The picture would have {width * DOTS_PER_INCH:,.0f} × {height * DOTS_PER_INCH:,.0f} pixels; "
            f"{MOST_PIXELS:,} on a side are the limit.",
            next_step="Choose fewer layers with --layer, or fewer files.",
        )


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` × `columns` axes, `width` × `height` inches in all, and its axes by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_size(width, height)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(row) for row in axes]


def save(figure: Figure, outputs: Sequence[Path]) -> None:
    """Writes the figure to each file, in the format of its ending; each is there whole or not at all.

    Raises `OutputRefused` where it cannot be written.
    """
    for output in outputs:
        kind = output.suffix.lower().removeprefix(".")
        content = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None, "Creator": "corda-convert"} if kind == "svg" else {"Software": None}
        with drawing():
            figure.savefig(content, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)
        part = output.with_name(f".{output.name}.part")
        try:
            part.write_bytes(content.getvalue())
            part.replace(output)
        except OSError as error:
            raise OutputRefused(f"{output} cannot be written: {error.strerror or error}.") from None
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
