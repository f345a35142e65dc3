"""A weighted sum of rewards, each normalised first where its part says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from scoreaction.rewards import RewardError, as_reward, begin_scores
from scoreaction.types import EVERY, Background, Prompts, RewardFunction
from scoreaction.world import World


@dataclass(frozen=True)
class Part:
    """A reward in a sum, with its weight; `normalise` brings it to mean 0 and standard deviation 1 first."""

    reward: RewardFunction
    weight: float
    normalise: bool = False


def settle(reward: RewardFunction, world: World, total: int) -> None:
    """Gives a sum without moments those of the `total` scores that all processes have begun; leaves other rewards alone."""
    if isinstance(reward, WeightedSum) and reward.unsettled:
        reward.settle(world.gather(world.together(reward.first_scores), total))


class WeightedSum:
    """`sum_i w_i r_i(samples, prompts)`; differentiable where every part is.

    A part with `normalise` counts as `(r_i - m_i)/s_i`. m_i and s_i are its mean and standard deviation over the first
    batch that is scored, the pretrained model's in a run, and stay: a reward whose scale moved would be another reward every
    iteration. They are in `moments`, which is part of a checkpoint. A part that is constant on that batch keeps s_i = 1.

    >>> reward = WeightedSum([Part(lambda x, c: 10 * x, weight=2.0, normalise=True)])
    >>> reward(torch.tensor([1.0, 3.0]), None)
    tensor([-1.4142,  1.4142])
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(replace(part, reward=as_reward(part.reward)) for part in parts)
        self.moments: Tensor | None = None
        """Mean and standard deviation of every part, (parts, 2) float64; None before the first batch."""
        self._first: list[Callable[[], Tensor]] = []

    @property
    def differentiable(self) -> bool:
        """True where every part is."""
        return all(part.reward.differentiable for part in self.parts)

    @property
    def unsettled(self) -> bool:
        """True while the moments of its normalised parts are not known: the batch scored next gives them."""
        return self.moments is None and any(part.normalise for part in self.parts)

    @property
    def rows(self) -> int:
        """Samples at a time: those of the part with the fewest; all of them where no part works in the background."""
        return min((part.reward.rows for part in self.parts if isinstance(part.reward, Background)), default=EVERY)

    def __call__(self, samples: Tensor, prompts: Prompts) -> Tensor:
        return self.begin(samples, prompts)()

    def begin(self, samples: Tensor, prompts: Prompts) -> Callable[[], Tensor]:
        """Begins to score with every part. The first batch is everything begun before the first scores are read."""
        begun, device = [begin_scores(part.reward, samples, prompts) for part in self.parts], samples.device
        raw = cache(lambda: torch.stack([torch.as_tensor(scores(), device=device) for scores in begun]))
        if self.moments is None:
            self._first.append(raw)
        return lambda: self._sum(raw)

    def _sum(self, scores: Callable[[], Tensor]) -> Tensor:
        """The sum (batch,) of the parts' own scores (parts, batch)."""
        if self.moments is None:
            if not self._first:
                raise RewardError("the first batch of the sum failed, which gives it its scale; score again")
            self.settle(self.first_scores())
        assert self.moments is not None
        raw = scores()
        mean, std = self.moments.to(raw).unbind(1)
        weights = raw.new_tensor([part.weight for part in self.parts])
        return (weights[:, None] * (raw - mean[:, None]) / std[:, None]).sum(0)

    def forget(self) -> None:
        """Forgets what was begun and gave no moments."""
        self._first = []

    def first_scores(self) -> Tensor:
        """The parts' own scores of all that was begun before the moments were known, (rows, parts) float64.

        Where a part fails all of it is forgotten, and the moments are those of the batch that is begun next.
        """
        begun, self._first = self._first, []
        try:
            nothing = torch.empty(len(self.parts), 0, dtype=torch.float64)  # of a process without rows
            return torch.cat([nothing, *(first().detach().double().cpu() for first in begun)], dim=1).T
        except Exception as error:
            raise RewardError(f"a part of the sum raised {type(error).__name__}: {error}") from error

    def settle(self, first: Tensor) -> None:
        """Fixes the moments by these scores of the parts, (rows, parts)."""
        moments = torch.tensor([[0.0, 1.0]] * len(self.parts), dtype=torch.float64)
        for i, part in enumerate(self.parts):
            if part.normalise:
                scores = first[:, i]
                std = float(scores.std()) if len(scores) > 1 else 0.0
                flat = std <= 1e-6 * max(1.0, float(scores.abs().max()))
                moments[i] = torch.tensor([float(scores.mean()), 1.0 if flat else std])
        self.moments = moments
