"""Weighted particles in groups: log weights, effective sample size, resampling within groups, and the running log Z."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, normal


def uniform(groups: int, source: Source) -> Tensor:
    """A uniform number for each group, (groups,) float64: `Phi(z)` of a normal z, so that it comes from the group's stream."""
    return torch.special.ndtr(normal((groups,), source, torch.float64))


def categorical(log_weights: Tensor, u: Tensor) -> Tensor:
    """The particle of each group at u (groups,) of its weights, (groups,): j with probability `softmax(log w)_j`.

    >>> categorical(torch.tensor([[0.0, -50.0]]), torch.tensor([0.999])).tolist()
    [0]
    """
    return _at(log_weights, u[:, None])[:, 0]


def systematic(log_weights: Tensor, u: Tensor) -> Tensor:
    """M ancestors of each group, (groups, M), by systematic resampling: j is there floor or ceil of `M softmax(log w)_j` times.

    log_weights (groups, M), u (groups,). The points are `(u + 0..M-1)/M` of the cumulated weights. Kitagawa 1996.

    >>> systematic(torch.tensor([[0.5, 0.25, 0.25, 0.0]]).log(), torch.tensor([0.5])).tolist()
    [[0, 0, 1, 2]]
    """
    m = log_weights.shape[1]
    return _at(log_weights, (u[:, None] + torch.arange(m, dtype=torch.float64)) / m)


def _at(log_weights: Tensor, points: Tensor) -> Tensor:
    """The particles at these points (groups, k), in [0, 1), of the cumulated weights of each group."""
    cumulated = torch.softmax(log_weights.double(), 1).cumsum(1)
    points = (points * cumulated[:, -1:]).contiguous()
    return torch.searchsorted(cumulated, points, right=True).clamp(max=log_weights.shape[1] - 1)


def effective_share(log_weights: Tensor) -> Tensor:
    """Effective sample size over M, `1/(M sum w^2)` of the normalised weights, (groups,): 1 where all are equal.

    >>> effective_share(torch.tensor([[0.0, 0.0], [0.0, -100.0]])).tolist()
    [1.0, 0.5]
    """
    return 1 / (torch.softmax(log_weights.double(), 1).square().sum(1) * log_weights.shape[1])


class Particles:
    """Log weights of the particles of each group, and log Z of what was resampled away.

    `Z = prod over resamplings of mean_j w_j` has the expectation that it estimates at any number of particles (Del Moral 2004).

    >>> particles = Particles(1, 2)
    >>> particles.weigh(torch.tensor([[0.0, math.log(3.0)]]))
    >>> round(float(particles.log_z.exp()), 6)
    2.0
    """

    def __init__(self, groups: int, m: int) -> None:
        self.log_weights = torch.zeros(groups, m, dtype=torch.float64)
        self.settled = torch.zeros(groups, dtype=torch.float64)
        self.shares: list[Tensor] = []
        """The effective share (groups,) at each weighing."""

    @property
    def log_z(self) -> Tensor:
        """Estimate of log Z of each group so far, (groups,)."""
        return self.settled + torch.logsumexp(self.log_weights, 1) - math.log(self.log_weights.shape[1])

    def weigh(self, increment: Tensor) -> None:
        """Adds to the log weights, (groups, M)."""
        self.log_weights = self.log_weights + increment.double().cpu()
        self.shares.append(effective_share(self.log_weights))

    def resample(self, below: float, source: Source) -> Tensor | None:
        """Resamples the groups whose effective share is below a threshold: row numbers (groups * M,), None where none is.

        Row `group * M + particle`. The weights of a resampled group are equal again.
        """
        groups, m = self.log_weights.shape
        u, due = uniform(groups, source), self.shares[-1] < below
        if not bool(due.any()):
            return None
        ancestors = torch.where(due[:, None], systematic(self.log_weights, u), torch.arange(m))
        self.settled = torch.where(due, self.log_z, self.settled)
        self.log_weights = torch.where(due[:, None], 0.0, self.log_weights)
        return (torch.arange(groups)[:, None] * m + ancestors).flatten()
