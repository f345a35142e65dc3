"""The linear reward `r(x) = scale <direction, x>` on vectors."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, FiniteFloat

from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.settings import Settings

EXAMPLE = {"direction": [1.0, 0.5]}


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = scale <direction, x>`, x (batch, d). Differentiable; the optimum is known where the data is a mixture.

    >>> float(build(Config(direction=[1.0, 0.5], scale=2.0))(torch.tensor([[1.0, 2.0]]), None))
    4.0
    """

    name: Literal["linear"] = "linear"
    direction: list[FiniteFloat] = Field(min_length=1, description="one number per dimension of the samples")
    scale: FiniteFloat = Field(1.0, description="multiplies the direction")


def build(config: Config) -> QuadraticReward:
    """The reward; its attribute `quadratic` has Q = 0 and l = scale * direction."""
    l = config.scale * torch.tensor(config.direction, dtype=torch.float64)
    return QuadraticReward(Quadratic.linear(l), setting="direction")
