"""DDPO: policy gradient on the denoising chain (Black et al. 2023, arXiv 2305.13301); REINFORCE, PPO clip, GRPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Algorithm, Learner, Setting, Update, roll_out_chain
from scoreaction.algorithms._likelihood_ratio import (
    ratio_updates,
    refuse_without_density,
    spread_is_rounding,
    standardised,
    step_kl,
    steps_taken,
)
from scoreaction.sampling.experience import Experience
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Conditions

Baseline = Literal["batch", "prompt", "group"]


class DDPO(Algorithm):
    """`-E sum_steps min(rho A, clip(rho) A)`, `rho = p_theta(x_s|x_t)/p_old(x_s|x_t)`, A the standardised reward.

    estimator: `ppo` clips the ratio of summed densities at 1 +- clip; `reinforce` does not and takes one update an
    iteration. baseline: `batch` statistics, running statistics of each `prompt` (DDPO's), or of the prompt's `group` in the
    batch (GRPO; DeepSeekMath, arXiv 2402.03300, eq. 4). It has no KL: `dpok` is the same with one.
    Needs densities: eta > 0 and a solver that does not look back.

    >>> DDPO(clip=0.1).estimator
    'ppo'
    """

    name: Literal["ddpo"] = "ddpo"
    estimator: Literal["ppo", "reinforce"] = "ppo"
    baseline: Baseline = "prompt"
    clip: float = Field(0.2, gt=0)
    advantage_clip: float = Field(5.0, gt=0)
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(4, ge=1)

    def build(self, setting: Setting) -> DDPOLearner:
        refuse_without_density(setting, self.name)
        return DDPOLearner(self, setting)


def prompt_advantages(
    known: dict[str, list[float]], rewards: Tensor, groups: Tensor, *, spread: float | None = None, keep: int = 64
) -> Tensor:
    """Rewards minus the mean of the last `keep` of their prompt, over their std (or `spread`), (batch,); adds to `known`.

    A prompt with fewer than 16 takes the statistics of the batch. Black et al. 2023, appendix D.2.
    """
    out = standardised(rewards)
    for group in groups.unique().tolist():
        mine = rewards[groups == group]
        kept = known[str(group)] = (known.get(str(group), []) + mine.tolist())[-keep:]
        if len(kept) >= 16:
            past = torch.tensor(kept, dtype=torch.float64)
            flat = spread_is_rounding(past)
            out[groups == group] = 0.0 if flat else ((mine - past.mean()) / (spread or past.std(correction=0))).to(out)
    return out


class DDPOLearner(Learner):
    """DDPO at work; with beta > 0 it is DPOK."""

    def __init__(self, config: DDPO, setting: Setting, *, beta: float = 0.0, kl_target: float | None = None) -> None:
        super().__init__(setting, beta=beta, kl_target=kl_target)
        self.config = config
        self.reference_rows = None if beta > 0 else 32  # without a KL it is only logged
        self.state["prompt_rewards"] = {}

    def times(self, generator: torch.Generator) -> Tensor:
        return self.setting.sampler.times(self.setting.model.process)

    def explore(self, conditions: Conditions, n: int, times: Tensor, generator: torch.Generator) -> Rollout:
        return roll_out_chain(self, conditions, n, times, generator)

    def advantages(self, experience: Experience) -> Tensor:
        """Standardised rewards by the chosen baseline, clipped, (batch,)."""
        rewards = experience.rewards
        match self.config.baseline:
            case "batch":
                advantage = standardised(rewards)
            case "group":
                advantage = standardised(rewards, experience.groups)
            case "prompt":
                # with a KL all prompts share one std, so that beta is worth the same on each
                spread = float(rewards.std(correction=0)) if self.beta > 0 else None
                advantage = prompt_advantages(self.state["prompt_rewards"], rewards, experience.groups, spread=spread)
                if spread is not None and spread_is_rounding(rewards):  # a distance to the past over nothing
                    advantage = torch.zeros_like(advantage)
        return advantage.clamp(-self.config.advantage_clip, self.config.advantage_clip)

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        advantage = self.advantages(experience)
        if bool((advantage == 0).all()):
            return
        steps = steps_taken(self.setting, experience)
        # rewards were divided by their std, so beta is too: it stays in reward units per nat
        weight = self.beta / float(experience.rewards.std(correction=0)) if self.beta > 0 else 0.0
        reinforce = self.config.estimator == "reinforce"
        yield from ratio_updates(
            self,
            steps,
            advantage[steps.trajectory],
            penalty=(lambda prediction, part: weight * step_kl(self.setting, prediction, part)) if weight else None,
            clip=None if reinforce else self.config.clip,
            epochs=1 if reinforce else self.config.epochs,
            minibatches=1 if reinforce else self.config.minibatches,
            generator=generator,
        )


Config = DDPO
