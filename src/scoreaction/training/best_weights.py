"""Keeping the weights that were best by a metric: model selection, for rewards that fall again when training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from scoreaction.errors import UserError


def check_metric(metric: str | None, held_out: Iterable[str], *, key: str) -> None:
    """Raises UserError unless a run can be judged by the metric: every iteration logs it and higher is better.

    >>> check_metric("rewad_mean", ["ink"], key="train.select")
    Traceback (most recent call last):
    scoreaction.errors.UserError: train.select: no metric 'rewad_mean'; choose from reward_mean, diversity, vendi, held_out.ink
    """
    known = ["reward_mean", "diversity", "vendi", *(f"held_out.{name}" for name in held_out)]
    if metric is not None and metric not in known:
        raise UserError(f"{key}: no metric {metric!r}; choose from {', '.join(known)}")


class Selection:
    """Selection by a metric (higher is better): the iteration after which the weights were best.

    Weights are judged by the samples that they draw, in the iteration after the one that made them. These are few: the metric
    is averaged over iterations by the same decay as the weights that are kept, so that it is theirs and not one batch's luck.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.average: float | None = None
        self.best, self.iteration = float("-inf"), 0

    def __call__(self, value: float, iteration: int, decay: float) -> bool:
        """Takes the value of the weights after so many iterations, which have this decay; True if they are the best so far."""
        self.average = value if self.average is None else decay * self.average + (1 - decay) * value
        if self.average <= self.best:
            return False
        self.best, self.iteration = self.average, iteration
        return True

    def state(self, weights: dict[str, Tensor] | None) -> dict[str, Any]:
        """All that changes, with the weights that are kept."""
        return {"average": self.average, "best": self.best, "iteration": self.iteration, "weights": weights}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a `state`, but for the weights."""
        self.average, self.best, self.iteration = state["average"], state["best"], state["iteration"]
