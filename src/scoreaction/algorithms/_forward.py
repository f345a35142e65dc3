"""The forward process: clean samples of a policy, noised again. It is all that RAM, DiffusionNFT and AWM learn from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from scoreaction.algorithms._baselines import prompt_advantages
from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._likelihood_ratio import standardised
from scoreaction.diffusion.noise import RowNoise, normal
from scoreaction.diffusion.predictions import expand, row
from scoreaction.diffusion.processes import Process
from scoreaction.networks.adapters import replaced
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.sampling.rollout import Rollout, States
from scoreaction.types import Prediction
from scoreaction.world import World

Baseline = Literal["batch", "prompt", "group"]
"""The baselines of rewards where no trajectory is branched."""


class Noised(NamedTuple):
    """Clean samples noised again, one a row: `x = alpha x0 + sigma eps` at t, eps drawn anew.

    x0, eps, x (rows, *shape); t (rows,) float64; path (rows,) the sample's number in its rollout, prompt (rows,) its prompt's.
    """

    x0: Tensor
    eps: Tensor
    x: Tensor
    t: Tensor
    path: Tensor
    prompt: Tensor

    @property
    def states(self) -> States:
        """The noised samples, as networks take them."""
        return States(self.x, self.t, self.prompt)

    @property
    def velocity(self) -> Tensor:
        """The target of a velocity in pretraining, `eps - x0`."""
        return self.eps - self.x0


def renoised(learner: Learner, rollout: Rollout, times: Tensor, generator: torch.Generator) -> Noised:
    """The samples of a rollout at these times (each, batch): row `i * batch + path`."""
    each, batch = times.shape
    path, t = torch.arange(batch).repeat(each), times.flatten()
    source = learner.noise(RowNoise.drawn(generator, learner.world.stripe(batch * learner.world.size)), rollout.prompt)
    eps = torch.cat([normal(rollout.x0.shape, source) for _ in range(each)]).to(rollout.x0)
    x0 = take(rollout.x0, path)
    x = expand(learner.process.alpha(t), x0) * x0 + expand(learner.process.sigma(t), x0) * eps
    return Noised(x0, eps, x, t, path, take(rollout.prompt, path))


def flow_time(process: Process, t: Tensor) -> Tensor:
    """The time of rectified flow with the SNR of t, `tau = sigma/(alpha + sigma)`.

    The methods here are written for rectified flow. Any process is that flow on another clock:
    `x/(alpha + sigma) = (1 - tau) x0 + tau eps`, with the velocity `eps - x0`.

    >>> from scoreaction import Flow
    >>> float(flow_time(Flow(), torch.tensor(0.3, dtype=torch.float64)))
    0.3
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    return sigma / (alpha + sigma)


def stratified(world: World, total: int, each: int, generator: torch.Generator) -> Tensor:
    """`each` uniform numbers a row, (each, own) float64 of the own of `total` rows, one in each of as many parts of [0, 1]."""
    drawn = world.own(torch.rand(total, each, generator=generator, dtype=torch.float64))
    return (torch.arange(each)[:, None] + drawn.T) / each


def drawn_times(learner: Learner, each: int, generator: torch.Generator, *, power: float, earliest: float = 0.0) -> Tensor:
    """Times at which the policy acts, `each` of them a sample, stratified, (each, batch): tau has the density `~ tau^power`.

    None is below `earliest`.
    """
    ends = torch.tensor([max(learner.sampler.acts_from, earliest), 1.0], dtype=torch.float64)
    low, high = flow_time(learner.process, ends) ** (power + 1)
    tau = (low + stratified(learner.world, learner.batch, each, generator) * (high - low)) ** (1 / (power + 1))
    return learner.process.time_at(2 * torch.log((1 - tau) / tau)).clamp(min=float(ends[0]))


def velocity(prediction: Prediction) -> Tensor:
    """The velocity of rectified flow, `eps - x0`, (rows, *shape)."""
    return prediction.eps - prediction.x0


def mean_square(difference: Tensor) -> Tensor:
    """The mean square of each row, (rows,)."""
    return difference.flatten(1).square().mean(1)


def advantages(
    baseline: Baseline, history: dict[str, list[float]], rewards: Tensor, prompt: Tensor, *, spread: float | None
) -> Tensor:
    """Rewards of the whole batch minus their baseline, over `spread`, or over the std of what it is the mean of, (batch,).

    The baseline is the mean of the batch, of the prompt's `group` in it, or of the last rewards of the `prompt`, in `history`.
    0 where rewards differ by rounding only.
    """
    if baseline == "prompt":
        return prompt_advantages(history, rewards, prompt, spread=spread)
    groups = prompt if baseline == "group" else torch.zeros_like(prompt)
    if spread is None:
        return standardised(rewards, groups.to(rewards.device))
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        rows = (groups == group).to(rewards.device)
        out[rows] = (rewards[rows] - rewards[rows].mean()) / spread
    return out


def sureness(model: Model, t: Tensor) -> Tensor:
    """Weight of rows in a loss on x0, by what the network predicts, (rows,).

    `min(1, alpha/sigma)` of eps, the score and a velocity under VE, which is eps too: an error of these is `sigma/alpha` times
    larger in x0, and rows near pure noise would be most of the loss. `min(1, sigma/alpha)` of x0: v and other velocities weigh
    so by themselves, their x0 moves by sigma times what they do. 1 of these.
    """
    ratio, (of_x0, _) = torch.exp(model.process.log_snr(t) / 2), row(model.process, model.predicts, t)
    if model.predicts == "x0":
        return (1 / ratio).clamp(max=1)
    return ratio.clamp(max=1) if bool((of_x0 == 0).all()) else torch.ones_like(t)


class LaggedPolicy(nn.Module):
    """Weights that follow the policy's, `w_old <- decay w_old + (1 - decay) w`; a checkpoint has them."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.policy = model.parameters
        for i, p in enumerate(self.policy.values()):
            self.register_buffer(f"weight{i}", p.detach().clone())

    def acting(self) -> AbstractContextManager[None]:
        """Context in which the policy has these weights."""
        return replaced(self.policy, dict(zip(self.policy, self.buffers(), strict=True)))

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """One step after the policy's weights."""
        torch._foreach_lerp_(list(self.buffers()), [p.detach() for p in self.policy.values()], 1 - decay)
