"""The base class of forward processes: four functions of t define a process, and the rest is derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, normal
from scoreaction.diffusion.processes.clock import Clock


@dataclass(frozen=True)
class Process(Clock):
    """Forward process `x_t = alpha_t x0 + sigma_t eps`, the solution of the SDE `dX = f X dt + g dB`.

    A subclass defines `log_alpha`, `f`, `sigma2` and `sigma2_rate`; all else follows, with `f = dlog alpha/dt` and
    `g^2 = dsigma^2/dt - 2 f sigma^2`. It overrides a derived method only where its own formula is finite or exact and the
    general one is not. Methods take t in [0, 1] as a float64 tensor of any shape and return float64 of that shape.
    Song et al., ICLR 2021 (arXiv 2011.13456), eq. 5.

    >>> from scoreaction import Flow
    >>> t = torch.tensor(0.25, dtype=torch.float64)
    >>> [float(value) for value in (Flow().alpha(t), Flow().sigma(t), Flow().f(t))]
    [0.75, 0.25, -1.333...]
    """

    states: ClassVar[str] = "Gaussian"

    def log_alpha(self, t: Tensor) -> Tensor:
        """`log alpha_t`."""
        raise NotImplementedError

    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient `f = dlog alpha/dt`, per unit of t."""
        raise NotImplementedError

    def sigma2(self, t: Tensor) -> Tensor:
        """Variance of the noise, `sigma_t^2`."""
        raise NotImplementedError

    def sigma2_rate(self, t: Tensor) -> Tensor:
        """`dsigma^2/dt`, finite where dsigma/dt is not (VP at t = 0)."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """Log of the signal-to-noise ratio, `log(alpha^2/sigma^2)`, decreasing in t."""
        return 2 * self.log_alpha(t) - torch.log(self.sigma2(t))

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal, `alpha_t`."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise, `sigma_t`."""
        return torch.sqrt(self.sigma2(t))

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient `g^2 = dsigma^2/dt - 2 f sigma^2`, per unit of t."""
        return self.sigma2_rate(t) - 2 * self.f(t) * self.sigma2(t)

    def alpha_rate(self, t: Tensor) -> Tensor:
        """`dalpha/dt`."""
        return self.f(t) * self.alpha(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """`dsigma/dt`."""
        return self.sigma2_rate(t) / (2 * self.sigma(t))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the Gaussian that sampling starts from: `sqrt(alpha_1^2 + sigma_1^2)`, data of variance 1."""
        one = torch.ones((), dtype=torch.float64)
        return float(torch.sqrt(self.alpha(one) ** 2 + self.sigma2(one)))

    @property
    def reaches_data(self) -> bool:
        """True if `sigma_0 = 0`; if False, x at t = 0 still carries noise of standard deviation sigma_0."""
        return float(self.sigma2(torch.zeros((), dtype=torch.float64))) == 0.0

    def start(self, shape: Sequence[int], source: Source) -> Tensor:
        """Noise of the prior's std, float32."""
        return self.prior_std * normal(shape, source)

    def has_density(self, s: Tensor) -> Tensor:
        """True where `sigma_s > 0`: a step to data is deterministic."""
        return self.sigma2(s) > 0

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The t with this log SNR, by bisection to 1e-15; a log SNR out of range gives 0 or 1.

        >>> from scoreaction import Flow
        >>> float(Flow().time_at(torch.zeros((), dtype=torch.float64)))  # alpha = sigma
        0.5
        """
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = (low + high) / 2
            noisier = self.log_snr(middle) > log_snr
            low, high = torch.where(noisier, middle, low), torch.where(noisier, high, middle)
        return (low + high) / 2
