"""Test oracle of the forward-process trainers on N(m, v) data and the reward `-q/2 (x - mu)^2 + l x`, eta 1, one dimension.

A rule says at each t which score it regresses on, given the law N(M, V) of the policy's samples. Where the score of every t and
the law belong together is its fixed point: two numbers, found by a root of the sampler's moments in continuous time. Rules:

- `ram`: `s_pre + grad E[r | x_t]/beta`, the posterior that of the noised samples (a baseline that is E[r | x_t]);
- `ram_batch`: with the mean reward as baseline: `+ (E[r | x_t] - E r)(s~ - s)/beta`, of which an affine policy sees the
  projection on affine functions, s~ the score of the noised samples;
- `optimal`: the score of the tilted law.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import root
from torch import Tensor

from scoreaction.diffusion.processes import Process


class Case(NamedTuple):
    """Data N(m, v), reward and price."""

    m: float
    v: float
    q: float
    mu: float
    l: float
    beta: float

    @property
    def tilted(self) -> tuple[float, float]:
        """Mean and variance of the tilted law."""
        variance = 1 / (1 / self.v + self.q / self.beta)
        return variance * (self.m / self.v + (self.q * self.mu + self.l) / self.beta), variance


TASK = Case(0.3, 0.8, 1.0, 1.0, 0.2, 0.5)
"""The product's linear-quadratic task."""


def coefficients(rule: str, case: Case, law: tuple[float, float], alpha: Tensor, sigma2: Tensor) -> tuple[Tensor, Tensor]:
    """`s = slope x + offset` of a rule at these alpha and sigma^2, where the samples have this law."""
    m, v, q, mu, l, beta = case
    P0 = alpha**2 * v + sigma2
    if rule == "optimal":
        mean, variance = case.tilted
        P = alpha**2 * variance + sigma2
        return -1 / P, alpha * mean / P
    mean, variance = law
    P = alpha**2 * variance + sigma2
    gain = variance * alpha / P
    slope = -q * gain**2  # of grad E[r | x_t]
    offset = gain * (-q * (mean - gain * alpha * mean - mu) + l)
    if rule == "ram":
        return -1 / P0 + slope / beta, alpha * m / P0 + offset / beta
    centre = alpha * mean  # in y = x - centre: E[r | x] - E r = c1 y + c2 (y^2 - P)
    D1, D0 = -1 / P0 + slope / beta, -(centre - alpha * m) / P0 + (slope * centre + offset) / beta
    c1, c2 = slope * centre + offset, slope / 2
    k1 = (-1 / P - D1 + c1 * D0 / beta) / (1 - c1**2 * P / beta**2 + 2 * c2 * P / beta)
    k0 = -D0 - c1 * P * k1 / beta  # s~ - s = k0 + k1 y
    return -1 / P - k1, -k0 - (-1 / P - k1) * centre


def reached(rule: str, case: Case, law: tuple[float, float], process: Process) -> tuple[float, float]:
    """Mean and variance of what the rule's policy samples, in continuous time."""

    def moments(u: float, y: np.ndarray) -> list[float]:
        t = torch.tensor((1 - u) ** 2, dtype=torch.float64)
        slope, offset = (float(c) for c in coefficients(rule, case, law, process.alpha(t), process.sigma2(t)))
        g2, f, pace = float(process.g2(t)), float(process.f(t)), 2 * (1 - u)
        drift = -f + g2 * slope
        return [pace * (drift * y[0] + g2 * offset), pace * (2 * drift * y[1] + g2)]

    end = solve_ivp(moments, (0, 1), [0.0, process.prior_std**2], method="LSODA", rtol=1e-8, atol=1e-10)
    return float(end.y[0, -1]), float(end.y[1, -1])


def fixed_point(rule: str, case: Case, process: Process) -> tuple[float, float]:
    """Mean and variance of the samples at the rule's fixed point."""
    found = root(lambda law: np.subtract(reached(rule, case, (law[0], abs(law[1])), process), law), case.tilted, tol=1e-7)
    assert found.success
    return float(found.x[0]), float(found.x[1])
