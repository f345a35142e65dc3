"""Agreement of a picture of coloured shapes with its prompt, read by an exact program."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._prompts import scenes_of
from scoreaction.settings import Settings
from scoreaction.tasks.shapes.reader import judge
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c)` in [0, 1]: 1 where picture x is the scene of prompt c, in part where it is in part.

    Each thing asked for counts 1/2 for its colour and 1/2 for its shape; the sum is divided by the number of things asked
    for or seen, whichever is more. In a pair the relation counts one quarter of the whole. With `correct` only the whole
    counts.
    Pictures (batch, 3, 32, 32) in [0, 1], prompts such as "two green triangles". A black box.
    """

    name: Literal["shapes"] = "shapes"
    correct: bool = Field(False, description="1 where everything is right, else 0, instead of credit for parts")


def build(config: Config) -> Reward:
    """The reward.

    >>> from scoreaction.tasks.shapes.scenes import draw, parse_caption
    >>> picture = draw([parse_caption("a red circle")], torch.Generator().manual_seed(0))
    >>> reward = build(Config())
    >>> [float(reward(picture, [prompt])) for prompt in ("a red circle", "a red square", "a red circle above a blue circle")]
    [1.0, 0.5, 0.375]
    """

    def shapes(samples: Tensor, prompts: Prompts) -> Tensor:
        values = torch.tensor(judge(samples, scenes_of(samples, prompts, name="shapes")), device=samples.device)
        return (values == 1).float() if config.correct else values

    return Reward(shapes)
