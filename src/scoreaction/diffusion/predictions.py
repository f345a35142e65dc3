"""What networks predict, and how to turn it into (x0, eps): one row `y = p x0 + q eps` per name."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from scoreaction.diffusion.processes import Process
from scoreaction.types import Prediction

Predicts = Literal["x0", "eps", "score", "v", "velocity"]


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """A coefficient of shape () or (batch,) made to multiply `like` (batch, *shape), in its dtype and device.

    >>> expand(torch.ones(4, dtype=torch.float64), torch.zeros(4, 3, 2)).shape
    torch.Size([4, 1, 1])
    """
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] != like.shape[0]):
        raise ValueError(f"expected a coefficient of shape () or ({like.shape[0]},), got {tuple(coefficient.shape)}")
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim)).to(like)


def row(process: Process, predicts: Predicts, t: Tensor) -> tuple[Tensor, Tensor]:
    """The coefficients (p, q) of `y = p x0 + q eps` for what a network predicts.

    x0 (1, 0); eps (0, 1); score (0, -1/sigma); v (-sigma, alpha) (Salimans and Ho 2022);
    velocity (dalpha/dt, dsigma/dt) (Lipman et al. 2023).
    """
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    match predicts:
        case "x0":
            return one, zero
        case "eps":
            return zero, one
        case "score":
            return zero, -1 / process.sigma(t)
        case "v":
            return -process.sigma(t), process.alpha(t)
        case "velocity":
            return process.alpha_rate(t), process.sigma_rate(t)
    raise ValueError(f"unknown prediction {predicts!r}: choose from {', '.join(get_args(Predicts))}")


def to_prediction(process: Process, predicts: Predicts, x: Tensor, t: Tensor, y: Tensor) -> Prediction:
    """(x0, eps) from a network's output y at (x, t).

    `det = alpha q - sigma p`, `x0 = (q x - sigma y)/det`, `eps = (alpha y - p x)/det`. Singular: x0 and score at
    sigma = 0, eps and score at alpha = 0. There the missing half is not known and is not finite.
    """
    p, q = row(process, predicts, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    det = alpha * q - sigma * p
    x0 = y if predicts == "x0" else expand(q / det, x) * x - expand(sigma / det, x) * y
    eps = y if predicts == "eps" else expand(alpha / det, x) * y - expand(p / det, x) * x
    return Prediction(x0, eps)


def from_prediction(process: Process, predicts: Predicts, t: Tensor, prediction: Prediction) -> Tensor:
    """The output y = p x0 + q eps that a network predicting `predicts` would have given."""
    p, q = row(process, predicts, t)
    return expand(p, prediction.x0) * prediction.x0 + expand(q, prediction.x0) * prediction.eps


def score(process: Process, t: Tensor, prediction: Prediction) -> Tensor:
    """The action: `s = grad log p_t(x) = -eps/sigma`."""
    return -prediction.eps / expand(process.sigma(t), prediction.eps)


def perturbed(
    process: Process, x: Tensor, t: Tensor, prediction: Prediction, std: float, generator: torch.Generator
) -> Prediction:
    """Exploration on the action: `eps + std z`, and x0 to match; unchanged at alpha = 0, where eps does not act."""
    if std == 0 or float(process.alpha(t)) == 0:
        return prediction
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    eps = prediction.eps + std * noise
    return Prediction((x - expand(process.sigma(t), x) * eps) / expand(process.alpha(t), x), eps)


class PredictionBuffer:
    """Room for `rows` predictions, filled one part after another, so that there is never a second copy of them all.

    >>> buffer = PredictionBuffer(2)
    >>> for value in (1.0, 2.0):
    ...     buffer.add(Prediction(torch.full((1, 3), value), torch.zeros(1, 3)))
    >>> buffer.all().x0[:, 0]
    tensor([1., 2.])
    """

    def __init__(self, rows: int) -> None:
        self.rows, self.count = rows, 0
        self.into: Prediction | None = None

    def add(self, prediction: Prediction) -> None:
        """The next rows: x0 and eps (some, ...)."""
        if self.into is None:
            self.into = Prediction(*(part.new_empty(self.rows, *part.shape[1:]) for part in prediction))
        rows = slice(self.count, self.count + len(prediction.x0))
        self.into.x0[rows], self.into.eps[rows] = prediction
        self.count += len(prediction.x0)

    def all(self) -> Prediction:
        """All rows; ValueError where some are missing."""
        if self.into is None or self.count < self.rows:
            raise ValueError(f"{self.count} of {self.rows} predictions are there")
        return self.into
