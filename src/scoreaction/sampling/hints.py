"""Hinted trajectories: those of a behaviour that knows more than the policy, at most so many nats away, with exact weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import Transition
from scoreaction.networks.model import Model
from scoreaction.sampling.look_ahead import look_ahead, twisted
from scoreaction.sampling.sampler import Sampler, act
from scoreaction.sampling.trajectory import Chosen
from scoreaction.types import Conditions, Prediction

Hint = Callable[[Tensor, Tensor, Tensor, Transition], Tensor]
"""The mean of a hinted step: `hint(x, t, s, transition)`, the policy's transition t -> s from x (rows, *shape)."""


def predicted(model: Model, sampler: Sampler, conditions: Conditions, prompt: Tensor) -> Hint:
    """The steps of the policy under another sampler's guidance, or of other conditions."""

    def mean(x: Tensor, t: Tensor, s: Tensor, transition: Transition) -> Tensor:
        prediction = act(model, sampler, x, t, conditions, prompt=prompt)
        step: Any = sampler.find().step(model.process, _never, prediction, x, t, s, sampler.eta, None)
        return step.mean

    return mean


def _never(x: Tensor, t: Tensor) -> Prediction:
    raise AssertionError("a step with a density asks the network once")


def steered(value: Callable[[Tensor, Tensor], Tensor], beta: float) -> Hint:
    """The steps of twisted steering: `mean + k^2 grad v(t, x)/beta`, `value(x, t)` the reward of x0_hat."""

    def mean(x: Tensor, t: Tensor, s: Tensor, transition: Transition) -> Tensor:
        _, grad, _ = look_ahead(x, lambda x: (value(x, t), None), gradient=True)
        return twisted(transition, grad, beta).mean

    return mean


class Hinted:
    """Chooses the next states of a rollout by a hint, as far from the policy as `nats` allow.

    A step's mean is moved towards the hint's, in full or by the share `sqrt(allowed/KL)`: each step may take what is left of
    `nats`, divided by the steps that are left. So `kl` (rows,), the KL of the hinted path law to the policy's, is at most
    `nats` on every path, and `log_weight` (rows,) = `log dP_policy/dP_hint` of the path is exact. Steps without noise are the
    policy's.

    x (rows, *shape): the states that the rollout starts from; steps (N,) bool: those that the hint may move.
    """

    def __init__(self, hint: Hint, x: Tensor, steps: Tensor, nats: float) -> None:
        self.hint, self.x, self.nats = hint, x, nats
        self.left = int(steps.sum())
        self.steps = iter(steps.tolist())
        self.log_weight = self.kl = torch.zeros(len(x), dtype=torch.float64)

    def choose(self, noise: Source, transition: Transition, t: Tensor, s: Tensor) -> Chosen:
        """The states that the hinted step leads to."""
        if not next(self.steps):
            self.x = transition.sample(noise)
            return Chosen(self.x)
        full = Transition(self.hint(self.x, t, s, transition), transition.std)
        kl = full.kl(transition).double().cpu()
        allowed = ((self.nats - self.kl) / self.left).clamp(min=0)
        share = torch.where(kl > 0, torch.sqrt(allowed / kl).clamp(max=1), 1.0)  # not 0/0 of a hint that says nothing
        move = expand(share.to(full.mean.device), full.mean) * (full.mean - transition.mean)
        proposal = Transition(transition.mean + move, transition.std)
        self.x = proposal.sample(noise)
        self.log_weight = self.log_weight + transition.log_ratio(proposal, self.x).double().cpu()
        self.kl, self.left = self.kl + torch.minimum(kl, allowed), self.left - 1
        return Chosen(self.x)

    def chooser(self, noise: Source) -> Callable[[Transition, Tensor, Tensor], Chosen]:
        """`choose` with its source of noise."""
        return partial(self.choose, noise)
