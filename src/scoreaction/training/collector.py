"""What one iteration learns from: prompts that are drawn, trajectories of the policy, and their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.rewards import CountedReward, RewardError
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.sampling.experience import Experience
from scoreaction.sampling.rollout import Rollout, Sampler, joined, roll_out
from scoreaction.training.online import Rounds
from scoreaction.training.optimizer import Train, TrainingError
from scoreaction.types import Conditions, Prompt

PIECES = 4
"""In which a batch is drawn at least where the reward works in the background: three quarters of its time are hidden."""


def check_finite(what: str, values: Tensor, iteration: int) -> None:
    """TrainingError where something of the policy is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(f"iteration {iteration + 1}: the policy diverged, its {what} are not finite; lower train.lr")


def drawn(prompts: Sequence[Any] | None, n: int, generator: torch.Generator) -> Tensor:
    """The numbers of n prompts: each as likely as the others, or by the weights that a `Prompt` has.

    >>> drawn([Prompt("a", weight=0.0), Prompt("b")], 3, torch.Generator()).tolist()
    [1, 1, 1]
    """
    weights = [prompt.weight if isinstance(prompt, Prompt) else 1.0 for prompt in prompts or ["none"]]
    if len(set(weights)) == 1:
        return torch.randint(len(weights), (n,), generator=generator)
    return torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator)


class Collector:
    """Draws trajectories for prompts and has them scored, by the reward or by the proxy of one that is asked in rounds."""

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        train: Train,
        reward: CountedReward,
        rounds: Rounds | None,
        prompts: list[Any] | None,
        conditions: Conditions,
    ) -> None:
        self.model, self.sampler, self.train, self.prompts, self.conditions = model, sampler, train, prompts, conditions
        self.reward, self.objective = reward, rounds or reward

    def score(self, x0: Tensor, groups: Tensor) -> Tensor:
        """The reward of x0 for the prompts of these numbers."""
        scores = self.objective(self.model.decode(x0), self._asked(groups))
        if torch.is_grad_enabled() and self.objective.differentiable and not scores.requires_grad:
            raise RewardError(
                f"{self.objective.name}: says it is differentiable, and no gradient reaches the samples; keep the graph in it,"
                " or leave differentiable out"
            )
        return scores

    def _asked(self, groups: Tensor) -> list[Any] | None:
        return None if self.prompts is None else [self.prompts[group] for group in groups.tolist()]

    def samples(self, learner: Learner, groups: Tensor, generator: torch.Generator) -> Tensor:
        """Samples of the policy as it is, decoded; groups (n,) say the prompt of each."""
        conditions, times = take(self.conditions, groups), self.sampler.times(self.model.process)
        with torch.no_grad():
            policy = learner.policy(conditions)
            return self.model.decode(roll_out(self.model, self.sampler, policy, len(groups), generator, times=times).x0)

    def experience(self, learner: Learner, generator: torch.Generator, iteration: int) -> tuple[Experience, list[Any] | None]:
        """A batch of trajectories with their rewards, and the prompt of each. TrainingError where samples are not finite."""
        batch, each, limit = self.train.batch, self.train.samples_per_prompt, self.train.rows
        groups = drawn(self.prompts, math.ceil(batch / each), generator).repeat_interleave(each)[:batch]
        conditions, prompts = take(self.conditions, groups), self._asked(groups)
        times, gradient = learner.times(generator), None
        # a reward that works in the background begins with the first trajectories while the next are drawn
        rows = self.objective.rows
        size = batch if rows is None else min(limit, max(rows, math.ceil(batch / PIECES)))
        rollouts: list[Rollout] = []
        waiting: list[Callable[[], Tensor]] = []
        for part in torch.arange(batch).split(size):
            rollouts.append(learner.explore(take(conditions, part), len(part), times, generator))
            check_finite("samples", rollouts[-1].x0, iteration)
            if not learner.reward_gradient:
                with torch.no_grad():
                    waiting.append(self.objective.begin_decoded(rollouts[-1].x0, self.model.decode, self._asked(groups[part])))
        rollout = joined(rollouts)
        if learner.reward_gradient:
            self._settle(rollout.x0, groups)
            parts = [self._slope(x0, part) for x0, part in zip(rollout.x0.split(limit), groups.split(limit), strict=True)]
            rewards, gradient = torch.cat([r for r, _ in parts]), torch.cat([g for _, g in parts])
        else:
            rewards = torch.cat([scores() for scores in waiting])
        return Experience(rollout, rewards, conditions, groups.to(rewards.device), reward_gradient=gradient), prompts

    def _settle(self, x0: Tensor, groups: Tensor) -> None:
        """A weighted sum takes its scale from all of the first batch, and not from the first piece whose gradient is asked."""
        reward = self.reward.reward
        if self.objective is self.reward and isinstance(reward, WeightedSum) and reward.unsettled:
            with torch.no_grad():
                self.score(x0, groups)

    def _slope(self, x0: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards and their gradient by x0, before decoding."""
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_(True)
            scores = self.score(leaf, groups)
            return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]
