"""Distances and similarities of samples, by which diversity and the Vendi score are measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Likeness(NamedTuple):
    """A way to compare samples: `of(features)` gives distances and similarities, of at most so many at once."""

    of: Callable[[Tensor], tuple[Tensor, Tensor]]
    at_most: int


def by_features(features: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distances, and cosine similarities, of features (n, F): both (n, n)."""
    unit = features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist"), unit @ unit.T


def by_edits(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Edit distances d of sequences (n, length), and similarities `1 - d/length`: both (n, n).

    No kernel is sure to be positive here: negative eigenvalues are left out, and the others scaled to the same sum.

    >>> distance, similarity = by_edits(torch.tensor([[1, 2, 3, 4], [2, 3, 4, 4], [0, 0, 0, 0]]))
    >>> distance.tolist()
    [[0.0, 2.0, 4.0], [2.0, 0.0, 4.0], [4.0, 4.0, 0.0]]
    """
    n, length = tokens.shape
    first, second = torch.triu_indices(n, n, 1, device=tokens.device)
    distance = torch.zeros(n, n, dtype=torch.float64, device=tokens.device)
    distance[first, second] = edit_distances(tokens[first], tokens[second]).double()
    distance = distance + distance.T
    values, vectors = torch.linalg.eigh(1 - distance / length)
    kept = values.clamp(min=0)
    return distance, (vectors * kept) @ vectors.T * (n / kept.sum())


def edit_distances(a: Tensor, b: Tensor) -> Tensor:
    """The fewest insertions, deletions and exchanges that make b of a, a row each: (rows, length) each, (rows,).

    Levenshtein's distance, a row of its table at a time: `D_j = j + min_{i <= j} (best_i - i)`, best_i without insertions.
    Wagner and Fischer 1974.

    >>> edit_distances(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 1]])).tolist()
    [2]
    """
    places = torch.arange(b.shape[1] + 1, device=a.device)
    table = places.expand(len(a), -1)
    for i in range(a.shape[1]):
        exchanged = table[:, :-1] + (a[:, i, None] != b)
        best = torch.cat([table[:, :1] + 1, torch.minimum(table[:, 1:] + 1, exchanged)], 1)
        table = places + torch.cummin(best - places, 1).values
    return table[:, -1]
