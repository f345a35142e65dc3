"""Groups of particles on their way from noise to samples, by each method of steering."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoreaction.diffusion.noise import GroupNoise, RowNoise
from scoreaction.diffusion.predictions import mapped
from scoreaction.diffusion.transitions import Kernel
from scoreaction.networks.conditions import take
from scoreaction.networks.memory import fitting
from scoreaction.networks.model import Model
from scoreaction.sampling.known import Likelihood
from scoreaction.sampling.look_ahead import look_ahead, soft_mean
from scoreaction.sampling.sampler import Sampler, act
from scoreaction.sampling.steering import Steering
from scoreaction.sampling.trajectory import Chosen, trajectory
from scoreaction.types import Conditions, Prediction

Score = Callable[[Tensor, list[Any] | None], Callable[[], Tensor]]
"""Begins to score x0 (rows, *shape), before decoding, with a prompt each; calling the result gives the rewards (rows,)."""


@dataclass(frozen=True)
class Walked:
    """The ends of groups: x0 (groups, M, *shape), weights and rewards (groups, M), and figures of each group.

    rewards are zero where the method does not query them. kl: what the choices cost at most, (groups,) nats. shares (groups,
    weighings): effective shares.
    """

    x0: Tensor
    log_weights: Tensor
    log_z: Tensor
    rewards: Tensor
    kl: Tensor
    shares: Tensor


class Walk:
    """The particles of some groups: row `group * M + particle`; each group has a stream of noise of its own.

    prompt (groups,): the numbers of the groups' prompts in `texts` and in the conditions.
    """

    def __init__(
        self,
        model: Model,
        sampler: Sampler,
        steering: Steering,
        score: Score,
        *,
        conditions: Conditions,
        texts: list[Any] | None,
        prompt: Tensor,
        noise: RowNoise,
        reference: bool,
    ) -> None:
        self.model, self.sampler, self.steering, self.noise = model, sampler, steering, noise
        self.process, self.solver, self.times = model.process, sampler.find(), sampler.times(model.process)
        self.groups, self.m, self.prompt = len(prompt), steering.particles or 1, prompt
        self.every_prompt, self.texts, self.begin = prompt.repeat_interleave(self.m), texts, score
        self.beta = steering.beta or math.inf
        self.inside = take(model.inside(conditions), prompt)  # None stays None
        pretrained = partial(model.reference, guidance=sampler.guidance)
        policy = pretrained if reference else partial(act, model, sampler)
        self.policy, self.pretrained = (partial(predict, conditions=conditions) for predict in (policy, pretrained))
        self.moved = (lambda x, prompt: x) if reference else partial(model.moved, conditions=conditions)
        noisy = self.process.has_density(self.times[1:]).nonzero().flatten()
        self.last_noisy = int(noisy[-1]) if len(noisy) and sampler.eta else -1
        self.conditions, self.every_noise = conditions, GroupNoise(noise)
        self.queries = 0
        self.known = None if steering.known is None else Likelihood.of(model, steering.known)

    def start(self, each: int) -> Tensor:
        """x at t = 1, (groups * each, *shape)."""
        prompt = self.prompt.repeat_interleave(each)
        x = self.model.start(len(prompt), self.model.noise(self.every_noise, self.conditions, prompt))
        return self.moved(x, prompt=prompt)

    def drawn(self, transition: Kernel) -> Tensor:
        """The states that a transition leads to, (groups * M, *shape)."""
        return transition.sample(self.model.noise(self.every_noise, self.conditions, self.every_prompt))

    def follow(self, predict: Callable[[Tensor, Tensor], Prediction], x: Tensor, choose: Any) -> Tensor:
        """The end of a trajectory whose next states are chosen by `choose(step, transition, t, s)`."""
        steps: Iterator[int] = iter(range(self.sampler.steps))

        def chosen(transition: Kernel, t: Tensor, s: Tensor) -> Chosen:
            return choose(next(steps), transition, t, s)

        visits = trajectory(predict, self.process, x, self.times, solver=self.solver, eta=self.sampler.eta, choose=chosen)
        for visit in visits:
            x = visit.x_next
        return x

    def scored(self, step: int) -> bool:
        """True for each `every`-th step, counted from the last one with noise."""
        return step <= self.last_noisy and (self.last_noisy - step) % self.steering.every == 0

    def is_end(self, t: Tensor) -> bool:
        """True at the end of the grid, where x is the sample itself."""
        return float(t) == float(self.times[-1])

    def score(self, x0: Tensor, prompt: Tensor) -> Callable[[], Tensor]:
        """Begins to score; counted in `queries`."""
        self.queries += len(x0)
        return self.begin(x0, None if self.texts is None else [self.texts[number] for number in prompt.tolist()])

    def look(
        self, x: Tensor, t: Tensor, predict: Callable[..., Prediction], *, gradient: bool
    ) -> tuple[Tensor, Tensor, Prediction | None]:
        """The value of x (rows,), its gradient in x (zero unless asked for) and the prediction, as memory holds it.

        It is `soft_mean` of the rewards of the clean samples that the model guesses; at the end of the grid the reward of x
        itself, and there is no prediction. Where a part of the sample is known it is the part's log likelihood, and no reward
        is asked. Without gradient a reward that works in the background scores one part while the next is predicted.
        """
        rows = torch.arange(len(x))
        guesses = None if self.is_end(t) else self.model.guesses(len(x), self.steering.draws, self.every_noise)

        def value(part: Tensor, x: Tensor) -> tuple[Callable[[], Tensor], Prediction | None]:
            prompt = take(self.every_prompt, part)
            prediction = None if guesses is None else predict(x, t, prompt=prompt)
            if self.known is not None:
                x0 = x if prediction is None else prediction.x0
                values = self.known(self.model.decode(x0), self.process, t, end=prediction is None)
                return lambda: values, prediction
            if guesses is None or prediction is None:
                return self.score(x, prompt), None
            every = guesses(part, x, prediction)
            scores = self.score(every.flatten(0, 1), prompt.repeat_interleave(every.shape[1]))
            return lambda: soft_mean(scores().unflatten(0, every.shape[:2]), self.beta), prediction

        def now(part: Tensor, x: Tensor) -> tuple[Tensor, Prediction | None]:
            scores, prediction = value(part, x)
            return scores(), prediction

        def work(limit: int) -> tuple[Tensor, Tensor, Prediction | None]:
            parts = rows.split(limit)
            if gradient:
                seen = [look_ahead(take(x, part), partial(now, part), gradient=True) for part in parts]
                values, grads, predictions = zip(*seen, strict=True)
                return torch.cat(values), torch.cat(grads), _joined(predictions)
            begun = [value(part, take(x, part)) for part in parts]
            return torch.cat([scores() for scores, _ in begun]), torch.zeros_like(x[:0]), _joined([p for _, p in begun])

        return fitting(self.model, len(x), work)


def _joined(parts: Any) -> Prediction | None:
    if parts[0] is None:
        return None
    return mapped(lambda *both: torch.cat([part.detach() for part in both]), *parts)
