"""Probability of the prompt's digit by the held-out judge: to report, not to train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from scoreaction.rewards._images import check_images
from scoreaction.rewards._prompts import class_ids
from scoreaction.tasks.digits.networks import Judge, judge
from scoreaction.types import Prompts


class Config(BaseModel, frozen=True, extra="forbid"):
    """`r(x, c) = p(c | x)` by the judge, which also knows "not a digit"; or 1 where it reads c, else 0.

    Images (batch, 1, 16, 16) in [0, 1], prompts such as "7". It shows no gradient, so that no
    algorithm can follow it into the judge's mistakes. The judge was trained on other digits than the `classifier` reward.
    """

    name: Literal["legibility"] = "legibility"
    correct: bool = Field(False, description="1 where the judge reads the prompt's digit, else 0, instead of its probability")


@dataclass(frozen=True, eq=False)
class Legibility:
    """Probability, or with `correct` the fact, that the judge reads the prompt's digit."""

    net: Judge
    correct: bool
    differentiable: bool = False

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        check_images(samples, name="legibility", channels=(1,))
        ids = class_ids(samples, prompts, name="legibility")
        weight = next(self.net.to(samples.device).parameters())
        log_prob = self.net.log_prob(samples.to(weight))
        if self.correct:
            return (log_prob.argmax(1) == ids).to(samples)
        return log_prob.gather(1, ids[:, None])[:, 0].exp().to(samples)


def build(config: Config) -> Legibility:
    """The reward, with the shipped weights."""
    return Legibility(judge(), config.correct)
