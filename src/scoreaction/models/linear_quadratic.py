"""One Gaussian, whose optimum under a quadratic reward is a Gaussian: the linear-quadratic case of control theory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.processes import ProcessName
from scoreaction.models import gaussian_mixture
from scoreaction.networks.model import Model
from scoreaction.settings import Settings

DEFAULTS: dict[str, Any] = gaussian_mixture.DEFAULTS


class Config(Settings, frozen=True, extra="forbid", allow_inf_nan=False):
    """mean (d,) and variance, one for all directions or (d,) of them; process vp, cosine, stable_diffusion, ve or flow.

    consistency: the folder of a consistency model that `scoreaction distill` made of this model.
    """

    name: Literal["linear_quadratic"] = "linear_quadratic"
    mean: list[float] = Field([0.3], min_length=1)
    variance: float | list[float] = 0.8
    process: ProcessName = "vp"
    hidden: int = Field(64, ge=1, le=2**14)
    depth: int = Field(2, ge=1, le=100)
    consistency: Path | None = None

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        variances = self.variance if isinstance(self.variance, list) else [self.variance]
        if min(variances, default=0) <= 0 or len(variances) not in (1, len(self.mean)):
            raise ValueError(f"variance: must be positive, one number or {len(self.mean)} of them")
        return self


def build(config: Config) -> Model:
    """The model, with its law for measuring distances."""
    d = len(config.mean)
    variance = torch.as_tensor(config.variance, dtype=torch.float64).expand(d)
    law = Mixture(torch.ones(1), torch.tensor([config.mean], dtype=torch.float64), torch.diag(variance)[None])
    return gaussian_mixture.exact_model(law, config.process, config.hidden, config.depth, config.consistency)
