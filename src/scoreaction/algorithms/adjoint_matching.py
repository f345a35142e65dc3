"""Adjoint Matching: regression onto the lean adjoint of the reward (Domingo-Enrich et al. 2024, arXiv 2409.08861)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised, Setting, Update, refuse_black_box
from scoreaction.algorithms._pathwise import Weights, decisions_at, given, improvement
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.networks.conditions import take
from scoreaction.sampling.experience import Experience
from scoreaction.sampling.rollout import stacked
from scoreaction.types import Prediction


class AdjointMatching(Regularised):
    """`min E integral 1/2 ||eta g (s - s_pre) - eta g a/beta||^2` with the lean adjoint a of the reward along sampled paths.

    a obeys `da/dtau = -(grad b_pre)^T a`, `a = grad r(x0)` at the end, b_pre the drift of the pretrained model (eq. 38 and 39
    of the paper); on a chain of steps it is `a_t = (dmean_pre/dx_t)^T a_s`. The regression's fixed point is the optimal action;
    memoryless noise (eta = 1) makes it the tilted law. One reward query a path. Needs the reward's gradient.

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
class Adjoint(Experience):
    """Experience with the lean adjoint at the visited states, (N, batch, *shape)."""

    adjoint: Tensor = torch.empty(0)


class AdjointMatchingLearner(Learner):
    """Adjoint Matching at work."""

    reward_gradient = True

    def __init__(self, config: AdjointMatching, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.config = config

    def prepare(self, experience: Experience, generator: torch.Generator) -> Adjoint:
        """The adjoint, backwards along the paths; the reference's predictions come with it."""
        assert experience.reward_gradient is not None
        rollout, adjoint = experience.rollout, experience.reward_gradient
        adjoints, said = [], []
        for i in reversed(range(len(rollout.times) - 1)):
            pieces = torch.arange(len(adjoint), device=adjoint.device).split(self.setting.max_rows)
            parts = [self._back(experience, i, rows, adjoint[rows]) for rows in pieces]
            adjoint = torch.cat([part[0] for part in parts])
            adjoints.append(adjoint)
            said.append(Prediction(torch.cat([p.x0 for _, p in parts]), torch.cat([p.eps for _, p in parts])))
        fields = {name: getattr(experience, name) for name in Experience.__dataclass_fields__}
        return Adjoint(**fields | {"reference": stacked(said[::-1])}, adjoint=torch.stack(adjoints[::-1]))

    def _back(self, experience: Experience, i: int, rows: Tensor, adjoint: Tensor) -> tuple[Tensor, Prediction]:
        """The adjoint at step i from that at its end."""
        rollout, process = experience.rollout, self.setting.model.process
        t, s = rollout.times[i], rollout.times[i + 1]
        with torch.enable_grad():
            x = rollout.x[i, rows].detach().requires_grad_(True)
            said = self.reference(take(experience.conditions, rows))(x, t)
            mean = ddim_step(process, said, t, s, self.setting.sampler.eta).mean
            (back,) = torch.autograd.grad(mean, x, adjoint)
        return back, Prediction(said.x0.detach(), said.eps.detach())

    def updates(self, experience: Experience, generator: torch.Generator) -> Iterator[Update]:
        assert isinstance(experience, Adjoint)
        steps, batch = experience.size
        chosen = torch.randperm(steps * batch, generator=generator)[: self.config.updates * self.config.rows]
        decisions = decisions_at(self.setting, experience, chosen, Weights.of_path)
        slope = experience.adjoint.flatten(0, 1)[chosen.to(experience.adjoint.device)]
        for rows in torch.arange(len(chosen)).chunk(self.config.updates):
            yield from improvement(self, decisions.take(rows), partial(given, slope), trust=self.config.trust)


Config = AdjointMatching
