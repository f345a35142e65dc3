"""Score as Action by the forward process: the gradient of the value from the noising kernel, less that of the KL to go."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._forward import Noised, mean_square, renoised, stratified
from scoreaction.algorithms._learner import Learner, Loss, Setting, Term, Update, Updates
from scoreaction.algorithms._likelihood_ratio import minibatches
from scoreaction.algorithms._score_action_ratio import calibrated
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._value import critic_updates, kl_to_go
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic
from scoreaction.sampling.rollout import Rollout, States
from scoreaction.types import Prediction

EARLIEST = 1e-3
"""Time below which nothing is learned: the path KL is counted from there."""


class ForwardSettings(NamedTuple):
    """The settings of `ScoreAction` that this estimator uses."""

    beta: float
    kl_target: float | None
    updates: int
    each: int
    critic_updates: int
    critic_lr: float
    trust: float
    trust_region: float


def forward_loss(
    eps: Tensor, *, noise: Tensor, old: Tensor, pretrained: Tensor, push: Tensor, advantage: Tensor, beta: float, trust: float
) -> Tensor:
    """`beta/2 ||eps - y||^2 + trust/2 ||eps - eps_old||^2`, `y = eps_pre + A/beta (noise - eps_old) + push`, (rows,).

    Mean over dimensions; push is `sigma grad K`, K the KL to go. In scores y is the improved action `s_pre + grad V/beta`,
    with `grad V = E[A (grad log q(x_t|x0) - s_old) | x_t] - beta grad K`. All (rows, *shape), A (rows,).
    """
    y = pretrained + expand(advantage / beta, eps) * (noise - old) + push
    return beta / 2 * mean_square(eps - y) + trust / 2 * mean_square(eps - old)


class ForwardLearner(Learner):
    """The forward estimator: clean samples noised again, a value of the reward as baseline, and one of the KL to go."""

    state: TrustState

    def __init__(self, config: ForwardSettings, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.state = config, TrustState(config.beta, trust=config.trust)
        self.trust_region = config.trust_region
        parts = self.process, self.model.shape
        own: dict[str, Any] = {"conditions": self.conditions, "network": self.model.critic}
        self.critic = Critic(*parts, skip="none", **own)
        self.to_go = Critic(*parts, skip="alpha", **own)  # without a look-ahead: sigma F
        for name, network in (("critic", self.critic), ("to_go", self.to_go)):
            self.networks[name], self.lr[name] = network, config.critic_lr

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The KL to go, the policy over the noised samples in shuffled minibatches, and then what its baseline was."""
        config, figures = self.config, {}
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        target, batch = kl_to_go(self.process, self.sampler.eta, rollout).flatten(), rollout.x.shape[1]
        yield from self.fit("to_go", rollout.steps().states, target, generator)
        low = max(self.sampler.off_below, EARLIEST)
        times = low + (1 - low) * stratified(self, config.each, generator)
        points = renoised(self, rollout, times, generator)
        fixed = self._fixed(points, rollout.rewards)
        for rows in minibatches(self.world, config.each, batch, epochs=1, count=config.updates, generator=generator):
            loss = partial(self._loss, take(points, rows.own), take(fixed, rows.own), 1 - low)
            figures = yield Update("policy", [Term(rows, loss)])
        yield from self.fit("critic", points.states, take(rollout.rewards, points.path), generator)
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def fit(self, network: str, states: States, target: Tensor, generator: torch.Generator) -> Updates:
        """The regression of one of the two values on its target."""
        critic, count = (self.critic, self.to_go)[network == "to_go"], self.config.critic_updates
        rows = self.world.rows(len(target) * self.world.size)
        yield from critic_updates(critic, states, rows, None, target, updates=count, generator=generator, network=network)

    def _fixed(self, points: Noised, rewards: Tensor) -> _Fixed:
        """The parts of the loss that an update does not change, at all points."""
        parts = self.parts(torch.arange(len(points.t)))
        with torch.no_grad():
            old, pretrained = self.policy(*points.states), self.pretrained(*points.states)
            value = torch.cat([self.critic(*take(points.states, rows)) for rows in parts])
        slope = torch.cat([self.to_go.gradient(*take(points.states, rows)) for rows in parts])
        reward = take(rewards, points.path)
        every = (self.world.gather(part.reshape(-1, len(rewards)).T).T for part in (value, reward.to(value)))
        advantage = reward - self.world.own(calibrated(*every).T).T.flatten()
        return _Fixed(old, pretrained, expand(self.process.sigma(points.t), slope) * slope, advantage)

    def _loss(self, points: Noised, fixed: _Fixed, span: float, numbers: Tensor) -> Loss:
        part, (old, pretrained, push, advantage) = take(points, numbers), take(fixed, numbers)
        eps = self.policy(*part.states).eps
        beta, trust = self.beta, self.state.trust * self.beta
        loss = forward_loss(
            eps, noise=part.eps, old=old.eps, pretrained=pretrained.eps, push=push, advantage=advantage, beta=beta, trust=trust
        )
        rate = (span * self.process.g2(part.t) / (2 * self.process.sigma2(part.t))).to(loss)
        return loss, {"kl_to_old": rate * sum_event((eps - old.eps) ** 2)}


class _Fixed(NamedTuple):
    """At noised samples: the predictions of the policy that sampled and of the base, `sigma grad K`, and the advantage."""

    old: Prediction
    pretrained: Prediction
    push: Tensor
    advantage: Tensor
