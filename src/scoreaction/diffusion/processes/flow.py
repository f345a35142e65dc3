"""Rectified flow: a straight line from data to noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.diffusion.processes.process import Process


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: `alpha = 1 - t, sigma = t`, so `f = -1/(1-t)` and `g^2 = 2t/(1-t)`.

    Liu et al. 2023 (arXiv 2209.03003). Reaches data at t = 0; f and g^2 are infinite at t = 1. `shift` and `last` choose
    the times of `own_grid` and are no part of the process.

    >>> [round(t, 3) for t in Flow(shift=3.0).own_grid(2).tolist()]
    [1.0, 0.75, 0.0]
    """

    shift: float = 1.0
    last: float | None = None

    def own_grid(self, steps: int) -> Tensor:
        """Times of a flow scheduler: `t = shift u/(1 + (shift - 1) u)`, then 0.

        u runs from 1 to `last` (1/steps by default) in equal steps. Esser et al. 2024 (arXiv 2403.03206), eq. 23.
        """
        u = torch.linspace(1, self.last or 1 / steps, steps, dtype=torch.float64)
        return torch.cat([self.shift * u / (1 + (self.shift - 1) * u), torch.zeros(1, dtype=torch.float64)])

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def sigma2(self, t: Tensor) -> Tensor:
        return t * t

    def sigma2_rate(self, t: Tensor) -> Tensor:
        return 2 * t

    def alpha_rate(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def g2(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)
