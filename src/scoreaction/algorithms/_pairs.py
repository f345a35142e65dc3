"""The kernel of preference pairs: log ratios of clean samples to a reference, and the logistic loss of their difference.

A log ratio is a sum of terms, each of which asks both networks at one state. Two passes: the first, without a graph, has all
terms and with them the slope of the loss; the second is linear in the terms, and takes the gradient of as many at a time as
memory holds. Together they are the gradient of the whole loss, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from scoreaction.algorithms._forward import stratified
from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._tokens import log_prob_of
from scoreaction.algorithms._updates import Loss, Term, Update
from scoreaction.diffusion.noise import RowNoise, normal
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.reveals import token_log_prob
from scoreaction.diffusion.solvers import time_grid
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import States
from scoreaction.types import Prediction
from scoreaction.world import Rows

Weighting = Literal["elbo", "published"]
Predicted = Callable[[Tensor, Tensor, Tensor], Prediction]
"""A prediction at (x, t, prompt)."""
EDGE = 5e-4
"""Times are drawn where the share of signal, alpha^2 of a variance-preserving process, is this far from 0 and from 1."""
T_MIN = 1e-3


class Probes(NamedTuple):
    """States at which two networks are compared on clean samples, one a row.

    x (rows, *shape), t (rows,) float64, prompt (rows,); target: what both should have predicted there, the noise, or the token
    to be shown at its position and -1 at all others; weight (rows,) of the term.
    """

    x: Tensor
    t: Tensor
    prompt: Tensor
    target: Tensor
    weight: Tensor

    @property
    def states(self) -> States:
        """The states, as networks take them."""
        return States(self.x, self.t, self.prompt)


class LogRatio(Protocol):
    """Estimate of `log p(x0) - log p_ref(x0)` of a clean sample as the sum of `count` terms of `term` at `probes`."""

    def count(self, learner: Learner) -> int:
        """Terms of one sample."""

    def probes(self, learner: Learner, x0: Tensor, prompt: Tensor, total: int, generator: torch.Generator) -> Probes:
        """Probes of x0 (sides, own, *shape), of the own of `total` rows: row `(side * count + term) * own + sample`.

        The sides share times and noise, or the order of positions.
        """

    def term(self, policy: Prediction, reference: Prediction, probes: Probes) -> Tensor:
        """The terms, (rows,) in nats."""


def elbo_times(process: Process, uniform: Tensor, shape: tuple[int, ...], earliest: float) -> tuple[Tensor, Tensor]:
    """Times with `alpha^2/(alpha^2 + sigma^2)` uniform, and the weight `1/2 / p(log SNR)` of the evidence bound there.

    Then the mean of `weight (||eps - eps_ref||^2 - ||eps - eps_theta||^2)` is the difference of two evidence lower bounds,
    `1/2 integral of E[...] d log SNR` (Kingma et al. 2021, arXiv 2107.00630, eq. 15). uniform in [0, 1], any shape.
    """
    ends = torch.tensor([1.0, max(earliest, T_MIN)], dtype=torch.float64)
    low, high = torch.sigmoid(process.log_snr(ends)).clamp(EDGE, 1 - EDGE)
    share = low + uniform * (high - low)
    return process.time_at(torch.logit(share)), (high - low) / (2 * share * (1 - share))


def uniform_times(process: Process, uniform: Tensor, shape: tuple[int, ...], earliest: float) -> tuple[Tensor, Tensor]:
    """Times uniform, and the constant weight `1/2` of a mean over dimensions, as published (arXiv 2311.12908, eq. 14)."""
    first = max(earliest, T_MIN)
    return first + uniform * (1 - first), torch.full_like(uniform, 0.5 / torch.Size(shape).numel())


TIMES = {"elbo": elbo_times, "published": uniform_times}


@dataclass(frozen=True)
class NoisedRatio(LogRatio):
    """The log ratio of Gaussian states: errors of both networks' noise at samples noised anew, at stratified `times`."""

    times: int
    weighting: Weighting = "elbo"

    def count(self, learner: Learner) -> int:
        return self.times

    def probes(self, learner: Learner, x0: Tensor, prompt: Tensor, total: int, generator: torch.Generator) -> Probes:
        process, (sides, own) = learner.process, x0.shape[:2]
        uniform = stratified(learner.world, total, self.times, generator)
        t, weight = TIMES[self.weighting](process, uniform, learner.model.shape, learner.sampler.acts_from)
        rows = RowNoise.drawn(generator, learner.world.stripe(total))
        source = learner.model.noise(rows, learner.conditions, prompt)
        eps = torch.stack([normal(x0.shape[1:], source) for _ in range(self.times)]).to(x0)
        t, weight = t.flatten().repeat(sides), weight.flatten().repeat(sides) / self.times
        eps = eps.flatten(0, 1).repeat(sides, *[1] * (eps.ndim - 2))
        clean = x0.repeat_interleave(self.times, 0).flatten(0, 1) if own else eps
        x = expand(process.alpha(t), eps) * clean + expand(process.sigma(t), eps) * eps
        return Probes(x, t, prompt.repeat(sides * self.times), eps, weight)

    def term(self, policy: Prediction, reference: Prediction, probes: Probes) -> Tensor:
        """`weight (||eps - eps_ref||^2 - ||eps - eps_theta||^2)`, by the difference, which rounding leaves whole."""
        here, there = policy.eps, reference.eps
        gain = sum_event((here - there) * ((probes.target - there) + (probes.target - here)))
        return probes.weight.to(gain) * gain


