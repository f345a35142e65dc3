"""The step of masked tokens, in which some positions are shown: its probability, its KL and its sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source, normal
from scoreaction.types import Tokens


def chosen(weights: Tensor, uniform: Tensor) -> Tensor:
    """Indices drawn by the weights of the last dimension, from uniform numbers in [0, 1): (...,).

    The first index at which the running sum exceeds `uniform` times the total: never one of weight 0.

    >>> chosen(torch.tensor([0.0, 1.0, 3.0, 0.0]), torch.tensor(0.2)).item(), chosen(torch.ones(2), torch.tensor(0.5)).item()
    (1, 1)
    """
    sums = weights.double().cumsum(-1)
    last = weights.shape[-1] - 1
    return (sums <= uniform[..., None] * sums[..., -1:]).sum(-1).clamp(max=last)


def tokens_of(log_prob: Tensor) -> Tokens:
    """The prediction with these log probabilities, (batch, length, vocabulary), and its own confidence.

    >>> tokens_of(torch.tensor([[[0.25, 0.75]]]).log()).confidence.exp()
    tensor([[0.7500]])
    """
    return Tokens(log_prob, log_prob.detach().amax(-1))


def product_draws(log_prob: Tensor, uniform: Tensor) -> Tensor:
    """Sequences drawn from the product of these probabilities, (rows, draws, length), by uniform numbers of that shape.

    log_prob (rows, length, vocabulary); token by token as `chosen`.
    """
    sums = log_prob.exp().double().cumsum(-1)
    points = uniform.transpose(1, 2).to(sums) * sums[..., -1:]
    tokens = torch.searchsorted(sums, points.contiguous(), right=True)
    return tokens.clamp(max=log_prob.shape[-1] - 1).transpose(1, 2)


@dataclass(frozen=True)
class Reveal:
    """A step in which masked positions of x are shown, each with its `chance`, with tokens drawn by `log_prob`.

    log_prob (batch, length, vocabulary), normalised; x (batch, length) with `mask` at masked positions; chance (batch, length),
    0 where nothing is masked. Positions are shown independently, or, with `single`, exactly one, and none where none is masked.
    Which positions are shown is no choice of the policy: it cancels in ratios, and costs no KL.

    >>> log_prob = torch.tensor([[[0.25, 0.75]]]).log()
    >>> step = Reveal(log_prob, torch.tensor([[2]]), 2, torch.ones(1, 1), single=True)
    >>> even = Reveal(torch.full((1, 1, 2), 0.5).log(), step.x, 2, step.chance, single=True)
    >>> round(step.log_ratio(even, torch.tensor([[1]])).item(), 4), round(step.kl(even).item(), 4)
    (0.4055, 0.1308)
    """

    log_prob: Tensor
    x: Tensor
    mask: int
    chance: Tensor
    single: bool

    def sample(self, generator: Source | None = None) -> Tensor:
        """Draws the next states (batch, length), by inverse distribution functions of normal noise."""
        rows, length = self.x.shape
        places = normal((rows, 1 if self.single else length), generator)
        tokens = normal((rows, length), generator)
        place, token = (torch.special.ndtr(noise.double()).to(self.x.device) for noise in (places, tokens))
        if self.single:
            shown = torch.zeros_like(self.x, dtype=torch.bool).scatter(1, chosen(self.chance, place[:, 0])[:, None], True)
        else:
            shown = place < self.chance
        return torch.where(shown & (self.x == self.mask), chosen(self.log_prob.exp(), token), self.x)

    def log_prob_of(self, x: Tensor) -> Tensor:
        """Log probability of the tokens that are masked here and shown in x, in nats, (batch,)."""
        shown = (self.x == self.mask) & (x != self.mask)
        return (token_log_prob(self.log_prob, torch.where(shown, x, 0)) * shown).sum(1)

    def log_ratio(self, other: Reveal, x: Tensor) -> Tensor:
        """Log ratio of the probabilities of the tokens shown in x, in nats, (batch,)."""
        return self.log_prob_of(x) - other.log_prob_of(x)

    def kl(self, other: Reveal) -> Tensor:
        """KL in nats, `sum_i chance_i KL(p_i || q_i)` over masked positions, (batch,)."""
        return (self.chance.to(self.log_prob) * position_kl(self.log_prob, other.log_prob)).sum(1)


def token_log_prob(log_prob: Tensor, tokens: Tensor) -> Tensor:
    """Log probability of the token at each position: (..., length, vocabulary) and (..., length) -> (..., length)."""
    return log_prob.gather(-1, tokens[..., None]).squeeze(-1)


def position_kl(log_prob: Tensor, other: Tensor) -> Tensor:
    """`KL(p_i || q_i)` of the tokens at each position, in nats: (..., length, vocabulary) -> (..., length)."""
    return (log_prob.exp() * (log_prob - other)).sum(-1)
