"""Moves of noise, `z' = z + f(z)`: their KL to standard normal noise, exactly, to second order, and as published."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.types import Conditions

Penalty = Literal["exact", "frobenius", "published"]
EXACT = 32
"""The most numbers in a sample for which Jacobians are made: each takes as many backward passes."""
DIFFERENCE = 0.05
"""Half of the step of a central difference, in standard deviations of the noise."""

Shift = Callable[[Tensor], Tensor]
"""`f(z)`, z and f (rows, *shape): each row's of its own z alone."""


class Move(NamedTuple):
    """f(z) (rows, *shape), what it costs in nats (rows,), and 1 where the map folds, `det(I + J) < 0`, None if not known."""

    f: Tensor
    nats: Tensor
    folds: Tensor | None = None


def published(f: Shift, z: Tensor, v: Tensor) -> Move:
    """`1/2 |f|^2`, which is the KL of a shift alone: a map that also shrinks the noise pays less than it owes.

    Eyring et al. 2025 (arXiv 2508.09968), which takes the mean over dimensions in the place of the sum.
    """
    shift = f(z)
    return Move(shift, sum_event(shift**2) / 2)


def frobenius(f: Shift, z: Tensor, v: Tensor) -> Move:
    """`1/2 |f|^2 + 1/2 |J v|^2`, v standard normal: the KL to second order in a symmetric J = df/dz, whose mean is `|J|^2/2`.

    J v is a central difference.
    """
    shift = f(z)
    change = (f(z + DIFFERENCE * v) - f(z - DIFFERENCE * v)) / (2 * DIFFERENCE)
    return Move(shift, (sum_event(shift**2) + sum_event(change**2)) / 2)


def exact(f: Shift, z: Tensor, v: Tensor) -> Move:
    """`1/2 |f|^2 + tr J - log |det(I + J)|`, J = df/dz, whose mean over z is `KL(law of z + f(z) || N(0, I))` (Stein).

    Where z + f(z) folds it is less than the KL: two values of z then share the mass of one.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        z = z.detach().requires_grad_(True)
        shift = f(z)
        columns = shift.flatten(1).sum(0)  # rows do not depend on one another
        rows = [
            torch.autograd.grad(y, z, create_graph=graph, retain_graph=True, materialize_grads=True)[0].flatten(1)
            for y in columns
        ]
        jacobian = torch.stack(rows, 1).double()
    with torch.set_grad_enabled(graph):
        eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
        sign, log_det = torch.linalg.slogdet(eye + jacobian)
        stein = jacobian.diagonal(dim1=1, dim2=2).sum(1) - log_det
        nats = sum_event(shift**2) / 2 + stein.to(shift)
    return Move(shift if graph else shift.detach(), nats if graph else nats.detach(), (sign < 0).to(shift))


PENALTIES: dict[Penalty, Callable[[Shift, Tensor, Tensor], Move]] = {
    "exact": exact,
    "frobenius": frobenius,
    "published": published,
}
CALLS: dict[Penalty, Callable[[int], int]] = {
    "exact": lambda size: 2 * (1 + size),
    "frobenius": lambda size: 6,
    "published": lambda size: 2,
}
"""Network evaluations with a graph that a row of a penalty takes, by the numbers in a sample."""


def known_penalty(size: int) -> Penalty:
    """The nearest to the KL that can be had for samples of so many numbers."""
    return "exact" if size <= EXACT else "frobenius"


def shift_of(model: Model, conditions: Conditions, prompt: Tensor) -> Shift:
    """The f of a model for the prompts of these numbers."""
    return partial(model.noise_move, conditions=conditions, prompt=prompt)


@torch.no_grad()
def noise_kl(model: Model, z: Tensor, v: Tensor, conditions: Conditions, prompt: Tensor) -> Tensor:
    """KL in nats of a model's moved noise to standard normal noise, (rows,), on average over z; exact up to 32 numbers.

    z, v (rows, *shape) standard normal.
    """
    cost, parts = PENALTIES[known_penalty(model.size)], torch.arange(len(z)).split(model.max_rows or max(1, len(z)))
    nats = [cost(shift_of(model, conditions, take(prompt, rows)), take(z, rows), take(v, rows)).nats for rows in parts]
    return torch.cat(nats)
