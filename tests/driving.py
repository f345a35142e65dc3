"""Drives an algorithm's updates as the loop does, without its optimiser: every loss is called once, with all its rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Largest, Update, Updates


class Evaluated(NamedTuple):
    """An update with its loss, which has its graph, and its figures over all rows."""

    update: Update
    loss: Tensor
    figures: dict[str, float]

    @property
    def network(self) -> str:
        return self.update.network


def evaluated(update: Update) -> Evaluated:
    """The sum over the terms of the mean over their rows."""
    losses, figures = [], {}
    for term in update.terms:
        if term.rows == 0:
            continue
        values, seen = term.loss(torch.arange(term.rows))
        assert values.shape == (term.rows,)
        losses.append(values.mean())
        for name, figure in seen.items():
            largest = isinstance(figure, Largest)
            figures[name] = float(figure.values.detach().max() if largest else figure.detach().double().mean())
    return Evaluated(update, torch.stack(losses).sum(), figures)


def each(updates: Updates) -> Iterator[Evaluated]:
    """Updates one after another, each evaluated and its figures sent back; whoever iterates may step between two of them."""
    try:
        update = next(updates)
        while True:
            done = evaluated(update)
            yield done
            update = updates.send(done.figures)
    except StopIteration:
        return


def total(update: Update) -> Tensor:
    """The loss of an update."""
    return evaluated(update).loss


def summed(updates: Iterable[Evaluated], network: str = "policy") -> Tensor:
    """The sum of a network's losses."""
    return torch.stack([done.loss for done in updates if done.network == network]).sum()
