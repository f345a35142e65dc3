"""Collecting: prompts are drawn, trajectories of the policy for them, and their rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.diffusion.noise import RowNoise, drawn_seed
from scoreaction.networks.conditions import take
from scoreaction.networks.memory import fitting
from scoreaction.networks.model import Model
from scoreaction.rewards import CountedReward
from scoreaction.rewards._reward import check_graph
from scoreaction.rewards._weighted import WeightedSum, settle
from scoreaction.sampling.rollout import ALL, Rollout, joined, roll_out
from scoreaction.sampling.sampler import Sampler, follow
from scoreaction.training.errors import GradientError
from scoreaction.training.online import Rounds
from scoreaction.training.optimizer import Train
from scoreaction.types import Prompt
from scoreaction.world import ALONE, World

PIECES = 4
"""Smallest number of parts of a batch if the reward works in the background: three quarters of its time are hidden."""


def check_finite(what: str, values: Tensor, iteration: int) -> None:
    """GradientError where something of the policy is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise GradientError(f"iteration {iteration + 1}: the policy diverged, its {what} are not finite")


def drawn(prompts: Sequence[Any] | None, n: int, generator: torch.Generator) -> Tensor:
    """The numbers of n prompts: each as likely as the others, or by the weights that a `Prompt` has.

    >>> drawn([Prompt("a", weight=0.0), Prompt("b")], 3, torch.Generator()).tolist()
    [1, 1, 1]
    """
    weights = [prompt.weight if isinstance(prompt, Prompt) else 1.0 for prompt in prompts or ["none"]]
    if len(set(weights)) == 1:
        return torch.randint(len(weights), (n,), generator=generator)
    return torch.multinomial(torch.tensor(weights), n, replacement=True, generator=generator)