@dataclass(frozen=True)
class PathRatio(LogRatio):
    """The log ratio of tokens along one order in which positions are shown, random or `left_to_right`: exact for its path."""

    left_to_right: bool

    def count(self, learner: Learner) -> int:
        return learner.model.shape[0]

    def probes(self, learner: Learner, x0: Tensor, prompt: Tensor, total: int, generator: torch.Generator) -> Probes:
        (sides, own, length), process = x0.shape, learner.process
        rank = torch.arange(length).expand(own, length)
        if not self.left_to_right:
            source = RowNoise.drawn(generator, learner.world.stripe(total))
            rank = source.normal((own, length), torch.float32).argsort(1).argsort(1)
        step = torch.arange(length)[:, None, None]
        masked, shown = ((mask.to(x0.device).flatten(0, 1).repeat(sides, 1)) for mask in (rank >= step, rank == step))
        clean = x0.repeat_interleave(length, 0).flatten(0, 1)
        x, target = torch.where(masked, _mask(process), clean), torch.where(shown, clean, -1)
        t = time_grid(process, length, name=learner.sampler.grid)[:-1].repeat_interleave(own).repeat(sides)
        return Probes(x, t, prompt.repeat(sides * length), target, torch.ones_like(t))

    def term(self, policy: Prediction, reference: Prediction, probes: Probes) -> Tensor:
        """`log p - log p_ref` of the token that is shown."""
        token = probes.target.clamp(min=0)
        gain = token_log_prob(log_prob_of(policy), token) - token_log_prob(log_prob_of(reference), token)
        return (gain * (probes.target >= 0)).sum(1)


def _mask(process: Any) -> int:
    return process.mask


class CausalRatio(LogRatio):
    """The log ratio of tokens by a causal network, which has all steps of the path from left to right in one evaluation.

    It is the difference of two `MaskedModel.path_log_prob` (CARD, arXiv 2601.22031), and that of `PathRatio(True)`.
    """

    def count(self, learner: Learner) -> int:
        return 1

    def probes(self, learner: Learner, x0: Tensor, prompt: Tensor, total: int, generator: torch.Generator) -> Probes:
        x = x0.flatten(0, 1)
        end = torch.zeros(len(x), dtype=torch.float64)
        return Probes(x, end, prompt.repeat(len(x0)), x, torch.ones_like(end))

    def term(self, policy: Prediction, reference: Prediction, probes: Probes) -> Tensor:
        """`sum_n log p(x_n | x_<n) - log p_ref(x_n | x_<n)`."""
        laws = (log_prob_of(prediction) for prediction in (policy, reference))
        here, there = (token_log_prob(law, probes.target) for law in laws)
        return (here - there).sum(1)


def path_ratio(setting: Setting) -> LogRatio:
    """The log ratio of tokens in the order of the run's solver; a random one where it shows several a step."""
    if setting.model.causal and not setting.sampler.acts_from:  # where steps are off, they are to be told apart
        return CausalRatio()
    return PathRatio(setting.sampler.solver == "left_to_right")


def pair_update(
    learner: Learner,
    ratio: LogRatio,
    x0: Tensor,
    prompt: Tensor,
    *,
    total: int,
    scale: float,
    reference: Predicted,
    generator: torch.Generator,
) -> Update:
    """One step on `softplus(-z)`, `z = scale (A(winner) - A(loser))` and A the log ratio of the policy to the reference.

    x0 (2, own, *shape): the winners and the losers of the own of `total` pairs; prompt (own,). The gradient is
    `-scale sigmoid(-z) grad (A(winner) - A(loser))`. Figures of a pair: `pair_loss`, which is log 2 where policy and
    reference agree, `implicit_accuracy`, 1 where z > 0 (1/2 at 0), and `margin`, z.
    """
    count, own = ratio.count(learner), x0.shape[1]
    probes = ratio.probes(learner, x0, prompt, total, generator)
    with torch.no_grad():
        there, here = reference(*probes.states), learner.policy(*probes.states)
        winner, loser = ratio.term(here, there, probes).unflatten(0, (2, count, own)).sum(1) if own else (x0.new_zeros(0),) * 2
    margin = scale * (winner - loser)
    slope = scale * torch.sigmoid(-margin)

    def loss(numbers: Tensor) -> Loss:
        rows, pair = torch.cat([numbers, numbers + count * own]), numbers % max(1, own)
        part = take(probes, rows)
        won, lost = ratio.term(learner.policy(*part.states), take(there, rows), part).chunk(2)
        z = take(margin, pair)
        figures = {"pair_loss": softplus(-z), "implicit_accuracy": (torch.sign(z) + 1) / 2, "margin": z}
        return count * take(slope, pair) * (lost - won), {**figures}

    place = (torch.arange(count)[:, None] * total + learner.world.stripe(total)).flatten()
    return Update("policy", [Term(Rows(torch.arange(count * own), place, count * total), loss, calls=2)])
