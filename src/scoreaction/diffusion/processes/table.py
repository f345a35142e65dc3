"""Variance-preserving process through a scheduler's table, such as Stable Diffusion's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from scoreaction.diffusion.processes.process import Process

Spacing = Literal["leading", "trailing", "linspace"]

KEPT = 1024
"""Times at which a table's spline is kept."""


@dataclass(frozen=True)
class TableVP(Process):
    """Variance preserving through a table of N cumulative alphas, continuous in t.

    At `t = i/(N-1)`, `alpha^2 = alphas_cumprod[i]`; between the nodes `log alpha` is a cubic (Hermite). A table that does not
    begin with 1 does **not** reach data at t = 0: sigma_0 is its first sigma (0.029 for Stable Diffusion). For a table that
    ends with 0 (zero terminal SNR, Lin et al. 2023, arXiv 2305.08891) `alpha = (1-t) h`, the cubic goes through log h, and f
    and g^2 are infinite at t = 1. `spacing` and `steps_offset` are the scheduler's choice of indices, for `own_grid`.

    >>> round(float(TableVP.scaled_linear().sigma(torch.zeros((), dtype=torch.float64))), 4)
    0.0292
    """

    alphas_cumprod: tuple[float, ...]
    spacing: Spacing = "leading"
    steps_offset: int = 0

    @classmethod
    def scaled_linear(cls, *, beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> TableVP:
        """Builds Stable Diffusion's table, whose betas are linear in their square root (Rombach et al. 2022)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        return cls(tuple(torch.cumprod(1 - betas, 0).tolist()), steps_offset=1)

    @classmethod
    def from_scheduler(
        cls, alphas_cumprod: Tensor, *, ends_at_data: bool, spacing: Spacing = "leading", steps_offset: int = 0
    ) -> TableVP:
        """Builds the process of a diffusers scheduler from its `alphas_cumprod` (N,).

        `ends_at_data` is the scheduler's `set_alpha_to_one`: it puts clean data, alpha = 1, in front of the table.
        """
        head = [1.0] if ends_at_data else []
        return cls(tuple(head + alphas_cumprod.double().tolist()), spacing, steps_offset)

    def cut(self, least: float = 0.006) -> TableVP:
        """The table up to the last alpha that is not below `least`, by default that at the end of DDPM's.

        The x0_hat of an eps network has its error times sigma/alpha. A cosine table goes on to an alpha of 5e-5, where that is
        20,000, and a policy follows it away. Samples begin at pure noise, where the process has alpha times the data besides.
        ValueError where fewer than two entries are left.

        >>> TableVP((1.0, 0.5, 0.01, 1e-8)).cut(0.01).alphas_cumprod
        (1.0, 0.5, 0.01)
        """
        kept = tuple(value for value in self.alphas_cumprod if value >= least**2)
        if len(kept) < 2:
            raise ValueError(f"least: {least:g} leaves {len(kept)} of {len(self.alphas_cumprod)} entries; take a smaller one")
        return replace(self, alphas_cumprod=kept)

    @property
    def _head(self) -> int:
        """Number of entries in front of the scheduler's own: 1 if the table begins with clean data, else 0."""
        return 1 if self.alphas_cumprod[0] == 1.0 else 0

    @property
    def _ends_at_zero(self) -> bool:
        return self.alphas_cumprod[-1] == 0.0

    def timestep(self, t: Tensor) -> Tensor:
        """Index into the scheduler's table, real-valued and at least 0: the time as a diffusers network takes it."""
        return (t * (len(self.alphas_cumprod) - 1) - self._head).clamp(min=0)

    def own_grid(self, steps: int) -> Tensor:
        """Times of the scheduler's indices, then 0; ValueError if they leave the table or the last one repeats t = 0.

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

    @cached_property
    def _seen(self) -> dict[tuple[float, torch.dtype], tuple[Tensor, Tensor]]:
        return {}

    def _cubic(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """The spline at t; at a single time, which a step asks for many times, as it was before."""
        if t.ndim or t.requires_grad or t.device.type != "cpu":
            return self._spline(t)
        key = float(t), t.dtype
        if key not in self._seen:
            if len(self._seen) >= KEPT:
                self._seen.clear()
            self._seen[key] = self._spline(t)
        return self._seen[key]

    def _spline(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Value and derivative (per unit of t) of the cubic Hermite spline through the nodes."""
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

    def alpha_rate(self, t: Tensor) -> Tensor:
        value, slope = self._cubic(t)
        return torch.exp(value) * ((1 - t) * slope - 1 if self._ends_at_zero else slope)
