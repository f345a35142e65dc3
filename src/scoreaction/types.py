"""What the floors hand to one another: frozen records and protocols, no behaviour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

Conditions = Any
"""Conditions of a network: None, a tensor whose first dimension is the batch, or a dict of such tensors."""


class Prediction(NamedTuple):
    """The clean sample and the noise that a network predicts at (t, x), with `x = alpha x0 + sigma eps`.

    Both are carried because at alpha = 0 eps (and the score) says nothing about x0, and at
    sigma = 0 x0 says nothing about eps. Shapes: both (batch, *shape).
    """

    x0: Tensor
    eps: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]
"""`predict(x, t)`: x (batch, *shape), t () or (batch,) float64 in [0, 1]."""


class RewardFunction(Protocol):
    """`reward(samples, conditions) -> (batch,)`. Higher is better."""

    @property
    def differentiable(self) -> bool: ...

    def __call__(self, samples: Tensor, conditions: Conditions) -> Tensor: ...


EVERY = 2**31
"""Rows of a `Background` that has nothing to do meanwhile: it may as well have all samples at once."""


@runtime_checkable
class Background(Protocol):
    """A reward that can work while other work goes on: `begin` asks, and calling what it gives waits for the scores.

    `rows`: how many samples it is best given at a time.
    """

    @property
    def rows(self) -> int: ...

    def begin(self, samples: Tensor, conditions: Conditions) -> Callable[[], Tensor]: ...


class Prompt(str):
    """A prompt that is drawn with a weight of its own and carries more than its text.

    Everything takes it for its text; a reward finds the rest in `metadata`, for example the objects it should count.

    >>> prompt = Prompt("two cats", weight=2.0, metadata={"count": 2})
    >>> prompt, prompt.metadata["count"]
    ('two cats', 2)
    """

    weight: float
    metadata: dict[str, Any]

    def __new__(cls, text: str, *, weight: float = 1.0, metadata: dict[str, Any] | None = None) -> Prompt:
        """ValueError for a weight that is negative or not finite."""
        if not 0 <= weight < float("inf"):
            raise ValueError(f"prompts: the weight of {text!r} must be finite and not negative (got {weight})")
        prompt = super().__new__(cls, text)
        prompt.weight, prompt.metadata = float(weight), metadata or {}
        return prompt


Values = dict[str, Any]
