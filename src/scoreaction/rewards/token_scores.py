"""A reward of tokens and of neighbours, whose optimum is known where the data is a Markov chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, FiniteFloat, model_validator
from torch import Tensor

from scoreaction.diffusion.sequences import Scores
from scoreaction.settings import Settings
from scoreaction.types import Prompts

EXAMPLE: dict[str, Any] = {"tokens": [0.0, 0.1, 0.2, -0.1]}


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x) = sum_i tokens[x_i] + sum_i pairs[x_i][x_{i+1}]`, x (batch, length) tokens; without pairs only the first sum.

    >>> float(build(Config(tokens=[0.0, 1.0], pairs=[[0.0, 0.5], [0.0, 0.0]]))(torch.tensor([[0, 1, 1]])))
    2.5
    """

    name: Literal["token_scores"] = "token_scores"
    tokens: list[FiniteFloat] = Field(min_length=2, description="a number for each token of the vocabulary")
    pairs: list[list[FiniteFloat]] | None = Field(None, description="a number for each pair of neighbours, a row a first token")

    @model_validator(mode="after")
    def _square(self) -> Config:
        if self.pairs is not None and {len(self.pairs), *map(len, self.pairs)} != {len(self.tokens)}:
            raise ValueError(f"pairs: must be {len(self.tokens)} rows of {len(self.tokens)} numbers, as many as tokens has")
        return self


@dataclass(frozen=True, eq=False)
class TokenScores:
    """The reward; its coefficients are in `scores`."""

    scores: Scores
    differentiable: bool = False

    def __call__(self, samples: Tensor, prompts: Prompts = None) -> Tensor:
        if samples.ndim != 2 or samples.is_floating_point():
            raise ValueError(
                f"scores tokens, (batch, length) integers, got {str(samples.dtype).removeprefix('torch.')}"
                f" {tuple(samples.shape)}; take a reward of such samples"
            )
        most = int(samples.max()) if samples.numel() else 0
        if most >= len(self.scores.tokens):
            raise ValueError(f"tokens: must have at least {most + 1} numbers, one for each token of the vocabulary")
        return self.scores(samples)


def build(config: Config) -> TokenScores:
    """The reward."""
    tokens = torch.tensor(config.tokens, dtype=torch.float64)
    pairs = torch.zeros(len(tokens), len(tokens)) if config.pairs is None else torch.tensor(config.pairs)
    return TokenScores(Scores(tokens, pairs.double()))
