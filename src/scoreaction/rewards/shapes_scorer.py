"""Fit of a picture of coloured shapes to its prompt by a small learned scorer, which can be exploited."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from scoreaction.rewards import Reward
from scoreaction.rewards._prompts import scenes_of
from scoreaction.settings import Settings
from scoreaction.tasks.shapes.scorer import load_scorer, scene_ids
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = log p(x shows c)` in nats, at most 0.

    Pictures (batch, 3, 32, 32) in [0, 1], prompts such as "two green triangles". Differentiable. A high value is not a right
    picture: that is what the held-out `shapes` measures.
    """

    name: Literal["shapes_scorer"] = "shapes_scorer"


def build(config: Config) -> Reward:
    """The reward, with the shipped weights."""
    net = load_scorer()

    def shapes_scorer(samples: Tensor, prompts: Prompts) -> Tensor:
        ids = scene_ids(scenes_of(samples, prompts, name="shapes_scorer")).to(samples.device)
        weight = next(net.to(samples.device).parameters())
        return F.logsigmoid(net(samples.to(weight), ids)).to(samples)

    return Reward(shapes_scorer, differentiable=True)
