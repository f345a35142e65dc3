"""Finding clusters of vectors: k-means from k-means++, and clusters of equal shares by Sinkhorn's iteration."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.vq import ClusterError, kmeans2
from torch import Tensor

STARTS, TRIES = 5, 10
"""Starts of k-means of which the best counts, and how many may end with an empty cluster."""
SHARPNESS, ROUNDS = 0.05, 50
"""Sinkhorn's epsilon, in mean squared distances of a sample to the centres, and rounds of assigning and moving centres."""


def kmeans(x: Tensor, k: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Centres (k, D) of least `sum_i min_c ||x_i - centre_c||^2` over five starts of Lloyd's iteration, and offsets of 0.

    ValueError where a cluster stays empty, or there are fewer different rows than clusters.
    """
    rng, rows, best = np.random.default_rng(seed), x.double().numpy(), (np.inf, np.empty(0))
    different = len(np.unique(rows, axis=0))
    if different < k:
        raise ValueError(f"k: there are {different} different samples only; lower it")
    empty = done = 0
    while done < STARTS:
        try:
            centres = _lloyd(rows, kmeans2(rows, k, iter=1, minit="++", missing="raise", rng=rng)[0])
        except ClusterError as error:
            empty += 1
            if empty == TRIES:
                raise ValueError(f"k: one of {k} clusters stays empty after {TRIES} starts; lower it") from error
            continue
        done += 1
        inertia = float(torch.cdist(torch.from_numpy(rows), torch.from_numpy(centres)).square().amin(1).sum())
        best = min(best, (inertia, centres), key=lambda pair: pair[0])
    return torch.from_numpy(best[1]).float(), torch.zeros(k)


def _lloyd(rows: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centres after Lloyd's iteration has come to rest; ClusterError where one of them has no row."""
    for _ in range(30):
        before = centres
        centres, _ = kmeans2(rows, centres, iter=10, minit="matrix", missing="raise")
        if np.array_equal(before, centres):
            break
    return centres


def sinkhorn(scores: Tensor, sharpness: float, iterations: int) -> Tensor:
    """`Q = diag(u) exp(scores/sharpness) diag(v)`, (N, K), scaled in turn to equal column sums and rows that sum to 1.

    After enough iterations every column holds N/K (SwAV, Caron et al. 2020, arXiv 2006.09882).

    >>> q = sinkhorn(torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.5], [1.0, 0.9]]), 0.1, 200)
    >>> q.sum(0).round(decimals=3).tolist()
    [2.0, 2.0]
    """
    return _log_sinkhorn(scores, sharpness, iterations).exp()


def _log_sinkhorn(scores: Tensor, sharpness: float, iterations: int) -> Tensor:
    log_q = scores.double() / sharpness
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(0, keepdim=True)
        log_q = log_q - log_q.logsumexp(1, keepdim=True)
    return log_q


def balanced(x: Tensor, k: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Centres (k, D) and offsets (k,) of clusters of equal shares: Lloyd's iteration with Sinkhorn's assignment.

    A sample goes to the centre of least `||x - centre_c||^2 - offset_c`. Where clusters of the data are not equally large they
    are cut up and mixed: take k-means.
    """
    centres, _ = kmeans(x, k, seed=seed)
    x, centres, offsets = x.double(), centres.double(), torch.zeros(k)
    for _ in range(ROUNDS):
        apart = torch.cdist(x, centres).square()
        epsilon = SHARPNESS * float(apart.mean())
        log_q = _log_sinkhorn(-apart, epsilon, 100)
        centres = log_q.exp().T @ x / log_q.exp().sum(0)[:, None]
        offsets = (epsilon * log_q + apart)[0]  # log u_i + log v_c: the same for every row but for a constant
    return centres.float(), (offsets - offsets.mean()).float()
