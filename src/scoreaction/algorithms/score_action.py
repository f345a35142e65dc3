"""Score as Action: continuous-time policy gradient with the score as action (Zhao et al. 2025, arXiv 2502.01819)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised
from scoreaction.algorithms._likelihood_ratio import refuse_without_density
from scoreaction.algorithms._score_action_forward import ForwardLearner, ForwardSettings, refuse_memory
from scoreaction.algorithms._score_action_ratio import RatioLearner, RatioSettings
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._tokens import TokenLearner, TokenRatioLearner, TokenSettings, refuse_large_vocabulary
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.algorithms._value import LookAhead, StateValue, ValuedRollout
from scoreaction.algorithms._windows import Window, refuse_windows
from scoreaction.diffusion.kl import drift_rate, g2_integral, kl_rate
from scoreaction.diffusion.predictions import score
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout, Steps
from scoreaction.world import Rows


class ScoreAction(Regularised):
    """`max E[r(x0)] - beta KL` over scores, with a critic V of the diffusion's own structure.

    The policy is Gaussian around the score. All estimators of its gradient rest on the advantage rate
    `q = c g^2 <grad V, a - s> - (beta/2)(c/eta)^2 g^2 (||a - s_pre||^2 - ||s - s_pre||^2)` (see `advantage_rate`):

    - `pathwise` goes through grad V: it moves eps towards `eps_pre - (eta^2/c) sigma grad V/beta`;
    - `likelihood_ratio` weighs densities by `V(x_s) - V(x_t) - beta KL_step`, lambda-averaged, with PPO's clip;
    - `forward` noises the clean samples again, `each` times, and takes grad V from the noising kernel:
      `E[(r - V_r) grad log q(x_t|x0)/p(x_t) | x_t] - beta grad K`, V_r the prompt's mean reward and a fitted value of the rest,
      K a fitted value of the KL to go. It needs rewards alone, and eta 1. Samples are those of a policy that follows the
      trained one with the decay `averaging`.

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
    estimator: Literal["pathwise", "likelihood_ratio", "forward"] = "pathwise"
    look_ahead: LookAhead = "auto"
    skip: Literal["alpha", "cosine"] = "alpha"
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="random (path, time) points in an update")
    each: int = Field(8, ge=1, description="times that forward noises a sample")
    errors: Literal["auto", "x0", "eps", "own"] = Field(
        "auto", description="what forward's errors count; eps of vectors, else x0"
    )
    averaging: float = Field(0.0, ge=0, lt=1, description="of forward: how slowly what samples follows the trained weights")
    critic_updates: int = Field(32, ge=1)
    surrogate_updates: int = Field(48, ge=1)
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="least penalty on leaving the old policy, in betas")
    trust_region: float = Field(0.1, gt=0, description="path KL in nats that one iteration may move")
    exploration: float = Field(0.0, ge=0, description="std of eps around the policy's")
    clip: float = Field(0.2, gt=0, description="of the likelihood ratio")
    gae_lambda: float = Field(0.95, ge=0, le=1)
    window: Window = Field(Window(), description="of likelihood_ratio: the steps that an iteration trains")
    branches: int = Field(1, ge=1, description="of likelihood_ratio: trajectories that go on from where it begins")
    zeroth_order_std: float = Field(0.05, gt=0)

    def build(self, setting: Setting) -> Learner:
        if self.estimator != "likelihood_ratio":
            why = f"the {self.estimator} estimator has none; set algorithm.estimator to likelihood_ratio"
            refuse_windows(self.window, self.branches, why)
        if self.estimator == "forward":
            refuse_memory(setting, self.exploration)
            return ForwardLearner(self._forward(setting), setting)
        if setting.sampler.eta == 0 and self.exploration == 0:
            raise ValueError(
                "algorithm.exploration: at sampler.eta 0 nothing else explores; set it to 0.1, or sampler.eta to 1 (the optimum"
                " of eta 0 is not the tilted law)"
            )
        if self.estimator == "pathwise":
            return ScoreActionLearner(self, setting)
        if self.exploration == 0:
            refuse_without_density(setting, "the likelihood_ratio estimator")
        return RatioLearner(RatioSettings(**{name: getattr(self, name) for name in RatioSettings._fields}), setting)

    def _forward(self, setting: Setting) -> ForwardSettings:
        """The forward estimator's settings: errors of vectors count as those of eps, all times alike, and of pictures as x0."""
        values = self.model_dump(include=set(ForwardSettings._fields))
        if self.errors == "auto":
            values["errors"] = "eps" if len(setting.model.shape) == 1 else "x0"
        return ForwardSettings(**values)

    def build_on_tokens(self, setting: Setting) -> Learner:
        refuse_windows(self.window, self.branches, "of tokens dpok, ddpo and hrf have them; take one of these")
        if self.look_ahead not in ("auto", "none"):
            raise ValueError(
                f"algorithm.look_ahead: {self.look_ahead} is a gradient of the reward, and tokens have none; leave it at auto"
            )
        if self.estimator == "forward" or self.exploration:
            raise ValueError(
                "algorithm.estimator: forward, and exploration, are of Gaussian noise, and this model's states are tokens; use"
                " pathwise or likelihood_ratio, and exploration 0"
            )
        settings = TokenSettings(**self.model_dump(include=set(TokenSettings._fields)))
        if self.estimator == "likelihood_ratio":
            return TokenRatioLearner(settings, setting, clip=self.clip, gae_lambda=self.gae_lambda)
        refuse_large_vocabulary(setting)
        return TokenLearner(settings, setting)


