"""Axes of figures without any global state, and their texts."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ["#1b6ca8", "#d1495b", "#2a9d5c", "#e39b1f", "#7b4ea3", "#4a4a4a", "#16a0a0", "#a8581b"]


def new_figure(
    panels: int = 1, columns: int | None = None, *, width: float = 4.6, height: float = 3.2
) -> tuple[Figure, list[Axes]]:
    """A figure without any global state, and the axes of its panels in reading order, by default all in one row."""
    from matplotlib.figure import Figure

    columns = columns or panels
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(panels)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def entitle(axis: Axes, text: str, **style: Any) -> None:
    """Sets a title that is shown letter by letter: a prompt with a $ is no formula."""
    printable = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    axis.set_title(printable, parse_math=False, **style)


def few_ticks(axis: Axes, which: str = "x") -> None:
    """At most five numbers along a linear axis, short ones (50 k, 2 M), so that they stand apart; of others only short."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    chosen = axis.xaxis if which == "x" else axis.yaxis
    if chosen.get_scale() == "linear":
        chosen.set_major_locator(MaxNLocator(nbins=5))
    chosen.set_major_formatter(EngFormatter(sep=" "))


def panels_of(figure: Figure, *, dpi: int) -> list[bytes]:
    """Each panel of a figure as a PNG of its own, which a page can put side by side or one below the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(dpi)
    canvas, parts = FigureCanvasAgg(figure), []
    canvas.draw()
    figure.set_layout_engine("none")  # the places that panels have together
    for axis in figure.axes:
        for other in figure.axes:
            other.set_visible(other is axis)
        canvas.draw()
        box, pixels = axis.get_tightbbox(canvas.get_renderer()), np.asarray(canvas.buffer_rgba())
        assert box is not None
        rows = slice(max(len(pixels) - int(box.y1) - PAD, 0), len(pixels) - int(box.y0) + PAD)
        buffer = io.BytesIO()
        Image.fromarray(pixels[rows, max(int(box.x0) - PAD, 0) : int(box.x1) + PAD]).convert("RGB").save(buffer, "PNG")
        parts.append(buffer.getvalue())
    return parts


PAD = 10
"""Pixels around a panel."""


def plain_legend(axis: Axes, *entries: Any, **style: Any) -> None:
    """A legend without a frame whose texts are no formulas."""
    legend = axis.legend(*entries, frameon=False, **style)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
