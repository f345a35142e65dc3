"""Score as Action by the forward process: the gradient of the value from the noising kernel, less that of the KL to go."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._baselines import PromptState
from scoreaction.algorithms._forward import LaggedPolicy, Noised, drawn_times, flow_time, mean_square, renoised
from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._likelihood_ratio import minibatches
from scoreaction.algorithms._score_action_ratio import calibrated
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.algorithms._value import critic_updates, kl_to_go
from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic
from scoreaction.sampling.rollout import Rollout, States
from scoreaction.types import Prediction

EARLIEST = 1e-3
"""Time below which nothing is learned: the path KL is counted from there."""
LEAST_SNR = 4.7e-3
"""Errors of x0 at more noise than this count as those at this SNR, Stable Diffusion's last."""
FEW, KEPT = 4, 64
"""Rewards that the batch's mean counts as in the mean of a prompt's, and how many of a prompt's are kept."""


class ForwardSettings(NamedTuple):
    """The settings of `ScoreAction` that this estimator uses."""

    beta: float
    kl_target: float | None
    updates: int
    each: int
    errors: Literal["x0", "eps", "own"]
    critic_updates: int
    critic_lr: float
    trust: float
    trust_region: float
    averaging: float


def refuse_memory(setting: Setting, exploration: float) -> None:
    """ValueError where samples remember the noise they began with, or are drawn by more noise than the policy's."""
    if setting.sampler.eta != 1 or exploration:
        raise ValueError(
            "sampler.eta: the forward estimator needs memoryless noise, which is eta 1, and no algorithm.exploration; set"
            " them, or algorithm.estimator to likelihood_ratio"
        )


def forward_loss(
    eps: Tensor, *, noise: Tensor, old: Tensor, pretrained: Tensor, push: Tensor, advantage: Tensor, beta: float, trust: float
) -> Tensor:
    """`||eps - y||^2 + trust ||eps - eps_old||^2`, `y = eps_pre + A/beta (noise - eps_old) + push`, (rows,).

    Mean over dimensions; push is `sigma grad K`, K the KL to go. In scores y is the improved action `s_pre + grad V/beta`,
    with `grad V = E[A (grad log q(x_t|x0) - s_old) | x_t] - beta grad K`. All (rows, *shape), A (rows,).
    """
    y = pretrained + expand(advantage / beta, eps) * (noise - old) + push
    return mean_square(eps - y) + trust * mean_square(eps - old)


@dataclass
class ForwardState(TrustState, PromptState):
    """The trust region, and the last rewards of each prompt."""


