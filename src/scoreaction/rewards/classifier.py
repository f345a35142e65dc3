"""Log probability of the prompt's digit by the shipped classifier."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from scoreaction.rewards import Reward
from scoreaction.rewards._prompts import class_ids
from scoreaction.settings import Settings
from scoreaction.tasks.digits.networks import reward_classifier
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, c) = log p(c | x)` in nats, at most 0.

    Images (batch, 1, 16, 16) in [0, 1], prompts such as "7". Differentiable. A high
    value is not legibility: that is what the held-out `legibility` measures.
    """

    name: Literal["classifier"] = "classifier"


def build(config: Config) -> Reward:
    """The reward, with the shipped weights."""
    net = reward_classifier()

    def classifier(samples: Tensor, prompts: Prompts) -> Tensor:
        ids = class_ids(samples, prompts, name="classifier")
        weight = next(net.to(samples.device).parameters())
        return net(samples.to(weight)).log_softmax(1).gather(1, ids[:, None])[:, 0].to(samples)

    return Reward(classifier, differentiable=True)
