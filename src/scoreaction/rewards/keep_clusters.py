"""A reward less what its clusters gain by it, so that the share of each cluster stays that of the pretrained model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction import catalog
from scoreaction.rewards import CountedReward
from scoreaction.rewards._images import texts_of
from scoreaction.settings import Settings
from scoreaction.tasks.clusters import Clusters
from scoreaction.types import Prompts, RewardFunction

EXAMPLE: dict[str, Any] = {"reward": {"name": "linear", "direction": [1.0, 0.5]}, "clusters": "clusters.npz", "beta": 0.5}
ROWS = 256
"""Samples of the file that are scored at a time."""


class Config(Settings, frozen=True, extra="forbid"):
    """`r(x, y) - beta log E_pre[exp(r/beta) | c(x), y]`, c(x) the cluster of x and r another reward.

    At the optimum of `E r - beta KL` every cluster then has the share that it has in the pretrained model, for each prompt y,
    and within a cluster the law is the one that r alone gives. It is another objective than that of r: what r gains by moving
    samples from cluster to cluster is given up. The expectation is over the samples in the file, which r scores once, when it
    is first used; a cluster that none of a prompt's samples is in counts as its best sample. A black box.
    """

    name: Literal["keep_clusters"] = "keep_clusters"
    reward: dict[str, Any] = Field(description="the reward that is kept from changing shares, as in reward:")
    clusters: Path = Field(description="file that scoreaction cluster made of the model's own samples")
    beta: float | None = Field(None, gt=0, description="the algorithm's beta, its own by default")


class KeptShares:
    """The reward around another: `r(x, y) - b[y, c(x)]`; `scored.queries` counts what was asked of r.

    ValueError where the clusters were not made of a model's samples, or need its network.

    >>> samples = torch.cat([torch.randn(40, 1) - 9, torch.randn(40, 1) + 9])
    >>> kept = KeptShares(lambda x, prompts: x[:, 0] * 0 + (x[:, 0] > 0), Clusters.fit(samples, 2), beta=1.0)
    >>> kept(samples, None).abs().max() < 1e-6
    tensor(True)
    """

    differentiable = False

    def __init__(self, reward: RewardFunction, clusters: Clusters, beta: float | None = None) -> None:
        if not clusters.drawn:
            raise ValueError(
                "clusters: are of data, and the shares to keep are the model's; cluster its own samples, without --data"
            )
        if clusters.features.kind != "samples":
            raise ValueError("clusters: a reward sees samples alone; cluster them with --features samples")
        self.scored, self.clusters, self.beta = CountedReward(reward, name="keep_clusters"), clusters, beta
        self.prompts = list(dict.fromkeys(clusters.prompts or [""]))
        self._baselines: tuple[float, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        own = self.clusters.samples
        if samples.shape[1:] != own.shape[1:]:
            shapes = f"{tuple(own.shape[1:])}, the model's are {tuple(samples.shape[1:])}"
            raise ValueError(f"clusters: are of samples of shape {shapes}; make them of this model's")
        texts = [""] * len(samples) if self.clusters.prompts is None else texts_of(samples, prompts, name="keep_clusters")
        if (self.clusters.prompts is None) != (prompts is None):
            raise ValueError("clusters: were made with prompts or without, and the run is the other; make them by its recipe")
        numbers = {text: number for number, text in enumerate(self.prompts)}
        if unknown := next((text for text in texts if text not in numbers), None):
            raise ValueError(f"clusters: have no samples of the prompt {unknown!r}; make them by a recipe with these prompts")
        scores, baselines = self.scored(samples, prompts), self.baselines(samples.device)
        prompt = torch.tensor([numbers[text] for text in texts], device=samples.device, dtype=torch.long)
        return scores - baselines[prompt, self.clusters.assign(samples)].to(scores)

    def baselines(self, device: torch.device) -> Tensor:
        """`b[y, c] = beta log mean exp(r/beta)` over the file's samples of prompt y in cluster c, (prompts, K) float64."""
        if self.beta is None:
            raise ValueError("beta: is the algorithm's in a run; elsewhere give one")
        if self._baselines is None or self._baselines[0] != self.beta:
            texts = self.clusters.prompts or [""] * len(self.clusters.samples)
            rewards = self._scores(device, None if self.clusters.prompts is None else texts)
            numbers = {text: number for number, text in enumerate(self.prompts)}
            prompt = torch.tensor([numbers[text] for text in texts])
            self._baselines = self.beta, baselines_of(rewards, prompt, self.clusters.labels, len(self.clusters), self.beta)
        return self._baselines[1].to(device)

    def _scores(self, device: torch.device, texts: list[str] | None) -> Tensor:
        parts = torch.arange(len(self.clusters.samples)).split(ROWS)
        scores = [
            self.scored(self.clusters.samples[rows].to(device), None if texts is None else [texts[i] for i in rows.tolist()])
            for rows in parts
        ]
        return torch.cat(scores).double().cpu()


def baselines_of(rewards: Tensor, prompt: Tensor, cluster: Tensor, clusters: int, beta: float) -> Tensor:
    """`beta log mean exp(r/beta)` of the samples (n,) of each prompt and cluster, (prompts, clusters); without any, their best.

    >>> none = torch.zeros(3, dtype=torch.long)
    >>> baselines_of(torch.tensor([1.0, 1.0, 2.0]), none, torch.tensor([0, 0, 1]), 3, 0.5).tolist()
    [[1.0, 2.0, 2.0]]
    """
    table = torch.empty(int(prompt.max()) + 1, clusters, dtype=torch.float64)
    for y in range(len(table)):
        for c in range(clusters):
            own = rewards[(prompt == y) & (cluster == c)].double() / beta
            best = rewards[prompt == y].max().double()
            table[y, c] = beta * (own.logsumexp(0) - math.log(len(own))) if len(own) else best
    return table


def build(config: Config) -> KeptShares:
    """The reward around the one that it names. ValueError where clusters or reward cannot be used."""
    module = catalog.find("reward", config.reward.get("name"), key="reward.name")
    settings = {key: value for key, value in config.reward.items() if key != "name" or key in module.Config.model_fields}
    return KeptShares(module.build(module.Config(**settings)), Clusters.read(config.clusters), config.beta)
