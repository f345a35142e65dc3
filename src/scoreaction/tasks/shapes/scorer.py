"""The learned scorer of `shapes`: a small network that estimates whether a picture fits its caption."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoreaction.tasks.fitting import convolutions, load_frozen
from scoreaction.tasks.shapes.scenes import COLOURS, COUNTS, RELATIONS, SHAPES, Scene

_NO_RELATION = len(RELATIONS)


def scene_ids(scenes: list[Scene]) -> Tensor:
    """Encodes scenes as (batch, 6) numbers: count, relation, colour and shape of the first and of the second thing.

    Without a relation the first thing stands for the second too.

    >>> scene_ids([Scene((("green", "circle"),) * 2)]).tolist()
    [[1, 4, 1, 0, 1, 0]]
    """
    colours = list(COLOURS)
    rows = []
    for scene in scenes:
        things = (scene.things[0], scene.things[1] if scene.relation else scene.things[0])
        relation = RELATIONS.index(scene.relation) if scene.relation else _NO_RELATION
        count = 0 if scene.relation else len(scene.things) - 1
        rows.append([count, relation, *(i for c, s in things for i in (colours.index(c), SHAPES.index(s)))])
    return torch.tensor(rows)


class Scorer(nn.Module):
    """Scorer `net(pictures, ids)`: logits (batch,) that pictures (batch, 3, 32, 32) in [0, 1] show scenes (`scene_ids`).

    Its activations are smooth: the gradient with respect to the picture exists everywhere.
    """

    sizes = (len(COUNTS), len(RELATIONS) + 1, len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES))

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            *convolutions((3, 24, 48, 48, 64), (2, 2, 1, 2)),
            nn.Flatten(),
            nn.Linear(64 * 16, width),
        )
        self.words = nn.Linear(sum(self.sizes), 2 * width)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, pictures: Tensor, ids: Tensor) -> Tensor:
        words = torch.cat([F.one_hot(ids[:, i], size) for i, size in enumerate(self.sizes)], 1).to(pictures)
        scale, shift = self.words(words).chunk(2, 1)
        return self.head(self.picture(2 * pictures - 1) * (1 + scale) + shift)[:, 0]


def shipped() -> Path:
    """Folder of the shipped pipeline and scorer."""
    return Path(str(resources.files("scoreaction") / "data" / "shapes"))


def load_scorer() -> Scorer:
    """Loads the shipped `Scorer`, frozen, in float32."""
    return load_frozen(Scorer(), shipped() / "scorer" / "scorer.safetensors")
