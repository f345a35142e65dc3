"""Scenes of coloured shapes: words and captions, and the drawing of pictures."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SIZE = 32
"""Height and width of a picture."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.10, 0.25, 0.90),
    "yellow": (0.98, 0.85, 0.10),
}
SHAPES = ("circle", "square", "triangle")
COUNTS = ("a", "two", "three")
RELATIONS = ("above", "below", "left of", "right of")

Thing = tuple[str, str]
"""A colour and a shape."""

THINGS: tuple[Thing, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

HELD_OUT: tuple[Thing, ...] = (("red", "triangle"), ("green", "circle"), ("blue", "square"), ("yellow", "triangle"))
"""Things in no prompt of the set `shapes`, of which every prompt of `shapes_unseen` has one."""


@dataclass(frozen=True)
class Scene:
    """Content of a caption: one to three equal things, or two unequal ones and the position of the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        """Caption of the scene.

        >>> Scene((("green", "triangle"),) * 2).caption
        'two green triangles'
        """
        (colour, shape), count = self.things[0], len(self.things)
        if self.relation:
            return f"a {colour} {shape} {self.relation} a {' '.join(self.things[1])}"
        return f"{COUNTS[count - 1]} {colour} {shape}{'s' if count > 1 else ''}"


_THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_COUNTED = re.compile(rf"({'|'.join(COUNTS)}) {_THING}(s?)")
_RELATED = re.compile(rf"a {_THING} ({'|'.join(RELATIONS)}) a {_THING}")


def parse_caption(text: str) -> Scene:
    """Reads a caption as a scene; ValueError, with examples, for any other text.

    >>> parse_caption("a red circle above a blue square")
    Scene(things=(('red', 'circle'), ('blue', 'square')), relation='above')
    """
    plain = " ".join(text.lower().split())
    if match := _RELATED.fullmatch(plain):
        colour, shape, relation, other_colour, other_shape = match.groups()
        if (colour, shape) != (other_colour, other_shape):
            return Scene(((colour, shape), (other_colour, other_shape)), relation)
    elif match := _COUNTED.fullmatch(plain):
        count, colour, shape, plural = match.groups()
        if (count == "a") == (plural == ""):
            return Scene(((colour, shape),) * (COUNTS.index(count) + 1))
    raise ValueError(f"prompt {text!r} names no scene of shapes: write for example 'two green triangles' or {EXAMPLE!r}")


EXAMPLE = "a red circle above a blue square"


def all_scenes() -> list[Scene]:
    """Lists every scene: 12 things alone, in twos and in threes, then 528 pairs."""
    counted = [Scene((thing,) * count) for count in (1, 2, 3) for thing in THINGS]
    return counted + [Scene((a, b), r) for r in RELATIONS for a in THINGS for b in THINGS if a != b]


def coverage(shape: str, centre: Tensor, radius: Tensor) -> Tensor:
    """Share of each pixel that a shape covers, in [0, 1]: (batch, SIZE, SIZE).

    centre (batch, 2) as (x, y), radius (batch,). Pixel centres lie at 0.5, 1.5, ...;
    edges are blended over one pixel. All shapes of one radius have area `pi radius^2`.
    """
    at = torch.arange(SIZE, dtype=centre.dtype, device=centre.device) + 0.5
    x = at[None, None, :] - centre[:, 0, None, None]
    y = at[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    if shape == "circle":
        outside = (x.square() + y.square()).sqrt() - r
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - math.sqrt(math.pi) / 2 * r
    else:  # equilateral, the centre in its centroid: three half-planes at the distance of the inscribed circle
        inscribed = math.sqrt(math.pi / (3 * math.sqrt(3))) * r
        slanted = math.sqrt(3) / 2 * x.abs() - y / 2
        outside = torch.maximum(y.expand_as(slanted), slanted) - inscribed
    return (0.5 - outside).clamp(0, 1)


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """Distances from a shape's centre to its left, right, upper and lower end, in pixels."""
    if shape == "circle":
        return (radius,) * 4
    if shape == "square":
        return (math.sqrt(math.pi) / 2 * radius,) * 4
    inscribed = math.sqrt(math.pi / (3 * math.sqrt(3))) * radius
    return math.sqrt(3) * inscribed, math.sqrt(3) * inscribed, 2 * inscribed, inscribed


_RADII = {1: (5.0, 9.0), 2: (4.4, 6.2), 3: (3.8, 4.8)}
"""Smallest and largest radius in scenes of one, two and three things."""
_GAP = 2.0
"""Smallest distance in pixels between the bounding boxes of two things."""


def place(scene: Scene, generator: Generator) -> list[tuple[float, float, float]]:
    """Draws (x, y, radius) for each thing: inside the picture, apart from one another, and in the scene's relation."""
    low, high = _RADII[len(scene.things)]
    while True:
        radii = (low + (high - low) * torch.rand(len(scene.things), generator=generator)).tolist()
        centres: list[tuple[float, float]] = []
        for (_, shape), radius in zip(scene.things, radii, strict=True):
            left, right, up, down = extent(shape, radius)
            u, v = torch.rand(2, generator=generator).tolist()
            centres.append((1 + left + u * (SIZE - 2 - left - right), 1 + up + v * (SIZE - 2 - up - down)))
        boxes = [
            (x - e[0], x + e[1], y - e[2], y + e[3])
            for (x, y), (_, shape), radius in zip(centres, scene.things, radii, strict=True)
            for e in [extent(shape, radius)]
        ]
        apart = all(
            max(a[0] - b[1], b[0] - a[1], a[2] - b[3], b[2] - a[3]) >= _GAP for i, a in enumerate(boxes) for b in boxes[:i]
        )
        if apart and (scene.relation is None or relation_holds(scene.relation, *centres, margin=1.3)):
            return [(x, y, radius) for (x, y), radius in zip(centres, radii, strict=True)]


def relation_holds(relation: str, first: tuple[float, float], second: tuple[float, float], *, margin: float = 1.0) -> bool:
    """Tells whether a relation holds between two centres: its distance exceeds `margin` times the one across.

    >>> relation_holds("above", (10.0, 5.0), (12.0, 20.0)), relation_holds("left of", (10.0, 5.0), (12.0, 20.0))
    (True, False)
    """
    x, y = second[0] - first[0], second[1] - first[1]
    along = {"above": y, "below": -y, "left of": x, "right of": -x}[relation]
    across = abs(x) if relation in ("above", "below") else abs(y)
    return along > margin * across


def draw(scenes: list[Scene], generator: Generator) -> Tensor:
    """Draws pictures (len(scenes), 3, SIZE, SIZE) in [0, 1]: things on white, of random position, size and shade."""
    pictures = torch.ones(len(scenes), 3, SIZE, SIZE)
    rows: dict[str, list[tuple[int, str, tuple[float, float, float]]]] = {shape: [] for shape in SHAPES}
    for i, scene in enumerate(scenes):
        for (colour, shape), circle in zip(scene.things, place(scene, generator), strict=True):
            rows[shape].append((i, colour, circle))
    for shape, drawn in rows.items():
        if drawn:
            places = torch.tensor([circle for _, _, circle in drawn])
            colours = torch.tensor([COLOURS[colour] for _, colour, _ in drawn])
            colours = (colours + 0.06 * (2 * torch.rand(colours.shape, generator=generator) - 1)).clamp(0, 1)
            cover = coverage(shape, places[:, :2], places[:, 2])[:, None]
            paint = cover * (colours[:, :, None, None] - 1)  # things do not overlap: their paints add
            pictures.index_add_(0, torch.tensor([i for i, _, _ in drawn]), paint)
    return pictures.clamp(0, 1)
