"""Conditions of a network: None, a tensor (batch, ...), or a dict of such tensors. Everything that is done to them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoreaction.types import Conditions


def map_conditions(function: Callable[..., Tensor], *conditions: Conditions) -> Conditions:
    """`function` applied to the tensors that stand in the same place."""
    first = conditions[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: function(*(c[key] for c in conditions)) for key in first}
    return function(*conditions)


def take(conditions: Conditions, rows: Tensor) -> Conditions:
    """The rows with these indices.

    >>> take(torch.tensor([5, 6, 7]), torch.tensor([2, 0])).tolist()
    [7, 5]
    """
    return map_conditions(lambda c: c[rows.to(c.device)], conditions)


def repeat(conditions: Conditions, times: int) -> Conditions:
    """The whole batch `times` times over: (batch, ...) -> (times * batch, ...), batch fastest."""
    return map_conditions(lambda c: c.repeat(times, *[1] * (c.ndim - 1)), conditions)


def concatenate(first: Conditions, second: Conditions) -> Conditions:
    """One batch after the other."""
    return map_conditions(lambda a, b: torch.cat([a, b]), first, second)
