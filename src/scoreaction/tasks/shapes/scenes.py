"""The small world of the `shapes` model: its words, its captions as scenes, and how a scene is drawn."""

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
"""What no prompt of the set `shapes` asks for and every prompt of `shapes_unseen` does."""


@dataclass(frozen=True)
class Scene:
    """What a caption asks for: one to three equal things, or two unequal ones and how the first stands to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def caption(self) -> str:
        """The scene in words.

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
    """The scene that a caption asks for; ValueError, with examples, for anything else.

    >>> parse_caption("a red circle above a blue square")
    Scene(things=(('red', 'circle'), ('blue', 'square')), relation='above')
    """
    plain = " ".join(text.lower().split())
    if found := _RELATED.fullmatch(plain):
        colour, shape, relation, other_colour, other_shape = found.groups()
        if (colour, shape) != (other_colour, other_shape):
            return Scene(((colour, shape), (other_colour, other_shape)), relation)
    elif found := _COUNTED.fullmatch(plain):
        count, colour, shape, plural = found.groups()
        if (count == "a") == (plural == ""):
            return Scene(((colour, shape),) * (COUNTS.index(count) + 1))
    raise ValueError(f"prompt {text!r} names no scene of shapes: write for example 'two green triangles' or {EXAMPLE!r}")


EXAMPLE = "a red circle above a blue square"


def all_scenes() -> list[Scene]:
    """Every scene there is: 12 things alone, in twos and in threes, and 528 pairs."""
    counted = [Scene((thing,) * count) for count in (1, 2, 3) for thing in THINGS]
    return counted + [Scene((a, b), r) for r in RELATIONS for a in THINGS for b in THINGS if a != b]


# Drawing


def coverage(shape: str, centre: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel a shape covers, in [0, 1]: (batch, SIZE, SIZE).

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
    """How far a shape reaches from its centre to the left, the right, up and down."""
    if shape == "circle":
        return (radius,) * 4
    if shape == "square":
        return (math.sqrt(math.pi) / 2 * radius,) * 4
    inscribed = math.sqrt(math.pi / (3 * math.sqrt(3))) * radius
    return math.sqrt(3) * inscribed, math.sqrt(3) * inscribed, 2 * inscribed, inscribed


_RADII = {1: (5.0, 9.0), 2: (4.4, 6.2), 3: (3.8, 4.8)}
"""Smallest and largest radius where there are one, two or three things."""
_GAP = 2.0


def place(scene: Scene, generator: Generator) -> list[tuple[float, float, float]]:
    """Where a scene's things stand, (x, y, radius) each: inside the picture, apart from one another, and in their relation."""
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
        if apart and (scene.relation is None or stands(scene.relation, *centres, clearly=1.3)):
            return [(x, y, radius) for (x, y), radius in zip(centres, radii, strict=True)]


def stands(relation: str, first: tuple[float, float], second: tuple[float, float], *, clearly: float = 1.0) -> bool:
    """Whether the first centre stands so to the second: by the larger of the two distances, `clearly` times the smaller.

    >>> stands("above", (10.0, 5.0), (12.0, 20.0)), stands("left of", (10.0, 5.0), (12.0, 20.0))
    (True, False)
    """
    x, y = second[0] - first[0], second[1] - first[1]
    along = {"above": y, "below": -y, "left of": x, "right of": -x}[relation]
    across = abs(x) if relation in ("above", "below") else abs(y)
    return along > clearly * across


def draw(scenes: list[Scene], generator: Generator) -> Tensor:
    """Pictures (len(scenes), 3, SIZE, SIZE) in [0, 1]: the scenes' things on white, at random places, sizes and shades."""
    pictures = torch.ones(len(scenes), 3, SIZE, SIZE)
    rows: dict[str, list[tuple[int, str, tuple[float, float, float]]]] = {shape: [] for shape in SHAPES}
    for i, scene in enumerate(scenes):
        for (colour, shape), where in zip(scene.things, place(scene, generator), strict=True):
            rows[shape].append((i, colour, where))
    for shape, drawn in rows.items():
        if drawn:
            places = torch.tensor([where for _, _, where in drawn])
            colours = torch.tensor([COLOURS[colour] for _, colour, _ in drawn])
            colours = (colours + 0.06 * (2 * torch.rand(colours.shape, generator=generator) - 1)).clamp(0, 1)
            cover = coverage(shape, places[:, :2], places[:, 2])[:, None]
            paint = cover * (colours[:, :, None, None] - 1)  # things do not overlap: their paints add
            pictures.index_add_(0, torch.tensor([i for i, _, _ in drawn]), paint)
    return pictures.clamp(0, 1)
