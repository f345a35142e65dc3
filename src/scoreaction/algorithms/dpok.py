"""DPOK: policy gradient with the KL to the pretrained model in the loss (Fan et al. 2023, arXiv 2305.16381)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scoreaction.algorithms._baselines import Baseline
from scoreaction.algorithms._ineffective import Ineffective
from scoreaction.algorithms._learner import Regularised
from scoreaction.algorithms._likelihood_ratio import refuse_without_density
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms.ddpo import DDPO, ClippedGradient, DDPOLearner


class DPOK(ClippedGradient, Regularised):
    """DDPO's clipped policy gradient plus `beta E sum_steps KL(p_theta(x_s|x_t) || p_pre(x_s|x_t))` (its eq. 8).

    The KL's gradient is taken at the visited states only, as published; beta is in reward units per nat. Of the baseline
    `group` all groups share one std, that of the batch, so that beta is worth the same for each. Whatever a reward is compared
    with, its own part in that mean is made up for, so that beta is worth the same beside any baseline. ineffective as in
    `DDPO`.

    >>> DPOK(beta=0.5).beta
    0.5
    """

    name: Literal["dpok"] = "dpok"
    baseline: Baseline = "prompt"
    ineffective: Ineffective = Field(Ineffective(), description="groups whose rewards are all equal")

    def build(self, setting: Setting) -> DDPOLearner:
        refuse_without_density(setting, self.name)
        ppo = DDPO(estimator="ppo", **self.model_dump(exclude={"name", "beta", "kl_target"}))
        return DDPOLearner(ppo, setting, beta=self.beta, kl_target=self.kl_target)


Config = DPOK
