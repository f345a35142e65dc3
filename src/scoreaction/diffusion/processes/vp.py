"""Variance-preserving processes in closed form, `alpha^2 + sigma^2 = 1`: linear beta and the cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.diffusion.processes.process import Process


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving with linear beta: `alpha = exp(-(beta_min t + (beta_max - beta_min) t^2/2)/2)`.

    Song et al. 2021 (arXiv 2011.13456), eq. 32. Reaches data at t = 0.

    >>> float(VP().alpha(torch.tensor(1.0, dtype=torch.float64)))
    0.006571...
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return -(self.beta_min * t + (self.beta_max - self.beta_min) / 2 * t * t) / 2

    def f(self, t: Tensor) -> Tensor:
        return -(self.beta_min + (self.beta_max - self.beta_min) * t) / 2

    def sigma2(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma2_rate(self, t: Tensor) -> Tensor:
        return -2 * self.f(t) * torch.exp(2 * self.log_alpha(t))


@dataclass(frozen=True)
class CosineVP(Process):
    """Variance preserving with `alpha = cos(a(t))/cos(a(0))`, `a(t) = pi/2 (t + offset)/(1 + offset)`.

    Nichol and Dhariwal 2021 (arXiv 2102.09672), eq. 17. Reaches data at t = 0; alpha_1 = 0, so f and g^2
    are infinite at t = 1.

    >>> CosineVP().alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    [1.0, 0.0]
    """

    offset: float = 0.008

    def _angle(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (t + self.offset) / (1 + self.offset)

    def log_alpha(self, t: Tensor) -> Tensor:
        cosine = torch.sin(math.pi / 2 * (1 - t) / (1 + self.offset))  # cos(a), exactly 0 at t = 1
        return torch.log(cosine) - math.log(math.cos(math.pi / 2 * self.offset / (1 + self.offset)))

    def f(self, t: Tensor) -> Tensor:
        # 1/tan of what is left to the end: infinite at t = 1, where tan(a) is 1.6e16 by rounding
        return -math.pi / 2 / (1 + self.offset) / torch.tan(math.pi / 2 * (1 - t) / (1 + self.offset))

    def alpha_rate(self, t: Tensor) -> Tensor:
        scale = math.cos(math.pi / 2 * self.offset / (1 + self.offset))
        return -math.pi / 2 / (1 + self.offset) * torch.sin(self._angle(t)) / scale

    def sigma2(self, t: Tensor) -> Tensor:
        # sin(a - a0) sin(a + a0)/cos^2 a0: exactly 0 at t = 0
        apart = torch.sin(math.pi / 2 * t / (1 + self.offset))
        together = torch.sin(math.pi / 2 * (t + 2 * self.offset) / (1 + self.offset))
        return apart * together / math.cos(math.pi / 2 * self.offset / (1 + self.offset)) ** 2

    def sigma2_rate(self, t: Tensor) -> Tensor:
        scale = math.cos(math.pi / 2 * self.offset / (1 + self.offset)) ** 2
        return math.pi / 2 / (1 + self.offset) * torch.sin(2 * self._angle(t)) / scale
