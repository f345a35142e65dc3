"""A small causal transformer on tokens, which keeps keys and values of what it has read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Stream = Callable[[Tensor | None], Tensor]
"""Reads a sequence token by token: `stream(token) -> logits (rows, vocabulary)` of the position after it.

token (rows,) is the one before that position, None at the first.
"""
Past = list[tuple[Tensor, Tensor] | None]
"""Keys and values of the positions that were read, (rows, heads, positions, width/heads), of each layer."""


@runtime_checkable
class Streaming(Protocol):
    """A causal network that keeps keys and values, so that a path from left to right reads each position once."""

    def stream(self, rows: int, cond: Any) -> Stream:
        """Begins to read so many sequences, with these conditions (rows, ...) or None."""


class Block(nn.Module):
    """Attention and a perceptron, both residual and normalised before (Xiong et al. 2020, arXiv 2002.04745).

    causal: a position attends to itself and to those before it, else to all.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (rows, positions, width), behind the positions of `past`; also the keys and values of all of them."""
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and past is None)
        x = x + self.to_out(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.norm2(x)), (k, v)


class CausalTransformer(nn.Module):
    """A causal masked language model, `net(tokens, t, cond) -> logits`: position n sees the tokens before it, masks among them.

    tokens (batch, length) with `vocabulary` for the mask, shifted by one behind a symbol for the beginning; t is not read;
    logits (batch, length, vocabulary), which begin even. With `classes` cond (batch,) holds class ids, `classes` that of no
    class, like None. Left to right, one at a time, it is an autoregressive model whose path has its probability from one pass
    (CARD, arXiv 2601.22031). Give it to `MaskedModel(..., causal=True)`. ValueError for a width that is no multiple of heads.

    >>> net, tokens = CausalTransformer(4, 6, width=16, layers=1), torch.full((2, 6), 4)
    >>> whole, stream = net(tokens, torch.ones(2), None), net.stream(2, None)
    >>> torch.allclose(stream(None), whole[:, 0]), torch.allclose(stream(tokens[:, 0]), whole[:, 1])
    (True, True)
    """

    def __init__(
        self, vocabulary: int, length: int, *, width: int = 96, layers: int = 4, heads: int = 4, classes: int = 0
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width: must be a multiple of heads (got {width} and {heads})")
        self.first, self.length, self.classes = vocabulary + 1, length, classes
        self.token, self.position = nn.Embedding(vocabulary + 2, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
        first = torch.full_like(tokens[:, :1], self.first)
        return self.logits(torch.cat([first, tokens[:, :-1]], 1), cond, [None] * len(self.blocks), 0)

    def logits(self, symbols: Tensor, cond: Tensor | None, past: Past, place: int) -> Tensor:
        """Logits (rows, positions, vocabulary) behind symbols (rows, positions) from `place` on; `past` goes on with them."""
        x = self.token(symbols) + self.position[place : place + symbols.shape[1]]
        if self.label is not None:
            label = torch.full((len(symbols),), self.classes, device=symbols.device) if cond is None else cond
            x = x + self.label(label)[:, None]
        for i, block in enumerate(self.blocks):
            x, past[i] = block(x, past[i])
        return self.head(self.norm(x))

    def stream(self, rows: int, cond: Tensor | None) -> Stream:
        """Begins to read so many sequences, with these conditions (rows,) or None: each position once."""
        past: Past = [None] * len(self.blocks)
        place = iter(range(self.length))
        first = torch.full((rows,), self.first, device=self.position.device)

        def following(token: Tensor | None) -> Tensor:
            return self.logits((first if token is None else token)[:, None], cond, past, next(place))[:, 0]

        return following
