"""What the floors hand to one another: frozen records and protocols, no behaviour."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

Conditions = Any
"""What the network is conditioned on: None, or a tensor whose first dimension is the batch."""


@dataclass(frozen=True)
class Prediction:
    """What the network says at (t, x): the clean sample and the noise, with `x = alpha x0 + sigma eps`.

    Both are carried because at alpha = 0 eps (and the score) says nothing about x0, and at
    sigma = 0 x0 says nothing about eps. Shapes: both (batch, *shape).
    """

    x0: Tensor
    eps: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]
"""`predict(x, t)`: x (batch, *shape), t () or (batch,) float64 in [0, 1]."""


class RewardFunction(Protocol):
    """`reward(samples, conditions) -> (batch,)`. Higher is better."""

    differentiable: bool

    def __call__(self, samples: Tensor, conditions: Conditions) -> Tensor: ...
