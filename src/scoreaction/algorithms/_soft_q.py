"""The soft Q of SQDF: the reward of the clean sample that a frozen predictor sees at the end of a step, and its gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._value import put
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import States


def clean_sample(learner: Learner, states: States, *, consistency: bool, steps: int) -> Tensor:
    """x0_hat of the frozen model at these states, (rows, *shape), differentiable in x.

    The pretrained model's posterior mean (Tweedie); with steps > 1 after `steps - 1` steps of its DDIM at eta 0, each an equal
    share of t; or a consistency model's. At t = 0 it is x itself.
    """
    if consistency:
        return learner.model.consistency(states.x, states.t, learner.conditions, prompt=states.prompt)
    x, t = states.x, states.t
    for left in range(steps, 1, -1):
        s = states.t * (left - 1) / steps
        x, t = ddim_step(learner.process, learner.pretrained(x, t, states.prompt), t, s, 0.0).mean, s
    return learner.pretrained(x, t, states.prompt).x0


class SoftQ(NamedTuple):
    """`r(x0_hat(x))` (rows,), its gradient in x and x0_hat itself (rows, *shape)."""

    value: Tensor
    grad: Tensor
    x0: Tensor


def soft_q(learner: Learner, states: States, *, gradient: bool, consistency: bool = False, steps: int = 1) -> SoftQ:
    """The soft Q at these states. Kang et al. 2026 (arXiv 2512.04559), eq. 9.

    Without `gradient` nothing is differentiated and the gradient is zero.
    """
    q = SoftQ(states.x.new_zeros(len(states.x)), torch.zeros_like(states.x), torch.zeros_like(states.x))
    for clean in (False, True):

        def ask(rows: Tensor, clean: bool = clean) -> None:
            with torch.set_grad_enabled(gradient):
                here = take(states, rows)
                here = here._replace(x=here.x.detach().requires_grad_(gradient))
                x0 = here.x if clean else clean_sample(learner, here, consistency=consistency, steps=steps)
                value = learner.reward(x0, here.prompt)
                grad = torch.autograd.grad(value.sum(), here.x)[0] if gradient else torch.zeros_like(here.x)
            put(q, rows, (value.detach(), grad, x0.detach()))

        learner.in_parts(((states.t == 0) == clean).nonzero().flatten(), ask)
    return q