class ForwardLearner(Learner):
    """The forward estimator: clean samples noised again, a value of the reward as baseline, and one of the KL to go.

    Errors count over their mean size at such times: as those of the clean sample x0, so that what is undecided there weighs
    most, or as those of eps, so that all times are learned alike. `own` is x0 with each error over its own size, as
    DiffusionNFT has it. That is less noise and another fixed point: where a state ends in one of two places with the odds p,
    the pull is `2 p (1 - p)/(p^2 + (1 - p)^2)` times as strong, 1 at p = 1/2 and .22 at .9. The time has the density of RAM.
    """

    state: ForwardState

    def __init__(self, config: ForwardSettings, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.state = config, ForwardState(config.beta, trust=config.trust)
        self.trust_region = config.trust_region
        parts = self.process, self.model.shape
        own: dict[str, Any] = {"conditions": self.conditions, "network": self.model.critic}
        self.lagged = LaggedPolicy(self.model) if config.averaging else None
        if self.lagged is not None:
            self.networks["lagged"] = self.lagged
        self.critic = Critic(*parts, skip="none", **own)
        self.to_go = Critic(*parts, skip="alpha", **own)  # without a look-ahead: sigma F
        for name, network in (("critic", self.critic), ("to_go", self.to_go)):
            self.networks[name], self.lr[name] = network, config.critic_lr

    def sampling(self) -> AbstractContextManager[None]:
        """Context in which the policy is the one that samples."""
        return nullcontext() if self.lagged is None else self.lagged.acting()

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """Trajectories of the policy that samples."""
        with self.sampling():
            return super().explore(prompt, times, generator)

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The KL to go, the policy over the noised samples in shuffled minibatches, and then what its baseline was."""
        config, figures = self.config, {}
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        target, batch = kl_to_go(self.process, self.sampler.eta, rollout).flatten(), rollout.x.shape[1]
        yield from self.fit("to_go", rollout.steps().states, target, generator)
        points = renoised(self, rollout, drawn_times(self, config.each, generator, power=1.0, earliest=EARLIEST), generator)
        rewards = rollout.rewards - self.world.own(self.expected(rollout))
        fixed = self._fixed(points, rewards)
        for rows in minibatches(self.world, config.each, batch, epochs=1, count=config.updates, generator=generator):
            loss = partial(self._loss, take(points, rows.own), take(fixed, rows.own))
            figures = yield Update("policy", [Term(rows, loss)])
        yield from self.fit("critic", points.states, take(rewards, points.path), generator)
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def updated(self) -> None:
        """The policy that samples follows the trained one."""
        if self.lagged is not None:
            self.lagged.follow(self.config.averaging)

    def fit(self, network: str, states: States, target: Tensor, generator: torch.Generator) -> Updates:
        """The regression of one of the two values on its target."""
        critic, count = (self.critic, self.to_go)[network == "to_go"], self.config.critic_updates
        rows = self.world.rows(len(target) * self.world.size)
        yield from critic_updates(critic, states, rows, None, target, updates=count, generator=generator, network=network)

    def expected(self, rollout: Rollout) -> Tensor:
        """The mean of the last rewards of each sample's prompt, without this batch's, of the whole batch, (batch,).

        Where they are few it is closer to the batch's mean. This batch's are remembered.
        """
        rewards, prompt = self.world.gather(rollout.rewards), self.world.gather(rollout.prompt).to(rollout.rewards.device)
        every, out = self.state.prompt_rewards, torch.empty_like(rewards)
        mean = float(rewards.double().mean())
        for number in prompt.unique().tolist():
            rows, last = prompt == number, every.get(str(number), [])
            out[rows] = (sum(last) + FEW * mean) / (len(last) + FEW)
            every[str(number)] = (last + rewards[rows].tolist())[-KEPT:]
        return out

    def _fixed(self, points: Noised, rewards: Tensor) -> _Fixed:
        """The parts of the loss that an update does not change, at all points."""
        parts = self.parts(torch.arange(len(points.t)))
        with torch.no_grad():
            with self.sampling():
                old = self.policy(*points.states)
            pretrained = self.pretrained(*points.states)
            value = torch.cat([self.critic(*take(points.states, rows)) for rows in parts])
        slope = torch.cat([self.to_go.gradient(*take(points.states, rows)) for rows in parts])
        reward = take(rewards, points.path)
        every = (self.world.gather(part.reshape(-1, len(rewards)).T).T for part in (value, reward.to(value)))
        advantage = reward - self.world.own(calibrated(*every).T).T.flatten()
        push = expand(self.process.sigma(points.t), slope) * slope
        return _Fixed(old, pretrained, push, advantage, self.weights(points, old.eps, len(rewards)))

    def weights(self, points: Noised, old: Tensor, batch: int) -> Tensor:
        """`c^2` over the mean of `c |eps - eps_old|` at times of the same stratum, (rows,); c = 1 for errors of eps.

        With `c = sigma/alpha`, at most that of `LEAST_SNR`, that is the error of x0, squared, over its mean size, or its own.
        """
        c = torch.exp(-self.process.log_snr(points.t) / 2).clamp(max=LEAST_SNR**-0.5).to(old)
        c = torch.ones_like(c) if self.config.errors == "eps" else c
        error = c * (points.eps - old).flatten(1).abs().mean(1)
        if self.config.errors != "own":
            error = self.world.gather(error.reshape(-1, batch).T).mean(0).repeat_interleave(batch)
        return c.square() / error.clamp(min=1e-12)

    def _loss(self, points: Noised, fixed: _Fixed, numbers: Tensor) -> Loss:
        part, (old, pretrained, push, advantage, weight) = take(points, numbers), take(fixed, numbers)
        eps = self.policy(*part.states).eps
        known = {"noise": part.eps, "old": old.eps, "pretrained": pretrained.eps, "push": push, "advantage": advantage}
        loss = weight * forward_loss(eps, **known, beta=self.beta, trust=self.state.trust)
        # per path: half of -d lambda, over the density of t, `2 tau d tau/(1 - tau_0^2)`
        ends = torch.tensor([max(self.sampler.acts_from, EARLIEST), 1.0], dtype=torch.float64)
        tau, (first, last) = flow_time(self.process, part.t), flow_time(self.process, ends)
        rate = ((last**2 - first**2) / (2 * tau**2 * (1 - tau))).to(loss)
        return loss, {"kl_to_old": rate * sum_event((eps - old.eps) ** 2)}


class _Fixed(NamedTuple):
    """At noised samples: predictions of the policy that sampled and of the base, `sigma grad K`, the advantage, the weight."""

    old: Prediction
    pretrained: Prediction
    push: Tensor
    advantage: Tensor
    weight: Tensor
