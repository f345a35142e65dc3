"""The words of a learner's updates: a network's step, the terms of its loss, and their figures."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple, TypeAlias

from torch import Tensor

from scoreaction.world import Rows


class Largest(NamedTuple):
    """A figure of which the log has the largest of all rows, and not the mean."""

    values: Tensor


Loss: TypeAlias = tuple[Tensor, dict[str, Tensor | Largest]]
"""The loss of each row (rows,), and figures for the log by name, each (rows,)."""


class Term(NamedTuple):
    """One term of an update: the mean of `loss(numbers)` over rows, numbers those of the own rows from 0 on.

    The loop calls `loss` with parts of them, as many as memory holds: `calls` is how often the loss of one row evaluates the
    model with a graph, 0 where it does not (a critic's). rows are this process's of a list that all drew alike; an int is as
    many of every process.
    """

    rows: Rows | int
    loss: Callable[[Tensor], Loss]
    calls: int = 1


class Update(NamedTuple):
    """One optimiser step of a network: "policy", or a name of the learner's `networks`; its loss is the sum of the terms."""

    network: str
    terms: list[Term]


Updates: TypeAlias = Generator[Update, dict[str, float], None]
"""Updates, one after another: `figures = yield Update(...)` steps the optimiser and gives the update's averaged figures."""
