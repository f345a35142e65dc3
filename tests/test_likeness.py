"""Truth: Levenshtein's distance by its own recursion, and the number of different sequences."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.networks.likeness import by_edits, by_features, edit_distances
from scoreaction.training.evaluation import diversity


@cache
def edits(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """By the definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@pytest.mark.parametrize(("first", "second"), [(6, 6), (3, 7), (7, 2)])
def test_edits_are_counted_as_defined(first: int, second: int) -> None:
    """Twin: exchanges alone, position by position."""
    generator = torch.Generator().manual_seed(first)
    a, b = (torch.randint(3, (50, length), generator=generator) for length in (first, second))
    truth = [edits(tuple(x), tuple(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    least = min(first, second)
    exchanged = (a[:, :least] != b[:, :least]).sum(1) + abs(first - second)
    same(edit_distances(a, b).tolist(), truth, exchanges_alone=exchanged.tolist())


def test_similarities_of_edits_are_a_kernel() -> None:
    """Positive, and of trace n, where `1 - d/length` is neither at once. Twin: that itself."""
    tokens = torch.randint(2, (12, 6), generator=torch.Generator().manual_seed(1))
    distance, similarity = by_edits(tokens)

    def kernel(similarity: torch.Tensor) -> None:
        assert float(torch.linalg.eigvalsh(similarity).min()) > -1e-9
        close(similarity.trace(), 12.0, atol=1e-9)

    plain = 1 - distance / 6
    accepts(kernel, similarity, plain=plain, unscaled=similarity * 0.9)


def test_a_shifted_sequence_is_near() -> None:
    """Twin: the features' distance, by which a shift is as far as another sequence."""
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0], [5, 5, 5, 5, 5, 4]])

    def nearer(distance: torch.Tensor) -> None:
        assert float(distance[0, 1]) < 0.5 * float(distance[0, 2])

    accepts(nearer, by_edits(tokens)[0], features=by_features(torch.nn.functional.one_hot(tokens).flatten(1).double())[0])


def test_the_vendi_score_counts_sequences_that_share_nothing() -> None:
    """Four of them, 15 times each. Twin: their one-hot features, in which a shift is another sequence."""
    kinds = torch.tensor([[0] * 6, [1] * 6, [2] * 6, [3, 4, 3, 4, 3, 4]])
    model = sa.models.markov_chain.build(sa.models.markov_chain.Config(vocabulary=5, length=6))
    samples, one = kinds.repeat(15, 1), torch.zeros(60, dtype=torch.long)
    found = diversity(model, samples, one)
    close([found["vendi"], found["diversity"]], [4.0, 6 * 45 / 59], atol=1e-6, rtol=1e-6, of_all_pairs=[4.0, 6 * 0.75])
    shifted = torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]]).repeat(20, 1)
    close(diversity(model, shifted, one[:40])["diversity"], 2 * 20 / 39, atol=1e-6, by_position=6 * 20 / 39)
