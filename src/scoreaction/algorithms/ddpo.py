"""DDPO: policy gradient on the denoising chain (Black et al. 2023, arXiv 2305.13301); REINFORCE, PPO clip, GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._baselines import (
    Baseline,
    PromptState,
    check_baseline,
    group_advantages,
    prompt_advantages,
    standardised_groups,
    whole,
)
from scoreaction.algorithms._ineffective import Ineffective, Redrawn
from scoreaction.algorithms._learner import LOGGED, Algorithm, Draw, Learner, roll_out_chain
from scoreaction.algorithms._likelihood_ratio import (
    minibatches,
    ratio_term,
    refuse_without_density,
    spread_is_rounding,
    standardised,
    step_kl,
    steps_with_density,
    transition,
)
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Loss, Update, Updates
from scoreaction.algorithms._windows import (
    Window,
    Windows,
    WindowState,
    check_windows,
    refuse_signal_of_tokens,
    sibling_advantages,
)
from scoreaction.diffusion.noise import Source
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout, Steps
from scoreaction.types import Prediction


class ClippedGradient(Algorithm):
    """The settings that `DDPO`, `DPOK` and `HRF` share: clip, passes over a batch, windows and branches."""

    clip: float = Field(0.2, gt=0)
    advantage_clip: float = Field(5.0, gt=0)
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(4, ge=1)
    window: Window = Field(Window(), description="the steps that an iteration trains: kind, size, start, every")
    branches: int = Field(1, ge=1, description="trajectories that go on from one state where the window begins")

    def build_on_tokens(self, setting: Setting) -> Learner:
        refuse_signal_of_tokens(self.window)
        return self.build(setting)


class DDPO(ClippedGradient):
    """`-E sum_steps min(rho A, clip(rho) A)`, `rho = p_theta(x_s|x_t)/p_old(x_s|x_t)`, A the standardised reward.

    estimator: `ppo` clips the ratio of summed densities at 1 +- clip; `reinforce` does not and takes one update an
    iteration. baseline: `batch` statistics, running statistics of each `prompt` (DDPO's), of the prompt's `group` in the
    batch (GRPO; DeepSeekMath, arXiv 2402.03300, eq. 4), or the siblings of a `branch`. ineffective: what becomes of groups
    whose rewards are all equal (HINT, arXiv 2510.09388). window, branches: which steps an iteration trains, and how many
    trajectories go on from where it begins; `hrf` is DDPO with both. It has no KL: `dpok` is the same with one.
    Needs densities: eta > 0 and a solver that does not look back.

    >>> DDPO(clip=0.1).estimator
    'ppo'
    """

    name: Literal["ddpo"] = "ddpo"
    estimator: Literal["ppo", "reinforce"] = "ppo"
    baseline: Baseline = "prompt"
    ineffective: Ineffective = Field(Ineffective(), description="groups whose rewards are all equal")

    def build(self, setting: Setting) -> DDPOLearner:
        refuse_without_density(setting, self.name)
        return DDPOLearner(self, setting)


@dataclass
class DDPOState(PromptState, WindowState):
    """The last rewards of each prompt, and the window."""


class DDPOLearner(Learner):
    """DDPO at work; with beta > 0 it is DPOK."""

    late_rewards = True

    state: DDPOState

    def __init__(self, config: DDPO, setting: Setting, *, beta: float = 0.0, kl_target: float | None = None) -> None:
        check_windows(setting, config.window, config.branches)
        check_baseline(setting, config.baseline, config.branches)
        config.ineffective.check(setting, config.baseline)
        super().__init__(setting, kl_target=kl_target)
        self.config, self.state = config, DDPOState(beta)
        self.reference_rows = None if beta > 0 else LOGGED  # without a KL it is only logged
        self.windows = Windows(self, config.window, config.branches)
        self.redrawn = Redrawn(self, config.ineffective, setting)

    def times(self, generator: torch.Generator) -> Tensor:
        """The sampler's grid as it is: the chain of its steps is what has densities. The iteration's window is drawn."""
        times = self.sampler.times(self.process)
        self.windows.draw(generator, times)
        return times

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """Trajectories of the policy; the pretrained model acts in steps without noise. Siblings part at the window."""
        return self.windows.explore(partial(roll_out_chain, self), prompt, times, generator)

    def redraw(self, rollout: Rollout, draw: Draw) -> tuple[Rollout, dict[str, float]]:
        """The rollout with the groups drawn again that say nothing, where they are compared in groups."""
        return self.redrawn(rollout, draw) if self.config.baseline == "group" else (rollout, {})

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """Passes over the steps of the window in shuffled minibatches; nothing where all advantages are 0 and no KL is owed.

        Of equal rewards none is: their std, in which beta is paid, is 0.
        """
        config, rewards = self.config, self.world.gather(rollout.rewards)
        self.windows.record(rollout, rewards)
        paths = None if rollout.weight is None else self.world.gather(rollout.weight[-1])
        advantage = self.advantages(rewards, self.world.gather(rollout.prompt), paths)
        if bool((advantage == 0).all()) and (self.beta == 0 or spread_is_rounding(rewards)):
            return
        advantage = self.world.own(advantage)
        steps, once = steps_with_density(self, rollout), config.estimator == "reinforce"
        if rollout.weight is not None:
            steps = steps._replace(weight=steps.weight * rollout.weight[steps.step, steps.path])
        # rewards were divided by their std, so beta is too: it stays in reward units per nat
        weight = self.beta / float(rewards.std(correction=0)) if self.beta > 0 else 0.0
        batch, passes = rollout.size[1], {"epochs": 1 if once else config.epochs, "count": 1 if once else config.minibatches}
        batches = minibatches(self.world, len(steps.t) // batch, batch, **passes, generator=generator)
        for i, every in enumerate(batches):
            rows = every.part(steps.weight[every.own] > 0)  # what counts for nothing is not evaluated
            term = ratio_term(
                self,
                steps,
                rows,
                take(advantage, steps.path),
                law=partial(transition, self),
                outcome=steps.x_next,
                clip=None if once else config.clip,
                first=i == 0,
                penalty=partial(self._kl, weight) if weight else None,
            )
            yield Update("policy", [term])

    def _kl(self, weight: float, prediction: Prediction, steps: Steps) -> Loss:
        return weight * step_kl(self, prediction, steps), {}

    def advantages(self, rewards: Tensor, prompt: Tensor, weight: Tensor | None = None) -> Tensor:
        """Standardised rewards of the whole batch by the chosen baseline, clipped, (batch,); weight: that of each path.

        Beside a KL a sample keeps all of its gradient, whatever it is compared with: else beta would be worth more.
        """
        match self.config.baseline:
            case "batch":
                advantage = standardised(rewards)
            case "group" if self.beta > 0:  # with a KL all share one std, so that beta is worth the same everywhere
                advantage = group_advantages(rewards, prompt, torch.ones_like(rewards) if weight is None else weight)
                flat = spread_is_rounding(rewards)
                advantage = torch.zeros_like(rewards) if flat else advantage / rewards.std(correction=0)
            case "group" if weight is not None:
                advantage = standardised_groups(rewards, prompt, weight)
            case "group":
                advantage = standardised(rewards, prompt)
            case "branch":
                advantage = sibling_advantages(rewards, self.branches)
            case "prompt":
                # with a KL all prompts share one std, so that beta is worth the same on each
                spread = float(rewards.std(correction=0)) if self.beta > 0 else None
                advantage = prompt_advantages(self.state.prompt_rewards, rewards, prompt, spread=spread)
                if spread is not None and spread_is_rounding(rewards):  # a distance to the past over nothing
                    advantage = torch.zeros_like(advantage)
        if self.beta > 0 and self.config.baseline != "branch":
            advantage = advantage * whole(self.config.baseline, prompt, self.state.prompt_rewards).to(advantage)
        return advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)


Config = DDPO
