"""DRaFT: the reward's gradient back through the last sampling steps (Clark et al. 2023, arXiv 2309.17400); DRaFT-K and -LV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoreaction.algorithms._backprop import refuse_unfit, visited_kl
from scoreaction.algorithms._learner import Algorithm, Learner, Setting, Update
from scoreaction.algorithms._pathwise import Weights
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.sampling.experience import Experience
from scoreaction.types import Predict, Prediction


class DRaFT(Algorithm):
    """`max E r(x0) - beta KL`, differentiated through the last `last` steps (all with null), noise held fixed.

    One update an iteration, one reward query a sample. low_variance n > 0 is DRaFT-LV: x0 is noised to the last step's time n
    times and denoised in one step, n queries more (its algorithm 1). beta = 0, as published, has no KL; with beta the path KL
    is charged at all steps, its gradient exact within the differentiated ones and local before (`rows` points). With
    gradient_checkpointing a step's activations are computed again in its backward: memory of one step, a third more work.

    >>> DRaFT(last=2).beta
    0.0
    """

    name: Literal["draft"] = "draft"
    beta: float = Field(0.0, ge=0)
    last: int | None = Field(1, ge=1)
    low_variance: int = Field(0, ge=0)
    rows: int = Field(160, ge=1)
    gradient_checkpointing: bool = False

    def build(self, setting: Setting) -> DRaFTLearner:
        refuse_unfit(setting, self.name, self.beta)
        if self.last is not None and self.last > setting.sampler.steps:
            raise ValueError(f"algorithm.last: there are {setting.sampler.steps} steps; lower it, or null for all of them")
        if self.low_variance and self.last != 1:
            raise ValueError("algorithm.low_variance: is written for the last step alone; set algorithm.last to 1")
        return DRaFTLearner(self, setting)


class DRaFTLearner(Learner):
    """DRaFT at work."""

    reward_gradient = True

    def __init__(self, config: DRaFT, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta)
        self.config = config
        self.last = config.last or setting.sampler.steps
        self.reference_rows = None if config.beta else 32  # without a KL it is only logged

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        steps, batch = experience.size
        before = steps - self.last
        if self.beta and before:
            chosen = torch.randperm(before * batch, generator=generator)[: self.config.rows]
            yield from visited_kl(self, experience, chosen, before / steps)
        pieces = torch.arange(batch).split(max(1, self.setting.max_rows // self.last))
        for i, rows in enumerate(pieces):
            loss = self._through(experience, rows)
            if self.config.low_variance:
                loss = loss + self._renoised(experience, rows, generator)
            yield Update(loss.sum() / batch, "policy", {}, step=i == len(pieces) - 1)

    def _through(self, experience: Experience, rows: Tensor) -> Tensor:
        """`-r(x0) + beta KL` of these trajectories as its gradient: the stored states, with the graph of the last steps."""
        rollout, process, eta = experience.rollout, self.setting.model.process, self.setting.sampler.eta
        assert experience.reward_gradient is not None
        conditions = take(experience.conditions, rows)
        policy, reference = self.policy(conditions), self.reference(conditions)
        near = rows.to(rollout.x.device)
        x = rollout.x[-1 - self.last, near]
        cost = x.new_zeros(len(rows))
        for i in range(len(rollout.times) - 1 - self.last, len(rollout.times) - 1):
            t, s = rollout.times[i], rollout.times[i + 1]
            said = self._checkpointed(policy, x, t)
            if self.beta:
                stay = Weights.of_step(process, t, s, eta).stay
                cost = cost + stay.to(x) / 2 * sum_event((said.x0 - self._checkpointed(reference, x, t).x0) ** 2)
            mean = ddim_step(process, said, t, s, eta).mean
            x = mean + (rollout.x[i + 1, near] - mean).detach()
        return self.beta * cost - sum_event(experience.reward_gradient[near] * x)

    def _checkpointed(self, predict: Predict, x: Tensor, t: Tensor) -> Prediction:
        """A prediction; with gradient checkpointing what it kept is computed again later, and counted again."""
        if not self.config.gradient_checkpointing:
            return predict(x, t)

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            said = predict(x, t)
            return said.x0, said.eps

        return Prediction(*checkpoint(parts, x, use_reentrant=False))

    def _renoised(self, experience: Experience, rows: Tensor, generator: torch.Generator) -> Tensor:
        """`-sum_i r(x0_hat(alpha x0 + sigma z_i))` at the last step's time."""
        process, t = self.setting.model.process, experience.rollout.times[-2]
        near = rows.to(experience.rollout.x.device)
        x0, groups = experience.rollout.x0[near], experience.groups[rows.to(experience.groups.device)]
        policy = self.policy(take(experience.conditions, rows))
        total = x0.new_zeros(len(rows))
        for _ in range(self.config.low_variance):
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            x = expand(process.alpha(t), x0) * x0 + expand(process.sigma(t), x0) * noise
            total = total - self.setting.judge.score(policy(x, t).x0, groups)
        return total


Config = DRaFT