FORESEEN, BLIND, KNOWN = 0.05, 5, 256
"""A surrogate that has seen so many samples, and foresees less than this share of a batch's variance, is told of after five."""


@dataclass
class PathwiseState(TrustState):
    """The trust region, and the surrogate.

    surrogate_r2: the share of the last batch's variance of rewards that it had foreseen; blind: how many batches on end that
    was less than `FORESEEN`; warned: True once a line has said so.
    """

    surrogate_r2: float | None = None
    blind: int = 0
    warned: bool = False


class ScoreActionLearner(Learner):
    """The pathwise estimator: the policy follows the gradient of the critic within a trust region."""

    late_rewards = True
    state: PathwiseState

    def __init__(self, config: ScoreAction, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.exploration, self.trust_region = config, config.exploration, config.trust_region
        self.state = PathwiseState(config.beta, trust=config.trust)
        self.value = StateValue(
            self, look_ahead=config.look_ahead, skip=config.skip, lr=config.critic_lr, std=config.zeroth_order_std
        )

    def prepare(self, rollout: Rollout, generator: torch.Generator) -> ValuedRollout:
        """The pretrained model at every state; the look-ahead with its gradient at those that updates will use."""
        self._foresee(self.value.remember(rollout))
        chosen = self.world.dealt(*rollout.size, self.config.updates * self.config.rows, generator)
        valued = self.value.prepare(rollout, chosen, generator)
        self.value.critic.scale.calibrate(self.world.gather(rollout.rewards))
        return valued

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The surrogate, the critic, and the policy at random steps, each counting for all steps of its path."""
        assert isinstance(rollout, ValuedRollout)
        config, steps, figures = self.config, rollout.steps(), {}
        yield from self.value.surrogate_updates(config.surrogate_updates, generator)
        yield from self.value.updates(rollout, critic=config.critic_updates, generator=generator)
        first = 0
        for rows in rollout.chosen.chunk(config.updates):
            grad_value = partial(self._grad_value, rollout.grad_look[first : first + len(rows)])
            first += len(rows)
            figures = yield score_action_update(self, steps, rows, grad_value, trust=self.state.trust)
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def _foresee(self, share: float | None) -> None:
        """Keeps what the surrogate had foreseen of a batch, and says once that it foresees nothing."""
        state, surrogate = self.state, self.value.surrogate
        state.surrogate_r2 = share
        if share is None or surrogate is None or int(surrogate.seen) < KNOWN:
            return
        state.blind = state.blind + 1 if share < FORESEEN else 0
        if state.blind == BLIND and not state.warned:
            state.warned = True
            if self.world.leads:
                logging.getLogger(__name__).warning(
                    "the surrogate of the reward has foreseen less than %.0f %% of the rewards' variance in each of %d batches:"
                    " its slope, which the pathwise estimator follows, says little; try algorithm.estimator=forward",
                    100 * FORESEEN, BLIND,
                )  # fmt: skip

    def _grad_value(self, grad_look: Tensor, steps: Steps, numbers: Tensor) -> Tensor:
        return self.value.gradient(steps.states, take(grad_look, numbers))


def score_action_update(
    learner: Learner, steps: Steps, rows: Rows, grad_value: Callable[[Steps, Tensor], Tensor], *, trust: float
) -> Update:
    """The policy update of `score_action_loss` at these rows of the steps, trust in betas.

    `grad_value(part, numbers)` is grad V at a part of the rows, (part, *shape); numbers are those of its rows in the update.
    The log has `kl_to_old`, the path KL to the behaviour policy over a whole path.
    """
    process, eta, beta = learner.process, learner.sampler.eta, learner.beta

    def loss(numbers: Tensor) -> Loss:
        part = take(steps, rows.own[numbers])
        assert part.pretrained is not None
        action = score(process, part.t, learner.policy(*part.states))
        old, pretrained = score(process, part.t, part.old), score(process, part.t, part.pretrained)
        fixed = {"old": old, "pretrained": pretrained, "grad_value": grad_value(part, numbers)}
        g2dt = g2_integral(process, part.t, part.s).to(action)
        value = score_action_loss(action, **fixed, g2dt=g2dt, eta=eta, beta=beta, trust=trust * beta)
        weight, kl_to_old = part.weight.to(value), kl_rate(eta) / 2 * g2dt * sum_event((action - old) ** 2)
        return weight * value, {"kl_to_old": weight * kl_to_old}

    return Update("policy", [Term(rows, loss)])


def score_action_loss(
    action: Tensor, *, old: Tensor, pretrained: Tensor, grad_value: Tensor, g2dt: Tensor, eta: float, beta: float, trust: float
) -> Tensor:
    """Minus the advantage of acting with this score over a step, and a penalty on leaving the old policy, (rows,).

    `-q dt + trust (c/eta)^2/2 g2dt ||a - s_old||^2`, q the `advantage_rate` and g2dt the integral of g^2 over the step. At the
    old policy its gradient is the policy gradient's, `E integral (ds)^T [c g^2 grad V - beta (c/eta)^2 g^2 (s - s_pre)]`.
    """
    advantage = advantage_rate(action, old=old, pretrained=pretrained, grad_value=grad_value, g2=g2dt, eta=eta, beta=beta)
    return trust * kl_rate(eta) / 2 * g2dt * sum_event((action - old) ** 2) - advantage


def advantage_rate(
    action: Tensor, *, old: Tensor, pretrained: Tensor, grad_value: Tensor, g2: Tensor, eta: float, beta: float
) -> Tensor:
    """The advantage per unit of time of acting with the score `action`, where the old policy's is `old`, (rows,).

    `q = c g^2 <grad V, a - s_old> - (beta/2)(c/eta)^2 g^2 (||a - s_pre||^2 - ||s_old - s_pre||^2)`: closed form, with no
    Hessian and no time derivative, because the drift is affine in the action and the noise is free of it. All tensors
    (rows, *shape), g2 (rows,). Zhao et al. 2025 (arXiv 2502.01819), theorem 3 and eq. 18.
    `J(theta) - J(old) = E_theta integral of q dtau`.
    """
    gain = drift_rate(eta) * sum_event(grad_value * (action - old))
    cost = kl_rate(eta) / 2 * (sum_event((action - pretrained) ** 2) - sum_event((old - pretrained) ** 2))
    return g2 * (gain - beta * cost)


Config = ScoreAction
