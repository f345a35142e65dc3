"""Probability of the prompt's digit by the held-out judge: to report, not to train on."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._prompts import class_ids
from scoreaction.settings import Settings
from scoreaction.tasks.digits.networks import judge
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = p(c | x)` by the judge, which also knows "not a digit"; or 1 where it reads c, else 0.

    Images (batch, 1, 16, 16) in [0, 1], prompts such as "7". It shows no gradient, so that no
    algorithm can follow it into the judge's mistakes. The judge was trained on other digits than the `classifier` reward.
    """

    name: Literal["legibility"] = "legibility"
    correct: bool = Field(False, description="1 where the judge reads the prompt's digit, else 0, instead of its probability")


def build(config: Config) -> Reward:
    """The reward, with the shipped weights."""
    net = judge()

    @torch.no_grad()
    def legibility(samples: Tensor, prompts: Prompts) -> Tensor:
        ids = class_ids(samples, prompts, name="legibility")
        weight = next(net.to(samples.device).parameters())
        log_prob = net.log_prob(samples.to(weight))
        if config.correct:
            return (log_prob.argmax(1) == ids).to(samples)
        return log_prob.gather(1, ids[:, None])[:, 0].exp().to(samples)

    return Reward(legibility)
