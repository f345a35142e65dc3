"""Small networks on tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scoreaction.diffusion.processes import Masking
from scoreaction.networks.layers import PromptEmbedding, RewardScale
from scoreaction.types import Conditions

ONE_HOT = 64
"""The largest vocabulary whose tokens a network sees one-hot; of a larger one it learns an embedding."""


class TokenNet(nn.Module):
    """A perceptron on all positions, masks among them, and a condition: x (batch, length) integers -> (batch, out).

    Its output begins at 0, so that what is not learned yet changes nothing.
    """

    def __init__(
        self, process: Masking, length: int, out: int, *, hidden: int = 192, depth: int = 2, condition: int = 0
    ) -> None:
        super().__init__()
        symbols = process.vocabulary + 1
        self.symbols, width = symbols, min(symbols, ONE_HOT)
        self.embedding = nn.Embedding(symbols, width) if symbols > ONE_HOT + 1 else None
        width = symbols if self.embedding is None else width
        widths = [length * width + condition] + [hidden] * depth
        layers = [m for a, b in zip(widths[:-1], widths[1:], strict=True) for m in (nn.Linear(a, b), nn.SiLU())]
        self.last = nn.Linear(hidden, out)
        self.body = nn.Sequential(*layers, self.last)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """x (batch, length), condition (batch, condition) -> (batch, out)."""
        seen = nn.functional.one_hot(x, self.symbols) if self.embedding is None else self.embedding(x)
        parts = [seen.flatten(1).to(self.last.weight)] + ([] if condition is None else [condition])
        return self.body(torch.cat(parts, 1))


class TokenCritic(nn.Module):
    """A value of token states, `V(x, c) = m + d F(x, c)`: m and d mean and spread of the first rewards, F a `TokenNet`.

    It is the mean of what its target is on states; the number of masks is in the state, so that it needs no time. conditions:
    those of all prompts, (prompts, ...), or None. x (batch, length), t (batch,), which it ignores, prompt (batch,) numbers of
    prompts, look_ahead None; returns (batch,).
    """

    def __init__(self, process: Masking, length: int, *, conditions: Conditions = None) -> None:
        super().__init__()
        self.embed = PromptEmbedding(conditions)
        self.net = TokenNet(process, length, 1, condition=self.embed.width)
        self.scale = RewardScale()

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor, look_ahead: Tensor | None = None) -> Tensor:
        return self.scale.mean + self.scale.spread * self.net(x, self.embed(prompt)).squeeze(1)
