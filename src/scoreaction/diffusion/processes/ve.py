"""The variance-exploding process: the signal keeps its scale and the noise grows geometrically."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.diffusion.processes.process import Process


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: `alpha = 1`, `sigma = sigma_min (sigma_max/sigma_min)^t`.

    Song et al. 2021 (arXiv 2011.13456), eq. 31. Does **not** reach data at t = 0: sigma_0 = sigma_min.

    >>> round(float(VE().sigma(torch.tensor(0.5, dtype=torch.float64))), 4)  # geometric mean of 0.01 and 50
    0.7071
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma2(self, t: Tensor) -> Tensor:
        return torch.exp(2 * (math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min)))

    def sigma2_rate(self, t: Tensor) -> Tensor:
        return 2 * math.log(self.sigma_max / self.sigma_min) * self.sigma2(t)
