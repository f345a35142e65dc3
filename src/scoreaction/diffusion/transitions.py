"""The Gaussian transition of one sampler step, with its density, its KL and its sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, normal
from scoreaction.diffusion.predictions import expand


def sum_event(x: Tensor) -> Tensor:
    """Sums over all dimensions but the first, (batch, *shape) -> (batch,), in float32 or better.

    >>> sum_event(torch.ones(2, 3, 4)).tolist()
    [12.0, 12.0]
    """
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return x.flatten(1).sum(1)


class Kernel(Protocol):
    """Law of one sampler step, given the states that it begins at: of Gaussian states a `Transition`, of tokens a `Reveal`."""

    def sample(self, generator: Source | None = None) -> Tensor:
        """Draws the next states (batch, *shape)."""

    def log_ratio(self, other: Any, x: Tensor) -> Tensor:
        """Log ratio of the probabilities of these next states to those under another law of the kind, in nats, (batch,)."""

    def kl(self, other: Any) -> Tensor:
        """KL in nats to another law of the kind, (batch,)."""


@dataclass(frozen=True)
class Transition:
    """Gaussian `x_s ~ N(mean, std^2 I)`; mean (batch, *shape), std () or (batch,) float64.

    With std = 0 the step is deterministic: it can be sampled and has no density (ValueError).

    >>> step = Transition(torch.zeros(1, 2), torch.tensor(1.0, dtype=torch.float64))
    >>> round(float(step.log_prob(torch.zeros(1, 2))), 4)
    -1.8379
    """

    mean: Tensor
    std: Tensor

    def sample(self, generator: Source | None = None) -> Tensor:
        """Draws x_s (batch, *shape) in the dtype of the mean: the value that is stored is the value that is scored later.

        The mean where std = 0, without noise.
        """
        if not bool(torch.any(self.std > 0)):
            return self.mean
        noise = normal(self.mean.shape, generator, self.mean.dtype)
        return self.mean + expand(self.std, self.mean) * noise.to(self.mean.device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of x in nats, summed over event dimensions, (batch,). ValueError if std = 0."""
        std = self._positive_std()
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = sum_event((x.to(wide) - self.mean.to(wide)) ** 2)
        dimension = x[0].numel()
        return -0.5 * squares / (std**2).to(squares) - dimension * (torch.log(std) + 0.5 * math.log(2 * math.pi)).to(squares)

    def log_ratio(self, other: Transition, x: Tensor) -> Tensor:
        """Log ratio `log p(x) - log p_other(x) = <m - m', 2x - m - m'>/(2 std^2)` in nats, (batch,), for steps of one std.

        Subtracting two log densities would lose it to rounding: at 65,536 dimensions each is some 10^5 nats in float32.
        """
        self._check_std(other)
        wide = torch.promote_types(x.dtype, torch.float32)
        x, here, there = x.to(wide), self.mean.to(wide), other.mean.to(wide)
        products = sum_event((here - there) * ((x - here) + (x - there)))
        return 0.5 * products / (self._positive_std() ** 2).to(products)

    def kl(self, other: Transition) -> Tensor:
        """KL in nats, `KL(self || other) = ||m - m'||^2/(2 std^2)`, (batch,), for steps of one std."""
        self._check_std(other)
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        squares = sum_event((self.mean.to(wide) - other.mean.to(wide)) ** 2)
        return 0.5 * squares / (self._positive_std() ** 2).to(squares)

    def _check_std(self, other: Transition) -> None:
        if not torch.equal(self.std, other.std):
            raise ValueError("two steps are compared at the same std only: use the same solver, eta and grid for both")

    def _positive_std(self) -> Tensor:
        if not bool((self.std > 0).all()):
            raise ValueError("a step with std 0 has no density: the reference acts there, and it carries no KL")
        return self.std
