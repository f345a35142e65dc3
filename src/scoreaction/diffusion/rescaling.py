"""Columns of a table in units of their own: what a model learns has mean 0 and deviation 1, what users see has their units."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from scoreaction.diffusion.mixtures import Mixture, Optimum, Quadratic

M = TypeVar("M", bound=Mixture)


@dataclass(frozen=True, eq=False)
class Rescale:
    """Decoding of vectors, `samples = shift + scale x0`, with scale and shift (d,) float64.

    >>> import torch
    >>> own = Rescale.of(torch.tensor([[10.0, 0.0], [30.0, 1.0]]))
    >>> own(torch.tensor([[1.0, -1.0]])).tolist(), own.inverse(torch.tensor([[30.0, 0.0]])).tolist()
    ([[30.0, 0.0]], [[1.0, -1.0]])
    """

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, table: Tensor) -> Rescale:
        """That under which the columns of a table (n, d) have mean 0 and deviation 1."""
        table = table.double()
        return cls(table.std(0, correction=0), table.mean(0))

    def __call__(self, x0: Tensor) -> Tensor:
        return self.shift.to(x0) + self.scale.to(x0) * x0

    def inverse(self, samples: Tensor) -> Tensor:
        """The x0 of samples (n, d)."""
        return (samples - self.shift.to(samples)) / self.scale.to(samples)

    def optimum(self, law: Mixture, reward: Quadratic, beta: float) -> Optimum:
        """The optimum of a reward of samples, its law that of x0: `r(x) = r'(x0) + l^T shift` with

        `Q' = S Q S`, `l' = S l`, `mu' = (mu - shift)/scale`, S = diag(scale). ValueError for a reward of another dimension.
        """
        if len(reward.l) != len(self.scale):
            raise ValueError(f"the reward takes {len(reward.l)} dimensions and the samples have {len(self.scale)}")
        Q = self.scale[:, None] * reward.Q * self.scale
        best = law.optimum(Quadratic(Q, self.scale * reward.l, self.inverse(reward.mu)), beta)
        c = float(reward.l @ self.shift)
        return replace(best, reward=best.reward + c, objective=best.objective + c, log_z=best.log_z + c / beta)

    def law(self, law: M) -> M:
        """The law of samples whose x0 have this law."""
        covariances = self.scale[:, None] * law.covariances * self.scale
        return replace(law, means=self(law.means), covariances=covariances)
