"""Conditions of a network (None, a tensor (batch, ...), a dict of such tensors), and rows of any record of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from scoreaction.types import Conditions

R = TypeVar("R")


def map_conditions(function: Callable[..., Tensor], *conditions: Conditions) -> Conditions:
    """Applies a function to the tensors at the same place of conditions of one form."""
    first = conditions[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: function(*(c[key] for c in conditions)) for key in first}
    return function(*conditions)


def take(record: R, rows: Tensor | slice) -> R:
    """The rows with these indices, of a tensor or of every tensor of a dict or a named tuple; None stays None.

    rows may be on another device than the record; a slice takes views.

    >>> take(torch.tensor([5, 6, 7]), torch.tensor([2, 0])).tolist()
    [7, 5]
    >>> from scoreaction.types import Prediction
    >>> take(Prediction(torch.tensor([1, 2]), torch.tensor([3, 4])), torch.tensor([1]))
    Prediction(x0=tensor([2]), eps=tensor([4]))
    """
    parts: Any = record
    if isinstance(parts, Tensor):
        parts = parts[rows if isinstance(rows, slice) else rows.to(parts.device)]
    elif isinstance(parts, dict):
        parts = {key: take(part, rows) for key, part in parts.items()}
    elif isinstance(parts, tuple):
        parts = type(parts)(*(take(part, rows) for part in parts))
    return parts


def concatenate(first: Conditions, second: Conditions) -> Conditions:
    """Concatenates two batches of conditions."""
    return map_conditions(lambda a, b: torch.cat([a, b]), first, second)


def null_of(conditions: Conditions, null: Conditions) -> Conditions:
    """The unconditional condition, of one row, for each of these rows; what it has not, such as a mask, is the row's own.

    >>> null_of({"text": torch.ones(2, 3), "mask": torch.tensor([1, 0])}, {"text": torch.zeros(1, 3)})["mask"].tolist()
    [1, 0]
    """
    rows = map_conditions(lambda n, c: n.to(c).expand_as(c), null, conditions)
    return {**conditions, **rows} if isinstance(rows, dict) else rows
