"""Conversion of a network's output to (x0, eps) and back: every kind of prediction is a row `y = p x0 + q eps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, normal
from scoreaction.diffusion.processes import Process
from scoreaction.types import Prediction

Predicts = Literal["x0", "eps", "score", "v", "velocity"]
P = TypeVar("P", bound=tuple[Tensor, ...])


def mapped(function: Callable[..., Tensor], *predictions: P) -> P:
    """A prediction of the same kind: `function` of the tensors that stand at the same place of each.

    >>> mapped(torch.add, Prediction(torch.ones(1), torch.zeros(1)), Prediction(torch.ones(1), torch.ones(1)))
    Prediction(x0=tensor([2.]), eps=tensor([1.]))
    """
    kind: Any = type(predictions[0])
    return kind(*(function(*parts) for parts in zip(*predictions, strict=True)))


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """Reshapes a coefficient () or (batch,) so that it multiplies `like` (batch, *shape), in the dtype and device of `like`.

    >>> expand(torch.ones(4, dtype=torch.float64), torch.zeros(4, 3, 2)).shape
    torch.Size([4, 1, 1])
    """
    if coefficient.ndim > 1 or (coefficient.ndim == 1 and coefficient.shape[0] != like.shape[0]):
        raise ValueError(f"expected a coefficient of shape () or ({like.shape[0]},), got {tuple(coefficient.shape)}")
    return coefficient.reshape(coefficient.shape + (1,) * (like.ndim - coefficient.ndim)).to(like)


def row(process: Process, predicts: Predicts, t: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients (p, q) of a kind of prediction, `y = p x0 + q eps`, each of the shape of t.

    x0 (1, 0); eps (0, 1); score (0, -1/sigma); v (-sigma, alpha) (Salimans and Ho 2022, arXiv 2202.00512);
    velocity (dalpha/dt, dsigma/dt) (Lipman et al. 2023, arXiv 2210.02747). ValueError for another name.

    >>> from scoreaction import Flow
    >>> [float(c) for c in row(Flow(), "velocity", torch.tensor(0.5, dtype=torch.float64))]
    [-1.0, 1.0]
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


def known_from(process: Process, predicts: Predicts, ratio: float) -> float:
    """The time from which on an error of a prediction counts at most `ratio` times in eps: of x0 that of `alpha/sigma`, else 0.

    Such an error costs the square of that in nats. The time is rounded to 1e-4.

    >>> from scoreaction import VE, Flow
    >>> known_from(Flow(), "x0", 20.0), known_from(VE(), "x0", 20.0), known_from(VE(), "v", 20.0)
    (0.0476, 0.189, 0.0)
    """
    if predicts != "x0":
        return 0.0
    return round(float(process.time_at(torch.tensor(2 * math.log(ratio), dtype=torch.float64))), 4)


def to_prediction(process: Process, predicts: Predicts, x: Tensor, t: Tensor, y: Tensor) -> Prediction:
    """Converts a network's output y at (x, t) to (x0, eps), both (batch, *shape); t () or (batch,) float64.

    `det = alpha q - sigma p`, `x0 = (q x - sigma y)/det`, `eps = (alpha y - p x)/det`. Not determined, and not finite: eps
    from an x0 at sigma = 0, x0 from an eps at alpha = 0, one or both from a score at either end.

    >>> from scoreaction import Flow
    >>> x, y = torch.tensor([[1.0]]), torch.tensor([[2.0]])  # x0 = x - t y, eps = x + (1 - t) y
    >>> prediction = to_prediction(Flow(), "velocity", x, torch.tensor(0.25, dtype=torch.float64), y)
    >>> prediction.x0.item(), prediction.eps.item()
    (0.5, 2.5)
    """
    p, q = row(process, predicts, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    det = alpha * q - sigma * p
    x0 = y if predicts == "x0" else expand(q / det, x) * x - expand(sigma / det, x) * y
    eps = y if predicts == "eps" else expand(alpha / det, x) * y - expand(p / det, x) * x
    return Prediction(x0, eps)


def projected(process: Process, t: Tensor, prediction: Prediction, projection: Callable[[Tensor], Tensor]) -> Prediction:
    """The prediction with x0 projected, at the same x: `eps + (alpha/sigma) (x0 - P x0)`; t () or (batch,).

    Where the data lie in a box that is the clip of Ho et al. 2020 (arXiv 2006.11239): near pure noise a small error of eps is
    a large one of x0. In a subspace all that is outside of it is noise, so samples end inside. At sigma = 0 eps stays.

    >>> from scoreaction import Flow
    >>> t, x = torch.tensor(0.5, dtype=torch.float64), torch.tensor([[3.0]])
    >>> wide = Prediction(2 * x - 1, torch.ones(1, 1))  # 3 = (5 + 1)/2
    >>> [part.item() for part in projected(Flow(), t, wide, lambda x0: x0.clamp(-1, 1))]
    [1.0, 5.0]
    """
    sigma = process.sigma(t)
    ratio = torch.where(sigma > 0, process.alpha(t) / sigma, 0.0)
    x0 = projection(prediction.x0)
    return Prediction(x0, prediction.eps + expand(ratio, x0) * (prediction.x0 - x0))


def from_prediction(process: Process, predicts: Predicts, t: Tensor, prediction: Prediction) -> Tensor:
    """Converts (x0, eps) to the output `y = p x0 + q eps` of a network of this kind of prediction, (batch, *shape)."""
    p, q = row(process, predicts, t)
    return expand(p, prediction.x0) * prediction.x0 + expand(q, prediction.x0) * prediction.eps


def score(process: Process, t: Tensor, prediction: Prediction) -> Tensor:
    """Score `s = grad log p_t(x) = -eps/sigma`, (batch, *shape): the action of the policy. Not finite where sigma = 0."""
    return -prediction.eps / expand(process.sigma(t), prediction.eps)


def perturbed(process: Process, x: Tensor, t: Tensor, prediction: Prediction, std: float, generator: Source) -> Prediction:
    """Adds exploration noise to the action: `eps + std z`, z normal, and the x0 of that eps at x (batch, *shape), t ().

    Unchanged at alpha = 0, where x alone determines eps.

    >>> from scoreaction import Flow
    >>> x, t = torch.ones(1, 2), torch.tensor(0.5, dtype=torch.float64)
    >>> moved = perturbed(Flow(), x, t, Prediction(x, x), 0.1, torch.Generator().manual_seed(0))
    >>> torch.allclose(0.5 * moved.x0 + 0.5 * moved.eps, x)
    True
    """
    if std == 0 or float(process.alpha(t)) == 0:
        return prediction
    noise = normal(x.shape, generator, x.dtype).to(x.device)
    eps = prediction.eps + std * noise
    return Prediction((x - expand(process.sigma(t), x) * eps) / expand(process.alpha(t), x), eps)


class PredictionBuffer:
    """Memory for the predictions of `rows` rows, filled piece by piece, so that no second copy of them exists.

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
        """Stores the next rows, tensors of (n, *shape)."""
        if self.into is None:
            self.into = mapped(lambda part: part.new_empty(self.rows, *part.shape[1:]), prediction)
        rows = slice(self.count, self.count + len(prediction[0]))
        for whole, part in zip(self.into, prediction, strict=True):
            whole[rows] = part
        self.count = rows.stop

    def all(self) -> Prediction:
        """All rows (rows, *shape); ValueError if some are missing."""
        if self.into is None or self.count < self.rows:
            raise ValueError(f"{self.count} of {self.rows} predictions are there")
        return self.into
