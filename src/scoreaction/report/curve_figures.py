"""Figures of runs: curves of one, and comparisons with bands of one standard error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scoreaction.report.axes import COLOURS, entitle, few_ticks, new_figure, plain_legend
from scoreaction.training.run_folder import read_json_lines
from scoreaction.types import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[Any]

TITLES = {
    "reward_mean": "reward",
    "kl_nats": "KL to the pretrained model (nats)",
    "diversity": "diversity",
}
EVALUATIONS = "model evaluations"
OPTIMA = {"reward_mean": "reward", "kl_nats": "kl_nats"}
"""The metrics whose value at the optimum a summary may have, and its name there."""


def curve_keys(records: Sequence[Values]) -> list[str]:
    """Metrics that have a curve: reward, KL, diversity and the held-out rewards."""
    present = dict.fromkeys(key for record in records for key in record)
    return [key for key in ("reward_mean", "kl_nats", "diversity") if key in present] + [
        key for key in present if key.startswith("held_out.")
    ]


def title_of(key: str) -> str:
    """Title of a metric in a figure."""
    return TITLES.get(key, key.removeprefix("held_out.") + " (only measured)" if key.startswith("held_out.") else key)


def _series(records: Sequence[Values], x: str, y: str) -> tuple[Array, Array]:
    kept = [record for record in records if isinstance(record.get(y), int | float) and isinstance(record.get(x), int | float)]
    return np.array([record[x] for record in kept], dtype=float), np.array([record[y] for record in kept], dtype=float)


def run_figure(records: Sequence[Values], summary: Values | None) -> Figure:
    """A run's curves against model evaluations; the optimum's reward and KL as dashed lines where they are known."""
    keys = curve_keys(records)
    columns = 3 if len(keys) == 3 else min(2, len(keys))
    figure, axes = new_figure(len(keys), columns, width=9.2 / columns)
    for axis, key in zip(axes, keys, strict=True):
        online = key == "reward_mean" and "oracle_mean" in records[0]
        label = "by the proxy" if online else None
        axis.plot(*_series(records, "model_evaluations", key), color=COLOURS[0], linewidth=1.4, label=label)
        if online:  # a round's queries are of the policy that the round began with
            rounds = [now for now, last in zip(records, [{}, *records], strict=False) if now["round"] != last.get("round")]
            axis.plot(
                *_series(rounds, "model_evaluations", "oracle_mean"), "o", color=COLOURS[3], label="by the oracle, a round"
            )
            plain_legend(axis)
        optimum = (summary or {}).get(f"optimum_{OPTIMA.get(key)}")
        if optimum is not None:
            axis.axhline(optimum, color="#d1495b", linestyle="--", linewidth=1.2, label="optimum")
            plain_legend(axis)
        entitle(axis, title_of(key))
        axis.set(xlabel=EVALUATIONS)
        few_ticks(axis)
    return figure


def band(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """x, mean and standard error of curves, each interpolated onto the range that all of them cover.

    >>> x = np.array([0.0, 1.0])
    >>> [part.tolist() for part in band([(x, x), (x, x + 2)])][1][::199]
    [1.0, 2.0]
    """
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.linspace(low, high, 200)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros_like(grid)
    return grid, values.mean(0), error


def comparison_figures(comparison: Values, folder: Path) -> dict[str, Figure]:
    """By file name: each metric against model evaluations, reward against seconds, and reward against KL."""
    records = {
        group["label"]: [
            read_json_lines(folder / record["folder"] / "metrics.jsonl")
            for record in comparison["runs"]
            if record["label"] == group["label"]
        ]
        for group in comparison["groups"]
    }
    first = next(iter(records.values()))[0]
    means = [group["mean"] for group in comparison["groups"] if "optimum_reward" in group["mean"]]
    known = {key: [mean[f"optimum_{name}"] for mean in means] for key, name in OPTIMA.items()}
    figures = {}
    for key in curve_keys(first):
        name = {"reward_mean": "reward", "kl_nats": "kl"}.get(key, key.removeprefix("held_out."))
        figures[name] = _bands(records, "model_evaluations", key, EVALUATIONS, optima=known.get(key, []))
    figures["reward_seconds"] = _bands(records, "seconds", "reward_mean", "seconds of training", optima=known["reward_mean"])
    figures["reward_kl"] = _frontier(comparison, records)
    return figures


def _bands(records: dict[str, list[list[Values]]], x: str, y: str, xlabel: str, *, optima: Sequence[float] = ()) -> Figure:
    figure, (axis,) = new_figure()
    for colour, (label, runs) in zip(COLOURS * 9, records.items(), strict=False):
        curves = [curve for curve in (_series(run, x, y) for run in runs) if len(curve[0])]
        if curves:
            grid, mean, error = band(curves)
            axis.plot(grid, mean, color=colour, label=label, linewidth=1.4)
            axis.fill_between(grid, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
    axis.set(ylabel=title_of(y), xlabel=xlabel)
    if y == "kl_nats":
        ends = [run[-1].get(y) for runs in records.values() for run in runs if run]
        squeeze(axis, "y", [end for end in ends if end is not None])
    for optimum in sorted(set(optima)):
        axis.axhline(optimum, color="black", linestyle="--", linewidth=1.0, label="optimum")
    few_ticks(axis)
    legend_once(axis)
    return figure


def _frontier(comparison: Values, records: dict[str, list[list[Values]]]) -> Figure:
    """The way each algorithm took through reward and KL, and where it ended."""
    figure, (axis,) = new_figure()
    for colour, group in zip(COLOURS * 9, comparison["groups"], strict=False):
        for run in records[group["label"]]:
            kl, reward = _series(run, "kl_nats", "reward_mean")
            axis.plot(kl, reward, color=colour, alpha=0.25, linewidth=0.8)
        end = group["mean"]
        if {"kl_nats", "reward_tuned"} <= end.keys():  # not of one that diverged
            axis.plot(end["kl_nats"], end["reward_tuned"], "o", color=colour, label=group["label"])
    ends = [group["mean"] for group in comparison["groups"] if "optimum_reward" in group["mean"]]
    for kl, reward in sorted({(end["optimum_kl_nats"], end["optimum_reward"]) for end in ends}):
        axis.plot(
            kl,
            reward,
            "*",
            color="black",
            markersize=15,
            markerfacecolor="none",
            markeredgewidth=1.4,
            label="optimum",
            zorder=5,
        )
    axis.set(xlabel="KL to the pretrained model (nats)", ylabel="reward")
    squeeze(axis, "x", [group["mean"]["kl_nats"] for group in comparison["groups"] if "kl_nats" in group["mean"]])
    legend_once(axis)
    return figure


def legend_once(axis: Axes) -> None:
    """A legend with one entry a label."""
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    plain_legend(axis, handles.values(), handles.keys())


def squeeze(axis: Axes, which: str, ends: Sequence[float]) -> None:
    """A logarithmic axis (linear below 1) where the ends are too far apart to be seen on one scale."""
    if ends and max(ends) > 20 * max(min(ends), 0.05):
        (axis.set_xscale if which == "x" else axis.set_yscale)("symlog", linthresh=1.0)
        few_ticks(axis, which)
