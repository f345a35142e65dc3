"""SPIN: self-play towards the law of good samples, by pairs of one of them and one of the model's own (arXiv 2402.10210)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._forward import LaggedPolicy
from scoreaction.algorithms._learner import LOGGED, Algorithm, Learner, State
from scoreaction.algorithms._pairs import LogRatio, NoisedRatio, pair_update, path_ratio
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Updates
from scoreaction.diffusion.noise import Source
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Prediction


class SPIN(Algorithm):
    """`softplus(-scale (A(winner) - A(loser)))`: winners are the samples of `data`, losers those of the opponent.

    The opponent is the policy as it was when its round began, and A the log ratio to it, as in `DPO`. A round of `round`
    iterations ends, in the limit, at `p_opponent^(1 - 1/scale) p_data^(1/scale)`: at scale 1 the law of the data in one
    round, at 1/2 and below never. The law of the data is a fixed point at any scale. Finitely many times a sample attenuate
    what is quadratic, so that means arrive first and variances over several rounds. Yuan et al. 2024 (arXiv 2402.10210), eq.
    3.9. No reward and no price of the KL: `reward: {name: none}` will do. The trajectories and the KL of the log are the
    opponent's.

    >>> SPIN(scale=2.0).round
    25
    """

    name: Literal["spin"] = "spin"
    learns_from: ClassVar[Literal["samples"]] = "samples"
    scale: float = Field(1.0, gt=0.5, description="nats of log ratio; at 1/2 rounds go in circles, below they diverge")
    times: int = Field(8, ge=1, description="times at which a sample is noised; of tokens as many as positions")
    round: int = Field(25, ge=1, description="iterations against one opponent")
    updates: int = Field(8, ge=1, description="policy updates an iteration, each of all its losers")

    def build(self, setting: Setting) -> SPINLearner:
        return SPINLearner(self, setting, NoisedRatio(self.times))

    def build_on_tokens(self, setting: Setting) -> SPINLearner:
        return SPINLearner(self, setting, path_ratio(setting))


@dataclass
class SPINState(State):
    """fought: iterations against the opponent of now."""

    fought: int = 0


class SPINLearner(Learner):
    """SPIN at work, and the weights of its opponent."""

    state: SPINState
    reference_rows = LOGGED  # the KL along paths is only logged

    def __init__(self, config: SPIN, setting: Setting, ratio: LogRatio) -> None:
        super().__init__(setting)
        self.config, self.ratio, self.state = config, ratio, SPINState()
        self.opponent = LaggedPolicy(self.model)
        self.networks["opponent"] = self.opponent

    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """The opponent's trajectories: their ends are the losers."""
        with self.opponent.acting():
            return super().explore(prompt, times, generator)

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """Updates on all losers, each against a sample for the same prompt that is drawn anew."""
        prompt = self.world.gather(rollout.prompt)
        for _ in range(self.config.updates):
            x0 = torch.stack([self._winners(prompt, generator).to(rollout.x0), rollout.x0])
            yield pair_update(
                self, self.ratio, x0, rollout.prompt,
                total=len(prompt), scale=self.config.scale, reference=self._answer, generator=generator,
            )  # fmt: skip
        self.state.fought += 1
        if self.state.fought == self.config.round:
            self.opponent.follow(0.0)
            self.state.fought = 0

    def _winners(self, prompt: Tensor, generator: torch.Generator) -> Tensor:
        """A sample of the data for each own loser, (own, *shape); prompt (total,) are those of all losers."""
        assert self.data is not None
        uniform, rows = torch.rand(len(prompt), generator=generator), torch.empty_like(prompt)
        wanted = take(self.data.first, prompt)
        for number in wanted.unique():
            known, same = (self.data.prompt == number).nonzero().flatten(), wanted == number
            rows[same] = known[(uniform[same] * len(known)).long()]
        return take(self.data.x0, self.world.own(rows))

    def _answer(self, x: Tensor, t: Tensor, prompt: Tensor) -> Prediction:
        """The opponent's prediction."""
        with self.opponent.acting():
            return self.policy(x, t, prompt)


Config = SPIN
