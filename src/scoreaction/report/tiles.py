"""Pictures of a page at their full size: those of one noise beside one another, by each model, and their prompt beneath."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHOWN = 24
"""Tiles of a page at most."""
LARGE = 128
"""Pixels of a side from which a picture is stored as JPEG: a PNG of a photograph is ten times as large."""


@dataclass(frozen=True)
class Tile:
    """Pictures of one noise as data URIs, an entry a model, and the prompt that they were drawn for."""

    pictures: list[str]
    prompt: str


@dataclass(frozen=True)
class Tiles:
    """A box of tiles: the models' names, in the order of each tile's pictures. small: fewer pixels than they are shown with."""

    title: str
    caption: str
    names: list[str]
    tiles: list[Tile]
    small: bool


def tiles_of(title: str, caption: str, panels: dict[str, NDArray[Any]], prompts: Sequence[str] | None) -> Tiles:
    """Some of the pictures (n, 1 or 3, height, width) of each panel, of as many different prompts as there are.

    >>> tiles_of("a", "b", {"before": np.zeros((3, 1, 2, 2))}, ["x", "y", "x"]).tiles[1].prompt
    'y'
    """
    n = min(len(samples) for samples in panels.values())
    texts = [""] * n if prompts is None else list(prompts)[:n]
    rows = _spread(texts)
    tiles = [Tile([data_uri(samples[i]) for samples in panels.values()], texts[i]) for i in rows]
    side = max(next(iter(panels.values())).shape[2:])
    return Tiles(title, caption, list(panels), tiles, side < LARGE)


def _spread(prompts: Sequence[str]) -> list[int]:
    """Rows to show: the first of each prompt, then the second and so on; of too many prompts some from all of the list."""
    first = list(dict.fromkeys(prompts))
    if len(first) > SHOWN:
        return [prompts.index(first[i * len(first) // SHOWN]) for i in range(SHOWN)]
    whole = max(1, SHOWN // len(first)) * len(first)
    return sorted(range(len(prompts)), key=lambda i: (prompts[:i].count(prompts[i]), i))[:whole]


def data_uri(picture: NDArray[Any]) -> str:
    """One picture (1 or 3, height, width) in [0, 1] as a data URI, pixel for pixel: PNG, or JPEG where it is large."""
    from PIL import Image

    pixels = (np.clip(picture, 0, 1).astype(np.float32) * 255).round().astype(np.uint8)
    image, buffer = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)), io.BytesIO()
    kind = "png" if max(image.size) < LARGE else "jpeg"
    image.save(buffer, kind, **({"quality": 92} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
