"""Figures: samples as points or pictures, curves of a run, comparisons with bands of one standard error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scoreaction.disk import whole
from scoreaction.report.axes import COLOURS, entitle, few_ticks, new_figure, plain_legend
from scoreaction.report.token_figures import is_tokens, tokens_figure
from scoreaction.training.run_folder import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scoreaction.diffusion.mixtures import Mixture
from scoreaction.types import Values

Array = NDArray[Any]

TITLES = {
    "reward_mean": "reward",
    "kl_nats": "KL to the pretrained model (nats)",
    "diversity": "diversity",
}
EVALUATIONS = "model evaluations"
OPTIMA = {"reward_mean": "reward", "kl_nats": "kl_nats"}
"""The metrics whose value at the optimum a summary may have, and its name there."""


def is_pictures(samples: Array) -> bool:
    """True for images (n, 1 or 3, height, width)."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def tiled(images: Array, columns: int, *, gap: int = 1) -> Array:
    """Images (n, C, h, w) in [0, 1] as one picture (H, W, 3), white where there is none."""
    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), dtype=np.float32)
    for i, image in enumerate(images):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[top : top + h, left : left + w] = np.clip(image, 0, 1).transpose(1, 2, 0)
    return sheet


def show_points(axis: Axes, samples: Array, title: str, *, law: Mixture | None, limits: tuple[Array, Array]) -> None:
    """The first two coordinates of samples over the contours of a law of the plane."""
    flat = samples.reshape(len(samples), -1)
    low, high = limits
    if law is not None:
        import torch

        grid = [torch.linspace(float(low[i]), float(high[i]), 200, dtype=torch.float64) for i in range(2)]
        x, y = torch.meshgrid(*grid, indexing="xy")
        density = law.log_prob(torch.stack([x, y], -1).reshape(-1, 2)).reshape(x.shape).exp().numpy()
        levels = density.max() * np.array([0.003, 0.03, 0.15, 0.5])
        if np.isfinite(levels).all() and (np.diff(levels) > 0).all():  # else no sample is where the law is
            axis.contour(x.numpy(), y.numpy(), density, levels=levels, colors="#d1495b", linewidths=1.1)
    axis.scatter(flat[:2000, 0], flat[:2000, 1], s=3, alpha=0.35, color="#1b6ca8", linewidths=0)
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    entitle(axis, title)


def rows_of(*samples: Array) -> Array:
    """Finite samples as rows (n, dimensions) in double precision; zeros where none is finite."""
    flat = np.concatenate([part.reshape(len(part), -1) for part in samples]).astype(np.float64)
    finite = np.isfinite(flat).all(1)
    return flat[finite] if finite.any() else np.zeros_like(flat)


def drawn(law: Mixture) -> Array:
    """A few samples of a law, always the same."""
    import torch

    return law.sample(512, torch.Generator().manual_seed(0)).numpy()


def within_reach(flat: Array, known: Array) -> tuple[Array, Array]:
    """Ends of the axes, (dimensions,) each: those of all samples, but at most the extent of the known ones beyond them.

    So one law that has run away does not shrink the others to dots.
    """
    reach = known.max(0) - known.min(0)
    low = np.maximum(flat.min(0), known.min(0) - reach)
    high = np.minimum(flat.max(0), known.max(0) + reach)
    low, high = np.minimum(low, known.min(0)), np.maximum(high, known.max(0))
    margin = 0.08 * (high - low) + 1e-6 * (1 + np.maximum(np.abs(low), np.abs(high)))
    return low - margin, high + margin


