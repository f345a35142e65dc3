"""Exact tasks of tokens: how far a policy is from the optimum, by enumeration where there are few states, else by samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.noise import RowNoise
from scoreaction.diffusion.predictions import mapped
from scoreaction.diffusion.sequences import PolicyLaw, SequenceLaw, TokenOptimum, total_variation
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.sampling.rollout import roll_out, unflattened
from scoreaction.sampling.sampler import Sampler, act
from scoreaction.training.evaluation import standard_error
from scoreaction.training.exact_task import ExactTask
from scoreaction.training.label_task import LabelTask
from scoreaction.world import ALONE, World

CHUNK = 4096
"""States, or positions of trajectories, that networks are evaluated at in one piece."""


@dataclass(frozen=True)
class TokenTask:
    """A law of tokens and a reward whose tilted law is known exactly."""

    law: SequenceLaw
    optimum: TokenOptimum
    reward: Any

    @classmethod
    def of(cls, model: Model, reward: Any, beta: float | None) -> TokenTask | None:
        """The task, where model, reward and beta make one."""
        if not isinstance(model.law, SequenceLaw) or not beta:
            return None
        optimum = model.law.optimum(reward, beta, model.decode)
        return None if optimum is None else cls(model.law, optimum, reward)

    @torch.no_grad()
    def exact(self, model: Model, sampler: Sampler) -> tuple[PolicyLaw, Tensor, Tensor] | None:
        """The averaged policy's law and its path KL, the rewards of all sequences and the optimum's law.

        None where the sequences are too many, or a step shows several positions.
        """
        every, best = self.law.enumerated(), self.optimum.law.enumerated()
        solver = sampler.find()
        if every is None or best is None or not solver.single:
            return None
        space, policies, references = every.space, list[Any](), list[Any]()
        times = sampler.times(model.process)[:-1].flip(0)  # by the number of masks
        t = torch.cat([torch.zeros(1, dtype=torch.float64), times])[space.masked.sum(1)]
        with model.averaged(), model.uncounted():
            for rows in torch.arange(len(t)).split(CHUNK):
                x = space.states[rows].to(model.device)
                policies.append(act(model, sampler, x, t[rows]))
                references.append(model.reference(x, t[rows]))
        policy, reference = (mapped(lambda *parts: torch.cat(parts).cpu(), *both) for both in (policies, references))
        end = torch.zeros((), dtype=torch.float64)
        step: Any = solver.step(model.process, model.predict, policy, space.states, end, end, sampler.eta, None)
        rewards = self.reward(model.decode(space.sequences.to(model.device)), None).double().cpu()
        return PolicyLaw.of(space, policy.log_prob, reference.log_prob, step.chance), rewards, best.law

    @torch.no_grad()
    def objectives(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> Tensor:
        """`r - beta KL` of n trajectories of the averaged policy, (n,)."""
        own, values = world.stripe(n), list[Tensor]()
        times = sampler.times(model.process)
        with model.averaged(), model.uncounted():
            for rows in own.split(max(1, CHUNK // sampler.steps)):
                prompt = torch.zeros(len(rows), dtype=torch.long)
                rollout = roll_out(model, sampler, partial(act, model, sampler), prompt, RowNoise(seed, rows), times=times)
                n_acted = rollout.size[0]
                x, old = rollout.x[:n_acted], take(rollout.old, slice(n_acted))
                reference = unflattened(model.reference(x.flatten(0, 1), rollout.steps().t), n_acted)
                path, _ = model.kls(sampler.find(), rollout.acted, x, old, reference, sampler.eta)
                values.append(self.reward(model.decode(rollout.x0), None).double() - self.optimum.beta * path.double())
        return world.gather(torch.cat(values) if values else torch.empty(0, dtype=torch.float64), n)

    def distances(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> dict[str, float]:
        """`objective_gap`, `beta log Z - (E r - beta KL)`, of the averaged policy; where it is exact also total variation.

        The gap is 0 at the optimum only; floor and oracle are 0, as one position a step is exact. Of n samples the gap has a
        standard error.
        """
        exact = self.exact(model, sampler)
        if exact is None:
            values = self.objectives(model, sampler, n, seed, world)
            gap = self.optimum.objective - float(values.mean())
            return {"objective_gap": gap, "objective_gap_se": standard_error(values)}
        policy, rewards, best = exact
        gap = self.optimum.objective - float(policy.law @ rewards) + self.optimum.beta * policy.kl_nats
        away = total_variation(policy.law, best)
        return {"objective_gap": gap, "distance_to_optimum": away, "distance_floor": 0.0, "distance_oracle": 0.0}

    def figures(self, model: Model, sampler: Sampler, n: int, seed: int, world: World = ALONE) -> dict[str, float]:
        """The optimum, and how far the averaged policy is from it under this sampler."""
        optimum = {"optimum_reward": self.optimum.reward, "optimum_kl_nats": self.optimum.kl_nats, "log_z": self.optimum.log_z}
        return optimum | self.distances(model, sampler, n, seed, world)


def exact_task(model: Model, reward: Any, beta: float | None) -> ExactTask | TokenTask | LabelTask | None:
    """The task of model, reward and beta whose optimum is known; None where it is not."""
    return ExactTask.of(model, reward, beta) or TokenTask.of(model, reward, beta) or LabelTask.of(model, reward, beta)
