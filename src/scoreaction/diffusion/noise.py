"""Standard normal noise: from one generator, or from a stream for every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

AHEAD = 64
"""The most draws that a stream of small rows makes at a time."""


class RowNoise:
    """Noise from a stream for every row: a row's is the same however the rows are cut into parts or dealt to processes.

    seed: of all streams together; rows (n,): the numbers of the rows, which part the streams. ahead: the most draws that are
    made at a time, 1 for noise of which no more is asked.

    >>> whole, part = RowNoise(7, torch.arange(4)), RowNoise(7, torch.tensor([1, 3]))
    >>> torch.equal(whole.normal((4, 2), torch.float32)[[1, 3]], part.normal((2, 2), torch.float32))
    True
    """

    def __init__(self, seed: int, rows: Tensor, *, ahead: int = AHEAD) -> None:
        self.ahead = ahead
        self.streams = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows.tolist()]
        self._waiting: dict[tuple[object, ...], list[Tensor]] = {}

    @classmethod
    def drawn(cls, generator: torch.Generator, rows: Tensor) -> RowNoise:
        """With a seed that the generator gives."""
        return cls(drawn_seed(generator), rows)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next noise of every row, (rows, *shape)."""
        if shape[0] != len(self.streams):
            raise ValueError(f"noise: there are streams for {len(self.streams)} rows, and {shape[0]} are asked for")
        if not self.streams:
            return torch.empty(*shape, dtype=dtype)
        waiting = self._waiting.setdefault((*shape[1:], dtype), [])
        if not waiting:
            ahead = max(1, min(self.ahead, 2**12 // max(1, torch.Size(shape[1:]).numel())))
            draws = [torch.randn(ahead, *shape[1:], generator=stream, dtype=dtype) for stream in self.streams]
            waiting.extend(torch.stack(draws, 1).unbind(0))
        return waiting.pop(0)


class GroupNoise:
    """Noise of rows in groups of equal size, each group's from its own stream of a `RowNoise`.

    >>> noise = GroupNoise(RowNoise(7, torch.arange(2)))
    >>> noise.normal((6, 3), torch.float32).shape
    torch.Size([6, 3])
    """

    def __init__(self, noise: RowNoise) -> None:
        self.noise, self.groups = noise, len(noise.streams)

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next noise of every group, (groups * each, *shape)."""
        each = shape[0] // max(1, self.groups)
        return self.noise.normal((self.groups, each, *shape[1:]), dtype).flatten(0, 1)


class Leading:
    """The noise of the first rows of `rows`: that of all is drawn, so that all have come as far when they go on.

    >>> whole, part = RowNoise(7, torch.arange(4)), Leading(RowNoise(7, torch.arange(4)), 4)
    >>> torch.equal(whole.normal((4, 2), torch.float32)[:2], part.normal((2, 2), torch.float32))
    True
    """

    def __init__(self, source: Source, rows: int) -> None:
        self.source, self.rows = source, rows

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next noise of the first rows, (shape[0], *shape)."""
        return normal((self.rows, *shape[1:]), self.source, dtype)[: shape[0]]


class PaddedNoise:
    """The noise of a source where samples have numbers, and 0 in their padding: `inside` (rows, ...) is True at numbers.

    inside broadcasts to whatever shape is asked for.

    >>> inside = torch.tensor([[True], [False]])
    >>> PaddedNoise(RowNoise(7, torch.arange(2)), inside).normal((2, 3), torch.float32).ne(0).tolist()
    [[True, True, True], [False, False, False]]
    """

    def __init__(self, source: Source, inside: Tensor) -> None:
        self.source, self.inside = source, inside

    def normal(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The source's next noise, (rows, *shape), 0 in padding."""
        return kept(normal(shape, self.source, dtype), self.inside)


Source: TypeAlias = torch.Generator | RowNoise | GroupNoise | Leading | PaddedNoise
"""A source of noise."""


def apart(source: Source) -> Source:
    """Other noise for the same rows, whose draws leave that of the source as it is; of one generator itself.

    >>> noise = RowNoise(7, torch.arange(2))
    >>> _ = apart(noise).normal((2, 3), torch.float32)
    >>> torch.equal(noise.normal((2,), torch.float32), RowNoise(7, torch.arange(2)).normal((2,), torch.float32))
    True
    """
    if isinstance(source, PaddedNoise):
        return apart(source.source)
    if not isinstance(source, RowNoise):
        return source
    other = RowNoise(0, torch.empty(0))
    other.streams = [torch.Generator().manual_seed(_mixed(stream.initial_seed(), 0)) for stream in source.streams]
    return other


def kept(x: Tensor, inside: Tensor | None) -> Tensor:
    """x where `inside` is True, 0 in padding; all of x where there is no mask (None).

    >>> kept(torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]]))
    tensor([[1., 0.]])
    """
    return x if inside is None else torch.where(inside.to(x.device), x, 0)


def drawn_seed(generator: torch.Generator) -> int:
    """A seed that the generator gives, below 2^62."""
    return int(torch.randint(2**62, (), generator=generator))


def normal(shape: Sequence[int], source: Source | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise of this shape, whose first dimension is rows, on the CPU so that seeds travel."""
    if source is None or isinstance(source, torch.Generator):
        return torch.randn(*shape, generator=source, dtype=dtype)
    return source.normal(shape, dtype)


def _mixed(seed: int, row: int) -> int:
    """A seed for a row: splitmix64 of both, so that neighbours have nothing in common (Steele, Lea and Flood 2014)."""
    z = (seed + (row + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
