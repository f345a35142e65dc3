"""ReFL: the reward of a one-step clean prediction at a random late time (Xu et al. 2023, arXiv 2304.05977, algorithm 1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._backprop import refuse_unfit, visited_kl
from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout


class ReFL(Algorithm):
    """`max E r(x0_hat_theta(x_t))`, t a random one of the last `late` share of the steps, one step differentiated.

    One update an iteration; a query a sample for it and one for the log. beta > 0 adds the path KL at `rows` visited states,
    where the published form adds the pretraining loss; without it `kl_nats` in the log is an estimate from a few states of each
    step. late = 0.25: steps 30 to 39 of 40, as published.

    >>> ReFL().late
    0.25
    """

    name: Literal["refl"] = "refl"
    beta: float = Field(0.0, ge=0)
    late: float = Field(0.25, gt=0, le=1)
    rows: int = Field(160, ge=1)

    def build(self, setting: Setting) -> ReFLLearner:
        refuse_unfit(setting, self.name, self.beta)
        return ReFLLearner(self, setting)


class ReFLLearner(Learner):
    """ReFL at work."""

    asks_in_its_update = True

    def __init__(self, config: ReFL, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta)
        self.config = config
        self.reference_rows = None if config.beta else LOGGED  # without a KL it is only logged

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One update: the reward of x0_hat at a late step of each trajectory, and where there is one the KL."""
        (n, batch), terms = rollout.size, []
        if self.beta:
            terms.append(visited_kl(self, rollout, self.world.dealt(n, batch, self.config.rows, generator), 1.0))
        late = max(1, round(self.config.late * n))
        step = self.world.own(torch.randint(n - late, n, (batch * self.world.size,), generator=generator))
        states = take(rollout.steps().states, step * batch + torch.arange(batch))

        def loss(rows: Tensor) -> Loss:
            late = take(states, rows)
            return -self.reward(self.policy(*late).x0, late.prompt), {}

        yield Update("policy", [*terms, Term(batch, loss)])


Config = ReFL
