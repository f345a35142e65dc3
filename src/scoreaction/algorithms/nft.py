"""DiffusionNFT: a positive and a negative policy, both implied by one, regressed on samples by reward (arXiv 2509.16117)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._baselines import PromptState, refuse_groups_of_one
from scoreaction.algorithms._forward import (
    Baseline,
    LaggedPolicy,
    Noised,
    advantages,
    mean_square,
    renoised,
    sureness,
    velocity,
)
from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner
from scoreaction.algorithms._likelihood_ratio import minibatches, spread_is_rounding
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.diffusion.noise import Source
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout


class NFT(Algorithm):
    """`r ||x0_+ - x0||^2 + (1 - r) ||x0_- - x0||^2`, `x0_± = x0_old ± b (x0_theta - x0_old)`, at clean samples noised again.

    r in [0, 1] is `1/2 + A/(2 clip)`, A the reward minus its baseline in std of the batch, clipped. Each error is divided by
    its own mean size. The samples are those of a policy that lags: its weights follow the trained ones with the decay
    `min(lag * iteration, most_lag)`. `kl` weighs the squared distance to the pretrained velocity; without it the optimum is a
    maximum of the reward, with it that of RAM at a beta that grows with the noise. Zheng et al. 2025, eq. 5. One reward query a
    sample, no density: any solver, 6 to 10 steps of `dpmpp_2m` at eta 0 will do.

    Of a network that predicts eps, the score or VE's velocity a row counts `min(1, alpha/sigma)`: near pure noise a small error
    of eps is a large one of x0. Of one that predicts x0 it counts `min(1, sigma/alpha)`, and the pretrained model acts from an
    alpha/sigma of 5 on: nothing brings a drift close to the data back, and it grows where rewards are below their baseline.

    >>> NFT().strength
    1.0
    """

    name: Literal["nft"] = "nft"
    largest_ratio: ClassVar[float] = 5.0
    strength: float = Field(1.0, gt=0, description="b, the paper's beta")
    baseline: Baseline = "prompt"
    advantage_clip: float = Field(5.0, gt=0)
    kl: float = Field(1e-4, ge=0)
    lag: float = Field(1e-3, ge=0)
    most_lag: float = Field(0.5, ge=0, lt=1)
    minibatches: int = Field(4, ge=1)

    def build(self, setting: Setting) -> NFTLearner:
        refuse_groups_of_one(setting, self.baseline)
        return NFTLearner(self, setting)


def nft_loss(x0: Tensor, *, old: Tensor, clean: Tensor, r: Tensor, strength: float) -> Tensor:
    """`(r L(x0_+) + (1 - r) L(x0_-))/b`, `L(y) = mean (y - clean)^2 / sg(mean |y - clean|)`, (rows,); all else (rows, *shape).

    Without the divisors its minimum is `x0_old + (2 r - 1)/b (clean - x0_old)`.

    >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
    >>> nft_loss(one, old=zero, clean=one, r=torch.tensor([1.0]), strength=1.0).tolist()
    [0.0]
    """

    def matching(y: Tensor) -> Tensor:
        return mean_square(y - clean) / (y - clean).detach().flatten(1).abs().mean(1).clamp(min=1e-5)

    move = strength * (x0 - old)
    return (r * matching(old + move) + (1 - r) * matching(old - move)) / strength


@dataclass
class LagState(PromptState):
    """The iterations that the lagged weights have followed."""

    followed: int = 0


class NFTLearner(Learner):
    """DiffusionNFT at work."""

    state: LagState
    reference_rows = LOGGED  # the KL along paths is only logged

    def __init__(self, config: NFT, setting: Setting) -> None:
        super().__init__(setting)
        self.config, self.state = config, LagState()
        self.networks["old"] = self.old = LaggedPolicy(self.model)

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """Trajectories of the lagged policy."""
        with self.old.acting():
            return super().explore(prompt, times, generator)

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One pass over the samples, noised to all times of the sampler, in shuffled minibatches; then the weights follow."""
        config, every = self.config, self.optimality(self.world.gather(rollout.rewards), self.world.gather(rollout.prompt))
        if not bool((every == 0.5).all()):
            r = self.world.own(every)
            points = renoised(self, rollout, rollout.acted[:-1, None].expand(-1, len(r)), generator)
            with self.old.acting(), torch.no_grad():
                old = self.policy(*points.states).x0
            steps, passes = len(rollout.acted) - 1, {"epochs": 1, "count": config.minibatches}
            for rows in minibatches(self.world, steps, len(r), **passes, generator=generator):
                loss = partial(self._loss, take(points, rows.own), take(old, rows.own), r)
                yield Update("policy", [Term(rows, loss)])
        self.state.followed += 1
        self.old.follow(min(config.lag * self.state.followed, config.most_lag))

    def optimality(self, rewards: Tensor, prompt: Tensor) -> Tensor:
        """The chance r that a sample is good, of the whole batch, (batch,)."""
        clip = self.config.advantage_clip
        std = 1.0 if spread_is_rounding(rewards) else float(rewards.std(correction=0))
        advantage = advantages(self.config.baseline, self.state.prompt_rewards, rewards, prompt, spread=std)
        return advantage.clamp(-clip, clip) / (2 * clip) + 0.5

    def _loss(self, points: Noised, old: Tensor, r: Tensor, numbers: Tensor) -> Loss:
        part, config = take(points, numbers), self.config
        prediction = self.policy(*part.states)
        fixed = {"old": take(old, numbers), "clean": part.x0, "r": take(r, part.path)}
        loss = config.advantage_clip * nft_loss(prediction.x0, **fixed, strength=config.strength)
        loss = loss * sureness(self.model, part.t).to(loss)
        if config.kl:
            with torch.no_grad():
                pretrained = velocity(self.pretrained(*part.states))
            loss = loss + config.kl * mean_square(velocity(prediction) - pretrained)
        return loss, {}


Config = NFT
