"""The look-ahead: the reward of the clean samples that a model predicts from x, and its gradient in x."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import Transition

R = TypeVar("R")


def twisted(transition: Transition, grad: Tensor, beta: float) -> Transition:
    """The transition with its mean moved by `k^2 grad v/beta`: the proposal of twisted sequential Monte Carlo."""
    return Transition(transition.mean + expand(transition.std**2 / beta, grad) * grad, transition.std)


def look_ahead(x: Tensor, value: Callable[[Tensor], tuple[Tensor, R]], *, gradient: bool) -> tuple[Tensor, Tensor, R]:
    """The value at each x, its gradient, and what `value` evaluated on the way.

    `value(x) -> (values (rows,), record)`, x (rows, *shape). Without `gradient` no graph is built and the gradient is zero.

    >>> value, grad, _ = look_ahead(torch.tensor([[3.0]]), lambda x: ((x**2).sum(1), None), gradient=True)
    >>> value.tolist(), grad.tolist()
    ([9.0], [[6.0]])
    """
    with torch.set_grad_enabled(gradient):
        leaf = x.detach().requires_grad_(gradient)
        values, record = value(leaf)
        grad = torch.autograd.grad(values.sum(), leaf)[0] if gradient else torch.zeros_like(leaf)
    return values.detach(), grad, record


def soft_mean(rewards: Tensor, beta: float) -> Tensor:
    """`beta log mean_j exp(r_j/beta)` of rewards (rows, draws), (rows,); the mean where beta is infinite.

    >>> soft_mean(torch.tensor([[0.0, math.log(3.0)]]), 1.0).exp()
    tensor([2.])
    """
    if rewards.shape[1] == 1 or math.isinf(beta):
        return rewards.mean(1)
    return beta * (torch.logsumexp(rewards / beta, 1) - math.log(rewards.shape[1]))
