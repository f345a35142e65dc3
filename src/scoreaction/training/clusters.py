"""Clusters of a run: the file that its measurement names, the shares of its samples, and the beta that keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Algorithm
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.networks.model import Model
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.rewards.keep_clusters import KeptShares
from scoreaction.tasks.clusters import Clusters, cluster_entropy
from scoreaction.types import RewardFunction
from scoreaction.world import ALONE, World

DRAWS = 2**17
"""Samples of the known optimum, for its cluster entropy."""


def clusters_of(path: Path, model: Model) -> Clusters:
    """The clusters of a file; ValueError where it holds none, or they are not of this model's samples."""
    try:
        clusters = Clusters.read(path)
        with torch.no_grad():
            clusters.check(model.decode(model.example(1, torch.Generator().manual_seed(0))), model)
    except ValueError as error:
        raise ValueError(f"evaluation.clusters: {str(error).removeprefix('clusters: ')}") from error
    return clusters


def settle_kept(reward: RewardFunction, algorithm: Algorithm, beta: float, *, online: bool) -> None:
    """Gives a reward that keeps shares the algorithm's beta; leaves others alone. ValueError where it would not keep them."""
    if isinstance(reward, WeightedSum) and any(isinstance(part.reward, KeptShares) for part in reward.parts):
        raise ValueError("reward: keep_clusters in a sum keeps no shares; put it around a single reward, alone")
    if not isinstance(reward, KeptShares):
        return
    if online:
        raise ValueError("online: keep_clusters asks its reward apart from the rounds; leave one of them out")
    if algorithm.model_dump().get("kl_target") is not None:
        raise ValueError("algorithm.kl_target: moves beta, and keep_clusters needs one; set it to null")
    if reward.beta is None and not beta:
        raise ValueError("reward.beta: the algorithm has none; give keep_clusters one")
    reward.beta = reward.beta or beta
    if beta and reward.beta != beta:
        raise ValueError(f"reward.beta: keeps shares at {reward.beta:g}, and algorithm.beta is {beta:g}; leave it out")


def cluster_figures(counts: Tensor, world: World = ALONE) -> dict[str, Any]:
    """`cluster_entropy` in nats with its standard error, and `by_cluster`, of all processes' counts (clusters,)."""
    every = torch.tensor(world.reduced(counts.tolist(), "sum"), dtype=torch.float64)
    entropy, error = cluster_entropy(every)
    shares = (every / every.sum()).tolist()
    return {
        "cluster_entropy": entropy,
        "cluster_entropy_se": error,
        "by_cluster": {str(number): share for number, share in enumerate(shares)},
    }


def optimum_entropy(law: Mixture, model: Model, clusters: Clusters, seed: int) -> float:
    """The cluster entropy in nats of an exact task's optimum, whose law of x0 this is, by its own draws."""
    x0 = law.sample(DRAWS, torch.Generator().manual_seed(seed + 3)).float().to(model.device)
    numbers = clusters.assign(model.decode(x0), model, x0)
    return cluster_entropy(numbers.bincount(minlength=len(clusters)))[0]
