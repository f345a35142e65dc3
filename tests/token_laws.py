"""Laws of short sequences for tests of tokens, by numpy's own arithmetic; and models whose network is exact."""

from __future__ import annotations

import itertools
import math
from functools import cache

import numpy as np
import torch
from torch import nn

import scoreaction as sa
from scoreaction.diffusion.sequences import Enumerated


def sequences(length: int, vocabulary: int) -> np.ndarray:
    return np.array(list(itertools.product(range(vocabulary), repeat=length)))


def potts(rng: np.random.Generator, length: int, vocabulary: int, *, field: float = 0.5, pair: float = 1.0) -> np.ndarray:
    """A random law with fields, and couplings of all positions that fall off as one over the distance."""
    x = sequences(length, vocabulary)
    log_weights = np.zeros(len(x))
    for i in range(length):
        log_weights += (field * rng.standard_normal(vocabulary))[x[:, i]]
        for j in range(i + 1, length):
            log_weights += (pair * rng.standard_normal((vocabulary, vocabulary)) / (j - i))[x[:, i], x[:, j]]
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def enumerated(law: np.ndarray, length: int) -> Enumerated:
    vocabulary = round(len(law) ** (1 / length))
    return Enumerated(torch.tensor(law).log().reshape((vocabulary,) * length))


@cache
def first() -> tuple[np.ndarray, np.ndarray]:
    """A law of 4 positions and 3 tokens, and a reward of its 81 sequences."""
    rng, x = np.random.default_rng(0), sequences(4, 3)
    law = potts(rng, 4, 3)
    additive = rng.standard_normal((4, 3))[np.arange(4), x].sum(1) * 0.5
    return law, additive + 1.0 * (x[:, 0] == x[:, 3]) - 0.7 * (x[:, 1] == x[:, 2])


def reward_of(values: np.ndarray, vocabulary: int):
    """The reward function of a table of all sequences."""
    length = round(math.log(len(values), vocabulary))
    table, powers = torch.tensor(values), vocabulary ** torch.arange(length - 1, -1, -1)
    return lambda x, prompts: table[(x * powers).sum(1)]


class Exact(nn.Module):
    """The exact log conditionals of a law, and a change of each state's own that begins at 0."""

    def __init__(self, law: Enumerated) -> None:
        super().__init__()
        self.law = law
        self.change = nn.Parameter(torch.zeros(len(law.space.states), law.length, law.vocabulary))

    def forward(self, x, t, cond):
        return self.law.log_conditionals(x).to(self.change) + self.change[self.law.space.numbers(x)]


def model_of(law: Enumerated, schedule: str = "linear") -> sa.MaskedModel:
    process = sa.Masking(law.vocabulary, schedule=schedule)
    return sa.MaskedModel(Exact(law), process=process, length=law.length, law=law)


def even_chance(space) -> torch.Tensor:
    """The chance of each masked position of all states if one is shown, uniformly."""
    return space.masked.double() / space.masked.sum(1, keepdim=True).clamp(min=1)
