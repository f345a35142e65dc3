"""Figures of tokens: sequences as rows of coloured cells, what changed between two of the same noise, and shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scoreaction.report.axes import COLOURS, entitle, new_figure, plain_legend

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[Any]

SEQUENCES, WRITTEN = 24, 32
"""Sequences of a panel at most, and the most positions whose tokens are written out."""


def is_tokens(samples: Array) -> bool:
    """True for sequences of tokens, integers (n, length)."""
    return samples.ndim == 2 and bool(np.issubdtype(samples.dtype, np.integer))


def changed(before: Array, after: Array) -> Array:
    """True at positions whose token is another after than before, (n, length).

    >>> changed(np.array([[0, 1]]), np.array([[0, 2]])).tolist()
    [[False, True]]
    """
    return before != after


def shares(samples: Array, vocabulary: int) -> Array:
    """The share of each token among all positions, (vocabulary,).

    >>> shares(np.array([[0, 1], [1, 1]]), 3).tolist()
    [0.25, 0.75, 0.0]
    """
    return np.bincount(samples.reshape(-1), minlength=vocabulary) / samples.size


def tokens_figure(panels: dict[str, Array], letters: str | None = None) -> Figure:
    """Sequences of each panel, framed where they differ from the first panel's, and the shares of tokens in all of them.

    letters: what stands for each token, by default its number.
    """
    vocabulary = 1 + max(int(samples.max(initial=0)) for samples in panels.values()) if letters is None else len(letters)
    names = letters or [str(token) for token in range(vocabulary)]
    first = next(iter(panels.values()))
    figure, axes = new_figure(len(panels) + 1, width=4.6, height=4.2)
    for axis, (title, samples) in zip(axes, panels.items(), strict=False):
        shown = samples[:SEQUENCES]
        axis.imshow(shown, cmap="tab20", vmin=0, vmax=max(19, vocabulary - 1), aspect="auto", interpolation="nearest")
        other = samples is not first and samples.shape == first.shape
        differs = changed(first[: len(shown)], shown) if other else np.zeros(shown.shape, dtype=bool)
        if shown.shape[1] <= WRITTEN:
            for row, column in np.ndindex(*shown.shape):
                weight = "bold" if differs[row, column] else "normal"
                axis.text(column, row, names[shown[row, column]], ha="center", va="center", fontsize=7, fontweight=weight)
        rows, columns = differs.nonzero()
        axis.plot(columns, rows, "s", markersize=9, markerfacecolor="none", markeredgecolor="black", markeredgewidth=1.0)
        axis.set(xlabel="position", ylabel="sequence")
        entitle(axis, f"{title}: {differs.mean():.0%} of positions changed" if other else title)
    width = 0.8 / len(panels)
    for i, (title, samples) in enumerate(panels.items()):
        places = np.arange(vocabulary) + (i - (len(panels) - 1) / 2) * width
        axes[-1].bar(places, shares(samples, vocabulary), width, color=COLOURS[i % len(COLOURS)], label=title)
    axes[-1].set(xlabel="token", ylabel="share of positions")
    if vocabulary <= WRITTEN:
        axes[-1].set_xticks(range(vocabulary), names)
    axes[-1].margins(y=0.2)  # for the legend
    plain_legend(axes[-1])
    return figure
