"""VARD: a learned value of intermediate states, back-propagated through one policy step (Dai et al. 2025, arXiv 2505.15791)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._critic import fit_critic, kl_to_go
from scoreaction.algorithms._learner import Learner, Regularised, Setting, Update
from scoreaction.algorithms._pathwise import Decisions, Weights, adapt_trust, decisions_at, improvement
from scoreaction.networks.critic import Critic
from scoreaction.sampling.experience import Experience, Points
from scoreaction.types import Prediction


class VARD(Regularised):
    """`E[-V(x_s) + beta KL_step]` with `x_s = mu_theta(x_t) + k z`, V(s, x) a network fitted to the rewards of visited states.

    Nothing but rewards is asked for, so a black box will do. V is of reward minus the KL still to be paid, which makes the
    tilted law the optimum; `kl_to_go: false` leaves that out, as published. Both terms are the path's, the limit of short
    steps, in which x_s becomes x_t: `c g^2 <grad V, s>` against `beta/2 g^2 ||s - s_pre||^2`. trust and trust_region as in
    Score as Action.

    >>> VARD(beta=0.5).kl_to_go
    True
    """

    name: Literal["vard"] = "vard"
    kl_to_go: bool = True
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="random (path, time) points in an update")
    critic_updates: int = Field(64, ge=1)
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="least penalty on leaving the old policy, in betas")
    trust_region: float = Field(0.1, gt=0, description="path KL in nats that one iteration may move")

    def build(self, setting: Setting) -> VARDLearner:
        if setting.sampler.eta == 0:
            raise ValueError("sampler.eta: vard needs the path's KL, which is infinite at eta 0; set it above 0, 1 is safe")
        return VARDLearner(self, setting)


class VARDLearner(Learner):
    """VARD at work: the value network and the trust region."""

    def __init__(self, config: VARD, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config = config
        self.critic = Critic(setting.model.process, setting.model.shape, skip="none", example=setting.conditions)
        self.networks["critic"] = self.critic
        self.lr = {"critic": config.critic_lr}
        self.state.update(trust=config.trust, kl_to_old=0.0)

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        self.critic.scale.calibrate(experience.rewards)
        yield from self._critic_updates(experience, generator)
        steps, batch = experience.size
        chosen = torch.randperm(steps * batch, generator=generator)[: self.config.updates * self.config.rows]
        decisions = decisions_at(self.setting, experience, chosen, Weights.of_path)
        moved: list[float] = []
        for rows in torch.arange(len(chosen)).chunk(self.config.updates):
            moved.clear()
            for update in improvement(self, decisions.take(rows), self._look, trust=self.state["trust"]):
                moved.append(update.metrics["kl_to_old"])
                yield update
        adapt_trust(self.state, sum(moved) / len(moved), least=self.config.trust, region=self.config.trust_region)

    def _look(self, decisions: Decisions, prediction: Prediction) -> Tensor:
        return self.grad_value(decisions.points)

    def grad_value(self, points: Points) -> Tensor:
        """grad V at points, (rows, *shape)."""
        return self.critic.slope(points.x, points.t, points.conditions)

    def _critic_updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        """V at all states of the paths, the data among them."""
        steps, batch = experience.size
        rollout = experience.rollout
        owner = torch.arange(batch).repeat(steps + 1)
        points = Points(rollout.x.flatten(0, 1), rollout.times.repeat_interleave(batch), experience.conditions, owner)
        target = experience.rewards.expand(steps + 1, batch)
        if self.config.kl_to_go:
            to_go = kl_to_go(self.setting, experience)
            target = target - self.beta * torch.cat([to_go, torch.zeros_like(to_go[:1])])
        updates = self.config.critic_updates
        yield from fit_critic(self.critic, points, None, target.flatten(), updates=updates, generator=generator)


Config = VARD
