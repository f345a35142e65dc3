"""The soft Q of SQDF: the reward of the clean sample that a frozen predictor sees at the end of a step, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._value import put
from scoreaction.diffusion.noise import kept
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.sampling.look_ahead import look_ahead
from scoreaction.sampling.rollout import States


def clean_sample(learner: Learner, states: States, *, consistency: bool, steps: int) -> Tensor:
    """x0_hat of the frozen model at these states, (rows, *shape), differentiable in x.

    The pretrained model's posterior mean (Tweedie); with steps > 1 after `steps - 1` steps of its DDIM at eta 0, each an equal
    share of t; or a consistency model's. At t = 0 it is x itself.
    """
    if consistency:
        return learner.model.consistency(states.x, states.t, learner.conditions, prompt=states.prompt)
    x, t = states.x, states.t
    for left in range(steps, 1, -1):
        s = states.t * (left - 1) / steps
        x, t = ddim_step(learner.process, learner.pretrained(x, t, states.prompt), t, s, 0.0).mean, s
    return learner.pretrained(x, t, states.prompt).x0


EPS_ERROR = 0.05
"""Variance of the error of eps that `Belief` allows for: 0.22 of the noise's own standard deviation."""


class Belief(nn.Module):
    """The x0_hat of an eps or score network as far as it can be believed: a line near pure noise, and nowhere beyond reach.

    An error of eps is `sigma/alpha` times larger in x0_hat, and so is that of its slope: near pure noise the soft Q points
    anywhere, and the policy follows it away from all that the network was trained on. With samples of mean m and variance v a
    number, the best scalar line `g = m + alpha v/(alpha^2 v + sigma^2) (x - alpha m)` has no such error, and
    - `E|x0_hat - g|^2 <= E|x0 - g|^2 = D v sigma^2/(alpha^2 v + sigma^2)`: x0_hat is kept within three such deviations of it;
    - what it adds to g is weighed as a signal of variance v in noise of variance `e sigma^2/alpha^2`, e the `EPS_ERROR`:
      `w = SNR/(SNR + e)`, `SNR = alpha^2 v/sigma^2` (Wiener).
    m and v are those of the first trajectories, whose policy still is the pretrained model.
    """

    mean: Tensor
    variance: Tensor
    taken: Tensor

    def __init__(self, process: Process, shape: Sequence[int]) -> None:
        super().__init__()
        self.process = process
        self.register_buffer("mean", torch.zeros(*shape))
        self.register_buffer("variance", torch.ones(()))
        self.register_buffer("taken", torch.zeros((), dtype=torch.bool))

    def calibrate(self, x0: Tensor, inside: Tensor | None = None) -> None:
        """Takes mean and variance from samples (batch, *shape), 0 where not `inside`; later calls change nothing."""
        if not bool(self.taken):
            numbers = kept(torch.ones_like(x0), inside)
            mean = x0.sum(0) / numbers.sum(0).clamp(min=1)
            self.mean.copy_(mean)
            self.variance.copy_((numbers * (x0 - mean).square()).sum() / numbers.sum())
            self.taken.fill_(True)

    def forward(self, x0_hat: Tensor, x: Tensor, t: Tensor, inside: Tensor | None = None) -> Tensor:
        """The x0_hat that is believed at (x, t): x0_hat, x (rows, *shape), t (rows,), differentiable in both."""
        alpha, sigma2, v = self.process.alpha(t), self.process.sigma2(t), self.variance.double()
        total = alpha**2 * v + sigma2
        line = kept(self.mean + expand(alpha * v / total, x) * (x - expand(alpha, x) * self.mean), inside)
        away = x0_hat - line
        numbers = sum_event(kept(torch.ones_like(x), inside)).double()
        reach = 3 * torch.sqrt(numbers * v * sigma2 / total)
        share = (reach / sum_event(away.detach() ** 2).sqrt().clamp(min=1e-30)).clamp(max=1)
        weight = alpha**2 * v / (alpha**2 * v + EPS_ERROR * sigma2)
        return line + expand(weight * share, x) * away


class SoftQ(NamedTuple):
    """`r(x0_hat(x))` (rows,), its gradient in x and x0_hat itself (rows, *shape)."""

    value: Tensor
    grad: Tensor
    x0: Tensor


def soft_q(
    learner: Learner,
    states: States,
    *,
    gradient: bool,
    consistency: bool = False,
    steps: int = 1,
    belief: Belief | None = None,
) -> SoftQ:
    """The soft Q at these states, of the x0_hat that is believed. Kang et al. 2026 (arXiv 2512.04559), eq. 9.

    Without `gradient` nothing is differentiated and the gradient is zero.
    """
    q = SoftQ(states.x.new_zeros(len(states.x)), torch.zeros_like(states.x), torch.zeros_like(states.x))
    for clean in (False, True):

        def ask(rows: Tensor, clean: bool = clean) -> None:
            here = take(states, rows)

            def value(x: Tensor) -> tuple[Tensor, Tensor]:
                x0 = x if clean else clean_sample(learner, here._replace(x=x), consistency=consistency, steps=steps)
                believed = x0 if clean or belief is None else belief(x0, x, here.t, learner.inside(here.prompt))
                return learner.reward(believed, here.prompt), x0

            values, grad, x0 = look_ahead(here.x, value, gradient=gradient)
            put(q, rows, (values, grad, x0.detach()))

        learner.in_parts(((states.t == 0) == clean).nonzero().flatten(), ask)
    return q
