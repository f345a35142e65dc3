"""Score as Action by likelihood ratio: densities of the steps that were taken, weighed by the critic's advantages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner, roll_out_policy
from scoreaction.algorithms._likelihood_ratio import Law, minibatches, ratio_term, steps_with_density, transition, with_density
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.algorithms._value import LookAhead, StateValue, ValuedRollout, running_cost
from scoreaction.algorithms._windows import Window, Windows, WindowState, check_windows
from scoreaction.diffusion.kl import g2_integral, kl_rate
from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import score
from scoreaction.diffusion.transitions import Transition, sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Skip
from scoreaction.sampling.rollout import Rollout, Steps
from scoreaction.types import Prediction
from scoreaction.world import Rows


class RatioSettings(NamedTuple):
    """The settings of `ScoreAction` that this estimator uses."""

    beta: float
    kl_target: float | None
    look_ahead: LookAhead
    skip: Skip
    updates: int
    critic_updates: int
    surrogate_updates: int
    critic_lr: float
    trust: float
    trust_region: float
    exploration: float
    clip: float
    gae_lambda: float
    zeroth_order_std: float
    window: Window
    branches: int


@dataclass
class RatioState(TrustState, WindowState):
    """The trust region and the window."""


class RatioLearner(Learner):
    """`-min(rho A, clip(rho) A) + beta KL + trust KL to the old policy`, A the lambda-averaged advantage of the critic."""

    late_rewards = True
    state: RatioState

    def __init__(self, config: RatioSettings, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.exploration = config, config.exploration
        self.trust_region = config.trust_region
        self.state = RatioState(config.beta, trust=config.trust)
        self.value = StateValue(
            self, look_ahead=config.look_ahead, skip=config.skip, lr=config.critic_lr, std=config.zeroth_order_std
        )
        check_windows(setting, config.window, config.branches, exploration=config.exploration)
        self.windows = Windows(self, config.window, config.branches, exploration=config.exploration)

    def times(self, generator: torch.Generator) -> Tensor:
        """The grid, jittered, and the iteration's window."""
        times = super().times(generator)
        self.windows.draw(generator, times)
        return times

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """Trajectories of the policy, of which siblings part where the window begins."""
        return self.windows.explore(partial(roll_out_policy, self), prompt, times, generator)

    def prepare(self, rollout: Rollout, generator: torch.Generator) -> ValuedRollout:
        """The pretrained model and the look-ahead at every state."""
        n, batch = rollout.size
        valued = self.value.prepare(rollout, self.world.dealt(n, batch, n * batch * self.world.size, generator), generator)
        self.value.remember(rollout)  # after: a baseline must not know the rewards that it is taken off
        self.value.critic.scale.calibrate(self.world.gather(rollout.rewards))
        return valued

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The surrogate, the critic, and the policy over all steps in shuffled minibatches."""
        assert isinstance(rollout, ValuedRollout)
        config, figures = self.config, {}
        self.windows.record(rollout, self.world.gather(rollout.rewards))
        yield from self.value.surrogate_updates(config.surrogate_updates, generator)
        advantage = self.advantages(rollout)  # before the critic has seen what it is a baseline of
        yield from self.value.updates(rollout, critic=config.critic_updates, generator=generator)
        steps = steps_with_density(self, rollout, exploration=config.exploration)
        every, batch = rollout.steps(), rollout.size[1]
        dense = with_density(self, rollout.times, exploration=config.exploration)
        others = (~torch.isin(every.step, dense)).nonzero().flatten()  # where only the KL is learned
        count = len(steps.t) // batch
        batches = list(minibatches(self.world, count, batch, epochs=1, count=config.updates, generator=generator))
        left = len(others) // batch
        rest = self.world.dealt(left, batch, left * batch * self.world.size, generator).tensor_split(config.updates)
        taken = slice(int(steps.step[0]) * batch, (int(steps.step[-1]) + 1) * batch)
        law: Law = partial(transition, self) if config.exploration == 0 else self._action
        outcome = steps.x_next if config.exploration == 0 else rollout.action.eps.flatten(0, 1)[taken]
        fixed: dict[str, Any] = {"law": law, "outcome": outcome, "clip": config.clip, "penalty": self._penalty}
        for i, rows in enumerate(batches):
            term = ratio_term(self, steps, rows, advantage[taken], first=i == 0, **fixed)
            kl = self._kl_term(take(every, others), rest[i], per_path=left)
            figures = yield Update("policy", [term, kl])
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def _action(self, prediction: Prediction, steps: Steps) -> Transition:
        """The law of the explored eps."""
        return Transition(prediction.eps, torch.tensor(self.config.exploration, dtype=torch.float64))

    def _penalty(self, prediction: Prediction, steps: Steps) -> Loss:
        """`beta (KL to the pretrained model + trust KL to the old policy)` of the path."""
        assert steps.pretrained is not None
        kl, kl_to_old = (self._kl(prediction, other, steps) for other in (steps.pretrained, steps.old))
        return self.beta * (kl + self.state.trust * kl_to_old), {"kl_to_old": steps.weight.to(kl) * kl_to_old}

    def _kl(self, prediction: Prediction, other: Prediction, steps: Steps) -> Tensor:
        """The path KL in nats of one prediction to another over these steps, (rows,)."""
        difference = score(self.process, steps.t, prediction) - score(self.process, steps.t, other)
        weight = kl_rate(self.sampler.eta) / 2 * g2_integral(self.process, steps.t, steps.s)
        return weight.to(difference) * sum_event(difference**2)

    def _kl_term(self, steps: Steps, rows: Rows, *, per_path: float) -> Term:
        """The KL of steps without a ratio, `per_path` of them on each path."""

        def loss(numbers: Tensor) -> Loss:
            part = take(steps, rows.own[numbers])
            assert part.pretrained is not None
            kl = self._kl(self.policy(*part.states), part.pretrained, part)
            return per_path * self.beta * kl, {}

        return Term(rows, loss)

    @torch.no_grad()
    def advantages(self, rollout: ValuedRollout) -> Tensor:
        """`sum lambda^k (V(x_s) - V(x_t) - beta cost)` over the steps to come, V calibrated and V(x_0) = r: (N * batch,).

        Schulman et al. 2016 (arXiv 1506.02438), eq. 16, without a discount.
        """
        states = take(rollout.steps().states, rollout.chosen.own)
        parts = self.parts(torch.arange(len(rollout.chosen)))
        values = torch.cat([self.value.critic(*take(states, rows), take(rollout.look, rows)) for rows in parts])
        order = rollout.chosen.own.argsort()
        value, target = (take(part, order).reshape(rollout.size) for part in (values, rollout.target))
        value = self.world.own(calibrated(*(self.world.gather(part.T).T for part in (value, target))).T).T
        value = torch.cat([value, rollout.rewards[None].to(values)])
        gain = value[1:] - value[:-1] - self.beta * running_cost(self.process, self.sampler.eta, rollout)
        advantages, ahead = torch.empty_like(gain), torch.zeros_like(gain[0])
        for step in reversed(range(len(gain))):
            ahead = gain[step] + self.config.gae_lambda * ahead
            advantages[step] = ahead
        return advantages.flatten()


def calibrated(value: Tensor, target: Tensor) -> Tensor:
    """`m + rho (V - mean V)` with the means of each step: m of the target, rho in [0, 1] its regression on V; (N, batch).

    value must not have been fitted to this batch. Then rho says how far it can be believed: where it explains nothing the
    baseline is the batch's mean, and where it is right it stays (the coefficient of a control variate; Glasserman 2003,
    section 4.1).

    >>> calibrated(torch.tensor([[5.0, 7.0, 9.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 2., 3.]])
    >>> calibrated(torch.tensor([[9.0, 7.0, 5.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 2., 2.]])
    """
    mean = target.mean(1, keepdim=True)
    centred = value - value.mean(1, keepdim=True)
    spread = centred.square().sum()
    rho = ((centred * (target - mean)).sum() / spread).clamp(0, 1) if spread > 0 else 0.0
    return mean + rho * centred
