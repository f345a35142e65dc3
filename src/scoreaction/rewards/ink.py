"""Ink of a picture, its mean brightness: for the shipped digits, the thickness of the strokes."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._images import check_images
from scoreaction.settings import Settings
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = mean(x)/unit` over channels and pixels, images (batch, C, H, W) in [0, 1]; strokes are bright.

    Unit: 0.03 of the full brightness, the standard deviation among the shipped digits, whose mean is 0.30 (10 units).
    A negative unit rewards thin strokes.

    >>> float(build(Config())(torch.full((1, 1, 16, 16), 0.3), None))
    10.0...
    """

    name: Literal["ink"] = "ink"
    unit: FiniteFloat = Field(0.03, description="mean brightness that counts as 1; negative to reward thin strokes")
    differentiable: bool = Field(True, description="false hides the gradient: a black box")


def build(config: Config) -> Reward:
    """The reward. ValueError for a unit of zero."""
    if config.unit == 0:
        raise ValueError("unit: must not be 0")

    def ink(samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="ink")
        with torch.set_grad_enabled(config.differentiable and torch.is_grad_enabled()):
            return samples.mean((1, 2, 3)) / config.unit

    return Reward(ink, differentiable=config.differentiable)
