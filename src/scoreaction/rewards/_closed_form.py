"""The form of the two rewards whose optimum is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.types import Prompts


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """`r(x) = -1/2 (x - mu)^T Q (x - mu) + l^T x` on vectors (batch, d); its coefficients are in `quadratic`.

    `setting` is the key that gives d, which a refusal names.
    """

    quadratic: Quadratic
    differentiable: bool = True
    setting: str = "l"

    def __call__(self, samples: Tensor, prompts: Prompts = None) -> Tensor:
        d = len(self.quadratic.l)
        if samples.ndim != 2:
            raise ValueError(f"scores vectors (batch, {d}), got samples {tuple(samples.shape)}; take a reward of images")
        if samples.shape[1] != d:
            raise ValueError(f"{self.setting}: must have {samples.shape[1]} numbers, one for each dimension (got {d})")
        return self.quadratic(samples)
