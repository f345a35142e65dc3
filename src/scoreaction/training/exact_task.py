"""Exact tasks: the distance of a policy to an optimum that is known, beside what the exact policy and samples of it have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from scoreaction.diffusion.kernel_density import KernelDensity, rows_behind
from scoreaction.diffusion.mixtures import Mixture, Optimum
from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.rescaling import Rescale
from scoreaction.networks.model import Model
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.sampling.draw import draw_x0, run
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.evaluation import standard_error
from scoreaction.world import ALONE, World


@dataclass(frozen=True)
class ExactTask:
    """A data law and a reward whose tilted law is known exactly: the optimum, to which distances are measured.

    Both are laws of x0, before decoding.
    """

    law: Mixture
    optimum: Optimum
    rows: dict[str, float] = field(default_factory=dict)
    """Of a density of data: how many rows the optimum rests on in effect, and the standard error of its reward by them."""

    @classmethod
    def of(cls, model: Model, reward: object, beta: float | None) -> ExactTask | None:
        """The task, where model, reward and beta make one."""
        if not isinstance(model.law, Mixture) or not isinstance(reward, QuadraticReward) or not beta:
            return None
        if isinstance(model.decode, Rescale):
            best = model.decode.optimum(model.law, reward.quadratic, beta)
        else:
            best = model.law.optimum(reward.quadratic, beta)
        if not isinstance(best.law, KernelDensity):
            return cls(model.law, best)
        return cls(model.law, best, rows_behind(best.law.weights, reward.quadratic(model.decode(best.law.means))))

    def measured(self, draws: Callable[[int], Tensor], n: int, seed: int, *, repeats: int = 5) -> Tensor:
        """Sliced W2 of n samples to the optimum, of draws with different seeds, (repeats,)."""
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.tensor([sliced_w2(draws(seed + i), self.optimum.law.sample(n, generator)) for i in range(repeats)])

    def distance(self, draws: Callable[[int], Tensor], n: int, seed: int, *, repeats: int = 5) -> float:
        """The mean of `measured`."""
        return float(self.measured(draws, n, seed, repeats=repeats).double().mean())

    def floor(self, n: int, seed: int, *, repeats: int = 20) -> float:
        """The mean distance of two samples of the optimum itself: what no method can beat."""
        generator = torch.Generator().manual_seed(seed + 2)
        law = self.optimum.law
        return sum(sliced_w2(law.sample(n, generator), law.sample(n, generator)) for _ in range(repeats)) / repeats

    @torch.no_grad()
    def oracle(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> float:
        """The distance of the exact score of the tilted law, run through this sampler at eta 1."""
        noisy = sampler.model_copy(update={"eta": 1.0, "solver": "ddim"} if sampler.eta == 0 else {})
        predict = partial(self.optimum.law.prediction, model.process)
        own = world.stripe(n)
        return self.distance(lambda s: world.gather(run(model, noisy, predict, len(own), RowNoise(s, own)), n), n, seed)

    def distances(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> dict[str, float]:
        """Distance of the averaged policy under this sampler with the standard error of its measurement, and floor."""
        return self.of_draws(lambda s: draw_x0(model, sampler, n, None, s, world=world), n, seed)

    def of_draws(self, draws: Callable[[int], Tensor], n: int, seed: int) -> dict[str, float]:
        """The same of samples that are drawn by their seed."""
        values = self.measured(draws, n, seed).double()
        return {
            "distance_to_optimum": float(values.mean()),
            "distance_to_optimum_se": standard_error(values),
            "distance_floor": self.floor(n, seed),
        }

    def figures(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> dict[str, float]:
        """Optimum, distance of the averaged policy, floor and oracle, under this sampler."""
        return {
            "optimum_reward": self.optimum.reward,
            "optimum_kl_nats": self.optimum.kl_nats,
            **self.rows,
            **self.distances(model, sampler, n, seed, world),
            "distance_oracle": self.oracle(model, sampler, n, seed, world),
        }


def sliced_w2(x: Tensor, y: Tensor, projections: int = 200) -> float:
    """Sliced 2-Wasserstein distance of two samples of equal size, (n, d) each.

    The square root of the mean, over `projections` fixed random directions, of the squared one-dimensional W2
    (Bonneel et al. 2015). Directions come from a generator of their own, so that any two calls use the same.

    >>> x = torch.zeros(5, 1)
    >>> round(sliced_w2(x, x + 2), 6)
    2.0
    """
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(f"sliced_w2 needs two samples of one shape (n, d), got {tuple(x.shape)} and {tuple(y.shape)}")
    generator = torch.Generator().manual_seed(20250201)
    directions = torch.randn(projections, x.shape[1], generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    a, b = (np.sort((directions @ sample.detach().cpu().double().T).numpy()) for sample in (x, y))  # five times torch's speed
    return float(np.sqrt(np.mean((a - b) ** 2)))
