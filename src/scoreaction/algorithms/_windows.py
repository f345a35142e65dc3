"""Windows and branches: which steps of a trajectory an iteration trains, and how many go on from one stem."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, State
from scoreaction.algorithms._likelihood_ratio import spread_is_rounding, transition, with_density
from scoreaction.algorithms._setting import Setting
from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.transitions import Transition
from scoreaction.networks.conditions import take
from scoreaction.sampling.branches import Drawing, branched
from scoreaction.sampling.rollout import Rollout

FLOOR = 0.1
"""The chance with which a window is drawn without regard to the signal, so that every step is visited."""
MEMORY = 0.9
"""Share of its past that a step's signal keeps when it is measured again."""


class Window(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """The steps that an iteration trains, of those that have a density; the others are drawn and not learned from.

    kind: all of them (`full`), those from the time `start` on (`fixed`), the next ones after `every` iterations (`sliding`), a
    window at `random`, or one drawn by the `signal` that siblings measured in its steps. size: the share of the steps. Steps
    of a window that is drawn count `1/P(the step is in the window)`, so that the expected gradient is that of all steps; a
    `fixed` one trains its own steps alone, and `sliding` ones take turns. Barcelo et al. 2024 (arXiv 2410.08315).

    >>> Window(kind="random", size=0.5).every
    5
    """

    kind: Literal["full", "fixed", "sliding", "random", "signal"] = "full"
    size: float = Field(0.3, gt=0, le=1, description="share of the steps")
    start: float = Field(1.0, gt=0, le=1, description="of fixed: the time where it begins, 1 is noise")
    every: int = Field(5, ge=1, description="of sliding: iterations until it moves on")


@dataclass
class WindowState(State):
    """The windows of a run so far: how many iterations learned, and the signal of each step, by its number.

    window_from and window_to are the times of the last one; sibling_share of the rewards' variance lies between stems.
    """

    learned: int = 0
    signal: dict[str, float] = field(default_factory=dict)
    window_from: float | None = None
    window_to: float | None = None
    sibling_share: float | None = None


def stretches(count: int, length: int) -> Tensor:
    """The windows of so many steps: all stretches of `length`, cut off at both ends, (count + length - 1, count) bool.

    Every step is in as many as any other.

    >>> stretches(3, 2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 1]]
    """
    end, step = torch.arange(count + length - 1)[:, None], torch.arange(count)
    return (step <= end) & (step > end - length)


def sibling_advantages(rewards: Tensor, branches: int) -> Tensor:
    """`(r_j - mean of its siblings' rewards)/std`, a sibling not among its own, std that of the whole batch; (batch,).

    rewards (batch,), row i of stem i mod batch/branches. The std of the siblings alone would make steps close to the data,
    where they differ little, count as much as any other. 0 where rewards differ by rounding only.

    >>> sibling_advantages(torch.tensor([1.0, 5.0, 3.0, 5.0]), 2)
    tensor([-1.2060,  0.0000,  1.2060,  0.0000])
    """
    if spread_is_rounding(rewards):
        return torch.zeros_like(rewards)
    families = rewards.view(branches, -1)
    centred = (families - families.mean(0)) * branches / (branches - 1)
    return centred.flatten() / rewards.std(correction=0)


def signal(advantage: Tensor, z: Tensor) -> Tensor:
    """`|E A z|^2` of each stem, without bias: what the step can gain, squared. advantage (B, stems), z (B, stems, *shape).

    `(|sum_j A_j z_j|^2 - sum_j |A_j z_j|^2)/(B (B-1))`; each advantage holds the other's reward, which makes it larger by
    `1 + 1/(B-1)^2`, and that is divided off.
    """
    count, moves = len(advantage), advantage[..., None] * z.flatten(2)
    pairs = moves.sum(0).square().sum(-1) - moves.square().sum((0, 2))
    return pairs / (count * (count - 1)) / (1 + 1 / (count - 1) ** 2)


class Windows:
    """The window and the branches of a learner at work, whose state is a `WindowState`."""

    def __init__(self, learner: Learner, window: Window, branches: int, *, exploration: float = 0.0) -> None:
        self.learner, self.window, self.exploration = learner, window, exploration
        learner.branches = branches
        self.first = self._first() if window.kind == "fixed" else 0
        self.step_weight: Tensor | None = None

    @property
    def state(self) -> WindowState:
        """The learner's."""
        return cast(WindowState, self.learner.state)

    def _first(self) -> int:
        """The place of a fixed window's first step among those that can be trained; ValueError where it has none."""
        sampler, start = self.learner.sampler, self.window.start
        times = sampler.times(self.learner.process)
        inside = times[with_density(self.learner, times, exploration=self.exploration)] <= start
        if not bool(inside.any()):
            raise ValueError(
                f"algorithm.window.start: no step between t = {start:g} and {sampler.acts_from:g} has noise; raise it"
            )
        return int(inside.nonzero()[0])

    def draw(self, generator: torch.Generator, times: Tensor) -> None:
        """Chooses the window of an iteration with these times, alike in all processes.

        A full, fixed or sliding one needs no random number.
        """
        drawn = self.window.kind in ("random", "signal")
        uniform = torch.rand(1, generator=generator, dtype=torch.float64) if drawn else torch.zeros(1, dtype=torch.float64)
        self.step_weight = self._weight(uniform, times)

    def _weight(self, uniform: Tensor, times: Tensor) -> Tensor | None:
        """The weight of each step of the grid, (N,), for this uniform number; None where all are trained."""
        if self.window.kind == "full":
            return None
        numbers = with_density(self.learner, times, exploration=self.exploration)
        weight, count = torch.zeros(len(times) - 1, dtype=torch.float64), len(numbers)
        length = max(1, round(self.window.size * count))
        if self.window.kind == "fixed":
            begin = min(self.first, count - 1)  # a jittered grid may have a step less
            weight[numbers[begin : begin + length]] = 1.0
        elif self.window.kind == "sliding":
            turn = self.state.learned // self.window.every % math.ceil(count / length)
            weight[numbers[turn * length : (turn + 1) * length]] = 1.0
        else:
            cover = stretches(count, length)
            chance = self._chance(numbers, cover)
            chosen = min(int(torch.searchsorted(chance.cumsum(0), uniform)), len(chance) - 1)
            weight[numbers] = cover[chosen] / (chance @ cover.double())
        return weight

    def _chance(self, numbers: Tensor, cover: Tensor) -> Tensor:
        """The chance of each window, (windows,): even, or by the signal of its steps; one not measured has the mean."""
        even = torch.full((len(cover),), 1 / len(cover), dtype=torch.float64)
        known = {int(number): max(value, 0.0) for number, value in self.state.signal.items()}
        if self.window.kind == "random" or not any(known.values()):
            return even
        mean = sum(known.values()) / len(known)
        gain = torch.tensor([known.get(number, mean) for number in numbers.tolist()], dtype=torch.float64)
        mass = cover.double() @ gain
        return FLOOR * even + (1 - FLOOR) * mass / mass.sum()

    def explore(self, draw: Drawing, prompt: Tensor, times: Tensor, noise: Source) -> Rollout:
        """Trajectories by `draw(prompt, times, noise, x=x)`, of which siblings part where the window begins."""
        weight, count = self.step_weight, self.learner.branches
        at = 0 if weight is None else int(weight.nonzero()[0])
        if count == 1:
            rollout = draw(prompt, times, noise, x=None)
        else:
            rollout = branched(draw, self._start, prompt, times, noise, at=at, count=count)
        return rollout if weight is None else replace(rollout, step_weight=weight)

    def _start(self, prompt: Tensor, noise: Source) -> Tensor:
        return self.learner.model.start(len(prompt), self.learner.noise(noise, prompt))

    def record(self, rollout: Rollout, rewards: Tensor) -> None:
        """Keeps of a rollout that is learned from its window and what its siblings say; rewards (batch,) of all processes."""
        state, weight, count = self.state, rollout.step_weight, self.learner.branches
        state.learned += 1
        if weight is not None:
            inside = weight.nonzero().flatten()
            state.window_from, state.window_to = (float(rollout.times[i]) for i in (inside[0], inside[-1] + 1))
        if count == 1:
            return
        variance = rewards.double().var()
        between = 1 - rewards.double().view(count, -1).var(0).mean() / variance if variance > 0 else torch.zeros(())
        state.sibling_share = float(between)
        if self.window.kind == "signal":
            assert weight is not None
            number = int(weight.nonzero()[0])
            value = self._signal(rollout, sibling_advantages(rewards, count), number)
            before = state.signal.get(str(number), value)
            state.signal[str(number)] = MEMORY * before + (1 - MEMORY) * value

    def _signal(self, rollout: Rollout, advantage: Tensor, number: int) -> float:
        """The signal of the step in which siblings part, over the stems of all processes."""
        learner, (_, batch) = self.learner, rollout.size
        steps = take(rollout.steps(), slice(number * batch, (number + 1) * batch))
        law = cast(Transition, transition(learner, steps.old, steps))
        z = (steps.x_next - law.mean) / expand(law.std, law.mean)
        own = learner.world.own(advantage).to(z)
        value = signal(own.view(learner.branches, -1), z.unflatten(0, (learner.branches, -1)))
        return learner.world.reduced([float(value.mean())])[0]


def check_windows(setting: Setting, window: Window, branches: int, *, exploration: float = 0.0) -> None:
    """ValueError, with the remedy, where a batch has no whole families, or a signal nothing that measures it."""
    stems, size = setting.batch // branches, setting.world.size
    if setting.batch % branches:
        raise ValueError(
            f"algorithm.branches: {branches} do not divide train.batch {setting.batch}; change one of them, such as train.batch"
            f" to {max(stems, 1) * branches}"
        )
    if stems % size:
        raise ValueError(
            f"algorithm.branches: {branches} make {stems} stems of train.batch {setting.batch}, which {size} processes do not"
            f" share evenly; set train.batch to {math.ceil(stems / size) * size * branches}"
        )
    if window.kind == "signal" and exploration > 0:
        raise ValueError(
            "algorithm.window.kind: the signal is of the sampler's noise, and algorithm.exploration acts beside it; set that to"
            " 0, or take random"
        )
    if window.kind == "signal" and branches == 1:
        raise ValueError(
            "algorithm.window.kind: the signal of a step is measured by siblings that part in it; set algorithm.branches to 2"
            " or more, or take random"
        )


def refuse_windows(window: Window, branches: int, why: str) -> None:
    """ValueError, with the reason and the remedy, where there is a window, or branches."""
    for key, there in (("window", window.kind != "full"), ("branches", branches > 1)):
        if there:
            raise ValueError(f"algorithm.{key}: windows are of densities, and {why}, or leave it out")


def refuse_signal_of_tokens(window: Window) -> None:
    """ValueError for a window by the signal, which is of Gaussian noise."""
    if window.kind == "signal":
        raise ValueError("algorithm.window.kind: signal is of Gaussian noise, and this model's states are tokens; take random")
