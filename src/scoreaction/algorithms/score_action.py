"""Score as Action: continuous-time policy gradient with the score as action (Zhao et al. 2025, arXiv 2502.01819)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._critic import calibrated, critic_updates, kl_to_go, running_cost
from scoreaction.algorithms._learner import Learner, Regularised, Setting, Update, unflattened
from scoreaction.algorithms._likelihood_ratio import Steps, ratio_updates, refuse_without_density, steps_taken
from scoreaction.algorithms._pathwise import Decisions, Weights, adapt_trust, decisions_at, improvement, perturbed
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.critic import Critic
from scoreaction.networks.surrogate import Surrogate, zeroth_order
from scoreaction.sampling.experience import Experience, Points
from scoreaction.sampling.rollout import Rollout, roll_out
from scoreaction.types import Conditions, Prediction

HOLD = 10.0
"""The price of a nat below `hold_below`, in betas."""
LookAhead = Literal["auto", "reward", "surrogate", "zeroth_order", "none"]


class ScoreAction(Regularised):
    """`max E[r(x0)] - beta KL` over scores, with a critic V of the diffusion's own structure.

    The policy is Gaussian around the score. Both estimators of its gradient rest on the advantage rate
    `q = c g^2 <grad V, a - s> - (beta/2)(c/eta)^2 g^2 (||a - s_pre||^2 - ||s - s_pre||^2)` (see `advantage_rate`):

    - `pathwise` goes through grad V: it moves eps towards `eps_pre - (eta^2/c) sigma grad V/beta`;
    - `likelihood_ratio` weighs densities by `V(x_s) - V(x_t) - beta KL_step`, lambda-averaged, with PPO's clip. Close to the
      data little is left to gain and every change costs many nats: below `hold_below` only the KL is learned, at ten times its
      price.

    `pathwise` takes the integral over time at random visited times with importance weights in continuous time, so it means the
    same at any number of steps; `likelihood_ratio` sums over the steps of the chain, and is off on coarse grids. `trust` (in
    betas) penalises the path KL to the old policy, and adapts so that one iteration moves at most `trust_region` nats of it.
    `look_ahead` is what stands in the critic's skip `c_skip r(x0_hat)`: the reward's own value and gradient, a fitted
    `surrogate` of a black-box reward, its `zeroth_order` gradient, or nothing; `auto` takes `reward` where it is differentiable
    and `surrogate` where not. At eta = 0 the cost is `beta/2 integral g^2 ||a - s_pre||^2`, and `exploration` (std of eps) must
    be positive.

    >>> ScoreAction(beta=0.5).estimator
    'pathwise'
    """

    name: Literal["score_action"] = "score_action"
    estimator: Literal["pathwise", "likelihood_ratio"] = "pathwise"
    look_ahead: LookAhead = "auto"
    skip: Literal["alpha", "cosine"] = "alpha"
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="random (path, time) points in an update")
    critic_updates: int = Field(32, ge=1)
    surrogate_updates: int = Field(48, ge=1)
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="least penalty on leaving the old policy, in betas")
    trust_region: float = Field(0.1, gt=0, description="path KL in nats that one iteration may move")
    exploration: float = Field(0.0, ge=0, description="std of eps around the policy's")
    clip: float = Field(0.2, gt=0, description="of the likelihood ratio")
    gae_lambda: float = Field(0.95, ge=0, le=1)
    zeroth_order_std: float = Field(0.05, gt=0)
    hold_below: float = Field(0.0, ge=0, lt=1, description="time below which likelihood_ratio holds on to the pretrained model")

    def build(self, setting: Setting) -> ScoreActionLearner:
        if setting.sampler.eta == 0 and self.exploration == 0:
            raise ValueError(
                "algorithm.exploration: at sampler.eta 0 nothing else explores; set it to 0.1, or sampler.eta to 1 (the optimum"
                " of eta 0 is not the tilted law)"
            )
        if self.estimator == "likelihood_ratio" and self.exploration == 0:
            refuse_without_density(setting, "the likelihood_ratio estimator")
        if self.look_ahead == "reward" and not setting.judge.differentiable:
            raise ValueError(
                "algorithm.look_ahead: this reward has no gradient; use surrogate, zeroth_order or none, or wrap it in"
                " Reward(fn, differentiable=True)"
            )
        return ScoreActionLearner(self, setting)


@dataclass(frozen=True)
class Valued(Experience):
    """Experience with what the critic needs: at `chosen` points (rows,) the look-ahead value, its gradient, the target.

    target is `r(x0) - beta * KL to go` from that point on; look (rows,) and grad_look (rows, *shape) are zero without skip.
    """

    chosen: Tensor = torch.empty(0)
    look: Tensor = torch.empty(0)
    grad_look: Tensor = torch.empty(0)
    target: Tensor = torch.empty(0)


class ScoreActionLearner(Learner):
    """Score as Action at work: critic, look-ahead, trust region."""

    def __init__(self, config: ScoreAction, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config = config
        auto = "reward" if setting.judge.differentiable else "surrogate"
        self.look_ahead = auto if config.look_ahead == "auto" else config.look_ahead
        skip = "none" if self.look_ahead == "none" else config.skip
        self.critic = Critic(setting.model.process, setting.model.shape, skip=skip, example=setting.conditions)
        self.networks["critic"] = self.critic
        self.lr = {"critic": config.critic_lr}
        if self.look_ahead == "surrogate":
            self.surrogate = Surrogate(setting.model.process, setting.model.shape, prompts=setting.conditions)
            self.networks["surrogate"] = self.surrogate
            self.lr["surrogate"] = config.critic_lr
        self.state.update(trust=config.trust, kl_to_old=0.0)

    def explore(self, conditions: Conditions, n: int, times: Tensor, generator: torch.Generator) -> Rollout:
        model, sampler, size = self.setting.model, self.setting.sampler, self.config.exploration

        def act(x: Tensor, t: Tensor, prediction: Prediction) -> Prediction:
            return perturbed(model.process, x, t, prediction, size, generator)

        policy = self.policy(conditions)
        return roll_out(model, sampler, policy, n, generator, times=times, explore=act if size > 0 else None)

    def prepare(self, experience: Experience, generator: torch.Generator) -> Valued:
        """Asks the reference everywhere, with the gradient of the look-ahead at the points that updates will use."""
        steps, batch = experience.size
        everywhere = self.config.estimator == "likelihood_ratio"
        if self.look_ahead == "surrogate" and not everywhere:
            self._learn_rewards(experience)
        wanted = steps * batch if everywhere else min(steps * batch, self.config.updates * self.config.rows)
        order = torch.randperm(steps * batch, generator=generator)
        chosen, others = order[:wanted], order[wanted:]
        points = experience.points()
        guidance, limit = self.setting.sampler.guidance, self.setting.max_rows

        def reference(x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
            return self.setting.model.reference(x, t, conditions, guidance=guidance)

        groups = experience.groups.repeat(steps)
        flat, looks, slopes = Prediction(torch.empty_like(points.x), torch.empty_like(points.x)), [], []

        def keep(rows: Tensor, said: Prediction) -> None:
            near = rows.to(points.x.device)
            flat.x0[near], flat.eps[near] = said.x0, said.eps

        for rows in chosen.split(limit):
            said, look, slope = self._look(points.take(rows), groups[rows.to(groups.device)], generator)
            keep(rows, said)
            looks.append(look)
            slopes.append(slope)
        with torch.no_grad():
            for rows in others.split(limit) if len(others) else ():
                part = points.take(rows)
                keep(rows, reference(part.x, part.t, part.conditions))
        if self.look_ahead == "surrogate" and everywhere:  # after: a baseline must not know the rewards that it is taken off
            self._learn_rewards(experience)
        compared = replace(experience, reference=unflattened(flat, steps))
        target = experience.rewards[None] - self.beta * kl_to_go(self.setting, compared)
        self.critic.scale.calibrate(experience.rewards)
        look, grad_look = torch.cat(looks), torch.cat(slopes)
        fields = {name: getattr(compared, name) for name in Experience.__dataclass_fields__}
        return Valued(**fields, chosen=chosen, look=look, grad_look=grad_look, target=target.flatten()[chosen])

    def _learn_rewards(self, experience: Experience) -> None:
        self.surrogate.remember(experience.rollout.x0, experience.groups, experience.rewards)
        self.surrogate.fit_line()

    def _look(self, points: Points, groups: Tensor, generator: torch.Generator) -> tuple[Prediction, Tensor, Tensor]:
        """The reference's prediction, the look-ahead r(x0_hat) and its gradient in x, at these points."""
        model, guidance = self.setting.model, self.setting.sampler.guidance
        if self.look_ahead == "none":
            with torch.no_grad():
                said = model.reference(points.x, points.t, points.conditions, guidance=guidance)
            return said, said.x0.new_zeros(len(said.x0)), torch.zeros_like(said.x0)
        with torch.enable_grad():
            x = points.x.detach().requires_grad_(True)
            said = model.reference(x, points.t, points.conditions, guidance=guidance)
            match self.look_ahead:
                case "reward":
                    look = self.setting.judge.score(said.x0, groups)
                case "surrogate":
                    look = self.surrogate(said.x0, points.conditions)
                case _:
                    score = self.setting.judge.score
                    look = zeroth_order(lambda x0: score(x0, groups), said.x0, self.config.zeroth_order_std, generator)
            (grad,) = torch.autograd.grad(look.sum(), x)
        return Prediction(said.x0.detach(), said.eps.detach()), look.detach(), grad

    def value(self, points: Points, look: Tensor) -> Tensor:
        """V at these points."""
        return self.critic(points.x, points.t, points.conditions, look)

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        assert isinstance(experience, Valued)
        if self.look_ahead == "surrogate":
            yield from self._surrogate_updates(experience, generator)
        if self.config.estimator == "pathwise":
            yield from self._critic_updates(experience, generator)
            yield from self._pathwise_updates(experience)
        else:
            advantage = self.advantages(experience)  # before the critic has seen what it is a baseline of
            yield from self._critic_updates(experience, generator)
            yield from self._ratio_updates(experience, advantage, generator)

    def _surrogate_updates(self, experience: Valued, generator: torch.Generator) -> Iterator[Update]:
        for _ in range(self.config.surrogate_updates):
            loss = self.surrogate.loss(64, generator)
            yield Update(loss, "surrogate", {"surrogate_loss": float(loss.detach())})

    def _critic_updates(self, experience: Valued, generator: torch.Generator) -> Iterator[Update]:
        points = experience.points().take(experience.chosen)
        yield from critic_updates(
            lambda rows: self.value(points.take(rows), experience.look[rows.to(experience.look.device)]),
            experience.target,
            spread=float(self.critic.scale.spread),
            updates=self.config.critic_updates,
            generator=generator,
        )

    def grad_value(self, points: Points, experience: Valued, rows: Tensor) -> Tensor:
        """grad V at these points: `c_skip grad r(x0_hat) + c_out grad F`, (rows, *shape)."""
        grad = self.critic.slope(points.x, points.t, points.conditions)
        c_skip = self.critic.coefficients(points.t)[0]
        return grad + expand(c_skip, grad) * experience.grad_look[rows.to(grad.device)]

    def _pathwise_updates(self, experience: Valued) -> Iterator[Update]:
        decisions = decisions_at(self.setting, experience, experience.chosen, Weights.of_path)
        moved: list[float] = []
        for rows in torch.arange(len(experience.chosen)).chunk(self.config.updates):
            moved.clear()
            look = partial(self._grad_at, experience)
            for update in improvement(self, decisions.take(rows), look, trust=self.state["trust"]):
                moved.append(update.metrics["kl_to_old"])
                yield replace(update, metrics={})
        self._adapt(sum(moved) / len(moved))

    def _adapt(self, kl_to_old: float) -> None:
        adapt_trust(self.state, kl_to_old, least=self.config.trust, region=self.config.trust_region)

    def _grad_at(self, experience: Valued, decisions: Decisions, prediction: Prediction) -> Tensor:
        return self.grad_value(decisions.points, experience, decisions.index)

    def _ratio_updates(self, experience: Valued, advantage: Tensor, generator: torch.Generator) -> Iterator[Update]:
        config = self.config
        steps = steps_taken(self.setting, experience, exploration=config.exploration, above=config.hold_below)
        moved: list[Tensor] = []
        last = torch.zeros(1)

        def penalty(prediction: Prediction, part: Steps) -> Tensor:
            assert part.reference is not None
            stay, leave = (self._stay(prediction.x0, to.x0, part.points.t, part.s) for to in (part.reference, part.old))
            moved.append(leave.detach())
            return self.beta * (stay + self.state["trust"] * leave)

        held = self._held(experience, steps, generator)
        for update in ratio_updates(
            self,
            steps,
            advantage[steps.index, steps.trajectory],
            penalty=penalty,
            clip=config.clip,
            epochs=1,
            minibatches=config.updates,
            generator=generator,
        ):
            if update.step:
                yield from next(held)
                last = torch.cat(moved)
                moved.clear()
            yield update
        self._adapt(float(last.mean()) * len(steps.s) / experience.size[1])

    def _held(self, experience: Valued, steps: Steps, generator: torch.Generator) -> Iterator[Iterator[Update]]:
        """The KL of the steps that have no ratio, for each minibatch: of the last one, and of those below `hold_below`."""
        times, batch = experience.rollout.times, experience.size[1]
        without = torch.ones(len(times) - 1, dtype=torch.bool)
        without[steps.index.unique()] = False
        step = without.nonzero().flatten().repeat_interleave(batch)
        path = torch.arange(batch).repeat(int(without.sum()))
        for rows in torch.randperm(len(step), generator=generator).tensor_split(self.config.updates):
            yield self._holding(experience, step[rows], path[rows], per_path=len(step) / batch)

    def _holding(self, experience: Valued, step: Tensor, path: Tensor, *, per_path: float) -> Iterator[Update]:
        points, times = experience.points(), experience.rollout.times
        assert experience.reference is not None
        for rows in torch.arange(len(step)).split(self.setting.max_rows) if len(step) else ():
            of, k = path[rows], step[rows]
            part = points.take(k * experience.size[1] + of)
            x0 = self.policy(part.conditions)(part.x, part.t).x0
            price = self.beta * torch.where(part.t < self.config.hold_below, HOLD, 1.0).to(x0)
            cost = price * self._stay(x0, experience.reference.x0[k, of], part.t, times[k + 1])
            yield Update(cost.sum() * per_path / len(step), "policy", step=False)

    def _stay(self, x0: Tensor, other: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The path KL in nats of saying x0 over the step t -> s where `other` was to be said: (rows,)."""
        weights = Weights.of_path(self.setting.model.process, t, s, self.setting.sampler.eta)
        return weights.stay.to(x0) / 2 * sum_event((x0 - other) ** 2)

    @torch.no_grad()
    def advantages(self, experience: Valued) -> Tensor:
        """`sum lambda^k (V(x_s) - V(x_t) - beta cost)` over the steps to come, V calibrated and V(x_0) = r: (N, batch).

        Schulman et al. 2016 (arXiv 1506.02438), eq. 16, without a discount.
        """
        steps, batch = experience.size
        points = experience.points().take(experience.chosen)
        pieces = torch.arange(len(experience.chosen)).split(self.setting.max_rows)
        values = torch.cat([self.value(points.take(rows), experience.look[rows]) for rows in pieces])
        order = experience.chosen.argsort()
        value = calibrated(values[order].reshape(steps, batch), experience.target[order].reshape(steps, batch))
        value = torch.cat([value, experience.rewards[None].to(value)])
        gain = value[1:] - value[:-1] - self.beta * running_cost(self.setting, experience)
        out, ahead = [], torch.zeros_like(gain[0])
        for step in reversed(range(steps)):
            ahead = gain[step] + self.config.gae_lambda * ahead
            out.append(ahead)
        return torch.stack(out[::-1])


Config = ScoreAction