def _begun(begin: Callable[[], Callable[[], Tensor]]) -> Callable[[], Tensor]:
    """Scores that have begun; where that fails they raise it, once no process waits for calls of the network."""
    try:
        return begin()
    except Exception as error:  # noqa: BLE001  whatever it is, it is raised later
        failure = error

    def failed() -> Tensor:
        raise failure

    return failed


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
        world: World = ALONE,
    ) -> None:
        self.model, self.sampler, self.train, self.prompts, self.world = model, sampler, train, prompts, world
        self.reward, self.objective = reward, rounds or reward

    def score(self, x0: Tensor, prompt: Tensor) -> Tensor:
        """The reward of x0 for the prompts of these numbers."""
        if not len(x0):  # of a process without rows
            return x0.flatten(1).sum(1)
        scores = self.objective(self.model.decode(x0), self.texts(prompt))
        return check_graph(self.objective.name, scores) if self.objective.differentiable else scores

    def texts(self, prompt: Tensor) -> list[Any] | None:
        """The prompts of these numbers, None without prompts."""
        return None if self.prompts is None else [self.prompts[number] for number in prompt.tolist()]

    def samples(self, learner: Learner, prompt: Tensor, noise: RowNoise) -> Tensor:
        """Samples of the policy as it is, decoded; prompt (n,) are the numbers of their prompts."""
        times = self.sampler.times(self.model.process)
        with torch.no_grad():
            source = learner.noise(noise, prompt)
            policy = follow(self.model, self.sampler, learner.conditions, prompt, source)
            x = self.model.moved(self.model.start(len(prompt), source), learner.conditions, prompt=prompt)
            return self.model.decode(roll_out(self.model, self.sampler, policy, prompt, source, times=times, x=x).x0)

    def rollout(self, learner: Learner, generator: torch.Generator, iteration: int) -> Rollout:
        """This process's trajectories of a batch with their rewards. TrainingError where samples are not finite."""
        rollout, scores = self.begin(learner, generator, iteration)
        return self.world.together(lambda: self._scored(learner, rollout, scores))

    def begin(
        self, learner: Learner, generator: torch.Generator, iteration: int, *, score: bool = True
    ) -> tuple[Rollout, Callable[[], Tensor]]:
        """This process's trajectories of a batch; calling the second waits for their scores, which have begun if `score`."""
        prompt = self._drawn(learner.branches, generator)
        times, seed = learner.times(generator), drawn_seed(generator)
        explored = partial(self._explored, learner, prompt, times, seed, iteration, score)
        rollout, scores = self.world.together(explored, sends=self.model.sharded)
        if score:
            settle(self.reward.reward, self.world, len(prompt))
        return rollout, scores

    def ask_again(self, rollout: Rollout, *, counted: bool) -> Callable[[], Tensor]:
        """Begins to score trajectories, not as queries again where they are `counted`; the result waits for the scores."""
        queries, texts = self.reward.queries, self.texts(rollout.prompt)
        with torch.no_grad():
            scores = self.objective.begin_decoded(rollout.x0.to(self.model.device), self.model.decode, texts)
        self.reward.queries = queries if counted else self.reward.queries
        return scores

    def _drawn(self, branches: int, generator: torch.Generator) -> Tensor:
        """The numbers of a batch's prompts, (batch,): those of the stems, as often as each goes on."""
        stems, each = self.train.batch // branches, max(1, self.train.samples_per_prompt // branches)
        return drawn(self.prompts, math.ceil(stems / each), generator).repeat_interleave(each)[:stems].repeat(branches)

    def _explored(
        self, learner: Learner, prompt: Tensor, times: Tensor, seed: int, iteration: int, score: bool
    ) -> tuple[Rollout, Callable[[], Tensor]]:
        """The trajectories, and their scores, which have begun."""
        own = self.world.stripe(len(prompt))
        # a reward that works in the background begins with the first trajectories while the next are drawn
        rows = None if learner.reward_gradient else self.objective.rows
        size = len(own) if rows is None else min(self.rows, max(rows, math.ceil(len(own) / PIECES)))
        rollouts: list[Rollout] = []
        waiting: list[Callable[[], Tensor]] = []
        unsettled = self.unsettled
        families = own.view(learner.branches, -1)  # siblings in one part, which makes another order of it
        parts = [part.flatten() for part in families.split(max(1, size // learner.branches), 1)]
        order = torch.cat(parts).argsort() if learner.branches > 1 else ALL
        for part in parts:
            rollouts.append(learner.explore(prompt[part], times, RowNoise(seed, part)))
            check_finite("samples", rollouts[-1].x0, iteration)
            if score and (not learner.reward_gradient or unsettled):
                begin = partial(self.objective.begin_decoded, rollouts[-1].x0, self.model.decode, self.texts(prompt[part]))
                with torch.no_grad():
                    waiting.append(_begun(begin) if self.model.sharded else begin())
        return joined(rollouts, order), lambda: torch.cat([scores() for scores in waiting])[order]

    def again(
        self,
        rollout: Rollout,
        generator: torch.Generator,
        iteration: int,
        explore: Callable[[Tensor, RowNoise], Rollout],
        rows: Tensor,
    ) -> Rollout | None:
        """This process's trajectories of these rows of all, drawn again by `explore(prompt, noise)` and scored."""
        seed = drawn_seed(generator)
        own = rows[rows % self.world.size == self.world.rank]

        def work() -> Rollout | None:
            rollouts, waiting = [], []
            for part in own.split(self.rows) if len(own) else ():
                rollouts.append(explore(take(rollout.prompt, part // self.world.size), RowNoise(seed, part)))
                check_finite("samples", rollouts[-1].x0, iteration)
                texts = self.texts(rollouts[-1].prompt)
                waiting.append(self.objective.begin_decoded(rollouts[-1].x0, self.model.decode, texts))
            return replace(joined(rollouts), rewards=torch.cat([scores() for scores in waiting])) if rollouts else None

        with torch.no_grad():
            return self.world.together(work)

    def _scored(self, learner: Learner, rollout: Rollout, scores: Callable[[], Tensor]) -> Rollout:
        """The rollout with its rewards, and with their gradient where the learner takes it from here."""
        if len(rollout.rewards):  # the learner has asked for them
            return rollout
        if not learner.reward_gradient:
            return replace(rollout, rewards=scores())
        work = partial(self._gradients, rollout.x0, rollout.prompt)
        rewards, gradients = fitting(self.model, len(rollout.x0), work)
        return replace(rollout, rewards=rewards, reward_gradient=gradients)

    @property
    def unsettled(self) -> bool:
        """True before a weighted sum has its scale, which is that of all of the first batch."""
        reward = self.reward.reward
        return self.objective is self.reward and isinstance(reward, WeightedSum) and reward.unsettled

    def at_once(self) -> bool:
        """True where a learner may score and differentiate a part of a batch by itself, as soon as it is drawn.

        Not where all processes make each call, the scale of the reward waits for the whole batch, or that of gradients for the
        loop (fp16).
        """
        return not (self.model.sharded or self.unsettled or self.train.precision == "fp16")

    @property
    def rows(self) -> int:
        """Samples that are decoded and scored with a graph at a time."""
        return self.model.max_rows or self.train.batch

    def _gradients(self, x0: Tensor, prompt: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """Rewards and gradients of all, `limit` samples at a time."""
        pieces = zip(x0.split(limit), prompt.split(limit), strict=True)
        rewards, gradients = zip(*(self._gradient(some, part) for some, part in pieces), strict=True)
        return torch.cat(rewards), torch.cat(gradients)

    def _gradient(self, x0: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards and their gradient by x0, before decoding."""
        with torch.enable_grad():
            leaf = x0.detach().requires_grad_(True)
            scores = self.score(leaf, prompt)
            return scores.detach(), torch.autograd.grad(scores.sum(), leaf)[0]
