"""RAM, Reinforce Adjoint Matching: the pretraining regression with a target that rewards move (Bergmeister et al. 2026)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._baselines import PromptState, refuse_groups_of_one, whole
from scoreaction.algorithms._forward import (
    Baseline,
    Noised,
    advantages,
    drawn_times,
    mean_square,
    renoised,
    velocity,
)
from scoreaction.algorithms._learner import LOGGED, Learner, Regularised
from scoreaction.algorithms._likelihood_ratio import minibatches, spread_is_rounding
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout


class RAM(Regularised):
    """`E ||v_theta - sg(v_pre + A/beta ((eps - x0) - v_theta))||^2` at clean samples of the policy, noised again `each` times.

    A is the reward minus its baseline (arXiv 2605.10759, eq. 17), a mean of other rewards. One reward query
    a sample, no density and no gradient of the reward: any solver draws the samples, 6 to 10 steps of `dpmpp_2m` at eta 0 will
    do. The fixed point leaves out the KL still to be paid, `s_pre + grad E[r | x_t]/beta`, and is the tilted law only where the
    KL from p_theta(x0|x_t) to p_pre(x0|x_t) is the same at all x_t. `standardise` divides A by the std of its group or prompt,
    the own reward in the baseline, as published: beta 0.01 is then its multiplier 100.

    >>> RAM(beta=0.5).each
    8
    """

    name: Literal["ram"] = "ram"
    baseline: Baseline = "prompt"
    standardise: bool = False
    each: int = Field(8, ge=1, description="times that a sample is noised")
    minibatches: int = Field(4, ge=1)

    def build(self, setting: Setting) -> RAMLearner:
        refuse_groups_of_one(setting, self.baseline)
        return RAMLearner(self, setting)


def ram_loss(v: Tensor, *, pretrained: Tensor, noised: Tensor, advantage: Tensor) -> Tensor:
    """`||v - sg(v_pre + a (noised - v))||^2`, mean over dimensions, (rows,); noised is `eps - x0`, a the advantage over beta.

    >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
    >>> ram_loss(zero, pretrained=zero, noised=one, advantage=torch.tensor([3.0])).tolist()
    [9.0]
    """
    target = pretrained + advantage.reshape(-1, *[1] * (v.ndim - 1)) * (noised - v.detach())
    return mean_square(v - target)


class RAMLearner(Learner):
    """RAM at work."""

    state: PromptState
    reference_rows = LOGGED  # the KL along paths is only logged

    def __init__(self, config: RAM, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.state = config, PromptState(config.beta)

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One pass over the noised samples in shuffled minibatches."""
        config, every = self.config, self.advantages(self.world.gather(rollout.rewards), self.world.gather(rollout.prompt))
        advantage, batch = self.world.own(every), rollout.x.shape[1]
        points = renoised(self, rollout, drawn_times(self, config.each, generator, power=1.0), generator)
        for rows in minibatches(self.world, config.each, batch, epochs=1, count=config.minibatches, generator=generator):
            yield Update("policy", [Term(rows, partial(self._loss, take(points, rows.own), advantage))])

    def advantages(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        """Rewards of the whole batch minus their baseline, in reward units or in std, (batch,)."""
        history = self.state.prompt_rewards
        std = 1.0 if spread_is_rounding(rewards) else float(rewards.std(correction=0))
        spread = None if self.config.standardise else std
        advantage = advantages(self.config.baseline, history, rewards, prompt, spread=spread)
        if self.config.standardise:
            return advantage
        return std * whole(self.config.baseline, prompt, history).to(advantage) * advantage  # else beta would be worth more

    def _loss(self, points: Noised, advantage: Tensor, numbers: Tensor) -> Loss:
        part = take(points, numbers)
        with torch.no_grad():
            pretrained = velocity(self.pretrained(*part.states))
        v, gain = velocity(self.policy(*part.states)), take(advantage, part.path) / self.beta
        return ram_loss(v, pretrained=pretrained, noised=part.velocity, advantage=gain), {}


Config = RAM
