"""The quadratic reward `r(x) = -1/2 (x - center)^T Q (x - center) + l^T x` on vectors."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, Field, FiniteFloat

from scoreaction.diffusion.mixtures import Quadratic
from scoreaction.rewards._closed_form import QuadraticReward


class Config(BaseModel, frozen=True, extra="forbid"):
    """`r(x) = -1/2 (x - center)^T Q (x - center) + l^T x`, x (batch, d). Differentiable, with a known optimum.

    >>> float(build(Config(center=[0.0, 1.0], curvature=2.0))(torch.tensor([[1.0, 3.0]]), None))
    -5.0
    """

    name: Literal["quadratic"] = "quadratic"
    center: list[FiniteFloat] = Field(min_length=1, description="where the quadratic part is largest, one number per dimension")
    curvature: FiniteFloat | list[list[FiniteFloat]] = Field(1.0, description="Q: a symmetric d x d matrix, or q for q times 1")
    linear: list[FiniteFloat] | None = Field(None, description="l, zero where not given")


def build(config: Config) -> QuadraticReward:
    """The reward; its attribute `quadratic` has the coefficients. ValueError where the shapes do not fit."""
    mu = torch.tensor(config.center, dtype=torch.float64)
    if isinstance(config.curvature, list):
        if any(len(row) != len(mu) for row in config.curvature):
            raise ValueError(f"quadratic reward: curvature must be a number or a matrix {len(mu)} x {len(mu)} like its center")
        Q = torch.tensor(config.curvature, dtype=torch.float64)
    else:
        Q = config.curvature * torch.eye(len(mu), dtype=torch.float64)
    l = torch.zeros_like(mu) if config.linear is None else torch.tensor(config.linear, dtype=torch.float64)
    return QuadraticReward(Quadratic(Q, l, mu))
