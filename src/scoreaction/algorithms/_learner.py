"""The parts of an algorithm: validated settings that build a learner, and a learner that yields updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Updates
from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import mapped, perturbed
from scoreaction.diffusion.solvers import jittered
from scoreaction.networks.conditions import take
from scoreaction.networks.lockstep import equal_parts
from scoreaction.networks.memory import fitting
from scoreaction.networks.model import Model
from scoreaction.networks.prompt_chooser import PromptChooser
from scoreaction.sampling.rollout import Rollout, compared, once, roll_out, rows_at, unflattened
from scoreaction.sampling.sampler import Sampler, act, follow
from scoreaction.sampling.trajectory import Choose
from scoreaction.settings import Settings
from scoreaction.types import Predict, Prediction, Values
from scoreaction.world import World

T = TypeVar("T")
LOGGED, STEERING = 2, 8
"""States of each step, of all processes together, at which the pretrained model is evaluated where the KL is only logged, and
where beta follows it."""

Draw: TypeAlias = Callable[[Callable[[Tensor, Source], Rollout], Tensor], "Rollout | None"]
"""Draws trajectories of an iteration again: `draw(explore, rows)`, rows the numbers of those of all processes.

`explore(prompt, noise)` draws some of them. It gives this process's, scored, None where it has none.
"""


class Algorithm(Settings):
    """Base of the algorithms' settings: validated, frozen, no unknown keys.

    learns_from: what an update is made of, the rewards of trajectories or the run's data.
    """

    learns_from: ClassVar[Literal["rewards", "pairs", "samples"]] = "rewards"
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    moves_noise: ClassVar[bool] = False
    """True of one whose policy moves the noise that samples start from, and keeps the pretrained model's steps."""
    largest_ratio: ClassVar[float] = 20.0
    """The alpha/sigma up to which it changes a network that predicts x0, where `sampler.off_below` is not set."""
    chooses_prompts: ClassVar[bool] = False
    """True of one whose policy chooses what the pretrained model is told."""

    @abstractmethod
    def build(self, setting: Setting) -> Learner:
        """The learner; ValueError with a remedy where sampler or reward cannot give what it needs."""

    def settled(self, model: Model, sampler: Sampler, prompts: Sequence[Any] | None, *, seed: int, world: World) -> Algorithm:
        """The algorithm with what it has to ask others for before a run; ValueError where they do not give it."""
        return self

    def resumed(self, saved: Values) -> Algorithm:
        """The algorithm with what others gave its run when it began; saved: the settings that the run's folder has."""
        return self

    def chooser(self, model: Model, prompts: Sequence[Any] | None) -> PromptChooser | None:
        """The network by which its policy chooses prompts; None where that is one of steps."""
        return None

    def build_on_tokens(self, setting: Setting) -> Learner:
        """The learner of a model of tokens; ValueError where the algorithm has none."""
        name = getattr(self, "name", type(self).__name__)
        raise ValueError(
            f"algorithm.name: {name} is for Gaussian states and this model's are tokens; use score_action, ddpp, vard, dpok,"
            " hrf or ddpo"
        )


class Regularised(Algorithm):
    """An algorithm with a KL to the pretrained model: beta in reward units per nat of path KL.

    kl_target: path KL in nats that beta is adapted to reach, starting from `beta`.
    """

    beta: float = Field(0.5, gt=0)
    kl_target: float | None = Field(None, gt=0)


@dataclass
class State:
    """Plain values of a learner that change and are kept in checkpoints; a learner with more of them derives its own.

    beta: the weight of the KL now. kl_floor: the path KL, in nats, that rounding alone puts between two policies that hardly
    differ, measured once in half precision; 0 in fp32. Floats are logged.
    """

    beta: float = 0.0
    kl_floor: float | None = None


