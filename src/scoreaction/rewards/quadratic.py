"""The quadratic reward `r(x) = -1/2 (x - center)^T Q (x - center) + l^T x` on vectors."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, FiniteFloat, model_validator

from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.settings import Settings

EXAMPLE = {"center": [1.0, 0.0]}


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = -1/2 (x - center)^T Q (x - center) + l^T x`, x (batch, d). Differentiable, with a known optimum.

    >>> float(build(Config(center=[0.0, 1.0], curvature=2.0))(torch.tensor([[1.0, 3.0]]), None))
    -5.0
    """

    name: Literal["quadratic"] = "quadratic"
    center: list[FiniteFloat] = Field(min_length=1, description="maximum of the quadratic part, one number per dimension")
    curvature: FiniteFloat | list[list[FiniteFloat]] = Field(1.0, description="Q: a symmetric d x d matrix, or q for q times 1")
    linear: list[FiniteFloat] | None = Field(None, description="l, zero where not given")

    @model_validator(mode="after")
    def _shapes(self) -> Config:
        d, q, l = len(self.center), self.curvature, self.linear
        if isinstance(q, list) and [len(row) for row in q] != [d] * d:
            raise ValueError(f"curvature: must be a number or a matrix {d} x {d}, as the center has {d} numbers")
        if isinstance(q, list) and not torch.allclose(torch.tensor(q), torch.tensor(q).T):
            raise ValueError("curvature: must be symmetric; take (Q + Q^T)/2")
        if l is not None and len(l) != d:
            raise ValueError(f"linear: must have {d} numbers, as the center has (got {len(l)})")
        return self


def build(config: Config) -> QuadraticReward:
    """The reward; its attribute `quadratic` has the coefficients."""
    mu = torch.tensor(config.center, dtype=torch.float64)
    scalar = not isinstance(config.curvature, list)
    Q = torch.tensor(config.curvature, dtype=torch.float64) * (torch.eye(len(mu)) if scalar else 1.0)
    l = torch.zeros_like(mu) if config.linear is None else torch.tensor(config.linear, dtype=torch.float64)
    return QuadraticReward(Quadratic(Q, l, mu), setting="center")
