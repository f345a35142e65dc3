"""Frontiers of a sweep: what each algorithm pays for its reward, a line an algorithm and a point a value of the setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scoreaction.report.axes import COLOURS, new_figure, plain_legend
from scoreaction.report.curve_figures import squeeze, title_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from scoreaction.report.numbers import held_out_figures
from scoreaction.types import Values


def prices(groups: Sequence[Values]) -> dict[str, str]:
    """KL, diversity and every held-out reward that the groups have, by the key of the tuned model's figure."""
    held_out = [f"held_out.{name}" for name, _, _ in held_out_figures(groups[0]["mean"])]
    known = {"kl_nats": "kl_nats"} | {f"{name}_tuned": name for name in ("diversity", *held_out)}
    return {key: name for key, name in known.items() if all(key in group["mean"] for group in groups)}


def frontier_figures(comparison: Values) -> dict[str, Figure]:
    """`frontier_kl`, `frontier_diversity` and so on, by file name; none where nothing was swept."""
    if not comparison["sweep"]:
        return {}
    groups, setting = comparison["groups"], comparison["sweep"].partition("=")[0].rpartition(".")[2]
    return {
        f"frontier_{name.removeprefix('held_out.').removesuffix('_nats')}": _frontier(groups, key, name, setting)
        for key, name in prices(groups).items()
    }


def line_of(groups: Sequence[Values], algorithm: str, key: str) -> list[tuple[str | None, float, float, float, float]]:
    """An algorithm's points, in the order of the swept value: (value, x, its error, reward, its error); errors 0 for one seed.

    >>> mean, error = {"kl_nats": 2.0, "reward_tuned": 1.0}, {"kl_nats": 0.1, "reward_tuned": None}
    >>> group = {"algorithm": "ddpo", "value": "0.1", "mean": mean, "standard_error": error}
    >>> line_of([group], "ddpo", "kl_nats")
    [('0.1', 2.0, 0.1, 1.0, 0.0)]
    """
    own = [group for group in groups if group["algorithm"] == algorithm]
    points = []
    for group in sorted(own, key=lambda group: _order(group["value"])):
        mean, error = group["mean"], group["standard_error"]
        errors = [error.get(name) or 0.0 for name in (key, "reward_tuned")]
        points.append((group["value"], mean[key], errors[0], mean["reward_tuned"], errors[1]))
    return points


def _order(value: str | None) -> tuple[float, str]:
    try:
        return float(value or 0), ""
    except ValueError:
        return 0.0, str(value)


def _frontier(groups: Sequence[Values], key: str, name: str, setting: str) -> Figure:
    from matplotlib.patheffects import withStroke

    figure, (axis,) = new_figure(width=5.6, height=4.2)
    outline = [withStroke(linewidth=3, foreground="white")]
    algorithms = list(dict.fromkeys(group["algorithm"] for group in groups))
    for i, (colour, algorithm) in enumerate(zip(COLOURS * 9, algorithms, strict=False)):
        values, x, x_error, y, y_error = zip(*line_of(groups, algorithm, key), strict=True)
        axis.errorbar(
            x, y, xerr=x_error, yerr=y_error, color=colour, marker="o", markersize=5, linewidth=1.4, capsize=2,
            label=algorithm if any(values) else f"{algorithm} (no {setting})",
        )  # fmt: skip
        for value, right, up in zip(values, x, y, strict=True):
            if value is not None:
                place, side = ((-5, 8), "right") if i % 2 == 0 else ((5, -14), "left")  # neighbours' numbers keep apart
                axis.annotate(
                    value, (right, up), place, textcoords="offset points", ha=side, fontsize=9, color=colour,
                    path_effects=outline, zorder=6, parse_math=False,
                )  # fmt: skip
    reward_base = sum(group["mean"]["reward_base"] for group in groups) / len(groups)
    base = 0.0 if key == "kl_nats" else sum(group["mean"][f"{name}_base"] for group in groups) / len(groups)
    axis.plot(base, reward_base, "s", color="#4a4a4a", markersize=6, label="pretrained model")
    if key == "kl_nats":
        _optima(axis, groups)
        squeeze(axis, "x", [group["mean"]["kl_nats"] for group in groups])
    axis.set(xlabel=title_of(name), ylabel="reward after training")
    axis.set_title(f"Up and to the {'left' if key == 'kl_nats' else 'right'} is better", fontsize=10)
    axis.margins(0.1)
    plain_legend(axis, title=f"numbers at points: {setting}", fontsize=9, title_fontsize=9)
    return figure


def _optima(axis: Axes, groups: Sequence[Values]) -> None:
    """The known optimum of each beta. No policy is above the line through them."""
    known = [group["mean"] for group in groups if "optimum_reward" in group["mean"]]
    optima = sorted({(round(mean["optimum_kl_nats"], 9), round(mean["optimum_reward"], 9)) for mean in known})
    if optima:
        axis.plot(*zip(*optima, strict=True), "*--", color="black", markersize=9, linewidth=1, label="best possible", zorder=5)