class Learner:
    """An algorithm at work: `explore` draws trajectories, `prepare` completes them, `updates` learns from them.

    networks: what it trains or remembers beside the policy, kept in checkpoints, each with its rate in `lr` where it is
    trained; state: plain values that change, kept too. reward_gradient: the loop brings the gradient of the rewards along
    with them, for the same queries. reference_rows: at how many states of each step the pretrained model is evaluated, None
    is all; the KL in the log is the sum over steps of the mean over these. exploration: std of the noise on eps with which
    the policy acts. branches: how many trajectories, siblings, go on from one stem; their number is that of the rows modulo
    batch/branches, and they have one prompt. late_rewards: it learns from trajectories of an older policy too, whose rewards
    come `delay` iterations late. trust_region: path KL in nats that an iteration may move, where the policy's
    updates measure it as `kl_to_old` and the state is a `TrustState`: an iteration that moves a multiple of it is taken back.
    asks_in_its_update: its one update asks the reward, and it keeps nothing of an iteration before: where the reward fails
    there, the iteration is taken back too.
    """

    reward_gradient = False
    reference_rows: int | None = None
    asks_in_its_update = False
    trust_region: float | None = None
    exploration = 0.0
    branches = 1
    late_rewards = False

    def __init__(self, setting: Setting, *, beta: float = 0.0, kl_target: float | None = None) -> None:
        self.model, self.sampler, self.reward, self.batch, self.conditions, _, self.world, self.delay, _, self.data = setting
        self.process, self.kl_target = self.model.process, kl_target
        self.networks = nn.ModuleDict()
        self.lr: dict[str, float] = {}
        self.state = State(beta)

    @property
    def beta(self) -> float:
        """The weight of the KL now."""
        return self.state.beta

    @property
    def kl_floor(self) -> float:
        """The path KL of rounding alone, in nats; 0 in fp32."""
        return self.state.kl_floor or 0.0

    def adapt_beta(self, kl_nats: float) -> None:
        """Moves beta towards the KL target: `beta *= 1 + clip(KL/target - 1, -0.2, 0.2)/10` an iteration.

        The proportional rule of Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. The KL of rounding does not count.
        """
        if self.kl_target is not None:
            kl_nats = max(kl_nats - self.kl_floor, 0.0)
            self.state.beta *= 1 + 0.1 * min(max(kl_nats / self.kl_target - 1, -0.2), 0.2)

    def policy(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        """The policy's guided prediction at (x, t) for these prompts: x (rows, *shape), t () or (rows,), prompt (rows,).

        At times below `sampler.off_below` it is the pretrained model's. The order of positions is no part of it: in a step
        that was taken it is known.
        """
        return act(self.model, self.sampler, x, t, self.conditions, prompt=prompt, ordered=False)

    def pretrained(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        """The pretrained model's guided prediction, as `policy`: gradients reach x, never a parameter."""
        return self.model.reference(x, t, self.conditions, prompt=prompt, guidance=self.sampler.guidance)

    def parts(self, rows: Tensor) -> tuple[Tensor, ...]:
        """These row numbers in parts of one network call each, for what is evaluated with a graph beside an update."""
        size = self.model.max_rows or max(1, len(rows))
        if self.model.sharded:
            return equal_parts(rows, size)
        return rows.split(size) if len(rows) else ()

    def together(self, work: Callable[[], T]) -> T:
        """Does `work`, which may ask the reward; where it fails in one process it fails in all."""
        return self.world.together(work, sends=self.model.sharded)

    def inside(self, prompt: Tensor) -> Tensor | None:
        """True at the numbers of samples of these prompts and False in padding, (rows, ...); None without a mask."""
        return take(self.model.inside(self.conditions), prompt)

    def noise(self, source: Source, prompt: Tensor) -> Source:
        """The source of the noise of samples of these prompts: 0 in the padding, where the model has a mask."""
        return self.model.noise(source, self.conditions, prompt)

    def in_parts(self, rows: Tensor, work: Callable[[Tensor], None]) -> None:
        """Calls `work` with these row numbers in parts of one network call each, smaller ones where memory runs out."""

        def first(limit: int) -> int:
            work(rows[:limit])
            return limit

        if self.model.sharded:  # a process alone must not take smaller ones
            for part in self.parts(rows):
                work(part)
            return
        while len(rows):
            rows = rows[fitting(self.model, len(rows), first) :]

    def times(self, generator: torch.Generator) -> Tensor:
        """The grid of an iteration: the sampler's, jittered each time, so that nearly all times are trained."""
        return jittered(self.sampler.times(self.process), generator)

    def exploration_at(self, t: Tensor) -> float:
        """The std of the noise on eps at a time t (), where there is any."""
        return self.exploration

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """A trajectory for each prompt; where the policy acts, its eps is perturbed by noise of std `exploration_at`."""
        return roll_out_policy(self, prompt, times, generator)

    def redraw(self, rollout: Rollout, draw: Draw) -> tuple[Rollout, dict[str, float]]:
        """The rollout with those trajectories drawn again that there is nothing to learn from, and figures for the log."""
        return rollout, {}

    def prepare(self, rollout: Rollout, generator: torch.Generator) -> Rollout:
        """The rollout with the pretrained predictions where the policy acted, `reference_rows` a step, without a graph."""
        (n, batch), count = rollout.size, self._compared_rows(rollout)
        if count == batch * self.world.size:
            with torch.no_grad():
                return replace(rollout, pretrained=unflattened(once(self.model, self.pretrained, rollout.steps()), n))
        trajectories, counts = compared(n, batch, count, self.world)
        steps, (own,) = take(rollout.steps(), rows_at(trajectories, batch)), counts.flatten().nonzero(as_tuple=True)
        evaluated = slice(None) if self.model.sharded else own  # of a sharded network all processes make the same calls
        with torch.no_grad():
            flat = once(self.model, self.pretrained, take(steps, evaluated))
        flat = take(flat, own) if self.model.sharded else flat
        # a row that does not count has the policy's own prediction, at no KL
        pretrained = mapped(lambda old, part: old.index_copy(0, own.to(old.device), part.to(old.dtype)), steps.old, flat)
        return replace(rollout, pretrained=unflattened(pretrained, n), compared_at=trajectories)

    def _compared_rows(self, rollout: Rollout) -> int:
        """The number of states, of all processes, that are compared at a step."""
        everyone = rollout.size[1] * self.world.size
        rows = self.reference_rows or everyone
        return min(rows if self.kl_target is None else max(rows, STEERING), everyone)

    def kls(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Path and chain KL of the policy that sampled to the pretrained model, in nats, (batch,) each, on average.

        A deterministic sampler has no path KL: that of the same scores at eta 1.
        """
        path, chain = self.model.kls(self.sampler.find(), rollout.acted, *rollout.compared(), self.sampler.eta or 1.0)
        if rollout.compared_at is None:
            return path, chain
        share = self._compared_rows(rollout) / (rollout.compared_at.shape[1] * self.world.size)  # of the rows that count
        return path / share, chain / share

    @abstractmethod
    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The updates of one iteration; the loop has stepped before it takes the next."""

    def updated(self) -> None:
        """Called when the updates of an iteration have been made, and those that left the trust region by far taken back."""


def roll_out_policy(learner: Learner, prompt: Tensor, times: Tensor, generator: Source, *, x: Tensor | None = None) -> Rollout:
    """Trajectories, from noise or from x (batch, *shape) at times[0], of the policy with its exploration."""
    source = learner.noise(generator, prompt)

    def explore(x: Tensor, t: Tensor, prediction: Prediction) -> Prediction:
        std = learner.exploration_at(t) if float(t) >= learner.sampler.acts_from else 0.0
        return perturbed(learner.process, x, t, prediction, std, source)

    noise, policy = explore if learner.exploration > 0 else None, _policy_along(learner, prompt, source, whole=x is None)
    return roll_out(learner.model, learner.sampler, policy, prompt, source, times=times, x=x, explore=noise)


def _policy_along(learner: Learner, prompt: Tensor, noise: Source, *, whole: bool) -> Predict:
    """The policy along trajectories, by what the model keeps between their steps where they are whole ones."""
    if whole:
        return follow(learner.model, learner.sampler, learner.conditions, prompt, noise)
    return partial(act, learner.model, learner.sampler, conditions=learner.conditions, prompt=prompt)


def roll_out_chain(
    learner: Learner, prompt: Tensor, times: Tensor, generator: Source, *, x: Tensor | None = None, choose: Choose | None = None
) -> Rollout:
    """Trajectories in which the pretrained model acts in the steps without noise, which have no density.

    x: the states at times[0], by default noise; `choose` as in `trajectory`.
    """
    noiseless = {float(t) for t in times[:-1][~learner.process.has_density(times[1:])]}
    source = learner.noise(generator, prompt)
    policy = _policy_along(learner, prompt, source, whole=x is None and choose is None)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return learner.pretrained(x, t, prompt) if float(t) in noiseless else policy(x, t)

    return roll_out(learner.model, learner.sampler, predict, prompt, source, times=times, x=x, choose=choose)


def refuse_black_box(setting: Setting, algorithm: str) -> None:
    """ValueError unless the reward has a gradient."""
    if not setting.reward.differentiable:
        raise ValueError(
            f"reward: {algorithm} needs its gradient and this one has none; use score_action, vard or ddpo, an online: block"
            " (a proxy is fitted), or, where gradients do flow, Reward(fn, differentiable=True)"
        )
