"""Kernel density estimates: a Gaussian of one width at every data point, whose score, tilted law and optimum are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.types import Prediction

PIECE = 2**24
"""Pairs of a state and a point that are looked at in one piece."""
PAIRS = 2**26
"""Pairs of points on which a bandwidth is judged, at most."""


@dataclass(frozen=True, eq=False)
class KernelDensity(Mixture):
    """Mixture whose components share one covariance (1, d, d): `p = sum_j w_j N(x_j, C)`, a component at each data point.

    Noised or tilted by a linear or quadratic reward it is one again, so all that a `Mixture` knows is known of it; score and
    prediction cost matrix products of states and points, in float64.

    >>> law = KernelDensity.at(torch.tensor([[0.0], [1.0]]), std=0.1)
    >>> law.dimension, law.sample(3).shape
    (1, torch.Size([3, 1]))
    """

    shared: ClassVar[bool] = True

    @classmethod
    def at(cls, points: Tensor, *, std: float, weights: Tensor | None = None) -> KernelDensity:
        """Kernels of one std in all directions at the points (n, d), of equal weight by default."""
        n, d = points.shape
        return cls(torch.ones(n) if weights is None else weights, points, std**2 * torch.eye(d, dtype=torch.float64)[None])

    @cached_property
    def _kernels(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`log w` (n,), axes U (d, d) and variances (d,) of the covariance, `U^T x_j` (n, d) and its squares."""
        variances, axes = self._eigen
        rotated = self.means @ axes[0]
        return self.weights.log(), axes[0], variances[0], rotated, rotated**2

    def _joint(self, x: Tensor, alpha: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`log w_j N(x; alpha x_j, P)` (batch, n), with `P = alpha^2 C + sigma^2`; `U^T x` and P's eigenvalues (batch, d).

        The square of `U^T (x - alpha x_j)` is multiplied out, so that it is two matrix products.
        """
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"mixture: expected samples (batch, {self.dimension}), got {tuple(x.shape)}")
        log_weights, axes, variances, points, squares = (part.to(x.device) for part in self._kernels)
        alpha, sigma2 = (c.to(x.device).expand(len(x))[:, None] for c in (alpha, sigma2))
        y, variance = x.double() @ axes, alpha**2 * variances + sigma2
        cross = (alpha * y / variance) @ points.T - (alpha**2 / (2 * variance)) @ squares.T
        own = (y**2 / variance + torch.log(variance)).sum(1) + self.dimension * math.log(2 * math.pi)
        return log_weights + cross - own[:, None] / 2, y, variance

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma2: Tensor) -> Tensor:
        rows = max(1, PIECE // len(self.means))
        alpha, sigma2 = alpha.expand(len(x)), sigma2.expand(len(x))
        parts = zip(x.split(rows), alpha.split(rows), sigma2.split(rows), strict=True)
        return torch.cat([torch.logsumexp(self._joint(*part)[0], 1) for part in parts]).to(x)

    def log_prob(self, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        return self._log_prob(x, one, 0 * one)

    def log_prob_at(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        return self._log_prob(x, process.alpha(t), process.sigma2(t))

    def score(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        return -self._means(x, process.alpha(t), process.sigma2(t))[1].to(x)

    def score_by(self, process: Process, x: Tensor, t: Tensor, chosen: Tensor) -> Tensor:
        """An estimate of the score from a few of the points, drawn by their weights: (batch, d).

        chosen (batch, m): the numbers of the points for each state. Of m points it is the score of those alone: the mean over
        draws is that of a narrower law, with m = 1 of a point mass at the mean, and its error goes as 1/m.
        """
        _, axes, variances, points, _ = (part.to(x.device) for part in self._kernels)
        alpha, sigma2 = (c.to(x.device).expand(len(x))[:, None] for c in (process.alpha(t), process.sigma2(t)))
        variance = alpha**2 * variances + sigma2
        y = (x.double() @ axes)[:, None] - alpha[:, :, None] * points[chosen.to(x.device)]
        share = torch.softmax(-(y**2 / variance[:, None]).sum(2) / 2, 1)
        return -((share[:, :, None] * y).sum(1) / variance @ axes.T).to(x)

    def prediction(self, process: Process, x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma2 = process.alpha(t), process.sigma2(t)
        x0, z = self._means(x, alpha, sigma2)
        return Prediction(x0.to(x), (expand(torch.sqrt(sigma2), z) * z).to(x))

    def _means(self, x: Tensor, alpha: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor]:
        """`E[x0 | x]` and `E[P^-1 (x - alpha x_j)]`, the score's negative, (batch, d) float64 each, in pieces."""
        rows = max(1, PIECE // len(self.means))
        alpha, sigma2 = alpha.expand(len(x)), sigma2.expand(len(x))
        x0, z = [], []
        for part, a, s2 in zip(x.split(rows), alpha.split(rows), sigma2.split(rows), strict=True):
            joint, y, variance = self._joint(part, a, s2)
            _, axes, variances, points, _ = (kept.to(x.device) for kept in self._kernels)
            mean = torch.softmax(joint, 1) @ points
            here = (y - a.to(y)[:, None] * mean) / variance
            x0.append((mean + a.to(y)[:, None] * variances * here) @ axes.T)
            z.append(here @ axes.T)
        if not x0:
            return x.double(), x.double()
        return torch.cat(x0), torch.cat(z)


def bandwidth(points: Tensor, weights: Tensor | None = None, *, seed: int = 0) -> float:
    """The std of kernels under which each point is likeliest given all others, between 1e-3 and 3.

    `max_h mean_i w_i log sum_{j != i} w_j N(x_i; x_j, h^2)/(1 - w_i)`, leave-one-out likelihood (Duin 1976). points (n, d), no
    two the same: copies are weights. Of many points some, drawn by the seed, are left out in turn.

    >>> 0.2 < bandwidth(torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()) < 0.4
    True
    """
    n, d = points.shape
    share = torch.full((n,), 1 / n, dtype=torch.float64) if weights is None else weights.double() / weights.sum()
    rows = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: max(64, PAIRS // n)]
    pieces = []
    for part in rows.split(max(1, PIECE // n)):
        squares = torch.cdist(points[part], points, compute_mode="donot_use_mm_for_euclid_dist").square()
        pieces.append(squares.scatter(1, part[:, None], math.inf))
    own, log_share = share[rows], share.log()

    def loss(log_h: float) -> float:
        h2 = math.exp(2 * log_h)
        logs = torch.cat([torch.logsumexp(log_share - squares / (2 * h2), 1) for squares in pieces])
        return -float((own * (logs - torch.log1p(-own))).sum() / own.sum()) + d * log_h

    least = minimize_scalar(loss, bounds=(math.log(1e-3), math.log(3.0)), method="bounded", options={"xatol": 1e-3})
    return math.exp(float(least.x))


def rows_behind(weights: Tensor, rewards: Tensor) -> dict[str, float]:
    """`1/sum w^2` rows in effect, and `sqrt(sum w^2 (r - E r)^2)`, the standard error of a mean by weighted rows.

    >>> rows_behind(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 2.0, 9.0]))
    {'optimum_rows': 2.0, 'optimum_reward_se': 0.7071...}
    """
    weights, rewards = weights.double(), rewards.double()
    error = weights * (rewards - weights @ rewards)
    return {"optimum_rows": float(1 / (weights**2).sum()), "optimum_reward_se": float(error.square().sum().sqrt())}
