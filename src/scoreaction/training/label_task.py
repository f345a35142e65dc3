"""The exact task of a control, a mixture with labelled components, and the KL of each label of any control."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from scoreaction.diffusion.labels import Labelled
from scoreaction.diffusion.mixtures import Mixture, Optimum
from scoreaction.networks.model import Model
from scoreaction.rewards.mixture_label import LabelReward
from scoreaction.sampling.draw import draw_x0
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.confusion import Confusion, prompts_by_label
from scoreaction.training.evaluation import measure_kl
from scoreaction.training.exact_task import ExactTask
from scoreaction.training.run import Run
from scoreaction.world import ALONE, World

DRAWS = 2**17
"""Samples of p(x|y) for the optimum's reward, which has no closed form."""


@dataclass(frozen=True)
class LabelTask:
    """The task of each prompt, which is a label: its optimum is `p(x|y)`, at `E log p(y|x) - log p(y)` nats."""

    tasks: dict[str, ExactTask]
    prior: tuple[float, ...]

    @classmethod
    def of(cls, model: Model, reward: Any, beta: float | None) -> LabelTask | None:
        """The task, where model, reward and beta 1 make one."""
        if not isinstance(model.law, Mixture) or not isinstance(reward, LabelReward) or beta != 1:
            return None
        labelled = reward.labelled
        tasks = {name: ExactTask(model.law, optimum(labelled, y)) for y, name in enumerate(reward.labels.names)}
        return cls(tasks, tuple(labelled.prior.tolist()))

    def figures(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> dict[str, Any]:
        """Means over labels, by their prior, of optimum, distance of the averaged policy, floor and oracle; and `by_label`."""
        each = {name: self._of_label(name, task, model, sampler, n, seed, world) for name, task in self.tasks.items()}
        names = next(iter(each.values()))
        shares = {key: [p * own[key] for p, own in zip(self.prior, each.values(), strict=True)] for key in names}
        mean = {key: math.hypot(*parts) if key.endswith("_se") else sum(parts) for key, parts in shares.items()}
        return {key: value for key, value in mean.items() if key != "kl_nats"} | {"by_label": each}

    def distances(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> dict[str, float]:
        """Means over labels, by their prior, of the distance of the averaged policy under this sampler, and of the floor."""
        every = self.figures(model, sampler, n, seed, world)
        return {key: every[key] for key in ("distance_to_optimum", "distance_to_optimum_se", "distance_floor")}

    def _of_label(
        self, name: str, task: ExactTask, model: Model, sampler: Sampler, n: int, seed: int, world: World
    ) -> dict[str, float]:
        draws = partial(draw_x0, model, sampler, n, [name] * n)
        return {
            "kl_nats": measure_kl(model, sampler, n, [name], seed, world)["kl_nats"],
            "optimum_reward": task.optimum.reward,
            "optimum_kl_nats": task.optimum.kl_nats,
            **task.of_draws(lambda s: draws(s, world=world), n, seed),
            "distance_oracle": task.oracle(model, sampler, n, seed, world),
        }


def optimum(labelled: Labelled, y: int) -> Optimum:
    """The optimum given a label at beta 1; its reward is a mean over draws."""
    law, log_z = labelled.conditional(y), float(labelled.prior[y].log())
    draws = law.sample(DRAWS, torch.Generator().manual_seed(y))
    reward = float(labelled.log_posterior(draws)[:, y].mean())
    return Optimum(law, reward, reward - log_z, log_z, log_z)


def label_kls(run: Run, sampler: Sampler) -> dict[str, float]:
    """The path KL in nats of the prompts that name each label, by the labels of a run's held-out judge; empty without one."""
    confusion = Confusion.of(run.held_out)
    own = {} if confusion is None else prompts_by_label(confusion.judge.labels, run.prompts)
    n = max(2, run.evaluation.n // max(1, len(own)))
    return {
        name: measure_kl(run.model, sampler, n, prompts, run.evaluation.seed, run.world)["kl_nats"]
        for name, prompts in own.items()
    }
