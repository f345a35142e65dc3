"""Log probability that a peptide is antimicrobial, by the shipped classifier; with judge, by its held-out twin."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from scoreaction.rewards import Reward
from scoreaction.rewards._peptides import check_peptides
from scoreaction.settings import Settings
from scoreaction.tasks.peptides import networks
from scoreaction.types import Prompts


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = log p(antimicrobial | x)` in nats, at most 0; or 1 where p > 1/2, else 0.

    Classifier and judge are alike, and were trained on disjoint halves of the labels: train on the one, and report the other,
    `{name: antimicrobial, judge: true, correct: true}`. Samples are tokens (n, length) as the model `peptides` has them. Not
    differentiable.

    >>> from scoreaction.tasks.peptides.letters import tokens_of_peptides
    >>> build(Config(correct=True))(tokens_of_peptides(["GLFDIVKKVVGALGSL", "DEDEGSTDEDEG"]), None)
    tensor([1., 0.])
    """

    name: Literal["antimicrobial"] = "antimicrobial"
    judge: bool = Field(False, description="the twin that was trained on the other half of the labels, to report")
    correct: bool = Field(False, description="1 where p > 1/2, else 0: the share of peptides")


def build(config: Config) -> Reward:
    """The reward, with the shipped weights."""
    net = networks.judge() if config.judge else networks.reward_classifier()

    @torch.no_grad()
    def antimicrobial(samples: Tensor, prompts: Prompts) -> Tensor:
        check_peptides(samples, name="antimicrobial")
        log_odds = net.to(samples.device)(samples)
        return (log_odds > 0).float() if config.correct else F.logsigmoid(log_odds)

    return Reward(antimicrobial)
