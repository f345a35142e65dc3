"""What every algorithm is: a validated configuration that builds a learner, and a learner that yields losses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from scoreaction.diffusion.solvers import jittered, noise_std
from scoreaction.networks.model import Model
from scoreaction.sampling.experience import Experience, over_rows
from scoreaction.sampling.rollout import Rollout, Sampler, roll_out
from scoreaction.types import Conditions, Predict, Prediction


@dataclass(frozen=True)
class Judge:
    """The run's reward as an algorithm may ask it: every row is counted as a query.

    `score(x0, groups) -> (batch,)`: x0 (batch, *shape) before decoding, groups (batch,) the numbers of their prompts.
    Gradients flow to x0 where `differentiable`.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    differentiable: bool


@dataclass(frozen=True)
class Update:
    """One backward pass: the loss, the network it trains, what to log; `step` says the optimiser steps after it."""

    loss: Tensor
    network: str
    metrics: dict[str, float] = field(default_factory=dict)
    step: bool = True


@dataclass(frozen=True)
class Setting:
    """What a run gives its algorithm: the parts it works on, the size of a batch, all prompts' conditions (or None)."""

    model: Model
    sampler: Sampler
    judge: Judge
    batch: int
    max_rows: int
    conditions: Conditions


class Algorithm(BaseModel):
    """Base of the algorithms' configurations: validated, frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @abstractmethod
    def build(self, setting: Setting) -> Learner:
        """The learner; ValueError with a remedy where sampler or reward cannot give what it needs."""


class Regularised(Algorithm):
    """An algorithm with a KL to the pretrained model: beta in reward units per nat of path KL.

    kl_target: path KL in nats that beta is adapted to reach, starting from `beta`.
    """

    beta: float = Field(0.5, gt=0)
    kl_target: float | None = Field(None, gt=0)


class Learner:
    """An algorithm at work.

    networks: what it trains or remembers beside the policy, kept in checkpoints, each with its rate in `lr` where it is
    trained; state: plain values that change, kept too, of which the numbers are logged. reward_gradient: the loop brings the
    gradient of the rewards along with them, for the same queries.
    """

    reward_gradient = False

    def __init__(self, setting: Setting, *, beta: float = 0.0, kl_target: float | None = None) -> None:
        self.setting, self.kl_target = setting, kl_target
        self.networks = nn.ModuleDict()
        self.lr: dict[str, float] = {}
        self.state: dict[str, Any] = {"beta": beta}
        self.reference_rows: int | None = None  # trajectories whose KL is measured; None is all

    @property
    def beta(self) -> float:
        """The weight of the KL now."""
        return self.state["beta"]

    @property
    def kl_floor(self) -> float:
        """The path KL, in nats, that rounding alone puts between two policies that hardly differ; 0 in fp32."""
        return self.state.get("kl_floor", 0.0)

    def adapt_beta(self, kl_nats: float) -> None:
        """Moves beta towards the KL target: `beta *= 1 + clip(KL/target - 1, -0.2, 0.2)/10` an iteration.

        The proportional rule of Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. What is rounding does not count.
        """
        if self.kl_target is not None:
            kl_nats = max(kl_nats - self.kl_floor, 0.0)
            self.state["beta"] *= 1 + 0.1 * min(max(kl_nats / self.kl_target - 1, -0.2), 0.2)

    def policy(self, conditions: Conditions) -> Predict:
        """The policy under these conditions."""
        model, guidance = self.setting.model, self.setting.sampler.guidance
        return lambda x, t: model.predict(x, t, conditions, guidance=guidance)

    def reference(self, conditions: Conditions) -> Predict:
        """The pretrained model under these conditions."""
        model, guidance = self.setting.model, self.setting.sampler.guidance
        return lambda x, t: model.reference(x, t, conditions, guidance=guidance)

    def times(self, generator: torch.Generator) -> Tensor:
        """The grid of an iteration: the sampler's own, moved a little each time, so that nearly all times are trained."""
        return jittered(self.setting.sampler.times(self.setting.model.process), generator)

    def explore(self, conditions: Conditions, n: int, times: Tensor, generator: torch.Generator) -> Rollout:
        """n trajectories to learn from; the policy acts in every step."""
        return roll_out(self.setting.model, self.setting.sampler, self.policy(conditions), n, generator, times=times)

    def prepare(self, experience: Experience, generator: torch.Generator) -> Experience:
        """Asks the reference at the visited states, without a graph."""
        rows = min(self.reference_rows or experience.size[1], experience.size[1])
        model, guidance = self.setting.model, self.setting.sampler.guidance
        with torch.no_grad():
            flat = over_rows(partial(model.reference, guidance=guidance), experience.points(rows), self.setting.max_rows)
        return replace(experience, reference=unflattened(flat, experience.size[0]))

    @abstractmethod
    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        """The losses of one iteration, one after another; the caller has stepped before it asks for the next."""


def roll_out_chain(learner: Learner, conditions: Conditions, n: int, times: Tensor, generator: torch.Generator) -> Rollout:
    """Trajectories in which the reference acts in the steps without noise, which have no density."""
    setting = learner.setting
    silent = noise_std(setting.model.process, times[:-1], times[1:], setting.sampler.eta) == 0
    acts_at = {float(t): bool(quiet) for t, quiet in zip(times[:-1], silent, strict=True)}
    policy, reference = learner.policy(conditions), learner.reference(conditions)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return reference(x, t) if acts_at[float(t)] else policy(x, t)

    return roll_out(setting.model, setting.sampler, predict, n, generator, times=times)


def refuse_black_box(setting: Setting, algorithm: str) -> None:
    """ValueError unless the reward has a gradient."""
    if not setting.judge.differentiable:
        raise ValueError(
            f"reward: {algorithm} needs its gradient and this one has none; use score_action, vard or ddpo, an online: block"
            " (a proxy is fitted), or, where gradients do flow, Reward(fn, differentiable=True)"
        )


def unflattened(flat: Prediction, steps: int) -> Prediction:
    """(N * rows, *shape) back to (N, rows, *shape)."""
    return Prediction(flat.x0.unflatten(0, (steps, -1)), flat.eps.unflatten(0, (steps, -1)))
