"""Updates without an optimiser: what the loop does with them, but for the step."""

from __future__ import annotations

import torch

from scoreaction.algorithms import Largest


def count(rows):
    """The rows of a term: as many as it says, or those of the list."""
    return rows if isinstance(rows, int) else len(rows)


def evaluated(update):
    """The loss of an update, with its graph, and its figures: the mean of each (or the largest) over the rows of a term."""
    value, figures = 0.0, {}
    for rows, loss, _ in update.terms:
        if count(rows):
            values, seen = loss(torch.arange(count(rows)))
            value = value + values.mean()
            figures |= {k: float((f.values.max() if isinstance(f, Largest) else f.mean()).detach()) for k, f in seen.items()}
    return value, figures


def total(update):
    """The loss of an update: the sum over its terms of the mean over their rows."""
    return evaluated(update)[0]


def each(updates):
    """(update, loss, figures), one after another; the algorithm gets the figures back when the next is taken."""
    update = next(updates, None)
    while update is not None:
        value, figures = evaluated(update)
        yield update, value, figures
        try:
            update = updates.send(figures)
        except StopIteration:
            return


def run(updates):
    """All updates with their figures sent back, without anything learned."""
    return list(each(updates))
