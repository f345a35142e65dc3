"""PI-FT: policy iteration in a backward sweep, from the data to the noise (Han et al. 2024, arXiv 2412.18164)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import LOGGED, Learner, Regularised, State, refuse_black_box
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._soft_q import soft_q
from scoreaction.algorithms._step import StepWeights, known, next_states, noise_of, step_term
from scoreaction.algorithms._updates import Update, Updates
from scoreaction.algorithms._value import critic_updates
from scoreaction.diffusion.noise import drawn_seed, kept
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic
from scoreaction.sampling.rollout import Rollout, States, Steps
from scoreaction.types import Prediction
from scoreaction.world import ALONE, Rows, World


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


@dataclass
class SweepState(State):
    """The curvature that each stage has measured: it damps the next iteration there."""

    curvature: list[float] = field(default_factory=list)


class PIFTLearner(Learner):
    """PI-FT at work: the value network and the damping of each stage."""

    state: SweepState

    def __init__(self, config: PIFT, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.reference_rows = LOGGED  # a stage evaluates it at the rows that it takes
        self.config, self.state = config, SweepState(config.beta, curvature=[0.0] * config.stages)
        self.critic = Critic(
            self.process, self.model.shape, skip="alpha", conditions=self.conditions, network=self.model.critic
        )
        self.networks["critic"], self.lr["critic"] = self.critic, config.critic_lr

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """A sweep: in each stage, from the data on, the policy is improved and then its value fitted."""
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        (n, batch), steps = rollout.size, rollout.steps()
        if n < len(rollout.times) - 1:  # after the policy's steps the pretrained model acts: V there is its mean reward
            end = States(rollout.x[n], rollout.acted[-1:].repeat(batch), rollout.prompt)
            look = self.together(partial(soft_q, self, end, gradient=False)).value
            count = self.config.critic_updates
            every = self.world.rows(batch * self.world.size)
            yield from critic_updates(self.critic, end, every, look, rollout.rewards, updates=count, generator=generator)
        for stage, numbers in enumerate(torch.arange(n).flip(0).chunk(self.config.stages)):
            members = (numbers[:, None] * batch + torch.arange(batch)).flatten()
            rows = self.world.dealt(len(numbers), batch, self.config.rows, generator)
            part = take(steps, members[rows.own])
            with torch.no_grad():
                pretrained = self.pretrained(*part.states)
            # a row counts for the steps of its stage
            part = part._replace(pretrained=pretrained, weight=part.weight * len(numbers) / n)
            yield from self._improve(part, rows, stage, generator)
            yield from self._evaluate(part, rows, generator)

    def _improve(self, steps: Steps, rows: Rows, stage: int, generator: torch.Generator) -> Updates:
        """The inner iterations of one stage."""
        seed = drawn_seed(generator)
        before: tuple[Tensor, Tensor] | None = None
        for _ in range(self.config.inner):
            prediction, ahead = self._ahead(steps, noise_of(self, steps, rows, seed))  # the same noise, to compare
            gradient = self.together(partial(self.gradient, ahead))
            if before is not None:
                weights, moved, turned = self._weights(steps), prediction.x0 - before[0], gradient - before[1]
                self.state.curvature[stage] = curvature(weights, moved, turned, self.beta, self.world)
            before = prediction.x0, gradient
            trust, now = max(self.config.trust, self.state.curvature[stage]), steps._replace(old=prediction)
            for _ in range(self.config.updates):
                yield Update("policy", [step_term(self, now, rows, known(gradient), weigh=StepWeights.of_step, trust=trust)])

    @torch.no_grad()
    def _ahead(self, steps: Steps, noise: Tensor) -> tuple[Prediction, States]:
        """The policy's prediction at these steps, and the states that its own steps lead to with this noise."""
        prediction = self.policy(*steps.states)
        return prediction, next_states(self, steps, prediction, noise)

    def _weights(self, steps: Steps) -> StepWeights:
        return StepWeights.of_step(self.process, steps.t, steps.s, self.sampler.eta)

    def gradient(self, states: States) -> Tensor:
        """grad V at states: `c_skip grad r(x0_hat) + c_out grad F`, at t = 0 that of the reward itself; (rows, *shape).

        It is 0 in padding, where a critic may have a slope and nothing moves.
        """
        slope = soft_q(self, states, gradient=True).grad
        gradient = self.critic.gradient(*states) + expand(self.critic.coefficients(states.t)[0], slope) * slope
        return kept(torch.where(expand(states.t == 0, slope).bool(), slope, gradient), self.inside(states.prompt))

    @torch.no_grad()
    def value(self, states: States) -> Tensor:
        """V at states: `c_skip r(x0_hat) + c_out F`, at t = 0 the reward itself; (rows,)."""
        look = soft_q(self, states, gradient=False).value
        value = self.critic(*states, look)
        return torch.where((states.t == 0).to(look.device), look.to(value), value)  # c_out is not 0 where sigma at 0 is not

    def _evaluate(self, steps: Steps, rows: Rows, generator: torch.Generator) -> Updates:
        """V at this stage's states, under the policy as it is now."""
        prediction, ahead = self._ahead(steps, noise_of(self, steps, rows, drawn_seed(generator)))
        assert steps.pretrained is not None
        cost = self._weights(steps).cost.to(prediction.x0) / 2 * sum_event((prediction.x0 - steps.pretrained.x0) ** 2)
        target = self.together(partial(self.value, ahead)) - self.beta * cost
        x0, prompt, parts = steps.pretrained.x0, steps.prompt, self.parts(torch.arange(len(target)))
        with torch.no_grad():
            look = self.together(lambda: torch.cat([self.reward(take(x0, rows), take(prompt, rows)) for rows in parts]))
        updates = self.config.critic_updates
        yield from critic_updates(self.critic, steps.states, rows, look, target, updates=updates, generator=generator)


def curvature(weights: StepWeights, moved: Tensor, turned: Tensor, beta: float, world: World = ALONE) -> float:
    """The answer of an inner iteration to a change of action: `||shift/(cost beta) dG||/||dx0||` over the rows of all.

    On a quadratic value of curvature Pi it is `k^2 Pi/beta`, the size of PI-FT's error ratio. moved and turned (rows, *shape):
    the change of x0_hat, and of grad V at x_s that it caused, the noise being the same.
    """
    answer = expand(weights.shift / weights.cost, turned) * turned / beta
    answers, size = (math.sqrt(part) for part in world.reduced([float((answer**2).sum()), float((moved**2).sum())], "sum"))
    return answers / size if size > 1e-12 else 0.0


Config = PIFT
