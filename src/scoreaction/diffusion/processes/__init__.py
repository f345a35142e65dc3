"""Forward processes `x_t = alpha_t x0 + sigma_t eps` on one clock: t in [0, 1], 0 is data, 1 is noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from scoreaction.diffusion.processes.clock import Clock
from scoreaction.diffusion.processes.flow import Flow
from scoreaction.diffusion.processes.process import Process
from scoreaction.diffusion.processes.table import Spacing, TableVP
from scoreaction.diffusion.processes.ve import VE
from scoreaction.diffusion.processes.vp import VP, CosineVP

__all__ = ["PROCESSES", "VE", "VP", "Clock", "CosineVP", "Flow", "Process", "ProcessName", "Spacing", "TableVP"]

ProcessName = Literal["vp", "cosine", "stable_diffusion", "ve", "flow"]
PROCESSES: dict[str, Callable[[], Process]] = {
    "vp": VP,
    "cosine": CosineVP,
    "stable_diffusion": TableVP.scaled_linear,
    "ve": VE,
    "flow": Flow,
}
"""The processes that a recipe can name."""
