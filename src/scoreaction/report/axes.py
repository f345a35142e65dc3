"""Axes of figures without any global state, and their texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def plain_legend(axis: Axes, *entries: Any, **style: Any) -> None:
    """A legend without a frame whose texts are no formulas."""
    legend = axis.legend(*entries, frameon=False, **style)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_parse_math(False)
