"""The form of the two rewards whose optimum is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.types import Conditions


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """`r(x) = -1/2 (x - mu)^T Q (x - mu) + l^T x` on vectors (batch, d); its coefficients are in `quadratic`."""

    quadratic: Quadratic
    differentiable: bool = True

    def __call__(self, samples: Tensor, conditions: Conditions = None) -> Tensor:
        d = len(self.quadratic.l)
        if samples.ndim != 2 or samples.shape[1] != d:
            raise ValueError(f"linear or quadratic reward: expected samples (batch, {d}), got {tuple(samples.shape)}")
        return self.quadratic(samples)
