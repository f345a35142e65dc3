"""No reward: 0 for every sample, for what learns from data alone (dpo, spin)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from scoreaction.rewards._images import check_range, is_images
from scoreaction.settings import Settings
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """It has no settings."""

    name: Literal["none"] = "none"


class NoReward:
    """0 for every sample; ValueError for images that are not in [0, 1].

    >>> NoReward()(torch.ones(2, 3), None)
    tensor([0., 0.])
    """

    differentiable = False

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        if is_images(samples):
            check_range(samples, where="reward none")
        return torch.zeros(len(samples), device=samples.device)


def build(config: Config) -> NoReward:
    """The reward."""
    return NoReward()
