"""Networks of the shipped peptides: the transformer that fills masks, the classifiers, and their loaders."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoreaction.networks.causal import Block
from scoreaction.tasks.fitting import load_frozen
from scoreaction.tasks.peptides.letters import END, LENGTH, VOCABULARY, inside


class PeptidesNet(nn.Module):
    """A transformer that fills masks, `net(tokens, t, cond) -> logits`: every position sees all others.

    tokens (batch, 32) with 21 for the mask; logits (batch, 32, 21), which begin even. t and cond are not read.
    """

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY + 1, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.ModuleList([Block(width, heads, causal=False) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, t: Tensor, cond: None) -> Tensor:
        x = self.token(tokens) + self.position
        for block in self.blocks:
            x = block(x)[0]
        return self.head(self.norm(x))


class AntimicrobialNet(nn.Module):
    """The log odds (batch,) that a peptide is antimicrobial, of tokens (batch, 32): letters alone are seen, no ends.

    Two convolutions of five positions, the mean and the largest value of each channel over the letters, and a perceptron.
    """

    def __init__(self, channels: int = 48) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(END, channels, 5, padding=2), nn.Conv1d(channels, channels, 5, padding=2)
        self.drop = nn.Dropout(0.3)
        self.hidden, self.last = nn.Linear(2 * channels, channels), nn.Linear(channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        there = inside(tokens)
        x = F.one_hot(tokens, VOCABULARY)[..., :END].to(self.last.weight) * there[..., None]
        x, there = x.transpose(1, 2), there[:, None]
        for layer in (self.first, self.second):
            x = F.silu(layer(x)) * there
        pooled = torch.cat([x.sum(2) / there.sum(2).clamp(min=1), x.amax(2)], 1)
        return self.last(self.drop(F.silu(self.hidden(self.drop(pooled))))).squeeze(1)


def shipped() -> Path:
    """Folder of the shipped weights."""
    return Path(str(resources.files("scoreaction") / "data" / "peptides"))


def load_network(folder: Path | None = None) -> PeptidesNet:
    """Loads the shipped network, or that of a folder, in float32; all of it can be trained."""
    return load_frozen(PeptidesNet(), (folder or shipped()) / "masked.safetensors").requires_grad_(True)


@cache
def reward_classifier() -> AntimicrobialNet:
    """The shipped classifier of the reward, frozen."""
    return load_frozen(AntimicrobialNet(), shipped() / "reward_classifier.safetensors")


@cache
def judge() -> AntimicrobialNet:
    """The shipped held-out judge, trained on the other half of the labels, frozen."""
    return load_frozen(AntimicrobialNet(), shipped() / "judge.safetensors")
