"""HRF: DDPO on windows of noise levels, with siblings that go on from one state (Barcelo et al. 2024, arXiv 2410.08315)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scoreaction.algorithms._learner import Algorithm, Setting
from scoreaction.algorithms._likelihood_ratio import refuse_without_density
from scoreaction.algorithms._windows import Window, refuse_signal_of_tokens
from scoreaction.algorithms.ddpo import DDPO, DDPOLearner


class HRF(Algorithm):
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
    clip: float = Field(0.2, gt=0)
    advantage_clip: float = Field(5.0, gt=0)
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(4, ge=1)

    def build(self, setting: Setting) -> DDPOLearner:
        refuse_without_density(setting, self.name)
        return DDPOLearner(self._ddpo(), setting)

    def build_on_tokens(self, setting: Setting) -> DDPOLearner:
        refuse_signal_of_tokens(self.window)
        return self.build(setting)

    def _ddpo(self) -> DDPO:
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return DDPO(baseline="branch" if self.branches > 1 else "prompt", **values)


Config = HRF
