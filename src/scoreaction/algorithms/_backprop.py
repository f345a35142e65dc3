"""What methods share that differentiate the reward through the policy's own steps: the KL that may go with it, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Setting, Update, refuse_black_box
from scoreaction.algorithms._pathwise import Decisions, Weights, decisions_at, improvement
from scoreaction.sampling.experience import Experience
from scoreaction.types import Prediction


def refuse_unfit(setting: Setting, algorithm: str, beta: float) -> None:
    """ValueError where the reward has no gradient, or the steps are not DDIM's."""
    refuse_black_box(setting, algorithm)
    if setting.sampler.solver != "ddim":
        raise ValueError(f"sampler.solver: {algorithm} is written for ddim (any eta); {setting.sampler.solver} was given")
    if beta > 0 and setting.sampler.eta == 0:
        raise ValueError(
            "sampler.eta: the path KL of a deterministic sampler is infinite; set it above 0, or algorithm.beta to 0"
        )


def visited_kl(learner: Learner, experience: Experience, chosen: Tensor, share: float) -> Iterator[Update]:
    """beta times the path KL at visited states with these numbers, its gradient at those states alone; no step after it.

    share: the part of all steps that they were drawn from.
    """
    decisions = decisions_at(learner.setting, experience, chosen, Weights.of_step)
    for update in improvement(learner, replace(decisions, scale=decisions.scale * share), _no_value, trust=0.0):
        yield replace(update, metrics={}, step=False)


def _no_value(decisions: Decisions, prediction: Prediction) -> Tensor:
    return torch.zeros_like(prediction.x0)
