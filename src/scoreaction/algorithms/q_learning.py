"""Reward-directed q-learning: the policy learns from temporal differences along its own exploration (arXiv 2409.04832)."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised
from scoreaction.algorithms._likelihood_ratio import transition
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Updates
from scoreaction.algorithms._value import kl_to_go, visited_updates
from scoreaction.algorithms.score_action import score_action_update
from scoreaction.diffusion.kernel_density import KernelDensity
from scoreaction.diffusion.kl import g2_integral
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.predictions import expand, score
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic
from scoreaction.sampling.rollout import Rollout, Steps, flattened
from scoreaction.world import Rows

LEAST_POINTS = 64


class QLearning(Regularised):
    """`max E[r(x0)] - beta KL` by continuous-time q-learning: the score acts with noise, `a ~ N(mu, theta/(beta g^2) I)`.

    For every action the temporal difference of a step, with w the integral of g^2 over it,
    `delta = V(x_s) - V(x_t) - (beta/2) w (s1.s2 - a.(s1 + s2)) + (beta/2) w (|mu|^2 - 2 a.mu)`,
    is zero in the mean at the optimum `mu = s + grad V/beta`, whatever theta is. V is fitted by the martingale loss, and mu
    follows delta against the noise in a: `E[delta (a - mu)] = 0`. From delta we subtract that of mu itself under the same noise
    of the sampler, which has no mean against a's, and takes the variance out at the optimum. The reward is a black box.

    theta: temperature of the exploration; it adds about theta dt/beta of its own to the noise of a step. points: of a model
    `from_data`, how many rows of the table, drawn anew for each state, estimate the score in place of all; s1 and s2 are two
    such estimates, so that their variance is no cost. Gao, Zha and Zhou 2024 (arXiv 2409.04832), whose beta is 2 over ours.

    >>> QLearning(beta=0.5).theta
    0.05
    """

    name: Literal["q_learning"] = "q_learning"
    theta: float = Field(0.05, gt=0, description="temperature of the exploration, in units of reward")
    points: int | None = Field(None, description="rows of the table that estimate a score, at least 64")
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="random (path, time) points in an update")
    critic_updates: int = Field(64, ge=1)
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="least penalty on leaving the old policy, in betas")
    trust_region: float = Field(0.1, gt=0, description="path KL in nats that one iteration may move")

    @field_validator("points")
    @classmethod
    def _enough(cls, points: int | None) -> int | None:
        if points is not None and points < LEAST_POINTS:
            raise ValueError(
                f"must be at least {LEAST_POINTS}: a score from few points is that of a narrower law (of a variance of 0.71 it"
                " leaves 0.39 with 16 points, 0.63 with 64, and nothing with one)"
            )
        return points

    def build(self, setting: Setting) -> QLearner:
        if setting.sampler.eta != 1:
            raise ValueError("sampler.eta: the temporal difference of q_learning is that of eta 1; set it to 1")
        if not setting.sampler.find().markov:
            raise ValueError(
                f"sampler.solver: q_learning takes a step again without its exploration, and {setting.sampler.solver} looks"
                " back; use ddim or euler_maruyama"
            )
        if self.points is not None and not isinstance(setting.model.law, KernelDensity):
            raise ValueError(
                "algorithm.points: this model has no table to draw them from; leave it out, or use model from_data"
            )
        return QLearner(self, setting)


class QLearner(Learner):
    """q-learning at work: the critic, the estimates of the score, and the trust region."""

    state: TrustState

    def __init__(self, config: QLearning, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.state = config, TrustState(config.beta, trust=config.trust)
        self.exploration, self.trust_region = config.theta, config.trust_region
        self.critic = Critic(self.process, self.model.shape, skip="none", conditions=self.conditions, network=self.model.critic)
        self.networks["critic"], self.lr["critic"] = self.critic, config.critic_lr

    def variance(self, t: Tensor) -> Tensor:
        """`theta/(beta g^2)`, that of the score as an action at t."""
        return self.config.theta / (self.beta * self.process.g2(t))

    def exploration_at(self, t: Tensor) -> float:
        return math.sqrt(float(self.variance(t) * self.process.sigma2(t)))

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The critic at all states of the paths, then the policy at random steps of them."""
        config, steps, figures = self.config, rollout.steps(), {}
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        scores, squares = self._scores(rollout, steps, generator)
        to_go = self.beta * kl_to_go(self.process, 1.0, rollout, squares)
        yield from visited_updates(self, self.critic, rollout, to_go, updates=config.critic_updates, generator=generator)
        chosen = self.world.dealt(*rollout.size, config.updates * config.rows, generator)
        gradient = self._gradient(rollout, steps, scores, chosen)
        first, own = 0, steps._replace(pretrained=steps.old)
        for rows in chosen.chunk(config.updates):
            known = partial(_known, gradient[first : first + len(rows)])
            first += len(rows)
            figures = yield score_action_update(self, own, rows, known, trust=self.state.trust)
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def _scores(
        self, rollout: Rollout, steps: Steps, generator: torch.Generator
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Two independent estimates of the data's score at all steps, and the product of their differences to the policy's.

        Without `points` both are the reference's, and the product is the square that the rollout has.
        """
        if self.config.points is None:
            assert steps.pretrained is not None
            own = score(self.process, steps.t, steps.pretrained)
            return (own, own), None
        law = self.model.law
        assert isinstance(law, KernelDensity)
        (n, batch), m = rollout.size, self.config.points
        noise = RowNoise.drawn(generator, self.world.stripe(batch * self.world.size))
        uniform = torch.special.ndtr(noise.normal((batch, n, 2 * m), torch.float64)).transpose(0, 1).flatten(0, 1)
        points = torch.searchsorted(law.weights.cumsum(0), uniform).clamp(max=len(law.weights) - 1)
        first, second = (
            torch.cat(
                [law.score_by(self.process, steps.x[r], steps.t[r], half[r]) for r in torch.arange(n * batch).split(PIECE)]
            )
            for half in points.split(m, 1)
        )
        old = score(self.process, steps.t, steps.old)
        return (first, second), sum_event((first - old) * (second - old)).view(n, batch)

    @torch.no_grad()
    def _gradient(self, rollout: Rollout, steps: Steps, scores: tuple[Tensor, Tensor], chosen: Rows) -> Tensor:
        """`(a - mu) (delta(a) - delta(mu))/(w var)` at these steps, var the variance of a: zero in the mean at the optimum.

        delta(mu) is that of the policy's own step from the same noise of the sampler; the end of a path has its reward.
        """
        part, s1, s2 = take(steps, chosen.own), *(take(own, chosen.own) for own in scores)
        followed = take(flattened(take(rollout.action, slice(rollout.size[0]))), chosen.own)
        action, policy = score(self.process, part.t, followed), score(self.process, part.t, part.old)
        laws: list[Any] = [transition(self, prediction, part) for prediction in (followed, part.old)]
        moved = laws[0].mean - laws[1].mean
        value = self.critic(*part.states)
        after, instead = (self.critic(x, part.s, part.prompt) for x in (part.x_next, part.x_next - moved))
        ends = part.s == rollout.times[-1]
        after = torch.where(ends.to(after.device), take(rollout.rewards, part.path).to(after), after)
        w = g2_integral(self.process, part.t, part.s)
        fixed = {"policy": policy, "scores": (s1, s2), "value": value, "g2dt": w, "beta": self.beta}
        delta = td_residual(action, value_next=after, **fixed) - td_residual(policy, value_next=instead, **fixed)
        acts = self.process.alpha(part.t) > 0  # at pure noise nothing explores
        each = torch.where(acts, delta.cpu() / (w * self.variance(part.t)), 0.0)
        return expand(each, action) * torch.where(expand(acts, action).bool(), action - policy, 0.0)


def _known(gradient: Tensor, part: Steps, numbers: Tensor) -> Tensor:
    return take(gradient, numbers)


def td_residual(
    action: Tensor,
    *,
    policy: Tensor,
    scores: tuple[Tensor, Tensor],
    value: Tensor,
    value_next: Tensor,
    g2dt: Tensor,
    beta: float,
) -> Tensor:
    """The temporal difference of a step with the score `action` under a policy of mean `policy`, (rows,) float64.

    `V(x_s) - V(x_t) - (beta/2) g2dt (s1.s2 - a.(s1 + s2)) + (beta/2) g2dt (|mu|^2 - 2 a.mu)`: less the running cost, plus what
    the action loses against the best one, `q = -(beta/2) g^2 |a - mu|^2`. Scores s1 and s2 are two estimates of the data's.
    """
    a, mu, s1, s2 = (part.double() for part in (action, policy, *scores))
    cost, loss = sum_event(s1 * s2 - a * (s1 + s2)), sum_event(mu * mu - 2 * a * mu)
    return value_next.double() - value.double() + beta / 2 * g2dt.to(cost) * (loss - cost)


PIECE = 1024
"""Steps at which scores are estimated in one piece."""

Config = QLearning
