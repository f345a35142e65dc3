"""The one clock of all forward processes, and all that samplers, loops and files know of a process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source


class Clock(ABC):
    """Forward process on the clock t in [0, 1], 0 data and 1 noise: `Process` of Gaussian states, `Masking` of tokens."""

    states: ClassVar[str]
    """Kind of the states, a word for messages."""
    noises: ClassVar[Literal["one"] | None] = None
    """Admissible eta where all solvers have one, `one` where there is no other noise than the process's own."""

    @abstractmethod
    def start(self, shape: Sequence[int], source: Source) -> Tensor:
        """States at t = 1, of this shape, whose first dimension is rows; drawn on the CPU so that seeds travel."""

    @abstractmethod
    def has_density(self, s: Tensor) -> Tensor:
        """True where a step with noise to s has a density, of the shape of s."""

    def own_grid(self, steps: int) -> Tensor:
        """Times of the pretrained model's own scheduler, decreasing to 0, (steps + 1,); uniform if there is no scheduler."""
        return torch.arange(steps, -1, -1, dtype=torch.float64) / steps
