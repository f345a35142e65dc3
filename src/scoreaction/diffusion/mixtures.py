"""Gaussian mixtures, their exact score, and the optimum of KL-regularised fine-tuning on them.

A mixture stays a mixture under the forward process and under tilting by a linear or quadratic reward, so score,
soft value, KL and objective are known in closed form: the ground truth of the tests and of the distances in a run's
summary. Coefficients are float64; samples may have any floating dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.types import Conditions, Prediction


@dataclass(frozen=True, eq=False)
class Quadratic:
    """Reward `r(x) = -1/2 (x - mu)^T Q (x - mu) + l^T x`, linear if Q = 0, differentiable.

    Q (d, d) symmetric, l (d,), mu (d,); ValueError for other shapes. `reward(samples (batch, d)) -> (batch,)`.

    >>> float(Quadratic.linear([1.0, 0.5])(torch.tensor([[2.0, 2.0]])))
    3.0
    """

    Q: Tensor
    l: Tensor
    mu: Tensor

    def __post_init__(self) -> None:
        for name in ("Q", "l", "mu"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().double())
        d = self.l.shape[0] if self.l.ndim == 1 else 0
        if self.Q.shape != (d, d) or self.mu.shape != (d,):
            shapes = ", ".join(str(tuple(part.shape)) for part in (self.Q, self.l, self.mu))
            raise ValueError(f"quadratic reward: Q, l, mu must be (d, d), (d,), (d,), got {shapes}")
        if not torch.allclose(self.Q, self.Q.T):
            raise ValueError("quadratic reward: Q must be symmetric; use (Q + Q^T)/2")

    @classmethod
    def linear(cls, direction: Tensor | list[float]) -> Quadratic:
        """Builds the linear reward `r(x) = l^T x` of a direction l (d,)."""
        l = torch.as_tensor(direction, dtype=torch.float64)
        return cls(torch.zeros(len(l), len(l)), l, torch.zeros(len(l)))

    def __call__(self, samples: Tensor, conditions: Conditions = None) -> Tensor:
        centred = samples - self.mu.to(samples)
        return samples @ self.l.to(samples) - ((centred @ self.Q.to(samples)) * centred).sum(-1) / 2


@dataclass(frozen=True, eq=False)
class Optimum:
    """Solution of `max E r - beta KL`: the tilted law `p* = p exp(r/beta)/Z` and its figures, E* the mean under it.

    `reward = E* r`, `kl_nats = E* r/beta - log Z`, `objective = beta log Z`, `log_z = log Z`.
    """

    law: Mixture
    reward: float
    kl_nats: float
    objective: float
    log_z: float


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussian mixture `p = sum_k w_k N(m_k, C_k)`: weights (K,), means (K, d), covariances (K, d, d), all float64.

    Weights are positive and are normalised to sum 1. A covariance may be singular (0 is a point mass); then there is no
    score at sigma = 0. ValueError for other shapes or values.

    >>> law = Mixture.isotropic([[0.0]], std=1.0)
    >>> round(float(law.log_prob(torch.zeros(1, 1))), 4)
    -0.9189
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    shared: ClassVar[bool] = False
    """True of a class whose components share one covariance, (1, d, d)."""

    def __post_init__(self) -> None:
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().double())
        k, d = self.means.shape if self.means.ndim == 2 else (0, 0)
        if k == 0 or self.weights.shape != (k,) or self.covariances.shape != (1 if self.shared else k, d, d):
            shapes = ", ".join(str(tuple(part.shape)) for part in (self.weights, self.means, self.covariances))
            raise ValueError(f"mixture: weights, means, covariances must be (K,), (K, d), (K, d, d), got {shapes}")
        if not bool((self.weights > 0).all()):
            raise ValueError("mixture: weights must be positive; leave out components of weight 0")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())
        variances, _ = self._eigen
        if not torch.allclose(self.covariances, self.covariances.mT) or float(variances.min()) < 0:
            raise ValueError("mixture: covariances must be symmetric and positive semi-definite")

    @classmethod
    def isotropic(
        cls, means: Tensor | list[list[float]], *, std: float, weights: Tensor | list[float] | None = None
    ) -> Mixture:
        """Builds components of one std in all directions, of equal weight by default; means (K, d), weights (K,)."""
        m = torch.as_tensor(means, dtype=torch.float64)
        k, d = m.shape
        w = torch.ones(k) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        return cls(w, m, (std**2 * torch.eye(d, dtype=torch.float64)).expand(k, d, d))

    @property
    def dimension(self) -> int:
        """Dimension d of the samples."""
        return self.means.shape[1]

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (K, d) and eigenvectors (K, d, d), in columns, of the covariances; axes where they are diagonal."""
        diagonal = torch.diagonal(self.covariances, dim1=1, dim2=2)
        if torch.equal(torch.diag_embed(diagonal), self.covariances):
            return diagonal, torch.eye(self.means.shape[1], dtype=torch.float64).expand_as(self.covariances)
        variances, axes = torch.linalg.eigh(self.covariances)
        rounding = variances.abs().amax(1, keepdim=True) * 1e-13
        return torch.where(variances.abs() < rounding, 0.0, variances), axes

    @cached_property
    def _axes(self) -> Tensor | None:
        """Eigenvectors of all components, transposed and stacked, (K d, d), to rotate x in one product; None for the axes."""
        _, axes = self._eigen
        if torch.equal(axes, torch.eye(self.dimension, dtype=torch.float64).expand_as(axes)):
            return None
        return axes.mT.reshape(-1, self.dimension)

    @cached_property
    def _rotated_means(self) -> Tensor:
        """`U_k^T m_k`, (K, d, 1)."""
        return self._eigen[1].mT @ self.means[:, :, None]

    def _terms(self, x: Tensor, alpha: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor]:
        """Terms at x (batch, d): `log w_k N(x; alpha m_k, P_k)` (K, batch) and `U_k^T P_k^-1 (x - alpha m_k)` (K, d, batch).

        `P_k = alpha^2 C_k + sigma^2 I`, `C_k = U_k diag(variances) U_k^T`. The batch is last because sums over a few
        components and dimensions are several times faster that way.
        """
        if x.ndim != 2 or x.shape[1] != self.dimension:
            raise ValueError(f"mixture: expected samples (batch, {self.dimension}), got {tuple(x.shape)}")
        k, d = self.means.shape
        columns = x.T.contiguous()
        rotated = columns if self._axes is None else (self._axes.to(x) @ columns).view(k, d, -1)
        y = rotated - alpha.to(x) * self._rotated_means.to(x)
        variance = (alpha**2).to(x) * self._eigen[0][:, :, None].to(x) + sigma2.to(x)  # (K, d, 1 or batch)
        z = y / variance
        log_normal = -0.5 * ((y * z).sum(1) + torch.log(variance).sum(1) + d * math.log(2 * math.pi))
        return self.weights.log()[:, None].to(x) + log_normal, z

    def _rotate_back(self, z: Tensor) -> Tensor:
        """Sum `sum_k U_k z_k`: (K, d, batch) -> (batch, d)."""
        return (z.sum(0) if self._axes is None else self._axes.to(z).T @ z.flatten(0, 1)).T.contiguous()

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x (batch, d), (batch,)."""
        one = torch.ones((), dtype=torch.float64, device=x.device)
        return torch.logsumexp(self._terms(x, one, 0 * one)[0], 0)

    def log_prob_at(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """Log density `log p_t(x)` of the noised law, (batch,); x (batch, d), t () or (batch,) float64."""
        return torch.logsumexp(self._terms(x, process.alpha(t), process.sigma2(t))[0], 0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws n samples, (n, d) float64."""
        component = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dimension, dtype=torch.float64, generator=generator)
        variances, axes = self._eigen
        root = axes * torch.sqrt(variances)[:, None, :]
        each = root.expand(len(self.means), -1, -1)[component]
        return self.means[component] + torch.einsum("nij,nj->ni", each, noise)

    def noised(self, process: Process, t: Tensor) -> Mixture:
        """Law p_t of `x_t = alpha x0 + sigma eps`: components `N(alpha m_k, alpha^2 C_k + sigma^2 I)`; t () float64."""
        alpha, eye = process.alpha(t), torch.eye(self.dimension, dtype=torch.float64)
        covariances = alpha**2 * self.covariances + process.sigma2(t) * eye
        return replace(self, means=alpha * self.means, covariances=covariances)

    def score(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """Score `grad log p_t(x)`, (batch, d); x (batch, d), t () or (batch,) float64.

        >>> from scoreaction import VP
        >>> time = torch.tensor(0.5, dtype=torch.float64)
        >>> Mixture.isotropic([[0.0]], std=1.0).score(VP(), torch.tensor([[3.0]]), time).tolist()  # p_t is N(0, 1)
        [[-3.0]]
        """
        logits, z = self._terms(x, process.alpha(t), process.sigma2(t))
        return -self._rotate_back(torch.softmax(logits, 0)[:, None, :] * z)

    def prediction(self, process: Process, x: Tensor, t: Tensor) -> Prediction:
        """Exact prediction (E[x0 | x_t], E[eps | x_t]) at x (batch, d), t () or (batch,): that of a perfect network.

        `x0 = sum_k r_k (m_k + alpha C_k P_k^-1 (x - alpha m_k))`, `eps = sigma sum_k r_k P_k^-1 (x - alpha m_k)`, with
        `r_k` the posterior weight of component k. Nothing divides by alpha or sigma.
        """
        alpha, sigma2 = process.alpha(t), process.sigma2(t)
        logits, z = self._terms(x, alpha, sigma2)
        weight = torch.softmax(logits, 0)
        weighted = weight[:, None, :] * z
        eps = expand(torch.sqrt(sigma2), x) * self._rotate_back(weighted)
        x0 = weight.T @ self.means.to(x) + expand(alpha, x) * self._rotate_back(weighted * self._eigen[0][:, :, None].to(x))
        return Prediction(x0, eps)

    def mean_reward(self, reward: Quadratic) -> float:
        """Mean reward `E r = sum_k w_k [-1/2 (tr(Q C_k) + (m_k - mu)^T Q (m_k - mu)) + l^T m_k]`."""
        spread = torch.einsum("ij,kji->k", reward.Q, self.covariances)
        return float(self.weights @ (reward(self.means) - spread / 2))

    def _tilt(self, reward: Quadratic, beta: float) -> tuple[Mixture, float]:
        """Tilted law `p* = p exp(r/beta)/Z` and log Z, component by component."""
        if beta <= 0:
            raise ValueError(f"beta must be positive, got {beta}")
        if len(reward.l) != self.dimension:
            raise ValueError(f"the reward takes {len(reward.l)} dimensions and the mixture has {self.dimension}")
        C, Q, l = self.covariances, reward.Q, reward.l
        eye = torch.eye(self.dimension, dtype=torch.float64)
        # symmetric form of I + C Q/beta, positive definite exactly if C^-1 + Q/beta is
        variances, axes = self._eigen
        root = axes * torch.sqrt(variances)[:, None, :]
        inner = eye + root.mT @ Q @ root / beta
        if float(torch.linalg.eigvalsh(inner).min()) <= 0:
            raise ValueError(
                "no optimum: C_k^-1 + Q/beta is not positive definite, so exp(r/beta) outgrows the data law; raise beta or Q"
            )
        log_det = torch.logdet(inner)
        G = torch.linalg.inv(eye + C @ Q / beta)
        d = self.means - reward.mu
        Gd = torch.einsum("kij,kj->ki", G, d)
        GC = G @ C
        means = torch.einsum("kij,kj->ki", G, self.means + C @ (Q @ reward.mu + l) / beta)
        log_weights = (
            self.weights.log()
            + l @ reward.mu / beta
            - ((d @ Q) * Gd).sum(1) / (2 * beta)
            + Gd @ l / beta
            + torch.einsum("i,kij,j->k", l, GC, l) / (2 * beta**2)
            - log_det / 2
        )
        log_z = torch.logsumexp(log_weights, 0)
        weights = (log_weights - log_z).exp().clamp(min=1e-300)
        return replace(self, weights=weights, means=means, covariances=(GC + GC.mT) / 2), float(log_z)

    def tilted(self, reward: Quadratic, beta: float) -> Mixture:
        """Tilted law `p*(x) = p(x) exp(r(x)/beta)/Z`, the goal of every KL-regularised method; a mixture again."""
        return self._tilt(reward, beta)[0]

    def optimum(self, reward: Quadratic, beta: float) -> Optimum:
        """Optimum of `max E r - beta KL`: the tilted law with its reward, KL and objective. ValueError if there is none.

        >>> four = Mixture.isotropic([[2, 0], [-2, 0], [0, 2], [0, -2]], std=0.3)
        >>> round(four.optimum(Quadratic.linear([1.0, 0.5]), 0.5).kl_nats, 4)
        1.2286
        """
        law, log_z = self._tilt(reward, beta)
        mean = law.mean_reward(reward)
        return Optimum(law, mean, mean / beta - log_z, beta * log_z, log_z)

    def value(self, reward: Quadratic, beta: float, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """Soft value at eta = 1, `V*(t, x) = beta log E[exp(r/beta) | x_t = x]`, (batch,).

        Computed as `V* = beta (log p*_t(x) - log p_t(x) + log Z)`; x (batch, d), t () or (batch,) float64.
        """
        law, log_z = self._tilt(reward, beta)
        return beta * (law.log_prob_at(process, x, t) - self.log_prob_at(process, x, t) + log_z)

    def value_grad(self, reward: Quadratic, beta: float, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """Gradient of the soft value at eta = 1, `grad V* = beta (s* - s_pre)`, (batch, d)."""
        law = self.tilted(reward, beta)
        return beta * (law.score(process, x, t) - self.score(process, x, t))
