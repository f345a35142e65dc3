"""The soft Q of SQDF: the reward of the clean sample that a frozen predictor sees at the end of a step, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.sampling.experience import Points
from scoreaction.types import Prediction


def clean_sample(learner: Learner, points: Points, *, consistency: bool, steps: int) -> Tensor:
    """x0_hat of the frozen model at points (rows,): (rows, *shape), differentiable in x.

    The reference's posterior mean (Tweedie); with steps > 1 after `steps - 1` steps of its DDIM at eta 0, each an equal share
    of t; or a consistency model's. At t = 0 it is x itself.
    """
    model = learner.setting.model
    if consistency:
        return model.consistency(points.x, points.t, points.conditions)
    process, x, t = model.process, points.x, points.t
    ask = learner.reference(points.conditions)
    for left in range(steps, 1, -1):
        s = points.t * (left - 1) / steps
        said: Prediction = ask(x, t)
        x, t = ddim_step(process, said, t, s, 0.0).mean, s
    return ask(x, t).x0


class SoftQ(NamedTuple):
    """`r(x0_hat(x))` (rows,), its gradient in x and x0_hat itself (rows, *shape)."""

    value: Tensor
    grad: Tensor
    x0: Tensor


def soft_q(
    learner: Learner, points: Points, groups: Tensor, *, slope: bool, consistency: bool = False, steps: int = 1
) -> SoftQ:
    """The soft Q at points, in pieces of at most `max_rows`. Kang et al. 2026 (arXiv 2512.04559), eq. 9.

    Without `slope` nothing is differentiated and the gradient is zero.
    """
    value, grad, clean = points.x.new_zeros(len(points.x)), torch.zeros_like(points.x), torch.zeros_like(points.x)
    score, limit = learner.setting.judge.score, learner.setting.max_rows
    for done in (False, True):
        chosen = ((points.t == 0) == done).nonzero().flatten()
        for rows in chosen.split(limit) if len(chosen) else ():  # no network is asked about no rows
            near = rows.to(points.x.device)
            with torch.set_grad_enabled(slope):
                part = points.take(rows)
                x = part.x.detach().requires_grad_(slope)
                here = Points(x, part.t, part.told, part.owner)
                x0 = x if done else clean_sample(learner, here, consistency=consistency, steps=steps)
                found = score(x0, groups[rows.to(groups.device)])
                if slope:
                    grad[near] = torch.autograd.grad(found.sum(), x)[0]
            value[near], clean[near] = found.detach(), x0.detach()
    return SoftQ(value, grad, clean)
