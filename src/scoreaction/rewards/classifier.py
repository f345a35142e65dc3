"""Log probability of the prompt's digit by the shipped classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel
from torch import Tensor, nn

from scoreaction.rewards._images import check_images
from scoreaction.rewards._prompts import class_ids
from scoreaction.tasks.digits.networks import reward_classifier
from scoreaction.types import Prompts


class Config(BaseModel, frozen=True, extra="forbid"):
    """`r(x, c) = log p(c | x)` in nats, at most 0.

    Images (batch, 1, 16, 16) in [0, 1], prompts such as "7". Differentiable. A high
    value is not legibility: that is what the held-out `legibility` measures.
    """

    name: Literal["classifier"] = "classifier"


@dataclass(frozen=True, eq=False)
class Classifier:
    """Log probability of the prompt's digit."""

    net: nn.Module
    differentiable: bool = True

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="classifier", channels=(1,))
        ids = class_ids(samples, prompts, name="classifier")
        weight = next(self.net.to(samples.device).parameters())
        return self.net(samples.to(weight)).log_softmax(1).gather(1, ids[:, None])[:, 0].to(samples)


def build(config: Config) -> Classifier:
    """The reward, with the shipped weights."""
    return Classifier(reward_classifier())
