"""Calls of a network that processes share: all of them make the same ones, whatever rows each has."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from scoreaction.diffusion.predictions import mapped
from scoreaction.networks.conditions import map_conditions
from scoreaction.types import Conditions, Prediction
from scoreaction.world import World

Call = Callable[[Tensor, Tensor, Conditions], Prediction]


def equal_parts(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Rows in parts of at most `size`, in every process as many, at least one: they may be empty. All processes must ask.

    A call of a sharded network is one of all processes.

    >>> import torch
    >>> [part.tolist() for part in equal_parts(torch.arange(3), 2)]
    [[0, 1], [2]]
    """
    (count,) = World.current().reduced([float(-(-len(rows) // max(1, size)))], "max")
    return rows.tensor_split(max(1, int(count)))


def without_rows(call: Call, x: Tensor, t: Tensor, conditions: Conditions) -> Prediction:
    """The prediction for no rows, of a process that calls the network all the same, with its graph: x (0, *shape).

    It is called for one row of zeros, whose gradient is 0.
    """
    one = x.sum() + x.new_zeros(1, *x.shape[1:])
    prediction = call(one, t.new_full((1,), 0.5), map_conditions(lambda c: c.new_zeros(1, *c.shape[1:]), conditions))
    return mapped(lambda part: part[:0] + 0 * part.sum(), prediction)
