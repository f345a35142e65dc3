"""Score as Action: continuous-time policy gradient with the score as action (Zhao et al. 2025, arXiv 2502.01819)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised, Setting, Update, unflattened
from scoreaction.algorithms._likelihood import Steps, ratio_updates, refuse_without_density, steps_taken
from scoreaction.algorithms._lookahead import Rates, lookahead_loss, noise_weight, perturbed
from scoreaction.gaussians import sum_event
from scoreaction.kl import score_weight
from scoreaction.rollout import Experience, Points, Rollout, roll_out
from scoreaction.solvers import jittered
from scoreaction.types import Conditions, Prediction
from scoreaction.value import Critic, Surrogate, zeroth_order

LookAhead = Literal["auto", "reward", "surrogate", "zeroth_order", "none"]


class ScoreAction(Regularised):
    """`max E[r(x0)] - beta KL` over scores, with a critic V of the diffusion's own structure.

    The policy is Gaussian around the score. Both estimators of its gradient rest on the advantage rate
    `q = c g^2 <grad V, a - s> - (beta/2)(c/eta)^2 g^2 (||a - s_pre||^2 - ||s - s_pre||^2)` (see `advantage_rate`):

    - `pathwise` goes through grad V: it moves eps towards `eps_pre - (eta^2/c) sigma grad V/beta`;
    - `likelihood_ratio` weighs densities by `V(x_s) - V(x_t) - beta KL_step`, lambda-averaged, with PPO's clip.

    The integral over time is taken at random visited times with importance weights in continuous time, so it means the
    same at any number of steps. `trust` (in betas) penalises the path KL to the old policy, and adapts so that one
    iteration moves at most `trust_region` nats of it. `look_ahead` is what stands in the critic's skip
    `c_skip r(x0_hat)`: the reward's own value and gradient, a fitted `surrogate` of a black-box reward, its `zeroth_order`
    gradient, or nothing; `auto` takes `reward` where it is differentiable and `surrogate` where not. At eta = 0 the cost is
    `beta/2 integral g^2 ||a - s_pre||^2`, and `exploration` (std of eps) must be positive.

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
        self.rates = Rates.at(setting.sampler.eta)
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

    def explore(self, conditions: Conditions, n: int, generator: torch.Generator) -> Rollout:
        model, sampler, size = self.setting.model, self.setting.sampler, self.config.exploration
        times = jittered(sampler.times(model.process), generator)

        def explore(x: Tensor, t: Tensor, prediction: Prediction) -> Prediction:
            return perturbed(model.process, x, t, prediction, size, generator)

        policy = self.policy(conditions)
        return roll_out(model, sampler, policy, n, generator, times=times, explore=explore if size > 0 else None)

    def prepare(self, experience: Experience, generator: torch.Generator) -> Valued:
        """Asks the reference everywhere, with the gradient of the look-ahead at the points that updates will use."""
        if self.look_ahead == "surrogate":
            self.surrogate.remember(experience.rollout.x0, experience.groups, experience.rewards)
            self.surrogate.fit_line()
        steps, batch = experience.size
        everywhere = self.config.estimator == "likelihood_ratio"
        wanted = steps * batch if everywhere else min(steps * batch, self.config.updates * self.config.rows)
        order = torch.randperm(steps * batch, generator=generator)
        chosen, others = order[:wanted], order[wanted:]
        points = experience.points()
        guidance, limit = self.setting.sampler.guidance, self.setting.max_rows

        def reference(x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
            return self.setting.model.reference(x, t, conditions, guidance=guidance)

        parts = [self._look(points.take(rows), rows % batch, generator) for rows in chosen.split(limit)]
        predictions = [part[0] for part in parts]
        with torch.no_grad():
            predictions += [
                reference(p.x, p.t, p.conditions) for p in (points.take(rows) for rows in others.split(limit) if len(rows))
            ]
        inverse = torch.argsort(order).to(points.x.device)
        flat = Prediction(torch.cat([p.x0 for p in predictions])[inverse], torch.cat([p.eps for p in predictions])[inverse])
        compared = replace(experience, reference=unflattened(flat, steps))
        target = experience.rewards[None] - self.beta * self.kl_to_go(compared)
        self.critic.scale.calibrate(experience.rewards)
        look, grad_look = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
        fields = {name: getattr(compared, name) for name in Experience.__dataclass_fields__}
        return Valued(**fields, chosen=chosen, look=look, grad_look=grad_look, target=target.flatten()[chosen])

    def _look(self, points: Points, trajectory: Tensor, generator: torch.Generator) -> tuple[Prediction, Tensor, Tensor]:
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
                    look = self.setting.judge.score(said.x0, trajectory)
                case "surrogate":
                    look = self.surrogate(said.x0, points.conditions)
                case _:
                    score = self.setting.judge.score
                    look = zeroth_order(lambda x0: score(x0, trajectory), said.x0, self.config.zeroth_order_std, generator)
            (grad,) = torch.autograd.grad(look.sum(), x)
        return Prediction(said.x0.detach(), said.eps.detach()), look.detach(), grad

    def running_cost(self, experience: Experience) -> Tensor:
        """`charge/2 integral of g^2 ||s - s_pre||^2` over each step, in nats at eta > 0: (N, batch).

        Trapezoid in the squared score difference, with the integral of g^2 over the step; the last step, which ends where no
        score was asked, takes its beginning. Trapezoid in log SNR would weigh the steps next to the data too much.
        """
        times, process = experience.rollout.times, self.setting.model.process
        t, s = times[:-1], times[1:]
        squares = torch.stack([sum_event(step**2) for step in experience.difference().eps])
        squares = squares / process.sigma2(t).to(squares)[:, None]
        ahead = torch.cat([squares[1:], squares[-1:]])
        weight = self.rates.charge / 2 * score_weight(process, t, s)
        return weight.to(squares)[:, None] * (squares + ahead) / 2

    def kl_to_go(self, experience: Experience) -> Tensor:
        """The running cost from each visited state to the end: (N, batch)."""
        return self.running_cost(experience).flip(0).cumsum(0).flip(0)

    def value(self, points: Points, look: Tensor) -> Tensor:
        """V at these points."""
        return self.critic(points.x, points.t, points.conditions, look)

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        assert isinstance(experience, Valued)
        if self.look_ahead == "surrogate":
            yield from self._surrogate_updates(experience, generator)
        yield from self._critic_updates(experience, generator)
        if self.config.estimator == "pathwise":
            yield from self._pathwise_updates(experience)
        else:
            yield from self._ratio_updates(experience, generator)

    def _surrogate_updates(self, experience: Valued, generator: torch.Generator) -> Iterator[Update]:
        for _ in range(self.config.surrogate_updates):
            loss = self.surrogate.loss(64, generator)
            yield Update(loss, "surrogate", {"surrogate_loss": float(loss.detach())})

    def _critic_updates(self, experience: Valued, generator: torch.Generator) -> Iterator[Update]:
        """The martingale loss `E integral (V(t, x_t) - target)^2 dt`: V is the conditional mean of reward minus KL to go."""
        points = experience.points().take(experience.chosen)
        spread = float(self.critic.scale.spread)
        size = max(1, len(experience.chosen) // 8)
        for _ in range(self.config.critic_updates):
            rows = torch.randint(len(experience.chosen), (size,), generator=generator)
            error = self.value(points.take(rows), experience.look[rows]) - experience.target[rows]
            loss = (error / spread).square().mean()
            yield Update(loss, "critic", {"critic_loss": float(loss.detach())})

    def grad_value(self, points: Points, experience: Valued, rows: Tensor) -> Tensor:
        """grad V at these points: `c_skip grad r(x0_hat) + c_out grad F`, (rows, *shape)."""
        with torch.enable_grad():
            x = points.x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(self.critic(x, points.t, points.conditions, None).sum(), x)
        c_skip = self.critic.coefficients(points.t)[0].to(x)
        return grad + c_skip.reshape(-1, *[1] * (x.ndim - 1)) * experience.grad_look[rows]

    def _pathwise_updates(self, experience: Valued) -> Iterator[Update]:
        setting, process = self.setting, self.setting.model.process
        steps, batch = experience.size
        times = experience.rollout.times
        weights = noise_weight(process, times[:-1], times[1:]).repeat_interleave(batch)
        assert experience.reference is not None
        reference, old = experience.reference.eps.flatten(0, 1), experience.rollout.prediction.eps.flatten(0, 1)
        everything = experience.points()
        moved: list[Tensor] = []
        groups = torch.arange(len(experience.chosen)).chunk(self.config.updates)
        for group in groups:
            pieces = group.split(setting.max_rows)
            for i, local in enumerate(pieces):
                rows = experience.chosen[local]
                points, weight = everything.take(rows), weights[rows]
                grad = self.grad_value(points, experience, local)
                eps = self.policy(points.conditions)(points.x, points.t).eps
                loss = lookahead_loss(
                    eps,
                    sigma=process.sigma(points.t),
                    weight=weight,
                    grad_value=grad,
                    reference=reference[rows],
                    old=old[rows],
                    beta=self.beta,
                    trust=self.state["trust"] * self.beta,
                    rates=self.rates,
                )
                squares = weight.to(eps) * sum_event((eps.detach() - old[rows]) ** 2)
                moved.append(self.rates.charge / 2 * squares)
                # every time is drawn with probability 1/N, so its weight is N: the integral, not its mean
                yield Update(loss.sum() * steps / len(group), "policy", {}, step=i == len(pieces) - 1)
        self._adapt_trust(float(torch.cat(moved[-len(pieces) :]).mean()) * steps)

    def _adapt_trust(self, kl_to_old: float) -> None:
        """Doubles the penalty on leaving the old policy where the last update found it too far, and lets it fall back."""
        factor = 2.0 if kl_to_old > self.config.trust_region else 0.9
        self.state.update(kl_to_old=kl_to_old, trust=max(self.config.trust, self.state["trust"] * factor))

    def _ratio_updates(self, experience: Valued, generator: torch.Generator) -> Iterator[Update]:
        setting = self.setting
        steps = steps_taken(setting, experience, exploration=self.config.exploration)
        advantage = self.advantages(experience).flatten()[steps.index * experience.size[1] + steps.trajectory]

        moved: list[Tensor] = []

        def penalty(prediction: Prediction, part: Steps) -> Tensor:
            weight = self.rates.charge / 2 * noise_weight(setting.model.process, part.points.t, part.s)
            assert part.reference is not None
            stay = weight.to(prediction.eps) * sum_event((prediction.eps - part.reference.eps) ** 2)
            leave = weight.to(prediction.eps) * sum_event((prediction.eps - part.old.eps) ** 2)
            moved.append(leave.detach())
            return self.beta * (stay + self.state["trust"] * leave)

        yield from ratio_updates(
            self,
            steps,
            advantage,
            penalty=penalty,
            clip=self.config.clip,
            epochs=1,
            minibatches=self.config.updates,
            generator=generator,
        )
        self._adapt_trust(float(moved[-1].mean()) * experience.size[0])

    @torch.no_grad()
    def advantages(self, experience: Valued) -> Tensor:
        """`sum lambda^k (V(x_s) - V(x_t) - beta cost)` over the steps to come, V(x_0) = r: (N, batch).

        Schulman et al. 2016 (arXiv 1506.02438), eq. 16, without a discount.
        """
        steps, batch = experience.size
        points = experience.points().take(experience.chosen)
        pieces = torch.arange(len(experience.chosen)).split(self.setting.max_rows)
        values = torch.cat([self.value(points.take(rows), experience.look[rows]) for rows in pieces])
        value = torch.empty_like(values)
        value[experience.chosen] = values
        value = torch.cat([value.reshape(steps, batch), experience.rewards[None].to(value)])
        gain = value[1:] - value[:-1] - self.beta * self.running_cost(experience)
        out, ahead = [], torch.zeros_like(gain[0])
        for step in reversed(range(steps)):
            ahead = gain[step] + self.config.gae_lambda * ahead
            out.append(ahead)
        return torch.stack(out[::-1])


Config = ScoreAction
