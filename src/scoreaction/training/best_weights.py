"""Keeping the weights that were best by a metric: model selection, for rewards that fall again when training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Selection:
    """Remembers when `metric` (higher is better) was highest, and the weights of then.

    One iteration's metric is that of few samples: it is averaged over iterations by the same decay as the weights that are
    kept, so that it is theirs and not one batch's luck.

    >>> Selection("rewad_mean", ["reward_mean", "diversity"])
    Traceback (most recent call last):
    ValueError: train.select: no metric 'rewad_mean'; choose from reward_mean, diversity
    """

    def __init__(self, metric: str, known: Iterable[str]) -> None:
        known = list(known)
        if metric not in known:
            raise ValueError(f"train.select: no metric {metric!r}; choose from {', '.join(known)}")
        self.metric = metric
        self.average: float | None = None
        self.best, self.iteration = float("-inf"), 0

    def __call__(self, value: float, iteration: int, decay: float) -> bool:
        """Takes one iteration's value; whether the weights after it are the best so far."""
        self.average = value if self.average is None else decay * self.average + (1 - decay) * value
        if self.average <= self.best:
            return False
        self.best, self.iteration = self.average, iteration
        return True

    def state(self, weights: dict[str, Tensor] | None) -> dict[str, Any]:
        """What changes, with the weights that are kept."""
        return {"average": self.average, "best": self.best, "iteration": self.iteration, "weights": weights}

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts back what `state` took, but for the weights."""
        self.average, self.best, self.iteration = state["average"], state["best"], state["iteration"]
