"""SQDF: reparameterised policy gradient of a training-free soft Q, with replay (Kang et al. 2026, arXiv 2512.04559)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from scoreaction.algorithms._critic import fit_critic, kl_to_go
from scoreaction.algorithms._learner import Learner, Regularised, Setting, Update, refuse_black_box, roll_out_chain
from scoreaction.algorithms._pathwise import Decisions, Look, Weights, adapt_trust, given, improved, improvement, stepped
from scoreaction.algorithms._soft_q import SoftQ, soft_q
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.solvers import noise_std
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.critic import Critic
from scoreaction.sampling.experience import Experience, Points, over_rows
from scoreaction.sampling.replay import Drawn, Replay
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Conditions, Prediction


class SQDF(Regularised):
    """`E[-w(s) r(x0_hat(x_s)) + beta KL_step]` with `x_s = mu_theta(x_t) + k z`: one random step of a stored trajectory.

    The soft Q of a step t -> s is the reward of the clean sample that the **pretrained** model predicts from x_s: `x0_hat` by
    its posterior mean (`reference`; `x0_steps` > 1: after that many of its DDIM steps) or a `consistency` model. Nothing is
    trained for it; the gradient goes reward, decoder, predictor, x_s, one policy step.

    weights: `chain` is the published form, where the reference acts in a last step without noise. `path` (ours) is its limit
    of short steps, which means the same at any number of them: x_s becomes x_t, so that the predictor that is asked for the
    gradient is the reference of the KL too, and both are weighed by the integral of g^2 over the step.
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
    trust_region: float = Field(0.1, gt=0, description="with correction: path KL in nats that one iteration may move")
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
            raise ValueError(
                "algorithm.x0_hat: the model has no consistency model; give model.consistency, or x0_hat: reference"
            )
        return SQDFLearner(self, setting)


