"""Reward back-propagation through the policy's own steps: the KL that may go with it, and refusals."""

from __future__ import annotations

import torch

from scoreaction.algorithms._learner import Learner, refuse_black_box
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._step import StepWeights, known, step_term
from scoreaction.algorithms._updates import Term
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout
from scoreaction.world import Rows


def refuse_unfit(setting: Setting, algorithm: str, beta: float) -> None:
    """ValueError where the reward has no gradient, or the steps are not DDIM's."""
    refuse_black_box(setting, algorithm)
    if setting.sampler.solver != "ddim":
        raise ValueError(f"sampler.solver: {algorithm} is written for ddim (any eta); {setting.sampler.solver} was given")
    if beta > 0 and setting.sampler.eta == 0:
        raise ValueError(
            "sampler.eta: the path KL of a deterministic sampler is infinite; set it above 0, or algorithm.beta to 0"
        )


def visited_kl(learner: Learner, rollout: Rollout, rows: Rows, share: float) -> Term:
    """beta times the path KL at visited states, its gradient at those states alone.

    rows are those of the rollout's steps, `share` the part of all steps that they were drawn from.
    """
    steps = take(rollout.steps(), rows.own)
    steps = steps._replace(weight=steps.weight * share)
    term = step_term(learner, steps, rows, known(torch.zeros_like(steps.x)), weigh=StepWeights.of_step, trust=0.0)
    return term._replace(loss=lambda numbers: (term.loss(numbers)[0], {}))
