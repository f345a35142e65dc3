"""Adjoint Matching: regression onto the lean adjoint of the reward (Domingo-Enrich et al. 2024, arXiv 2409.08861)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised, refuse_black_box
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Updates
from scoreaction.algorithms._value import put
from scoreaction.algorithms.score_action import score_action_update
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout, Steps
from scoreaction.types import Prediction


class AdjointMatching(Regularised):
    """`min E integral 1/2 ||eta g (s - s_pre) - eta g a/beta||^2` with the lean adjoint a of the reward along sampled paths.

    a obeys `da/dtau = -(grad b_pre)^T a`, `a = grad r(x0)` at the end, b_pre the drift of the pretrained model (eq. 38 and 39
    of the paper); on a chain of steps it is `a_t = (dmean_pre/dx_t)^T a_s`. The regression is the loss of Score as Action with
    a in the place of grad V; its fixed point is the optimal action, and memoryless noise (eta = 1) makes it the tilted law. One
    reward query a path. Needs the reward's gradient.

    >>> AdjointMatching(beta=0.5).updates
    16
    """

    name: Literal["adjoint_matching"] = "adjoint_matching"
    updates: int = Field(16, ge=1, description="policy updates an iteration")
    rows: int = Field(160, ge=1, description="random (path, time) points in an update")
    trust: float = Field(0.0, ge=0, description="penalty on leaving the policy that sampled, in betas")

    def build(self, setting: Setting) -> AdjointMatchingLearner:
        refuse_black_box(setting, self.name)
        if setting.sampler.eta != 1:
            raise ValueError(
                f"sampler.eta: adjoint_matching needs memoryless noise, which is eta 1 (got {setting.sampler.eta}); at another"
                " its optimum is biased"
            )
        return AdjointMatchingLearner(self, setting)


@dataclass(frozen=True)
class AdjointRollout(Rollout):
    """A rollout with the lean adjoint at the visited states, (N, batch, *shape)."""

    adjoint: Tensor = field(kw_only=True)


class AdjointMatchingLearner(Learner):
    """Adjoint Matching at work."""

    reward_gradient = True

    def __init__(self, config: AdjointMatching, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config = config

    def prepare(self, rollout: Rollout, generator: torch.Generator) -> AdjointRollout:
        """The adjoint, backwards along the paths; the pretrained predictions come with it."""
        assert rollout.reward_gradient is not None
        adjoint, at_end = torch.empty_like(rollout.old.x0), rollout.reward_gradient
        pretrained = Prediction(torch.empty_like(adjoint), torch.empty_like(adjoint))
        for i in reversed(range(len(adjoint))):

            def step_back(rows: Tensor, i: int = i, at_end: Tensor = at_end) -> None:
                back, prediction = self._step_back(rollout, i, rows, take(at_end, rows))
                put((adjoint[i], pretrained.x0[i], pretrained.eps[i]), rows, (back, *prediction))

            self.in_parts(torch.arange(rollout.size[1]), step_back)
            at_end = adjoint[i]
        acted = take(pretrained, slice(rollout.size[0]))
        return AdjointRollout(**vars(rollout) | {"pretrained": acted}, adjoint=adjoint)

    def _step_back(self, rollout: Rollout, i: int, rows: Tensor, adjoint: Tensor) -> tuple[Tensor, Prediction]:
        """The adjoint at the beginning of step i from that at its end, and the prediction there."""
        t, s = rollout.times[i], rollout.times[i + 1]
        with torch.enable_grad():
            x = take(rollout.x[i], rows).detach().requires_grad_(True)
            prediction = self.pretrained(x, t, take(rollout.prompt, rows))
            mean = ddim_step(self.process, prediction, t, s, self.sampler.eta).mean
            (back,) = torch.autograd.grad(mean, x, adjoint)
        return back, Prediction(*(part.detach() for part in prediction))

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """The policy at random steps, each counting for all steps of its path."""
        assert isinstance(rollout, AdjointRollout)
        steps, adjoint = rollout.steps(), rollout.adjoint.flatten(0, 1)
        chosen = self.world.dealt(*rollout.size, self.config.updates * self.config.rows, generator)
        for rows in chosen.chunk(self.config.updates):
            grad_value = partial(_at, adjoint, rows.own)
            yield score_action_update(self, steps, rows, grad_value, trust=self.config.trust)


def _at(adjoint: Tensor, rows: Tensor, steps: Steps, numbers: Tensor) -> Tensor:
    return take(adjoint, rows[numbers])


Config = AdjointMatching
