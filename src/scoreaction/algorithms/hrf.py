"""HRF: DDPO on windows of noise levels, with siblings that go on from one state (Barcelo et al. 2024, arXiv 2410.08315)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scoreaction.algorithms._likelihood_ratio import refuse_without_density
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._windows import Window
from scoreaction.algorithms.ddpo import DDPO, ClippedGradient, DDPOLearner


class HRF(ClippedGradient):
    """DDPO in a window W of the chain: `batch/branches` stems run to the first step of W, each goes on `branches` times.

    `-E sum_{steps in W} min(rho A, clip(rho) A)/P(step in W)`, `A_j = (r_j - mean of its siblings)/std`, std that of the
    batch. Siblings differ by what happens from the window on alone, so close to the data their comparison has a few times less
    variance than one with the batch, and the stem is evaluated once for all of them. Windows are drawn at random; the published
    choice by reward differences and distances of pictures is not described well enough to be built, and `signal` is ours. A
    `fixed` window trains its own steps alone. With a full window and one branch it is DDPO.

    >>> HRF().window.kind
    'random'
    """

    name: Literal["hrf"] = "hrf"
    window: Window = Field(Window(kind="random"), description="the steps that an iteration trains: kind, size, start, every")
    branches: int = Field(8, ge=1, description="trajectories that go on from one state where the window begins")

    def build(self, setting: Setting) -> DDPOLearner:
        refuse_without_density(setting, self.name)
        return DDPOLearner(self._ddpo(), setting)

    def _ddpo(self) -> DDPO:
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return DDPO(baseline="branch" if self.branches > 1 else "prompt", **values)


Config = HRF
