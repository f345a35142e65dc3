"""PI-FT: policy iteration in a backward sweep, from the data to the noise (Han et al. 2024, arXiv 2412.18164)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._critic import fit_critic
from scoreaction.algorithms._learner import Learner, Regularised, Setting, Update, refuse_black_box
from scoreaction.algorithms._pathwise import Decisions, Weights, decisions_at, given, improvement, stepped
from scoreaction.algorithms._soft_q import soft_q
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.critic import Critic
from scoreaction.sampling.experience import Experience, Points
from scoreaction.types import Prediction


class PIFT(Regularised):
    """`a <- s_pre + E grad V_s(x_s)/beta` (in a step's own units), inner iterations of it at each time, then V at that time.

    The steps are taken in `stages` groups, the one next to the data first. In a stage the policy is regressed `inner` times
    onto the improved action against V at the end of the step, then `V(t, x_t) = E[V(s, x_s)] - beta KL_step` is fitted
    under the new policy; V is the reward's look-ahead plus a network. An inner iteration multiplies the error by
    `-curvature`, which is `k^2 Pi_s/beta` on a quadratic value; it is measured from two iterations, and the next is damped
    by `1/(1 + curvature)`, so that a large one does not diverge. Needs the reward's gradient.

    >>> PIFT(beta=0.5).stages
    5
    """

    name: Literal["pi_ft"] = "pi_ft"
    stages: int = Field(5, ge=1, description="groups of steps in a sweep")
    inner: int = Field(2, ge=1, description="policy iterations a stage")
    updates: int = Field(2, ge=1, description="updates towards one improved action")
    rows: int = Field(160, ge=1, description="(path, time) points of a stage")
    critic_updates: int = Field(16, ge=1, description="of a stage")
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="least penalty on leaving the old policy, in betas")

    def build(self, setting: Setting) -> PIFTLearner:
        refuse_black_box(setting, self.name)
        if setting.sampler.eta == 0:
            raise ValueError("sampler.eta: pi_ft needs the noise of a step and eta 0 has none; set it above 0, 1 is safe")
        return PIFTLearner(self, setting)


class PIFTLearner(Learner):
    """PI-FT at work: the value network and the damping of each stage."""

    def __init__(self, config: PIFT, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config = config
        self.critic = Critic(setting.model.process, setting.model.shape, skip="alpha", example=setting.conditions)
        self.networks["critic"] = self.critic
        self.lr = {"critic": config.critic_lr}
        self.state["curvature"] = [0.0] * config.stages

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        self.critic.scale.calibrate(experience.rewards)
        steps, batch = experience.size
        groups = torch.arange(steps).flip(0).chunk(self.config.stages)
        for stage, numbers in enumerate(groups):
            pairs = (numbers[:, None] * batch + torch.arange(batch)).flatten()
            chosen = pairs[torch.randperm(len(pairs), generator=generator)[: self.config.rows]]
            decisions = decisions_at(self.setting, experience, chosen, Weights.of_step)
            share = replace(decisions, scale=decisions.scale * len(numbers) / steps)
            yield from self._improve(share, stage, generator)
            yield from self._evaluate(decisions, generator)

    def _improve(self, decisions: Decisions, stage: int, generator: torch.Generator) -> Iterator[Update]:
        """The inner iterations of one stage."""
        seed = int(torch.randint(2**31, (), generator=generator))
        before: tuple[Tensor, Tensor] | None = None
        for _ in range(self.config.inner):
            said, ahead = self._ahead(decisions, torch.Generator().manual_seed(seed))  # the same noise, to compare
            grad = self.grad_ahead(ahead, decisions.groups)
            if before is not None:
                self.state["curvature"][stage] = curvature(decisions.weights, said - before[0], grad - before[1], self.beta)
            before = said, grad
            fixed = replace(decisions, old=said)
            trust = max(self.config.trust, self.state["curvature"][stage])
            for _ in range(self.config.updates):
                yield from improvement(self, fixed, partial(given, grad), trust=trust)

    @torch.no_grad()
    def _ahead(self, decisions: Decisions, generator: torch.Generator) -> tuple[Tensor, Points]:
        """The policy's x0_hat at the decisions, and where its steps lead."""
        said, ahead = [], []
        for rows in torch.arange(len(decisions.s)).split(self.setting.max_rows):
            part = decisions.take(rows)
            prediction: Prediction = self.policy(part.points.conditions)(part.points.x, part.points.t)
            said.append(prediction.x0)
            ahead.append(stepped(self.setting, part, prediction, generator).x)
        return torch.cat(said), Points(torch.cat(ahead), decisions.s, decisions.points.conditions)

    def grad_ahead(self, points: Points, groups: Tensor) -> Tensor:
        """grad V at points: `c_skip grad r(x0_hat) + c_out grad F`, at t = 0 that of the reward itself; (rows, *shape)."""
        slope = soft_q(self, points, groups, slope=True).grad
        grad = self.critic.slope(points.x, points.t, points.conditions)
        grad = grad + expand(self.critic.coefficients(points.t)[0], slope) * slope
        return torch.where(expand(points.t == 0, slope).bool(), slope, grad)

    @torch.no_grad()
    def value_ahead(self, points: Points, groups: Tensor) -> Tensor:
        """V at points: `c_skip r(x0_hat) + c_out F`, at t = 0 the reward itself; (rows,)."""
        look = soft_q(self, points, groups, slope=False).value
        value = self.critic(points.x, points.t, points.conditions, look)
        return torch.where((points.t == 0).to(look.device), look.to(value), value)  # c_out is not 0 where sigma at 0 is not

    def _evaluate(self, decisions: Decisions, generator: torch.Generator) -> Iterator[Update]:
        """V at this stage's states, under the policy as it is now."""
        said, ahead = self._ahead(decisions, generator)
        cost = decisions.weights.stay.to(said) / 2 * sum_event((said - decisions.reference) ** 2)
        target = self.value_ahead(ahead, decisions.groups) - self.beta * cost
        points = decisions.points
        look = soft_q(self, points, decisions.groups, slope=False).value
        yield from fit_critic(self.critic, points, look, target, updates=self.config.critic_updates, generator=generator)


def curvature(weights: Weights, moved: Tensor, turned: Tensor, beta: float) -> float:
    """By how much an inner iteration answers a change of action: `||pull/(stay beta) dG||/||dx0||` over all rows.

    On a quadratic value of curvature Pi it is `k^2 Pi/beta`, the size of PI-FT's error ratio. moved and turned (rows, *shape):
    the change of x0_hat, and of grad V at x_s that it caused, the noise being the same.
    """
    answer = expand(weights.pull / weights.stay, turned) * turned / beta
    size = float((moved**2).sum().sqrt())
    return float((answer**2).sum().sqrt()) / size if size > 1e-12 else 0.0


Config = PIFT
