"""Training of causal models on masked tokens: soft tails of masks, and weights by what is missing before a position."""

from __future__ import annotations

import torch
from torch import Tensor


def tail_sizes(length: int, t: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Numbers of masks N and of the last positions that they fall into, at t (batch,).

    `N = max(1, floor(L t))` and `W = min(L, floor(spread N))`.
    """
    masks = (length * t).floor().clamp(min=1)
    return masks, (spread * masks).floor().clamp(max=length)


def soft_tail_masking(x0: Tensor, t: Tensor, generator: torch.Generator, *, mask: int, spread: float = 1.5) -> Tensor:
    """Masks tokens x0 (batch, length) near the end: N positions, uniformly among the last W, as `tail_sizes` has them.

    t (batch,) in (0, 1]; spread 1 masks the whole tail, a large one anywhere. A position in the tail is masked with probability
    N/W, one before it never. CARD (arXiv 2601.22031).

    >>> x = soft_tail_masking(torch.zeros(1, 8, dtype=torch.long), torch.tensor([0.5]), torch.Generator(), mask=2, spread=1.0)
    >>> x.tolist()
    [[0, 0, 0, 0, 2, 2, 2, 2]]
    """
    length = x0.shape[1]
    masks, tail = tail_sizes(length, t, spread)
    inside = torch.arange(length) >= length - tail[:, None]
    order = torch.where(inside, torch.rand(x0.shape, generator=generator), 2.0).argsort(1).argsort(1)
    return torch.where((order < masks[:, None]).to(x0.device), mask, x0)


def context_weights(masked: Tensor, *, decay: float = 0.5) -> Tensor:
    """Weights of the positions that are predicted, (batch, length): `1/(1 + S)`, S what is missing just before.

    `C_n = [n is masked](1 + [n-1 is masked])`, `S_n = C_n + (1 - decay) S_{n-1}`; the weight of position n has `S_{n-1}`: it
    knows what the network saw and no more. masked (batch, length). CARD (arXiv 2601.22031).

    >>> context_weights(torch.tensor([[True, True, False]])).tolist()
    [[1.0, 0.5, 0.2857142984867096]]
    """
    before = torch.cat([torch.zeros_like(masked[:, :1]), masked[:, :-1]], 1)
    cost = masked.float() * (1 + before.float())
    missing, weights = torch.zeros_like(cost[:, 0]), []
    for position in range(masked.shape[1]):
        weights.append(1 / (1 + missing))
        missing = cost[:, position] + (1 - decay) * missing
    return torch.stack(weights, 1)


def causal_loss(logits: Tensor, x0: Tensor, masked: Tensor) -> Tensor:
    """The cross-entropy of all positions, in nats, weighted by their context: `sum w_n (-log p(x_n))/sum w_n`, ().

    logits (batch, length, vocabulary) of a causal network at the masked tokens.
    """
    weights = context_weights(masked)
    errors = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
    return (weights * errors).sum() / weights.sum()
