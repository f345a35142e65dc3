"""Forward processes: how data becomes noise. One clock: t in [0, 1], 0 is data, 1 is noise.

Forward process `x_t = alpha_t x0 + sigma_t eps`, that is the SDE `dX = f X dt + g dB` with
`f = dlog alpha/dt` and `g^2 = dsigma^2/dt - 2 f sigma^2`. A row of the table owns `log_alpha`,
`f`, `sigma2`, `sigma2_rate` and `log_snr`; everything else follows, and nothing downstream knows which row it has.
All methods take t as a float64 tensor of any shape and return float64 of that shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Process:
    """What every forward process derives from the five functions that its row owns.

    Score SDE: Song et al., ICLR 2021 (arXiv 2011.13456), eq. 5.
    """

    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha_t."""
        raise NotImplementedError

    def f(self, t: Tensor) -> Tensor:
        """Drift coefficient `dlog alpha/dt` (per unit of t)."""
        raise NotImplementedError

    def sigma2(self, t: Tensor) -> Tensor:
        """Variance of the noise, sigma_t^2."""
        raise NotImplementedError

    def sigma2_rate(self, t: Tensor) -> Tensor:
        """`dsigma^2/dt`, finite where dsigma/dt is not (VP at 0)."""
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """`log(alpha^2/sigma^2)`, decreasing in t."""
        return 2 * self.log_alpha(t) - torch.log(self.sigma2(t))

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise."""
        return torch.sqrt(self.sigma2(t))

    def g2(self, t: Tensor) -> Tensor:
        """Squared diffusion coefficient `g^2 = dsigma^2/dt - 2 f sigma^2`."""
        return self.sigma2_rate(t) - 2 * self.f(t) * self.sigma2(t)

    def alpha_rate(self, t: Tensor) -> Tensor:
        """`dalpha/dt`."""
        return self.f(t) * self.alpha(t)

    def sigma_rate(self, t: Tensor) -> Tensor:
        """`dsigma/dt`."""
        return self.sigma2_rate(t) / (2 * self.sigma(t))

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from, `sqrt(alpha_1^2 + sigma_1^2)`."""
        one = torch.ones((), dtype=torch.float64)
        return float(torch.sqrt(self.alpha(one) ** 2 + self.sigma2(one)))

    @property
    def reaches_data(self) -> bool:
        """Whether sigma_0 = 0. Where False, x at t = 0 still carries the noise sigma_0."""
        return float(self.sigma2(torch.zeros((), dtype=torch.float64))) == 0.0

    def own_grid(self, steps: int) -> Tensor:
        """Decreasing times to 0 that the pretrained model's own scheduler steps on, (steps + 1,); uniform where it has none."""
        return torch.arange(steps, -1, -1, dtype=torch.float64) / steps

    def time_at(self, log_snr: Tensor) -> Tensor:
        """The t whose log SNR is `log_snr`, by bisection to 1e-15 (values outside the range give 0 or 1)."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = (low + high) / 2
            noisier = self.log_snr(middle) > log_snr
            low, high = torch.where(noisier, middle, low), torch.where(noisier, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class VP(Process):
    """Variance preserving with linear beta: `alpha = exp(-(beta_min t + (beta_max - beta_min) t^2/2)/2)`.

    Song et al. 2021, eq. 32. Reaches data at t = 0.

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
    """

    offset: float = 0.008

    def _angle(self, t: Tensor) -> Tensor:
        return math.pi / 2 * (t + self.offset) / (1 + self.offset)

    def log_alpha(self, t: Tensor) -> Tensor:
        cosine = torch.sin(math.pi / 2 * (1 - t) / (1 + self.offset))  # cos(a), exactly 0 at t = 1
        return torch.log(cosine) - math.log(math.cos(math.pi / 2 * self.offset / (1 + self.offset)))

    def f(self, t: Tensor) -> Tensor:
        return -math.pi / 2 / (1 + self.offset) * torch.tan(self._angle(t))

    def sigma2(self, t: Tensor) -> Tensor:
        # sin(a - a0) sin(a + a0)/cos^2 a0: exactly 0 at t = 0
        apart = torch.sin(math.pi / 2 * t / (1 + self.offset))
        together = torch.sin(math.pi / 2 * (t + 2 * self.offset) / (1 + self.offset))
        return apart * together / math.cos(math.pi / 2 * self.offset / (1 + self.offset)) ** 2

    def sigma2_rate(self, t: Tensor) -> Tensor:
        scale = math.cos(math.pi / 2 * self.offset / (1 + self.offset)) ** 2
        return math.pi / 2 / (1 + self.offset) * torch.sin(2 * self._angle(t)) / scale


Spacing = Literal["leading", "trailing", "linspace"]


@dataclass(frozen=True)
class TableVP(Process):
    """Variance preserving, through a table of cumulative alphas such as Stable Diffusion's, continuous in t.

    `log alpha` is the cubic through the table's nodes at `t = i/(N-1)`; at the nodes it equals the table.
    A table that does not begin with 1 does **not** reach data at t = 0: sigma_0 is its first sigma (0.029 for
    Stable Diffusion). A table that ends with 0 (zero terminal SNR, Lin et al. 2023, arXiv 2305.08891) has `alpha = (1-t) h`,
    the cubic through log h, and f and g^2 infinite at t = 1.

    spacing and steps_offset are the scheduler's choice of indices, for `own_grid`.
    """

    alphas_cumprod: tuple[float, ...]
    spacing: Spacing = "leading"
    steps_offset: int = 0

    @classmethod
    def scaled_linear(cls, *, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> TableVP:
        """Stable Diffusion's table: betas linear in their square root (Rombach et al. 2022)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls(tuple(torch.cumprod(1 - betas, 0).tolist()), steps_offset=1)

    @classmethod
    def from_scheduler(
        cls, alphas_cumprod: Tensor, *, ends_at_data: bool, spacing: Spacing = "leading", steps_offset: int = 0
    ) -> TableVP:
        """A diffusers scheduler's `alphas_cumprod`; with `ends_at_data` (its `set_alpha_to_one`) t = 0 is clean data."""
        head = [1.0] if ends_at_data else []
        return cls(tuple(head + alphas_cumprod.double().tolist()), spacing, steps_offset)

    @property
    def _head(self) -> int:
        """Entries in front of the scheduler's own."""
        return 1 if self.alphas_cumprod[0] == 1.0 else 0

    @property
    def _ends_at_zero(self) -> bool:
        return self.alphas_cumprod[-1] == 0.0

    def timestep(self, t: Tensor) -> Tensor:
        """The index into the scheduler's table (real-valued, at least 0) that a diffusers network takes for t."""
        return (t * (len(self.alphas_cumprod) - 1) - self._head).clamp(min=0)

    def own_grid(self, steps: int) -> Tensor:
        """The scheduler's indices as times, then 0.

        leading `i (N // steps) + offset`; trailing `N - i N/steps - 1`; linspace from N - 1 to 0, rounded (Lin et al. 2023,
        table 2).
        """
        n = len(self.alphas_cumprod) - self._head
        if steps > n:
            raise ValueError(
                f"sampler.steps: the scheduler's table has {n} steps, got {steps}; use fewer, or another sampler.grid"
            )
        i = torch.arange(steps - 1, -1, -1, dtype=torch.float64)
        match self.spacing:
            case "leading":
                index = i * (n // steps) + self.steps_offset
            case "trailing":
                index = torch.round((i + 1) * n / steps) - 1
            case "linspace":
                index = torch.round(torch.linspace(n - 1, 0, steps, dtype=torch.float64))
        times = (index + self._head) / (len(self.alphas_cumprod) - 1)
        if not 0 < float(times[-1]) <= float(times[0]) <= 1:
            raise ValueError(
                f"sampler.grid: the scheduler's own {steps} steps leave its table, or the last one does nothing (steps_offset"
                f" {self.steps_offset}, spacing {self.spacing}); use grid uniform or power"
            )
        return torch.cat([times, torch.zeros(1, dtype=torch.float64)])

    @cached_property
    def _nodes(self) -> tuple[Tensor, Tensor]:
        values = torch.log(torch.tensor(self.alphas_cumprod, dtype=torch.float64)) / 2
        if self._ends_at_zero:
            values = values - torch.log1p(-torch.linspace(0, 1, len(values), dtype=torch.float64))
            values[-1] = 3 * values[-2] - 3 * values[-3] + values[-4]
        (slopes,) = torch.gradient(values, edge_order=2)  # per index
        return values, slopes

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cubic Hermite value and derivative (per unit of t) through the nodes."""
        values, slopes = (node.to(t.device) for node in self._nodes)
        last = len(self.alphas_cumprod) - 1
        index = t * last
        i = index.floor().clamp(0, last - 1).long()
        u = index - i
        y0, y1, d0, d1 = values[i], values[i + 1], slopes[i], slopes[i + 1]
        a, b = 2 * (y0 - y1) + d0 + d1, 3 * (y1 - y0) - 2 * d0 - d1
        return y0 + u * (d0 + u * (b + u * a)), last * (d0 + u * (2 * b + 3 * u * a))

    def log_alpha(self, t: Tensor) -> Tensor:
        value = self._cubic(t)[0]
        return value + torch.log1p(-t) if self._ends_at_zero else value

    def f(self, t: Tensor) -> Tensor:
        slope = self._cubic(t)[1]
        return slope - 1 / (1 - t) if self._ends_at_zero else slope

    def sigma2(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self.log_alpha(t))

    def sigma2_rate(self, t: Tensor) -> Tensor:
        value, slope = self._cubic(t)
        if self._ends_at_zero:  # -2 alpha dalpha/dt, finite at t = 1 where f is not
            return -2 * (1 - t) * torch.exp(2 * value) * ((1 - t) * slope - 1)
        return -2 * slope * torch.exp(2 * value)


@dataclass(frozen=True)
class VE(Process):
    """Variance exploding: `alpha = 1`, `sigma = sigma_min (sigma_max/sigma_min)^t`.

    Song et al. 2021, eq. 31. Does **not** reach data at t = 0: sigma_0 = sigma_min.
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


@dataclass(frozen=True)
class Flow(Process):
    """Rectified flow: `alpha = 1 - t, sigma = t`, so `f = -1/(1-t)` and `g^2 = 2t/(1-t)`.

    Liu et al. 2023 (arXiv 2209.03003). Reaches data at t = 0; f and g^2 are infinite at t = 1. shift and last are a
    scheduler's choice of times, for `own_grid`, and no part of the process.
    """

    shift: float = 1.0
    last: float | None = None

    def own_grid(self, steps: int) -> Tensor:
        """`u = 1, ..., last` in equal steps (last = 1/steps by default), `t = shift u/(1 + (shift - 1) u)`, then 0.

        Esser et al. 2024 (arXiv 2403.03206), eq. 23.
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


ProcessName = Literal["vp", "cosine", "stable_diffusion", "ve", "flow"]
PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": VP,
    "cosine": CosineVP,
    "stable_diffusion": TableVP.scaled_linear,
    "ve": VE,
    "flow": Flow,
}
"""The processes a recipe can name."""
