"""The exact program of `shapes`: it detects the coloured shapes of a picture and scores them against a scene."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from scoreaction.tasks.shapes.scenes import COLOURS, SHAPES, Scene, coverage, relation_holds

Array = npt.NDArray[np.float32]

_PAINT = 1 - np.array(list(COLOURS.values()), dtype=np.float32)
"""Difference of white and each colour, (colours, 3)."""
SMALLEST = 16.0
"""Area in pixels below which paint is not a thing."""
LIKENESS = 0.72
"""Intersection over union with the ideal shape below which a thing has no shape."""


@dataclass(frozen=True)
class Detection:
    """Thing detected in a picture: colour, shape (None if it resembles no shape), centre (x, y) and area in pixels."""

    colour: str
    shape: str | None
    centre: tuple[float, float]
    area: float


def read(picture: Array) -> list[Detection]:
    """Detects the things in a picture (3, 32, 32) with values in [0, 1], on white.

    Paint is `1 - picture`: its direction is the colour, and its length, relative to that of the full colour, the covered
    share of the pixel. A thing is a connected set of pixels of one colour that are at least half covered; its shape is the one
    with the largest overlap at the same centre and area.
    """
    paint = (1 - picture).transpose(1, 2, 0)
    smooth = ndimage.uniform_filter(paint, size=(3, 3, 1), mode="nearest")  # noise in one pixel must not change its colour
    likeness = smooth @ (_PAINT / np.linalg.norm(_PAINT, axis=1, keepdims=True)).T
    nearest = likeness.argmax(2)
    cover = np.clip((paint @ _PAINT.T) / (_PAINT**2).sum(1), 0, 1)
    detections = []
    for i, colour in enumerate(COLOURS):
        layer = np.where(nearest == i, cover[:, :, i], 0)
        labels, _ = ndimage.label(layer > 0.5)
        for label in np.flatnonzero(np.bincount(labels.ravel())[1:] >= SMALLEST / 2) + 1:
            inside = labels == label
            part = np.where(ndimage.binary_dilation(inside) & (inside | (labels == 0)), layer, 0)
            part = np.clip(part / np.median(layer[inside]), 0, 1)  # a pale shade covers no less
            area = float(part.sum())
            if area >= SMALLEST:
                detections.append(_detection(colour, part, area))
    return detections


def _detection(colour: str, part: Array, area: float) -> Detection:
    at = np.arange(part.shape[0], dtype=np.float32) + 0.5
    x, y = float(part.sum(0) @ at) / area, float(part.sum(1) @ at) / area
    centre, radius = torch.tensor([[x, y]]), torch.tensor([(area / np.pi) ** 0.5], dtype=torch.float32)
    sharp = np.stack([coverage(shape, centre, radius)[0].numpy() for shape in SHAPES])
    ideals = np.stack([sharp, ndimage.gaussian_filter(sharp, (0, 1, 1), mode="constant")])
    overlap = (np.minimum(ideals, part).sum((2, 3)) / np.maximum(ideals, part).sum((2, 3))).max(0)
    best = int(overlap.argmax())
    return Detection(colour, SHAPES[best] if overlap[best] >= LIKENESS else None, (x, y), area)


def score(detections: list[Detection], scene: Scene) -> float:
    """Agreement of the detected things with a scene, in [0, 1]; 1 only if they are the scene.

    A thing of the scene counts 1/2 for its colour and 1/2 for its shape, in the matching of the highest score; the sum is
    divided by the number of things in the scene or of detections, whichever is larger. In a pair the relation is a quarter of
    the whole, given if both things are right and it holds.

    >>> red = Detection("red", "circle", (16.0, 16.0), 80.0)
    >>> [score([red], Scene(things)) for things in ((("red", "circle"),), (("red", "square"),), (("red", "circle"),) * 2)]
    [1.0, 0.5, 0.5]
    """
    things = scene.things
    slots: list[Detection | None] = [*detections, *([None] * max(0, len(things) - len(detections)))]
    best = 0.0
    for chosen in permutations(slots[:6], len(things)):  # more than six things are wrong anyhow
        points = [
            0.0 if seen is None else 0.5 * (seen.colour == colour) + 0.5 * (seen.shape == shape)
            for seen, (colour, shape) in zip(chosen, things, strict=True)
        ]
        value = sum(points) / max(len(things), len(detections))
        if scene.relation:
            first, second = chosen
            holds = sum(points) == 2 and first and second and relation_holds(scene.relation, first.centre, second.centre)
            value = 0.75 * value + (0.25 if holds else 0.0)
        best = max(best, value)
    return best


def judge(pictures: Tensor, scenes: list[Scene]) -> list[float]:
    """Scores each picture (batch, 3, 32, 32) against its scene, in [0, 1]."""
    arrays = pictures.detach().float().cpu().numpy()
    return [score(read(array), scene) for array, scene in zip(arrays, scenes, strict=True)]
