"""Laws of token sequences that are known exactly: all of their sequences, or a Markov chain of any length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.reveals import position_kl

MOST_STATES = 2**19
"""The largest number of states, masks among the tokens, that are enumerated."""


@dataclass(frozen=True)
class Scores:
    """Reward of neighbours `r(x) = sum_i tokens[x_i] + sum_i pairs[x_i, x_{i+1}]`: tokens (V,), pairs (V, V), float64.

    >>> Scores(torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 0.5], [0.0, 0.0]]))(torch.tensor([[0, 1, 1]]))
    tensor([2.5000])
    """

    tokens: Tensor
    pairs: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.tokens.to(x.device)[x].sum(1) + self.pairs.to(x.device)[x[:, :-1], x[:, 1:]].sum(1)


@dataclass(frozen=True)
class TokenOptimum:
    """The tilted law `p exp(r/beta)/Z` with its mean reward and its KL to p in nats: `objective = reward - beta kl`.

    log_z is log Z, and beta log Z the objective, which no policy exceeds.
    """

    law: SequenceLaw
    reward: float
    log_z: float
    beta: float

    @property
    def kl_nats(self) -> float:
        """KL of the tilted law, `E* r/beta - log Z`."""
        return self.reward / self.beta - self.log_z

    @property
    def objective(self) -> float:
        """`beta log Z`."""
        return self.beta * self.log_z


class SequenceLaw(ABC):
    """Law p of sequences of `length` tokens below `vocabulary`; states have the mask, `vocabulary`, at some positions."""

    vocabulary: int
    length: int

    @abstractmethod
    def log_partial(self, x: Tensor) -> Tensor:
        """Log of the total weight of the sequences that agree with the states x (batch, length), (batch,) float64."""

    @abstractmethod
    def log_conditionals(self, x: Tensor) -> Tensor:
        """`log p(x_i = v | the other positions of x)`, (batch, length, vocabulary) float64."""

    @abstractmethod
    def optimum(self, reward: Any, beta: float, decode: Callable[[Tensor], Tensor] = torch.as_tensor) -> TokenOptimum | None:
        """The tilted law of a reward of decoded sequences; None where it is not known."""

    def enumerated(self) -> Enumerated | None:
        """The same law with all its sequences; None where they are too many."""
        if (self.vocabulary + 1) ** self.length > MOST_STATES:
            return None
        space = Space(self.vocabulary, self.length)
        return Enumerated(self.log_partial(space.sequences).reshape((self.vocabulary,) * self.length))

    def value(self, x: Tensor, optimum: TokenOptimum) -> Tensor:
        """`V*(x) = beta log E[exp(r/beta) | x]` of states x, (batch,): the value of the optimal policy."""
        masks = x.new_full((1, self.length), self.vocabulary)
        gain, norm = (optimum.law.log_partial(states) - self.log_partial(states) for states in (x, masks))
        return optimum.beta * (gain - norm + optimum.log_z)


class Space:
    """All (V + 1)^L states of L positions, the last token of each the mask: state k has the digits of k in base V + 1.

    >>> Space(2, 2).sequences.tolist()
    [[0, 0], [0, 1], [1, 0], [1, 1]]
    """

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length
        self.powers = (vocabulary + 1) ** torch.arange(length - 1, -1, -1)
        numbers = torch.arange((vocabulary + 1) ** length)
        self.states = numbers[:, None] // self.powers % (vocabulary + 1)
        self.masked = self.states == vocabulary
        self.sequences = self.states[~self.masked.any(1)]

    def numbers(self, x: Tensor) -> Tensor:
        """The numbers of states x (batch, length)."""
        return (x * self.powers).sum(1)

    def filled(self, numbers: Tensor) -> Tensor:
        """The numbers of these states with position i set to token v, (batch, length, vocabulary)."""
        change = torch.arange(self.vocabulary) - self.states[numbers][..., None]
        return numbers[:, None, None] + change * self.powers[:, None]

    def visits(self, log_prob: Tensor, chance: Tensor) -> Tensor:
        """Probability that a policy comes to each state, one position shown a step, (states,) float64.

        log_prob (states, length, vocabulary), chance (states, length) of the positions.
        """
        visits = torch.zeros(len(self.states), dtype=torch.float64)
        visits[-1] = 1.0  # all masks
        count = self.masked.sum(1)
        for masks in range(self.length, 0, -1):
            here = (count == masks).nonzero().flatten()
            mass = (visits[here, None] * chance[here] * self.masked[here])[..., None] * log_prob[here].double().exp()
            visits.index_add_(0, torch.where(self.masked[here][..., None], self.filled(here), 0).flatten(), mass.flatten())
        return visits


@dataclass(frozen=True)
class PolicyLaw:
    """Law (sequences,) of a policy that shows one position a step, and its path KL in nats to another, exactly."""

    law: Tensor
    kl_nats: float

    @classmethod
    def of(cls, space: Space, log_prob: Tensor, reference: Tensor, chance: Tensor) -> PolicyLaw:
        """From the predictions at all states, (states, length, vocabulary), and the chances (states, length)."""
        visits = space.visits(log_prob, chance)
        cost = (chance * space.masked * position_kl(log_prob.double(), reference.double())).sum(1)
        return cls(visits[~space.masked.any(1)], float(visits @ cost))


class Enumerated(SequenceLaw):
    """A law by the log weights of all its sequences, (V,)*L: partial sums over all (V + 1)^L states in L steps.

    ValueError for more states than 2^19.

    >>> law = Enumerated(torch.tensor([[0.1, 0.4], [0.3, 0.2]]).log())
    >>> law.log_conditionals(torch.tensor([[2, 1]])).exp()[0, 0]
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    def __init__(self, log_weights: Tensor) -> None:
        self.vocabulary, self.length = log_weights.shape[0], log_weights.ndim
        if (self.vocabulary + 1) ** self.length > MOST_STATES or len(set(log_weights.shape)) != 1:
            raise ValueError(
                f"log_weights: must have one size in all dimensions and at most {MOST_STATES} states, (V + 1)^L (got shape"
                f" {tuple(log_weights.shape)})"
            )
        self.space = Space(self.vocabulary, self.length)
        sums = log_weights.double() - torch.logsumexp(log_weights.double().flatten(), 0)
        self.log_law = sums.flatten()
        for position in range(self.length):
            sums = torch.cat([sums, torch.logsumexp(sums, position, keepdim=True)], position)
        self._sums = sums.flatten()

    @property
    def law(self) -> Tensor:
        """Probabilities of all sequences, (V^L,) in the order of `space.sequences`."""
        return self.log_law.exp()

    def log_partial(self, x: Tensor) -> Tensor:
        return self._sums.to(x.device)[self.space.numbers(x.cpu()).to(x.device)]

    def log_conditionals(self, x: Tensor) -> Tensor:
        sums = self._sums[self.space.filled(self.space.numbers(x.cpu()))].to(x.device)
        return torch.log_softmax(sums, -1)

    def optimum(self, reward: Any, beta: float, decode: Callable[[Tensor], Tensor] = torch.as_tensor) -> TokenOptimum | None:
        """Of any reward `reward(samples, None) -> (batch,)`, which is asked for all sequences."""
        rewards = torch.as_tensor(reward(decode(self.space.sequences), None)).double()
        tilted = Enumerated((self.log_law + rewards / beta).reshape((self.vocabulary,) * self.length))
        return TokenOptimum(tilted, float(tilted.law @ rewards), float(torch.logsumexp(self.log_law + rewards / beta, 0)), beta)