def samples_figure(
    panels: dict[str, Array], laws: dict[str, Mixture | None] | None = None, letters: str | None = None
) -> Figure:
    """Samples next to one another, a panel each: pictures, sequences of tokens, points of the plane, or a histogram.

    letters: of the tokens, which are numbers without.
    """
    first = next(iter(panels.values()))
    if is_tokens(first):
        return tokens_figure(panels, letters)
    if is_pictures(first):
        figure, axes = new_figure(len(panels), 2 if len(panels) > 3 else None, width=5.2, height=2.9)
        for axis, (title, samples) in zip(axes, panels.items(), strict=True):
            axis.imshow(tiled(samples[:SHEET].astype(np.float32), sheet_columns(samples)), interpolation="nearest")
            entitle(axis, title)
            axis.set_axis_off()
        return figure
    flat = rows_of(*panels.values())
    known = [law for law in (laws or {}).values() if law is not None and law.dimension == flat.shape[1]]
    limits = within_reach(flat, rows_of(first, *map(drawn, known)))
    spread = limits[1] - limits[0]
    shape = min(1.3, max(0.4, spread[1] / spread[0])) if flat.shape[1] > 1 else 0.7
    figure, axes = new_figure(len(panels), width=4.2, height=4.2 * shape + 0.4)
    for axis, (name, samples) in zip(axes, panels.items(), strict=True):
        own = rows_of(samples)
        outside = 1 - float(((own >= limits[0]) & (own <= limits[1])).all(1).mean())
        title = f"{name} ({outside:.0%} outside)" if outside >= 0.005 else name
        if flat.shape[1] == 1:
            ends = (limits[0][0], limits[1][0])
            axis.hist(samples.reshape(-1).astype(np.float64), bins=60, range=ends, density=True, color="#1b6ca8")
            axis.set(xlim=ends)
            entitle(axis, title)
        else:
            law = (laws or {}).get(name)
            show_points(axis, samples, title, law=law if flat.shape[1] == 2 else None, limits=limits)
    return figure


def pairs_figure(before: Array, after: Array, prompts: Sequence[str], *, columns: int = 6) -> Figure:
    """Pictures before and after side by side, the prompt under each pair: (n, C, h, w) each, n prompts."""
    ratio = before.shape[2] / before.shape[3]
    figure, axes = new_figure(len(prompts), columns, width=1.9, height=0.35 + 0.95 * ratio)
    for axis, pair, prompt in zip(axes, zip(before, after, strict=True), prompts, strict=True):
        axis.set_axis_off()
        framed = np.pad(np.stack(pair).astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.8)
        axis.imshow(tiled(framed, 2, gap=3), interpolation="nearest")
        entitle(axis, fill(prompt, 28), y=-0.1 / ratio, verticalalignment="top", fontsize=7)
    return figure


def save_samples(path: Path, samples: Array, prompts: Sequence[str] | None, letters: str | None = None) -> None:
    """samples.png: one panel, with the prompts in its title where they are few; no picture is made smaller in it."""
    several = list(dict.fromkeys(prompts or []))
    title = f"{len(samples)} samples" + (f": {', '.join(several)}" if 0 < len(several) <= 3 else "")
    figure, dpi = samples_figure({title: samples}, letters=letters), 120
    if is_pictures(samples):
        rows, columns = -(-min(len(samples), SHEET) // sheet_columns(samples)), sheet_columns(samples)
        figure.set_size_inches(5.2, max(1.0, 5.2 * rows * samples.shape[2] / (columns * samples.shape[3])) + 0.4)
        dpi = max(dpi, math.ceil(columns * (samples.shape[3] + 1) / 5.0))
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=dpi)


def save_pictures(folder: Path, samples: Array, prompts: Sequence[str] | None) -> None:
    """A PNG file of each picture (n, 1 or 3, height, width) at its full size, named by its number and its prompt."""
    from PIL import Image

    for i, pixels in enumerate((np.clip(samples, 0, 1).astype(np.float32) * 255).round().astype(np.uint8)):
        words = "" if prompts is None else "-" + re.sub(r"[^\w]+", "-", prompts[i]).strip("-")[:60]
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        with whole(folder / f"{i:03d}{words.rstrip('-')}.png") as file:
            picture.save(file, "PNG")


def sheet_columns(samples: Array) -> int:
    """The pictures of a row of a sheet: ten, or as many as fit 2,560 pixels.

    >>> sheet_columns(np.zeros((1, 3, 16, 16))), sheet_columns(np.zeros((1, 3, 512, 512)))
    (10, 5)
    """
    return max(1, min(10, 2560 // samples.shape[3]))


SHEET = 50
"""Pictures of a sheet at most."""


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