class SQDFLearner(Learner):
    """SQDF at work: replay, soft Q, and the critic where it is corrected."""

    def __init__(self, config: SQDF, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config = config
        self.chain = config.weights == "chain"
        model, steps = setting.model, setting.sampler.steps
        kept = max(config.buffer, setting.batch)
        self.replay = Replay(
            kept, steps, model.shape, max_age=config.max_age, priority=config.priority, importance=config.importance
        )
        self.networks["replay"] = self.replay
        if config.correction:
            self.critic = Critic(model.process, model.shape, skip="whole", example=setting.conditions)
            self.networks["critic"] = self.critic
            self.lr["critic"] = config.critic_lr
            self.state.update(trust=config.trust, kl_to_old=0.0)
        else:
            self.reference_rows = 32  # the KL is only logged

    def times(self, generator: torch.Generator) -> Tensor:
        return self.setting.sampler.times(self.setting.model.process) if self.chain else super().times(generator)

    def explore(self, conditions: Conditions, n: int, times: Tensor, generator: torch.Generator) -> Rollout:
        if self.chain:
            return roll_out_chain(self, conditions, n, times, generator)
        return super().explore(conditions, n, times, generator)

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        self.replay.add(experience)
        if self.config.correction:
            self.critic.scale.calibrate(experience.rewards)
            yield from self._critic_updates(experience, generator)
        process, eta = self.setting.model.process, self.setting.sampler.eta
        times = experience.rollout.times
        # on the chain a step without noise is the reference's; on the path the score says nothing of x0 at pure noise
        acts = noise_std(process, times[:-1], times[1:], eta) > 0 if self.chain else process.alpha(times[:-1]) > 0
        steps = acts.nonzero().flatten()
        if len(steps) == 0:
            raise ValueError("sampler.steps: one step from pure noise to data has nothing to learn from; use at least 2")
        pairs = len(self.replay.held()) * len(steps)
        trust = self.state["trust"] if self.config.correction else 0.0  # a soft Q that is not learned does not run away
        moved: list[float] = []
        for _ in range(self.config.updates):
            drawn = self.replay.draw(self.config.rows, steps, generator)
            decisions, look = self._rows(drawn, len(steps), generator)
            moved.clear()
            for update in improvement(self, decisions, look, trust=trust):
                moved.append(update.metrics["kl_to_old"])
                yield replace(update, metrics=update.metrics | {"replay_pairs": float(pairs)})
        if self.config.correction:
            adapt_trust(self.state, sum(moved) / len(moved), least=self.config.trust, region=self.config.trust_region)

    def _rows(self, drawn: Drawn, steps: int, generator: torch.Generator) -> tuple[Decisions, Look]:
        """The drawn rows as decisions, and where the soft Q is asked for them."""
        model, eta = self.setting.model, self.setting.sampler.eta
        points = Points(drawn.x.to(model.device), drawn.t, self.setting.conditions, drawn.groups)
        if self.chain:
            weights, reference = Weights.of_chain(model.process, drawn.t, drawn.s, eta), self._pretrained(points)
            look: Look = partial(self._ahead, drawn, generator)
        else:
            weights = Weights.of_path(model.process, drawn.t, drawn.s, eta)
            grad, clean = self.grad_q(points, drawn.groups, self.setting.sampler.steps - drawn.step)
            same = self.config.x0_hat == "reference" and self.config.x0_steps == 1
            reference = clean if same else self._pretrained(points)
            look = partial(given, grad)
        if self.config.priority:
            look = partial(self._ranked, drawn, look)
        scale, index = drawn.importance * steps, torch.arange(len(drawn.t))
        return Decisions(points, drawn.s, drawn.groups, weights, reference, drawn.old.to(points.x.device), scale, index), look

    @torch.no_grad()
    def _pretrained(self, points: Points) -> Tensor:
        """The reference's x0_hat."""
        ask = partial(self.setting.model.reference, guidance=self.setting.sampler.guidance)
        return over_rows(ask, points, self.setting.max_rows).x0

    def _ahead(self, drawn: Drawn, generator: torch.Generator, decisions: Decisions, prediction: Prediction) -> Tensor:
        """The gradient where the policy's own step leads."""
        left = self.setting.sampler.steps - 1 - drawn.step[decisions.index]
        return self.grad_q(stepped(self.setting, decisions, prediction, generator), decisions.groups, left)[0]

    def _ranked(self, drawn: Drawn, look: Look, decisions: Decisions, prediction: Prediction) -> Tensor:
        """The gradient; a row's priority becomes how far, in nats, its policy is from the improved action."""
        grad, rows = look(decisions, prediction), decisions.index
        aim = improved(
            decisions.weights, grad_value=grad, reference=decisions.reference, old=decisions.old, beta=self.beta, trust=0.0
        )
        gap = decisions.weights.stay.to(grad) / 2 * sum_event((prediction.x0 - aim) ** 2)
        self.replay.set_priority(drawn.slot[rows], drawn.step[rows], gap.cpu())
        return grad

    def soft_q(self, points: Points, groups: Tensor, *, slope: bool) -> SoftQ:
        """The soft Q with the chosen x0 predictor."""
        consistency, steps = self.config.x0_hat == "consistency", self.config.x0_steps
        return soft_q(self, points, groups, slope=slope, consistency=consistency, steps=steps)

    def grad_q(self, points: Points, groups: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the soft Q at points with `left` (rows,) steps to go, discounted or corrected, and its x0_hat."""
        found = self.soft_q(points, groups, slope=True)
        grad = expand(self.discount(points.t, left), found.grad) * found.grad
        if self.config.correction:
            grad = grad + self.critic.slope(points.x, points.t, points.conditions)
        return grad, found.x0

    def discount(self, s: Tensor, left: Tensor) -> Tensor:
        """The weight of the soft Q at time s with `left` steps to go: by clock time or by steps, (rows,) float64."""
        return self.config.gamma ** left.double() * torch.exp(-self.config.discount_rate * s)

    def _critic_updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        steps, batch = experience.size
        order = torch.randperm(steps * batch, generator=generator)[: self.config.critic_rows]
        points, groups = experience.points().take(order), experience.groups.repeat(steps)
        look = self.soft_q(points, groups[order.to(groups.device)], slope=False).value
        target = (experience.rewards[None] - self.beta * kl_to_go(self.setting, experience)).flatten()[order.to(look.device)]
        yield from fit_critic(self.critic, points, look, target, updates=self.config.critic_updates, generator=generator)


Config = SQDF
