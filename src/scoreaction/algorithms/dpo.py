"""DPO: the law that preference pairs ask for, without a reward and without sampling (arXiv 2305.18290, 2311.12908)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from scoreaction.algorithms._learner import LOGGED, Learner, Regularised
from scoreaction.algorithms._pairs import LogRatio, NoisedRatio, Weighting, pair_update, path_ratio
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Update, Updates
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout


class DPO(Regularised):
    """`softplus(-beta (A(winner) - A(loser)))` over the pairs of `data`, A the log ratio to the pretrained model.

    Where winners were chosen with probability `sigmoid(r(winner) - r(loser))` (Bradley and Terry 1952), the minimiser is
    `p_pre exp(r/beta)/Z`, whatever law the pairs came from (Rafailov et al. 2023, arXiv 2305.18290, eq. 4). Of Gaussian states
    A is the difference of two evidence bounds at `times` times (weight: `elbo`); `published` is the constant weight and the
    mean over dimensions of Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908, eq. 14: beta 5000, times 1), where every time
    has a beta of its own and the minimiser is no tilt of the pretrained law. Of tokens A is the ratio of a path. The reward is
    only reported; the trajectories of an iteration are for the log.

    >>> DPO(beta=0.1).times
    8
    """

    name: Literal["dpo"] = "dpo"
    learns_from: ClassVar[Literal["pairs"]] = "pairs"
    times: int = Field(8, ge=1, description="times at which a pair is noised; of tokens as many as positions")
    weight: Weighting = "elbo"
    updates: int = Field(8, ge=1, description="policy updates an iteration")
    rows: int = Field(64, ge=1, description="pairs in an update")

    def build(self, setting: Setting) -> DPOLearner:
        return DPOLearner(self, setting, NoisedRatio(self.times, self.weight))

    def build_on_tokens(self, setting: Setting) -> DPOLearner:
        return DPOLearner(self, setting, path_ratio(setting))


class DPOLearner(Learner):
    """DPO at work."""

    reference_rows = LOGGED  # the KL along paths is only logged

    def __init__(self, config: DPO, setting: Setting, ratio: LogRatio) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config, self.ratio = config, ratio

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """Updates on pairs drawn at random."""
        for _ in range(self.config.updates):
            yield self._update(generator)

    def _update(self, generator: torch.Generator) -> Update:
        data, rows = self.data, self.config.rows
        assert data is not None
        assert data.worse is not None
        own = self.world.own(torch.randint(len(data.x0), (rows,), generator=generator))
        x0 = torch.stack([take(data.x0, own), take(data.worse, own)]).to(self.model.device)
        return pair_update(
            self, self.ratio, x0, take(data.prompt, own),
            total=rows, scale=self.beta, reference=self.pretrained, generator=generator,
        )  # fmt: skip


Config = DPO
