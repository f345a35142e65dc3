"""Figures of samples: points, pictures or tokens, beside others, as a sheet or each in a file of its own."""

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
from scoreaction.report.axes import entitle, new_figure
from scoreaction.report.token_figures import is_tokens, tokens_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from scoreaction.diffusion.mixtures import Mixture

Array = NDArray[Any]


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
