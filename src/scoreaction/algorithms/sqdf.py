"""SQDF: reparameterised policy gradient of a training-free soft Q, with replay (Kang et al. 2026, arXiv 2512.04559)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from scoreaction.algorithms._learner import LOGGED, Learner, Regularised, refuse_black_box, roll_out_chain
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._soft_q import Belief, SoftQ, soft_q
from scoreaction.algorithms._step import GradValue, StepWeights, known, learnable, next_states, noise_of, step_gap, step_term
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Update, Updates
from scoreaction.algorithms._value import critic_updates, kl_to_go
from scoreaction.diffusion.kl import chain_kl_steps
from scoreaction.diffusion.noise import Source, drawn_seed
from scoreaction.diffusion.predictions import expand, to_prediction
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic
from scoreaction.sampling.replay import Replay
from scoreaction.sampling.rollout import Rollout, States, Steps
from scoreaction.types import Prediction
from scoreaction.world import Rows


class SQDF(Regularised):
    """`E[-w(s) r(x0_hat(x_s)) + beta KL_step]` with `x_s = mu_theta(x_t) + k z`: one random step of a stored trajectory.

    The soft Q of a step t -> s is the reward of the clean sample that the **pretrained** model predicts from x_s: `x0_hat` by
    the posterior mean (`reference`; `x0_steps` > 1: that many DDIM steps) or a `consistency` model; nothing is trained for it.

    weights: `chain` is the published form, where the reference acts in a last step without noise. `path` (ours), its limit of
    short steps, means the same at any number of them: at x_t itself, both terms weighed by the integral of g^2 over the step.
    w(s) discounts: `exp(-discount_rate s)`, s the clock time left, or `gamma` a step left. correction: a critic
    `Q = r(x0_hat) + c_out F`, trained on reward minus KL to go of fresh paths, removes what the soft Q leaves out.
    buffer: trajectories kept (the newest batch alone where smaller), drawn by (trajectory, step); see `Replay`.

    >>> SQDF(beta=0.5).weights
    'path'
    """

    name: Literal["sqdf"] = "sqdf"
    weights: Literal["path", "chain"] = "path"
    x0_hat: Literal["reference", "consistency"] = "reference"
    x0_steps: int = Field(1, ge=1)
    discount_rate: float = Field(0.0, ge=0, description="rho in exp(-rho s); -N log(gamma) on a uniform grid")
    gamma: float = Field(1.0, gt=0, le=1, description="discount a step left, as published")
    correction: bool = False
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="(trajectory, step) pairs in an update; updates * rows queries an iteration")
    critic_updates: int = Field(32, ge=1)
    critic_rows: int = Field(2560, ge=8, description="visited states that the correction is fitted on, a query each")
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="with correction: least penalty on leaving the policy that sampled, in betas")
    trust_region: float = Field(0.1, gt=0, description="path KL in nats that one iteration may move")
    buffer: int = Field(0, ge=0)
    max_age: int | None = Field(None, ge=1, description="iterations after which a trajectory is not drawn")
    priority: float = Field(0.0, ge=0)
    importance: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_discount(self) -> SQDF:
        if self.discount_rate > 0 and self.gamma < 1:
            raise ValueError("discount_rate and gamma are two ways to say one thing; give one")
        if self.correction and (self.discount_rate > 0 or self.gamma < 1):
            raise ValueError("correction removes the bias that a discount hides; give one of them")
        return self

    def build(self, setting: Setting) -> SQDFLearner:
        refuse_black_box(setting, self.name)
        if setting.sampler.eta == 0:
            raise ValueError("sampler.eta: sqdf needs the noise of a step and eta 0 has none; set it above 0, 1 is safe")
        if self.weights == "chain" and setting.sampler.solver != "ddim":
            raise ValueError("sampler.solver: sqdf with weights: chain is written for ddim; use it, or weights: path")
        if self.x0_hat == "consistency" and not setting.model.has_consistency:
            raise ValueError("algorithm.x0_hat: there is no consistency model; give model.consistency, or x0_hat: reference")
        return SQDFLearner(self, setting)


@dataclass
class ReplayState(TrustState):
    """The number of (trajectory, step) pairs that are drawn from, for the log."""

    replay_pairs: float = 0.0


class SQDFLearner(Learner):
    """SQDF at work: replay, soft Q, and the critic where it is corrected."""

    state: ReplayState

    def __init__(self, config: SQDF, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.chain, self.trust_region = config, config.weights == "chain", config.trust_region
        self.weigh = StepWeights.of_chain if self.chain else StepWeights.of_path
        self.least_trust = config.trust if config.correction else 0.0
        self.state = ReplayState(config.beta, trust=self.least_trust)
        shape, kept = self.model.shape, max(config.buffer, self.batch)
        self.networks["replay"] = self.replay = Replay(
            kept, self.sampler.steps, shape, max_age=config.max_age, priority=config.priority, importance=config.importance,
            batch=self.batch, world=self.world,
        )  # fmt: skip
        self.belief: Belief | None = None
        if self.model.predicts in ("eps", "score") and config.x0_hat == "reference":
            self.networks["belief"] = self.belief = Belief(self.process, shape)
        self.critic: Critic | None = None
        if config.correction:
            self.critic = Critic(self.process, shape, skip="whole", conditions=self.conditions, network=self.model.critic)
            self.networks["critic"], self.lr["critic"] = self.critic, config.critic_lr
        self.reference_rows = None if config.correction else LOGGED  # without a correction the KL is only logged

    def times(self, generator: torch.Generator) -> Tensor:
        """The sampler's grid as it is on the chain, jittered on the path."""
        return self.sampler.times(self.process) if self.chain else super().times(generator)

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """Trajectories of the policy; on the chain the pretrained model acts in steps without noise."""
        return roll_out_chain(self, prompt, times, generator) if self.chain else super().explore(prompt, times, generator)

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The correction, if there is one, then the policy at random steps of stored trajectories."""
        config, figures = self.config, {}
        self.replay.add(rollout)
        if self.belief is not None and not self.belief.taken:
            self.belief.calibrate(self.world.gather(rollout.x0), self.inside(self.world.gather(rollout.prompt)))
        yield from self._critic_updates(rollout, generator)
        numbers = learnable(self, rollout.acted, chain=self.chain)
        self.state.replay_pairs = float(self.replay.known() * len(numbers))
        for _ in range(config.updates):
            steps, rows = self.replay.draw(self.model, config.rows, numbers, generator)
            steps, grad_value = self._complete(steps, rows, generator)
            term = step_term(self, steps, rows, grad_value, weigh=self.weigh, trust=self.state.trust)
            figures = yield Update("policy", [term])
        adapt_trust(self.state, figures["kl_to_old"], least=self.least_trust, region=config.trust_region)

    def _complete(self, steps: Steps, rows: Rows, generator: torch.Generator) -> tuple[Steps, GradValue]:
        """The steps with the pretrained predictions, and where the soft Q is evaluated for them."""
        if self.chain:
            grad_value: GradValue = partial(self._gradient_ahead, noise_of(self, steps, rows, drawn_seed(generator)))
        else:
            gradient, x0 = self.together(partial(self.gradient, steps.states, self.sampler.steps - steps.step))
            grad_value = known(gradient)
        if not self.chain and self.config.x0_hat == "reference" and self.config.x0_steps == 1:
            pretrained = to_prediction(self.process, "x0", steps.x, steps.t, x0)  # its x0_hat is what was evaluated
        else:
            with torch.no_grad():
                pretrained = self.pretrained(*steps.states)
        return steps._replace(pretrained=pretrained), partial(self._ranked, grad_value) if self.config.priority else grad_value

    def _gradient_ahead(self, z: Tensor, steps: Steps, prediction: Prediction, numbers: Tensor) -> Tensor:
        """The gradient where the policy's own step leads; z is the noise of all rows of the update."""
        return self.gradient(next_states(self, steps, prediction, take(z, numbers)), self.sampler.steps - 1 - steps.step)[0]

    def _ranked(self, grad_value: GradValue, steps: Steps, prediction: Prediction, numbers: Tensor) -> Tensor:
        """The gradient; a row's priority becomes how far, in nats, its policy is from the improved action."""
        gradient = grad_value(steps, prediction, numbers)
        gap = step_gap(self, steps, prediction, gradient, weigh=self.weigh)
        self.replay.set_priority(steps.path, steps.step, gap.cpu())
        return gradient

    def soft_q(self, states: States, *, gradient: bool) -> SoftQ:
        """The soft Q with the chosen x0 predictor."""
        consistency, steps = self.config.x0_hat == "consistency", self.config.x0_steps
        return soft_q(self, states, gradient=gradient, consistency=consistency, steps=steps, belief=self.belief)

    def gradient(self, states: States, left: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the soft Q at states with `left` (rows,) steps to go, discounted or corrected, and its x0_hat."""
        q = self.soft_q(states, gradient=True)
        gradient = expand(self.discount(states.t, left), q.grad) * q.grad
        return gradient if self.critic is None else gradient + self.critic.gradient(*states), q.x0

    def discount(self, s: Tensor, left: Tensor) -> Tensor:
        """The weight of the soft Q at time s with `left` steps to go: by clock time or by steps, (rows,) float64."""
        return self.config.gamma ** left.double() * torch.exp(-self.config.discount_rate * s)

    def _critic_updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The correction: what reward minus KL to go of fresh paths has beyond the soft Q."""
        if self.critic is None:
            return
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        target = (rollout.rewards[None] - self.beta * self._to_go(rollout)).flatten()
        rows = self.world.dealt(*rollout.size, self.config.critic_rows, generator)
        states, updates = take(rollout.steps().states, rows.own), self.config.critic_updates
        look, target = self.together(partial(self.soft_q, states, gradient=False)).value, take(target, rows.own)
        yield from critic_updates(self.critic, states, rows, look, target, updates=updates, generator=generator)

    def _to_go(self, rollout: Rollout) -> Tensor:
        """The KL in nats from each state of the policy to the end, of path or chain as its steps pay it, (n, batch)."""
        if not self.chain:
            return kl_to_go(self.process, self.sampler.eta, rollout)
        steps = chain_kl_steps(self.process, rollout.acted, rollout.difference(), self.sampler.eta)
        return steps.flip(0).cumsum(0).flip(0)


Config = SQDF
