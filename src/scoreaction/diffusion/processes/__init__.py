"""Forward processes on one clock, t in [0, 1], 0 data and 1 noise: Gaussian `x_t = alpha_t x0 + sigma_t eps`, and `Masking`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from scoreaction.diffusion.processes.clock import Clock
from scoreaction.diffusion.processes.flow import Flow
from scoreaction.diffusion.processes.masking import Masking
from scoreaction.diffusion.processes.process import Process
from scoreaction.diffusion.processes.table import Spacing, TableVP
from scoreaction.diffusion.processes.ve import VE
from scoreaction.diffusion.processes.vp import VP, CosineVP

__all__ = ["PROCESSES", "VE", "VP", "Clock", "CosineVP", "Flow", "Masking", "Process", "ProcessName", "Spacing", "TableVP"]

ProcessName = Literal["vp", "cosine", "stable_diffusion", "ve", "flow"]
PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": VP,
    "cosine": CosineVP,
    "stable_diffusion": TableVP.scaled_linear,
    "ve": VE,
    "flow": Flow,
}
"""The processes that a recipe can name."""
