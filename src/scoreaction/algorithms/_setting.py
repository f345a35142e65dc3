"""The parts that a run gives its learner: model, sampler, reward, batch, processes and data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from scoreaction.networks.model import Model
from scoreaction.sampling.sampler import Sampler
from scoreaction.types import Conditions
from scoreaction.world import ALONE, World


class Objective(NamedTuple):
    """The run's reward: `reward(x0, prompt) -> (batch,)`, every row is counted as a query.

    x0 (batch, *shape) before decoding, prompt (batch,) the numbers of the prompts. Gradients flow to x0 where
    `differentiable`. at_once: True while a learner may differentiate, and score, a part of the batch as soon as it is drawn.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    differentiable: bool
    at_once: Callable[[], bool] = lambda: True

    def __call__(self, x0: Tensor, prompt: Tensor) -> Tensor:
        return self.score(x0, prompt)


class Examples(NamedTuple):
    """The run's data, one a row, whole in every process: x0 (n, *shape) before decoding, prompt (n,) the numbers of prompts.

    worse (n, *shape): of pairs, the samples that x0 is preferred to, else None. Of prompts with one text the first's number
    stands; `first` (prompts,) has it for each of the run's.
    """

    x0: Tensor
    worse: Tensor | None
    prompt: Tensor
    first: Tensor


class Setting(NamedTuple):
    """The parts that a run gives its learner; `conditions` are those of all prompts, `batch` is trajectories an iteration.

    batch counts those of all processes; what a learner sees of them is this process's.
    """

    model: Model
    sampler: Sampler
    reward: Objective
    batch: int
    conditions: Conditions
    group: float = math.inf
    """Trajectories an iteration with one prompt, on average."""
    world: World = ALONE
    delay: int = 0
    """Iterations that rewards come late."""
    prompts: list[Any] | None = None
    data: Examples | None = None
