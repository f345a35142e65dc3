"""Rewards that come late: batches wait for their answers while the policy goes on, and are learned from in their order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.diffusion.predictions import mapped
from scoreaction.diffusion.processes import Masking
from scoreaction.networks.model import Model
from scoreaction.rewards import RewardError
from scoreaction.sampling.replay import ON_DISK, check_room, stored
from scoreaction.sampling.rollout import Rollout
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.collector import Collector
from scoreaction.training.optimizer import Train
from scoreaction.types import Prediction, Tokens
from scoreaction.world import OtherProcess, World


def check_delay(train: Train, learner: Learner, *, algorithm: str, online: bool) -> None:
    """ValueError, with the remedy, where rewards cannot come so late."""
    delay = train.reward_delay
    if delay == 0:
        return
    if delay >= train.iterations:
        raise ValueError(
            f"train.reward_delay: no reward comes {delay} iterations late in {train.iterations}; set it below train.iterations"
        )
    if online:
        raise ValueError("train.reward_delay: an online: block asks its oracle in rounds and trains on a proxy; set it to 0")
    if not learner.late_rewards:
        raise ValueError(
            f"train.reward_delay: {algorithm} takes every batch for one of the policy as it is, or asks for more at once; use"
            " ddpo, dpok, hrf, vard, or score_action by pathwise or likelihood_ratio"
        )
    if train.select == "reward_mean":
        raise ValueError(
            "train.select: reward_mean is that of weights which are gone when train.reward_delay lets it be known; take a"
            " held-out reward, or null"
        )


def check_late_room(train: Train, sampler: Sampler, model: Model, world: World) -> None:
    """ValueError where the batches that wait find no room: their states, and the predictions of the policy that sampled."""
    if train.reward_delay == 0:
        return
    state, rows = 4 * math.prod(model.shape), train.batch // world.size
    kinds = model.process.vocabulary if isinstance(model.process, Masking) else 1
    batch = [rows * (sampler.steps + 1) * state, *[rows * sampler.steps * state * kinds] * (1 if kinds > 1 else 2)]
    what = f"train.reward_delay: {train.reward_delay} batches of {rows} trajectories"
    check_room(batch * train.reward_delay, what, "train.reward_delay")


@dataclass
class Waiting:
    """A batch of trajectories on the host, the iteration that drew it, and what waits for its scores.

    scores is None where they are not on their way: nobody needs them, or they failed. counted: they are among the queries.
    """

    rollout: Rollout
    drawn: int
    scores: Callable[[], Tensor] | None = None
    counted: bool = False


class Late:
    """The batches whose rewards are awaited, oldest first: each is learned from `delay` iterations after it was drawn.

    The predictions that are stored with the states are those of the policy that sampled, so that ratios are right. Its state
    is all of them, of all processes; answers that are on their way are awaited for it, and those that failed are begun again.
    The last batches of a run, which it will not learn from, are not scored.
    """

    def __init__(self, train: Train, collector: Collector, world: World) -> None:
        self.delay, self.iterations = train.reward_delay, train.iterations
        self.collector, self.world = collector, world
        self.waiting: list[Waiting] = []

    def add(self, learner: Learner, generator: torch.Generator, iteration: int) -> Rollout:
        """Draws a batch, which then waits, and begins what scores are not on their way; returns it without them."""
        score = self._wanted(iteration)
        rollout, scores = self.collector.begin(learner, generator, iteration, score=score)
        kept = self.world.together(lambda: _moved(rollout, _on_host))  # memory may run out of one process
        self.waiting.append(Waiting(kept, iteration, scores if score else None, score))
        self.world.together(self._begin)
        return rollout

    def _wanted(self, drawn: int) -> bool:
        """True where this run learns from the batch of that iteration."""
        return drawn + self.delay < self.iterations

    def _begin(self) -> None:
        for waiting in self.waiting:
            if waiting.scores is None and self._wanted(waiting.drawn):
                waiting.scores = self.collector.ask_again(waiting.rollout, counted=waiting.counted)
                waiting.counted = True

    def due(self) -> Rollout | None:
        """The batch that is learned from now, with its rewards, which then waits no more; None while none is due."""
        if len(self.waiting) <= self.delay:
            return None
        due = self.world.together(self._due)
        self.waiting.pop(0)
        return due

    def _due(self) -> Rollout:
        waiting, device = self.waiting[0], self.collector.model.device
        rewards = self._rewards(waiting).to(device)
        return replace(_moved(waiting.rollout, lambda part: part.to(device)), rewards=rewards)

    def _rewards(self, waiting: Waiting) -> Tensor:
        """The scores of a batch that are on their way. Where they fail they are to be begun again."""
        scores, waiting.scores = waiting.scores, None
        assert scores is not None
        rewards = scores()
        waiting.scores = lambda: rewards
        return rewards

    def state(self) -> list[dict[str, Any]]:
        """All that waits, of all processes, which all must ask."""
        return [self._state(waiting) for waiting in self.waiting]

    def _state(self, waiting: Waiting) -> dict[str, Any]:
        rollout, gather, rewards = waiting.rollout, self.world.gather, torch.empty(0)
        if self.world.any(waiting.scores is None):  # a failure is known to the process that it happened in, and to no other
            waiting.scores = None
        if waiting.scores is not None:
            try:
                rewards = gather(self.world.together(lambda: self._rewards(waiting)).cpu())
            except (RewardError, OtherProcess):  # in every process alike
                waiting.scores = None

        def whole(states: Tensor) -> Tensor:
            return gather(states.transpose(0, 1).contiguous()).transpose(0, 1)

        policies = {"old": rollout.old} | ({} if rollout.action is rollout.old else {"action": rollout.action})
        return {
            "drawn": waiting.drawn,
            "counted": waiting.counted,
            "times": rollout.times,
            "x": whole(rollout.x),
            "prompt": gather(rollout.prompt),
            "rewards": rewards,
            "off_below": rollout.off_below,
            "step_weight": rollout.step_weight,
            **{name: mapped(whole, prediction)._asdict() for name, prediction in policies.items()},
        }

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Restores a `state`."""
        self.waiting = [self._waiting(values) for values in state]

    def _waiting(self, values: dict[str, Any]) -> Waiting:
        def own(states: Tensor) -> Tensor:
            return states[:, self.world.stripe(states.shape[1])]

        def policy(parts: dict[str, Tensor]) -> Prediction:
            kind: Any = Tokens if "log_prob" in parts else Prediction
            return kind(**{name: own(part) for name, part in parts.items()})

        old = policy(values["old"])
        action = policy(values["action"]) if "action" in values else old
        rollout = Rollout(
            values["times"], own(values["x"]), old, action, self.world.own(values["prompt"]),
            off_below=values["off_below"], step_weight=values["step_weight"],
        )  # fmt: skip
        rewards = self.world.own(values["rewards"])
        scores = (lambda: rewards) if len(values["rewards"]) else None
        return Waiting(_moved(rollout, _on_host), values["drawn"], scores, values["counted"])


def _moved(rollout: Rollout, move: Callable[[Tensor], Tensor]) -> Rollout:
    """The rollout with its states and predictions elsewhere."""
    old = mapped(move, rollout.old)
    action = old if rollout.action is rollout.old else mapped(move, rollout.action)
    return replace(rollout, x=move(rollout.x), old=old, action=action)


def _on_host(part: Tensor) -> Tensor:
    """The tensor in the host's memory, or in a file where it is large."""
    if part.device.type == "cpu" and part.nbytes <= ON_DISK:
        return part
    kept = stored(part.shape, part.dtype)
    kept.copy_(part)
    return kept
