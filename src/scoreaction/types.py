"""Records and protocols that several parts of the library share; they hold values and do nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions by the names that settings have for them."""

Conditions = Any
"""Conditions of a network: None, a tensor (batch, ...), or a dict of such tensors (see `networks.conditions`)."""


class Prediction(NamedTuple):
    """Prediction of the clean sample and of the noise at (x, t), `x = alpha x0 + sigma eps`; both (batch, *shape).

    It holds both because x and one of them do not determine the other everywhere: eps (or the score) leaves x0 open at
    alpha = 0, and x0 leaves eps open at sigma = 0.
    """

    x0: Tensor
    eps: Tensor


class Tokens(NamedTuple):
    """Prediction of the clean tokens at (x, t): log_prob (batch, length, vocabulary), normalised at every position.

    It is read at masked positions; those that are shown are what they are. confidence (batch, length): the largest log
    probability at each position, the pretrained model's where the order in which positions are shown goes by it.
    """

    log_prob: Tensor
    confidence: Tensor


Predict = Callable[[Tensor, Tensor], Prediction]
"""Prediction function `predict(x, t)`: x (batch, *shape), t () or (batch,) float64 in [0, 1]."""


Prompts = Sequence[Any] | None
"""A prompt for each sample, a text or a `Prompt`; None where the model takes none."""


class RewardFunction(Protocol):
    """Reward `reward(samples, prompts) -> (batch,)`, higher is better; images in [0, 1], a prompt for each sample or None."""

    @property
    def differentiable(self) -> bool:
        """True if gradients flow from the reward to the samples."""

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor: ...


EVERY = 2**31
"""Number of rows of a `Background` reward that gains nothing from small pieces: all samples at once."""


@runtime_checkable
class Background(Protocol):
    """Reward that can be computed in the background, for example on a server, while sampling goes on."""

    @property
    def rows(self) -> int:
        """Number of samples that `begin` is best called with."""

    def begin(self, samples: Tensor, prompts: Prompts) -> Callable[[], Tensor]:
        """Starts scoring and returns at once; the returned function waits for the scores (batch,)."""


class Prompt(str):
    """Prompt with a sampling weight and metadata: a string to everything else, and a reward can read `metadata`.

    `weight` is proportional to how often training draws the prompt; `metadata` may hold, say, the objects to count.

    >>> prompt = Prompt("two cats", weight=2.0, metadata={"count": 2})
    >>> prompt, prompt.metadata["count"]
    ('two cats', 2)
    """

    weight: float
    metadata: dict[str, Any]

    def __new__(cls, text: str, *, weight: float = 1.0, metadata: dict[str, Any] | None = None) -> Prompt:
        """Makes a prompt; ValueError for a weight that is negative or not finite."""
        if not 0 <= weight < float("inf"):
            raise ValueError(f"prompts: the weight of {text!r} must be finite and not negative (got {weight})")
        prompt = super().__new__(cls, text)
        prompt.weight, prompt.metadata = float(weight), metadata or {}
        return prompt


Values = dict[str, Any]


class Pairs(NamedTuple):
    """Pairs of samples, the better first, as rewards see them (pictures in [0, 1]): winner and loser (n, ...).

    prompts: what both samples of each pair were made for, n of them; None where the model takes none.

    >>> Pairs(torch.ones(1, 2), torch.zeros(1, 2)).prompts is None
    True
    """

    winner: Tensor
    loser: Tensor
    prompts: Sequence[Any] | None = None


class Samples(NamedTuple):
    """Good samples, as rewards see them (pictures in [0, 1]): samples (n, ...), and what each was made for, or None.

    >>> len(Samples(torch.zeros(3, 2), ["a", "b", "a"]).prompts)
    3
    """

    samples: Tensor
    prompts: Sequence[Any] | None = None