class Chain(SequenceLaw):
    """A Markov chain and its tilts: `log weight = sum_i unary[i, x_i] + sum_i pair[i, x_i, x_{i+1}]`, at any length.

    unary (L, V), pair (L-1, V, V) float64. Partial sums and conditionals by the forward-backward recursion (Rabiner 1989,
    section III), which is linear in L.

    >>> chain = Chain.markov(torch.tensor([0.5, 0.5]), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), 3)
    >>> chain.log_conditionals(torch.tensor([[0, 2, 1]])).exp()[0, 1]  # .9 x .1 against .1 x .8
    tensor([0.5294, 0.4706], dtype=torch.float64)
    """

    def __init__(self, unary: Tensor, pair: Tensor) -> None:
        self.unary, self.pair = unary.double(), pair.double()
        self.length, self.vocabulary = self.unary.shape

    @classmethod
    def markov(cls, initial: Tensor, transition: Tensor, length: int) -> Chain:
        """The chain with these probabilities of the first token (V,) and of the next (V, V)."""
        unary = torch.zeros(length, len(initial), dtype=torch.float64)
        unary[0] = initial.double().log()
        return cls(unary, transition.double().log().expand(length - 1, -1, -1))

    def tilted(self, scores: Scores, scale: float | Tensor) -> Chain:
        """`p exp(scale r)`, without its norm."""
        return Chain(self.unary + scale * scores.tokens.double(), self.pair + scale * scores.pairs.double())

    def _messages(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The log partial sums (batch,), and the conditionals without their norm, (batch, length, vocabulary)."""
        seen = x[..., None] == torch.arange(self.vocabulary, device=x.device)
        evidence = (seen | (x == self.vocabulary)[..., None]).double()
        unary, pair = self.unary.to(x.device), self.pair.to(x.device)
        peaks = pair.amax((1, 2), keepdim=True)
        weights, kernel = torch.exp(unary - unary.amax(1, keepdim=True)), torch.exp(pair - peaks)
        log_sum = (unary.amax(1).sum() + peaks.sum()).expand(len(x))
        ahead, behind = [weights[0].expand(len(x), -1)], [torch.ones_like(evidence[:, 0])]
        for i in range(1, self.length):
            message = ahead[-1] * evidence[:, i - 1]
            norm = message.sum(1, keepdim=True)
            log_sum = log_sum + norm[:, 0].log()
            ahead.append((message / norm) @ kernel[i - 1] * weights[i])
        for i in range(self.length - 2, -1, -1):
            message = (behind[-1] * evidence[:, i + 1] * weights[i + 1]) @ kernel[i].T
            behind.append(message / message.sum(1, keepdim=True))
        log_sum = log_sum + (ahead[-1] * evidence[:, -1]).sum(1).log()
        return log_sum, torch.stack(ahead, 1) * torch.stack(behind[::-1], 1)

    def log_partial(self, x: Tensor) -> Tensor:
        return self._messages(x)[0]

    def log_conditionals(self, x: Tensor) -> Tensor:
        weights = self._messages(x)[1]
        return weights.log() - weights.sum(-1, keepdim=True).log()

    def optimum(self, reward: Any, beta: float, decode: Callable[[Tensor], Tensor] = torch.as_tensor) -> TokenOptimum | None:
        """Of a reward whose `scores` are `Scores`."""
        scores = getattr(reward, "scores", None)
        if not isinstance(scores, Scores) or len(scores.tokens) < self.vocabulary:
            return None
        scores = Scores(scores.tokens[: self.vocabulary], scores.pairs[: self.vocabulary, : self.vocabulary])
        masks = torch.full((1, self.length), self.vocabulary)
        scale = torch.tensor(1 / beta, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            log_z = self.tilted(scores, scale).log_partial(masks).sum() - self.log_partial(masks).sum()
            (mean,) = torch.autograd.grad(log_z, scale)  # d log Z/d(1/beta) is the mean reward of the tilted law
        return TokenOptimum(self.tilted(scores, 1 / beta), float(mean), log_z.item(), beta)


def total_variation(p: Tensor, q: Tensor) -> float:
    """`1/2 sum |p - q|` of two laws of the same sequences.

    >>> total_variation(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    0.5
    """
    return float((p - q).abs().sum() / 2)
