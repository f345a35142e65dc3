"""ReFL: the reward of a one-step clean prediction at a random late time (Xu et al. 2023, arXiv 2304.05977, algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field

from scoreaction.algorithms._backprop import refuse_unfit, visited_kl
from scoreaction.algorithms._learner import Algorithm, Learner, Setting, Update
from scoreaction.sampling.experience import Experience


class ReFL(Algorithm):
    """`max E r(x0_hat_theta(x_t))`, t a random one of the last `late` share of the steps, one step differentiated.

    One update an iteration; a query a sample for it and one for the log. beta > 0 adds the path KL at `rows` visited states,
    where the published form adds the pretraining loss. late = 0.25: steps 30 to 39 of 40, as published.

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

    def __init__(self, config: ReFL, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta)
        self.config = config
        self.reference_rows = None if config.beta else 32  # without a KL it is only logged

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        steps, batch = experience.size
        if self.beta:
            yield from visited_kl(self, experience, torch.randperm(steps * batch, generator=generator)[: self.config.rows], 1.0)
        late = max(1, round(self.config.late * steps))
        step = torch.randint(steps - late, steps, (batch,), generator=generator)
        visited = experience.points().take(step * batch + torch.arange(batch))
        pieces = torch.arange(batch).split(self.setting.max_rows)
        for i, rows in enumerate(pieces):
            points = visited.take(rows)
            x0 = self.policy(points.conditions)(points.x, points.t).x0
            score = self.setting.judge.score(x0, experience.groups[rows.to(experience.groups.device)])
            yield Update(-score.sum() / batch, "policy", {}, step=i == len(pieces) - 1)


Config = ReFL
