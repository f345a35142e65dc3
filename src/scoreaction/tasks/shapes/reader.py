"""The exact program of `shapes`: reads a picture back into coloured shapes, and says how far it shows a scene."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from scoreaction.tasks.shapes.scenes import COLOURS, SHAPES, Scene, Thing, coverage, stands

Array = npt.NDArray[np.float32]

_PAINT = 1 - np.array(list(COLOURS.values()), dtype=np.float32)
"""What each colour takes away from white, (colours, 3)."""
SMALLEST = 16.0
"""Area in pixels below which paint is dirt."""
LIKENESS = 0.72
"""Overlap with the ideal shape, as a share of the union, below which paint has no shape."""


@dataclass(frozen=True)
class Found:
    """Paint in a picture: its colour, its shape (None where it is like none), its centre (x, y) and its area in pixels."""

    colour: str
    shape: str | None
    centre: tuple[float, float]
    area: float


def read(picture: Array) -> list[Found]:
    """What is in a picture (3, 32, 32) with values in [0, 1], on white.

    Paint is `1 - picture`; its direction says the colour and its length, against the colour's own, how much of the pixel is
    covered. Connected pixels of one colour, at least half covered, are a thing; its shape is the one that overlaps most with it
    at the same centre and area.
    """
    paint = (1 - picture).transpose(1, 2, 0)
    smooth = ndimage.uniform_filter(paint, size=(3, 3, 1), mode="nearest")  # noise in one pixel must not change its colour
    likeness = smooth @ (_PAINT / np.linalg.norm(_PAINT, axis=1, keepdims=True)).T
    nearest = likeness.argmax(2)
    cover = np.clip((paint @ _PAINT.T) / (_PAINT**2).sum(1), 0, 1)
    found = []
    for i, colour in enumerate(COLOURS):
        mine = np.where(nearest == i, cover[:, :, i], 0)
        labels, _ = ndimage.label(mine > 0.5)
        for label in np.flatnonzero(np.bincount(labels.ravel())[1:] >= SMALLEST / 2) + 1:
            inside = labels == label
            part = np.where(ndimage.binary_dilation(inside) & (inside | (labels == 0)), mine, 0)
            part = np.clip(part / np.median(mine[inside]), 0, 1)  # a pale shade covers no less
            area = float(part.sum())
            if area >= SMALLEST:
                found.append(_thing(colour, part, area))
    return found


def _thing(colour: str, part: Array, area: float) -> Found:
    at = np.arange(part.shape[0], dtype=np.float32) + 0.5
    x, y = float(part.sum(0) @ at) / area, float(part.sum(1) @ at) / area
    centre, radius = torch.tensor([[x, y]]), torch.tensor([(area / np.pi) ** 0.5], dtype=torch.float32)
    sharp = np.stack([coverage(shape, centre, radius)[0].numpy() for shape in SHAPES])
    ideals = np.stack([sharp, ndimage.gaussian_filter(sharp, (0, 1, 1), mode="constant")])
    overlap = (np.minimum(ideals, part).sum((2, 3)) / np.maximum(ideals, part).sum((2, 3))).max(0)
    best = int(overlap.argmax())
    return Found(colour, SHAPES[best] if overlap[best] >= LIKENESS else None, (x, y), area)


def score(found: list[Found], scene: Scene) -> float:
    """How far what was found is the scene, from 0 to 1; 1 exactly where it is the scene.

    A thing that was asked for counts 1/2 for its colour and 1/2 for its shape, matched to the scene's best advantage, and the
    sum is divided by the number of things asked for or found, whichever is more. In a pair the relation counts one quarter of
    the whole, if both things are right and it holds.

    >>> red = Found("red", "circle", (16.0, 16.0), 80.0)
    >>> [score([red], Scene(things)) for things in ((("red", "circle"),), (("red", "square"),), (("red", "circle"),) * 2)]
    [1.0, 0.5, 0.5]
    """
    wanted = scene.things
    slots: list[Found | None] = [*found, *([None] * max(0, len(wanted) - len(found)))]
    best = 0.0
    for chosen in permutations(slots[:6], len(wanted)):  # more than six things are wrong anyhow
        points = [_alike(thing, wants) for thing, wants in zip(chosen, wanted, strict=True)]
        value = sum(points) / max(len(wanted), len(found))
        if scene.relation:
            first, second = chosen
            holds = sum(points) == 2 and first and second and stands(scene.relation, first.centre, second.centre)
            value = 0.75 * value + (0.25 if holds else 0.0)
        best = max(best, value)
    return best


def _alike(found: Found | None, wanted: Thing) -> float:
    return 0.0 if found is None else 0.5 * (found.colour == wanted[0]) + 0.5 * (found.shape == wanted[1])


def judge(pictures: Tensor, scenes: list[Scene]) -> list[float]:
    """`score` of each picture (batch, 3, 32, 32) for its scene."""
    arrays = pictures.detach().float().cpu().numpy()
    return [score(read(array), scene) for array, scene in zip(arrays, scenes, strict=True)]
