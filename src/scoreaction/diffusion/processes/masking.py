"""The masking process of tokens: a sibling of the Gaussian processes on the same clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, normal
from scoreaction.diffusion.processes.clock import Clock

ScheduleName = Literal["linear", "cosine", "power"]


@dataclass(frozen=True)
class Masking(Clock):
    """Forward process of tokens: each is kept with probability alpha_t and masked otherwise, independently of all else.

    States are (batch, length) integers: tokens 0 .. vocabulary - 1, and the mask, which is `vocabulary`. alpha_0 = 1 and
    alpha_1 = 0, so that the start is all masks, a constant. schedule: `linear` alpha = 1 - t, `cosine` cos(pi t/2), `power`
    (1 - t)^rho. Sahoo et al. 2024 (arXiv 2406.07524), section 3. ValueError for a vocabulary below 2.

    >>> process, t = Masking(4), torch.tensor([0.5, 0.25], dtype=torch.float64)
    >>> process.alpha(t).tolist(), process.chance(t[0], t[1]).item()
    ([0.5, 0.75], 0.5)
    """

    vocabulary: int
    schedule: ScheduleName = "linear"
    rho: float = 2.0

    states: ClassVar[str] = "tokens"
    noises: ClassVar[Literal["one"] | None] = "one"
    reaches_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.vocabulary < 2:
            raise ValueError(f"vocabulary: must be at least 2, the number of tokens without the mask (got {self.vocabulary})")
        if self.schedule not in ("linear", "cosine", "power") or not self.rho > 0:
            raise ValueError("schedule: must be linear, cosine, or power with a rho above 0")

    @property
    def mask(self) -> int:
        """The mask's number, one above the last token's."""
        return self.vocabulary

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still there at t; any shape, float64."""
        match self.schedule:
            case "linear":
                return 1 - t
            case "cosine":
                return torch.where(t == 1, 0.0, torch.cos(math.pi / 2 * t))
            case "power":
                return (1 - t) ** self.rho

    def alpha_rate(self, t: Tensor) -> Tensor:
        """`dalpha/dt`, negative."""
        match self.schedule:
            case "linear":
                return -torch.ones_like(t)
            case "cosine":
                return -math.pi / 2 * torch.sin(math.pi / 2 * t)
            case "power":
                return -self.rho * (1 - t) ** (self.rho - 1)

    def rate(self, t: Tensor) -> Tensor:
        """Rate at which a masked position is shown in reverse, `-alpha'/(1 - alpha)` per unit of t: no choice of the policy."""
        return -self.alpha_rate(t) / (1 - self.alpha(t))

    def chance(self, t: Tensor, s: Tensor) -> Tensor:
        """Probability that a position masked at t is shown at s, `(alpha_s - alpha_t)/(1 - alpha_t)`."""
        return (self.alpha(s) - self.alpha(t)) / (1 - self.alpha(t))

    def start(self, shape: Sequence[int], source: Source) -> Tensor:
        """All masks; nothing is drawn."""
        return torch.full(tuple(shape), self.mask)

    def has_density(self, s: Tensor) -> Tensor:
        """True: every step has a probability."""
        return torch.ones_like(s, dtype=torch.bool)

    def log_snr(self, t: Tensor) -> Tensor:
        """ValueError: tokens have no signal-to-noise ratio to space a grid by."""
        raise ValueError("sampler.grid: log_snr and karras are spaced by a Gaussian's noise, which tokens lack; use uniform")

    def forward(self, x0: Tensor, t: Tensor, source: Source) -> Tensor:
        """Masks tokens x0 (batch, length) at t () or (batch,): states at t."""
        uniform = torch.special.ndtr(normal(x0.shape, source).double())
        alpha = self.alpha(torch.as_tensor(t, dtype=torch.float64)).reshape(-1, 1)
        return torch.where((uniform < alpha).to(x0.device), x0, self.mask)
