"""DRaFT: the reward's gradient back through the last sampling steps (Clark et al. 2023, arXiv 2309.17400); DRaFT-K and -LV."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoreaction.algorithms._backprop import refuse_unfit, visited_kl
from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner, Loss, Setting, Term, Update, Updates
from scoreaction.algorithms._step import StepWeights
from scoreaction.diffusion.noise import RowNoise, normal
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Prediction


class DRaFT(Algorithm):
    """`max E r(x0) - beta KL`, differentiated through the policy's last `last` steps (all with null), noise held fixed.

    One update an iteration, one reward query a sample. low_variance n > 0 is DRaFT-LV: x0 is noised to the last step's time n
    times and denoised in one step, n queries more (its algorithm 1). beta = 0, as published and whatever model or recipe have
    for others, has no KL: `kl_nats` in the log is then an estimate from a few states of each step. With beta the path KL is
    charged at all steps, its gradient exact within the differentiated ones and local before (`rows` points). With
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
        self.reference_rows = None if config.beta else LOGGED  # without a KL it is only logged

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One update: the reward through the last steps, and where there is a KL its part at the steps before."""
        n, batch = rollout.size
        first, terms = max(0, n - self.last), []
        if self.beta and first:
            rows = self.world.dealt(first, batch, self.config.rows, generator)
            terms.append(visited_kl(self, rollout, rows, first / n))
        source = self.noise(RowNoise.drawn(generator, self.world.stripe(batch * self.world.size)), rollout.prompt)
        steps = len(rollout.times) - 1 - first
        # with a KL the reference's evaluations are in the graph too, but for the first of these steps
        calls = steps + (min(self.last, n) - 1 if self.beta else 0)
        terms.append(Term(batch, lambda rows: (self._through(rollout, first, rows), {}), calls=calls))
        for _ in range(self.config.low_variance):
            terms.append(Term(batch, partial(self._renoised, rollout, normal(rollout.x0.shape, source))))
        yield Update("policy", terms)

    def _through(self, rollout: Rollout, first: int, rows: Tensor) -> Tensor:
        """`-r(x0) + beta KL` of these trajectories as its gradient: the stored states, with the graph from step `first` on."""
        process, eta, prompt = self.process, self.sampler.eta, take(rollout.prompt, rows)
        assert rollout.reward_gradient is not None
        x = take(rollout.x[first], rows)
        cost = x.new_zeros(len(rows))
        for i in range(first, len(rollout.times) - 1):
            t, s = rollout.times[i], rollout.times[i + 1]
            prediction = self._checkpointed(self.policy, x, t, prompt)
            if self.beta and i < rollout.size[0]:
                with torch.set_grad_enabled(x.requires_grad):  # at the first of the steps it needs none
                    pretrained = self._checkpointed(self.pretrained, x, t, prompt)
                difference = prediction.x0 - pretrained.x0
                cost = cost + StepWeights.of_step(process, t, s, eta).cost.to(x) / 2 * sum_event(difference**2)
            mean = ddim_step(process, prediction, t, s, eta).mean
            x = mean + (take(rollout.x[i + 1], rows) - mean).detach()
        return self.beta * cost - sum_event(take(rollout.reward_gradient, rows) * x)

    def _checkpointed(
        self, predict: Callable[[Tensor, Tensor, Tensor], Prediction], x: Tensor, t: Tensor, prompt: Tensor
    ) -> Prediction:
        """A prediction; with gradient checkpointing its activations are computed again in the backward, and counted again."""
        if not self.config.gradient_checkpointing:
            return predict(x, t, prompt)
        return Prediction(*checkpoint(lambda x: tuple(predict(x, t, prompt)), x, use_reentrant=False))

    def _renoised(self, rollout: Rollout, z: Tensor, rows: Tensor) -> Loss:
        """`-r(x0_hat(alpha x0 + sigma z))` at the time of the policy's last step."""
        t, x0, prompt = rollout.acted[-2], take(rollout.x0, rows), take(rollout.prompt, rows)
        alpha, sigma = (expand(part, x0) for part in (self.process.alpha(t), self.process.sigma(t)))
        x = alpha * x0 + sigma * take(z, rows).to(x0)
        return -self.reward(self.policy(x, t, prompt).x0, prompt), {}


Config = DRaFT
