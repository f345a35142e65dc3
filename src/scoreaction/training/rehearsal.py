"""Rehearsal of a measurement: what it asks of reward and network, counted with a network that does nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.processes import Process
from scoreaction.networks.model import Model
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.steer import steer_x0
from scoreaction.sampling.steering import Steering
from scoreaction.training.evaluation import Evaluation, kl_samples
from scoreaction.types import Conditions


@dataclass(frozen=True)
class Demand:
    """Samples that are drawn, reward queries, and points of the network, forward and with a gradient."""

    samples: int = 0
    queries: int = 0
    points: int = 0
    gradients: int = 0

    def __add__(self, other: Demand) -> Demand:
        values = zip(vars(self).values(), vars(other).values(), strict=True)
        return Demand(*(a + b for a, b in values))


class _Still(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        return self.scale * x


def steering_demand(process: Process, sampler: Sampler, settled: Steering, *, n: int, prompts: list[Any] | None) -> Demand:
    """The demand of n steered samples, and of their own rewards, which are asked once they are drawn; settled settings.

    >>> from scoreaction.diffusion.processes import VP
    >>> steering = Steering(method="svdd", particles=4).settled(differentiable=False, sampler=Sampler(steps=5), beta=0.5)
    >>> steering_demand(VP(), Sampler(steps=5), steering, n=10, prompts=None)
    Demand(samples=10, queries=170, points=170, gradients=0)
    """
    still = Model(_Still(), process=process, predicts="x0", shape=(1,))
    alone = sampler.model_copy(update={"guidance": 1.0, "negative_prompt": None})
    walked = settled.model_copy(update={"known": None})  # a part of a sample that this one does not have
    drawn = steer_x0(
        still, alone, walked, lambda x0, texts: lambda: x0.flatten(1).sum(1), n=1, prompts=None, seed=0, reference=True
    )
    count = settled.group_count(n, len(prompts or [None])) * len(drawn.x0)
    rates = ("queries_per_sample", "evaluations_per_sample", "backward_per_sample")
    queries, points, gradients = (round(drawn.figures[rate] * count) for rate in rates)
    queries = 0 if settled.known is not None else queries
    return Demand(count, queries + count, points, gradients)


CERTIFIED = 4096
"""Trajectories of the policy at most, and of the pretrained model's particles, that a certificate is measured on."""


def certified(n: int, prompts: int) -> tuple[int, int, int]:
    """Trajectories of a certificate for a measurement of n samples, and of the pretrained model's the particles and groups.

    >>> certified(8192, 1), certified(32, 3)
    ((4096, 64, 64), (33, 16, 6))
    """
    n = math.ceil(min(n, CERTIFIED) / prompts) * prompts
    m = min(64, max(16, n // (8 * prompts)))
    return n, m, prompts * max(2, round(n / (m * prompts)))


def measuring_demand(
    process: Process,
    evaluation: Evaluation,
    sampler: Sampler,
    *,
    steering: Steering | None,
    prompts: list[Any] | None,
    differentiable: bool,
    size: int,
) -> dict[str, Demand]:
    """The demand of a run's measurement at its end, by part; sampler: the evaluation's, steering: settled, None without.

    size: numbers of a sample.
    """
    n, each = evaluation.n, len(prompts or [None])
    parts = {
        "base and tuned": Demand(2 * n, 2 * n, 2 * sampler.steps * n),
        "KL": Demand(points=2 * sampler.steps * kl_samples(n, sampler.steps, size)),
    }
    if steering is not None:
        parts["steering"] = steering_demand(process, sampler, steering, n=steering.sample_count(n), prompts=prompts)
    if evaluation.certificate:
        paths, m, groups = certified(n, each)
        noisy = sampler.noisy()
        walk = Steering(particles=m).settled(differentiable=differentiable, sampler=noisy, beta=1.0, tuned=False)
        pretrained = steering_demand(process, noisy, walk, n=groups, prompts=prompts)
        own = Demand(paths, paths - groups, 2 * sampler.steps * paths)  # the groups' samples are not scored again
        parts["certificate"] = pretrained + own
    return parts
