"""VARD: a learned value of intermediate states, back-propagated through one policy step (Dai et al. 2025, arXiv 2505.15791)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._tokens import TokenLearner, TokenSettings, refuse_large_vocabulary
from scoreaction.algorithms._trust import TrustState, adapt_trust
from scoreaction.algorithms._updates import Updates
from scoreaction.algorithms._value import kl_to_go, visited_updates
from scoreaction.algorithms.score_action import score_action_update
from scoreaction.networks.critic import Critic
from scoreaction.sampling.rollout import Rollout, Steps


class VARD(Regularised):
    """`E[-V(x_s) + beta KL_step]` with `x_s = mu_theta(x_t) + k z`, V(s, x) a network fitted to the rewards of visited states.

    Only rewards are needed, so a black box will do. V is of reward minus the KL still to be paid, which makes the
    tilted law the optimum; `kl_to_go: false` leaves that out, as published. Both terms are the path's, the limit of short
    steps, in which x_s becomes x_t: `c g^2 <grad V, s>` against `beta/2 (c/eta)^2 g^2 ||s - s_pre||^2`, the loss of Score as
    Action with this V. V sees a state as far as it is signal, so that its gradient vanishes at pure noise as the true one
    does. trust and trust_region as there.

    >>> VARD(beta=0.5).kl_to_go
    True
    """

    name: Literal["vard"] = "vard"
    kl_to_go: bool = True
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="random (path, time) points in an update")
    critic_updates: int = Field(64, ge=1)
    critic_lr: float = Field(2e-3, gt=0)
    trust: float = Field(1.0, ge=0, description="least penalty on leaving the old policy, in betas")
    trust_region: float = Field(0.1, gt=0, description="path KL in nats that one iteration may move")

    def build(self, setting: Setting) -> VARDLearner:
        if setting.sampler.eta == 0:
            raise ValueError("sampler.eta: vard needs the path's KL, which is infinite at eta 0; set it above 0, 1 is safe")
        return VARDLearner(self, setting)

    def build_on_tokens(self, setting: Setting) -> TokenLearner:
        refuse_large_vocabulary(setting)
        return TokenLearner(TokenSettings(**self.model_dump(include=set(TokenSettings._fields))), setting)


class VARDLearner(Learner):
    """VARD at work: the value network and the trust region."""

    late_rewards = True
    state: TrustState

    def __init__(self, config: VARD, setting: Setting) -> None:
        super().__init__(setting, kl_target=config.kl_target)
        self.config, self.state = config, TrustState(config.beta, trust=config.trust)
        self.trust_region = config.trust_region
        shape, network = self.model.shape, self.model.critic
        self.critic = Critic(self.process, shape, skip="signal", conditions=self.conditions, network=network)
        self.networks["critic"], self.lr["critic"] = self.critic, config.critic_lr

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The critic at all states of the paths, then the policy at random steps of them."""
        config, steps, figures = self.config, rollout.steps(), {}
        self.critic.scale.calibrate(self.world.gather(rollout.rewards))
        yield from self._critic_updates(rollout, generator)
        chosen = self.world.dealt(*rollout.size, config.updates * config.rows, generator)
        for rows in chosen.chunk(config.updates):
            figures = yield score_action_update(self, steps, rows, self._gradient, trust=self.state.trust)
        adapt_trust(self.state, figures["kl_to_old"], least=config.trust, region=config.trust_region)

    def _gradient(self, steps: Steps, numbers: Tensor) -> Tensor:
        return self.critic.gradient(*steps.states)

    def _critic_updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        to_go = self.beta * kl_to_go(self.process, self.sampler.eta, rollout) if self.config.kl_to_go else None
        count = self.config.critic_updates
        yield from visited_updates(self, self.critic, rollout, to_go, updates=count, generator=generator)


Config = VARD
