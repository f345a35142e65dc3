"""AWM, Advantage Weighted Matching: PPO with the pretraining loss in the place of a log density (arXiv 2509.25050)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._baselines import PromptState, refuse_groups_of_one
from scoreaction.algorithms._forward import (
    Baseline,
    LaggedPolicy,
    Noised,
    advantages,
    drawn_times,
    flow_time,
    mean_square,
    renoised,
    velocity,
)
from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner
from scoreaction.algorithms._likelihood_ratio import clipped_surrogate, minibatches
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Largest, Loss, Term, Update, Updates
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout


class AWM(Algorithm):
    """`-min(rho A, clip(rho) A)`, `rho = exp(l_theta - l_old)`, l minus the weighted error of the velocity at noised samples.

    `l = -tau (||v - (eps - x0)||^2)^p/p` with the mean over dimensions, p the `power`: 1/4 is the published generalised Huber
    weight, 1 the plain error times tau. A is the standardised reward. `kl` weighs the squared distance to the velocity of an
    average of the policy, whose decay is `lag`, as published, or to the `pretrained` one. Xue et al. 2025. One reward query a
    sample, no density of the sampler: any solver, 6 to 10 steps of `dpmpp_2m` at eta 0 will do.

    >>> AWM().power
    0.25
    """

    name: Literal["awm"] = "awm"
    baseline: Baseline = "prompt"
    advantage_clip: float = Field(5.0, gt=0)
    clip: float = Field(1e-5, gt=0)
    power: float = Field(0.25, gt=0, le=1)
    kl: float = Field(0.1, ge=0)
    kl_to: Literal["average", "pretrained"] = "average"
    lag: float = Field(0.9, ge=0, lt=1)
    each: int = Field(8, ge=1, description="times that a sample is noised")
    minibatches: int = Field(4, ge=1)

    def build(self, setting: Setting) -> AWMLearner:
        refuse_groups_of_one(setting, self.baseline)
        return AWMLearner(self, setting)


def matching_score(v: Tensor, *, noised: Tensor, tau: Tensor, power: float) -> Tensor:
    """`-tau (e^p - c^p)/p`, e the mean square of `v - noised` and c = 1e-10, (rows,): what stands for a log density.

    >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
    >>> matching_score(2 * one, noised=zero, tau=torch.tensor([0.5]), power=1.0).tolist()
    [-2.0]
    """
    error, least = mean_square(v - noised), 1e-10
    return -tau.to(error) * ((error + least) ** power - least**power) / power


class AWMLearner(Learner):
    """AWM at work."""

    state: PromptState
    reference_rows = LOGGED  # the KL along paths is only logged

    def __init__(self, config: AWM, setting: Setting) -> None:
        super().__init__(setting)
        self.config, self.state = config, PromptState()
        self.average = LaggedPolicy(self.model) if config.kl and config.kl_to == "average" else None
        if self.average is not None:
            self.networks["average"] = self.average

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One pass over the noised samples in shuffled minibatches; then the average follows."""
        config, history = self.config, self.state.prompt_rewards
        rewards, prompt = self.world.gather(rollout.rewards), self.world.gather(rollout.prompt)
        advantage = advantages(config.baseline, history, rewards, prompt, spread=None)
        advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
        if bool((advantage == 0).all()):
            return
        advantage, batch = self.world.own(advantage), rollout.x.shape[1]
        points = renoised(self, rollout, drawn_times(self, config.each, generator, power=0.0), generator)
        with torch.no_grad():
            old = self._score(velocity(self.policy(*points.states)), points)
        passes = minibatches(self.world, config.each, batch, epochs=1, count=config.minibatches, generator=generator)
        for i, rows in enumerate(passes):
            loss = partial(self._loss, take(points, rows.own), take(old, rows.own), advantage, i == 0)
            yield Update("policy", [Term(rows, loss)])
        if self.average is not None:
            self.average.follow(config.lag)

    def _score(self, v: Tensor, points: Noised) -> Tensor:
        return matching_score(v, noised=points.velocity, tau=flow_time(self.process, points.t), power=self.config.power)

    def _loss(self, points: Noised, old: Tensor, advantage: Tensor, first: bool, numbers: Tensor) -> Loss:
        part = take(points, numbers)
        v = velocity(self.policy(*part.states))
        log_ratio = self._score(v, part) - take(old, numbers)
        size = Largest(log_ratio.detach().abs())
        loss = clipped_surrogate(log_ratio, take(advantage, part.path), self.config.clip)
        if self.config.kl:
            loss = loss + self.config.kl * mean_square(v - self._anchor(part))
        return loss, {"log_ratio": size, **({"log_ratio_first": size} if first else {})}

    @torch.no_grad()
    def _anchor(self, points: Noised) -> Tensor:
        """The velocity that the KL is to."""
        if self.average is None:
            return velocity(self.pretrained(*points.states))
        with self.average.acting():
            return velocity(self.policy(*points.states))


Config = AWM
