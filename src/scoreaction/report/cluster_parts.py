"""The clusters that a run's samples fall into: a sentence, a table and a histogram, base beside tuned."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from scoreaction.report.axes import COLOURS, entitle, new_figure, plain_legend
from scoreaction.report.numbers import number
from scoreaction.report.parts import Grid
from scoreaction.types import Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 20
"""Clusters in the table at most."""


def effective(entropy: float) -> float:
    """Effective number of clusters, `exp(H)`, H in nats.

    >>> round(effective(1.386294), 4)
    4.0
    """
    return math.exp(entropy)


def clusters_sentence(summary: Values) -> str:
    """The effective number of clusters before and after, and of the optimum where it is known.

    >>> clusters_sentence({"clusters": [0, 1, 2, 3], "cluster_entropy_base": 1.386294, "cluster_entropy_tuned": 0.693147})
    'Of 4 clusters its samples fill 2 in effect (0.693 nats), 4 before (1.39 nats).'
    """
    tuned, base = (summary[f"cluster_entropy_{kind}"] for kind in ("tuned", "base"))
    own, before = (f"{number(effective(value), 3)}" for value in (tuned, base))
    optimum = summary.get("optimum_cluster_entropy")
    best = "" if optimum is None else f"; the optimum fills {number(effective(optimum), 3)}"
    return (
        f"Of {len(summary['clusters'])} clusters its samples fill {own} in effect ({number(tuned, 3)} nats), {before} before"
        f" ({number(base, 3)} nats){best}."
    )


def clusters_table(summary: Values) -> Grid:
    """The share of each cluster, those that changed most first."""
    clusters = sorted(summary["clusters"], key=lambda row: -abs(row["share_tuned"] - row["share_base"]))
    caption = "Share of the samples in each cluster, the one that changed most first."
    if len(clusters) > SHOWN:
        caption = f"Share of the samples in the {SHOWN} of {len(clusters)} clusters that changed most."
    rows = [[str(row["cluster"]), number(row["share_base"], 3), number(row["share_tuned"], 3)] for row in clusters[:SHOWN]]
    return Grid("Clusters", caption, ["cluster", "base", "tuned"], rows)


def clusters_figure(clusters: list[Values]) -> Figure:
    """Histogram of the shares, base beside tuned."""
    figure, (axis,) = new_figure(1, width=6.0, height=3.6)
    for i, kind in enumerate(("base", "tuned")):
        places = np.arange(len(clusters)) + (i - 0.5) * 0.4
        axis.bar(places, [row[f"share_{kind}"] for row in clusters], 0.4, color=COLOURS[i], label=kind)
    axis.set(xlabel="cluster", ylabel="share of samples")
    axis.margins(y=0.2)  # for the legend
    entitle(axis, "clusters")
    plain_legend(axis)
    return figure
