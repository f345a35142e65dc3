"""Noise hypernetworks: a frozen few-step generator whose noise is moved (Eyring et al. 2025, arXiv 2508.09968)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Regularised, refuse_black_box
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.diffusion.noise import RowNoise, Source
from scoreaction.diffusion.solvers import ddim_step
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.noise_map import CALLS, EXACT, PENALTIES, Penalty, known_penalty, noise_kl, shift_of
from scoreaction.sampling.rollout import Rollout, roll_out
from scoreaction.types import Prediction

FEW = 8
"""The most steps of a generator that is differentiated."""


class Hypernoise(Regularised):
    """`max E r(g(z + f(z, c), c)) - beta KL(law of z + f || N(0, I))`, z standard normal, g a frozen deterministic generator.

    g is the model's consistency model where it has one, else DDIM of the pretrained model at eta 0 in at most 8 steps. f is
    what the trained network's output at pure noise differs by from the pretrained one's; the steps of the samples stay the
    pretrained model's. The KL of samples is at most that of their noise.

    penalty: `exact`, `E[1/2 |f|^2 + tr J - log |det(I + J)|]` with J = df/dz, for samples of at most 32 numbers; `frobenius`,
    `1/2 |f|^2 + 1/2 |J v|^2`, v a random direction, the same to second order; `published`, 1/2 |f|^2 alone, under which the
    samples' spread shrinks too much. auto is the first where it can be had, else the second. One reward query a sample.
    Needs the reward's gradient.

    >>> Hypernoise(penalty="published").beta
    0.5
    """

    name: Literal["hypernoise"] = "hypernoise"
    moves_noise: ClassVar[bool] = True
    penalty: Literal["auto", "exact", "frobenius", "published"] = Field("auto", description="the cost of moving the noise")

    def build(self, setting: Setting) -> HypernoiseLearner:
        refuse_black_box(setting, self.name)
        model, sampler = setting.model, setting.sampler
        if sampler.eta > 0:
            raise ValueError(
                f"sampler.eta: {self.name} needs a deterministic map from noise to samples (got {sampler.eta:g}); set it to 0"
            )
        if not model.has_consistency and sampler.solver != "ddim":
            raise ValueError(f"sampler.solver: {self.name} differentiates steps of ddim (got {sampler.solver}); use that")
        if not model.has_consistency and sampler.steps > FEW:
            raise ValueError(
                f"sampler.steps: {self.name} needs a generator of few steps (got {sampler.steps}); set it to {FEW} or fewer, or"
                " name a consistency model, model.consistency"
            )
        if sampler.acts_from > 0:
            raise ValueError(f"sampler.off_below: {self.name} acts at pure noise alone; set it to 0")
        if self.penalty == "exact" and model.size > EXACT:
            raise ValueError(
                f"penalty: exact is for samples of at most {EXACT} numbers, and the model's have {model.size}; use frobenius"
            )
        return HypernoiseLearner(self, setting)


@dataclass(frozen=True)
class NoiseRollout(Rollout):
    """A rollout with the reward's gradient at the moved noise, (batch, *shape), a direction v and the KL (batch,) there."""

    noise_gradient: Tensor = field(kw_only=True)
    v: Tensor = field(kw_only=True)
    kl: Tensor = field(kw_only=True)


class HypernoiseLearner(Learner):
    """Noise hypernetworks at work."""

    reward_gradient = True

    def __init__(self, config: Hypernoise, setting: Setting) -> None:
        super().__init__(setting, beta=config.beta, kl_target=config.kl_target)
        self.penalty: Penalty = known_penalty(self.model.size) if config.penalty == "auto" else config.penalty

    def times(self, generator: torch.Generator) -> Tensor:
        """The generator's own grid: of a consistency model one step."""
        if self.model.has_consistency:
            return torch.tensor([1.0, 0.0], dtype=torch.float64)
        return self.sampler.times(self.process)

    @torch.no_grad()
    def explore(self, prompt: Tensor, times: Tensor, generator: Source) -> Rollout:
        """The generator's samples from moved noise."""
        source = self.noise(generator, prompt)
        noise = self.model.start(len(prompt), source)
        x = self.model.moved(noise, self.conditions, prompt=prompt)
        if self.model.has_consistency:
            x0 = self.model.consistency(x, times[0], self.conditions, prompt=prompt)
            prediction = Prediction(
                x0[None], ((x - self.process.alpha(times[0]).to(x) * x0) / self.process.sigma(times[0]).to(x))[None]
            )
            return Rollout(times, torch.stack([x, x0]), prediction, prediction, prompt, noise=noise)

        def pretrained(x: Tensor, t: Tensor) -> Prediction:
            return self.pretrained(x, t, prompt)

        rollout = roll_out(self.model, self.sampler, pretrained, prompt, source, times=times, x=x)
        return Rollout(**vars(rollout) | {"noise": noise})

    def prepare(self, rollout: Rollout, generator: torch.Generator) -> NoiseRollout:
        """The reward's gradient, taken back through the generator a step at a time, and the KL of the noise."""
        assert rollout.reward_gradient is not None
        assert rollout.noise is not None
        noise_gradient = rollout.reward_gradient.clone()
        for i in reversed(range(len(rollout.times) - 1)):

            def step_back(rows: Tensor, i: int = i) -> None:
                noise_gradient[rows] = self._step_back(rollout, i, rows, take(noise_gradient, rows)).to(noise_gradient)

            self.in_parts(torch.arange(len(noise_gradient)), step_back)
        rows = self.world.stripe(len(noise_gradient) * self.world.size)
        v = RowNoise.drawn(generator, rows).normal(noise_gradient.shape, torch.float32).to(noise_gradient)
        kl = noise_kl(self.model, rollout.noise / self.process.prior_std, v, self.conditions, rollout.prompt)
        return NoiseRollout(**vars(rollout), noise_gradient=noise_gradient, v=v, kl=kl)

    def _step_back(self, rollout: Rollout, i: int, rows: Tensor, at_end: Tensor) -> Tensor:
        """`(dx_s/dx_t)^T a` of step i of these trajectories."""
        t, s, prompt = rollout.times[i], rollout.times[i + 1], take(rollout.prompt, rows)
        with torch.enable_grad():
            x = take(rollout.x[i], rows).detach().requires_grad_(True)
            if self.model.has_consistency:
                end = self.model.consistency(x, t, self.conditions, prompt=prompt)
            else:
                end = ddim_step(self.process, self.pretrained(x, t, prompt), t, s, 0.0).mean
            return torch.autograd.grad(end, x, at_end)[0]

    def kls(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The KL of the moved noise, which is that of the paths: their steps are the pretrained model's."""
        assert isinstance(rollout, NoiseRollout)
        return rollout.kl, rollout.kl

    def updates(self, rollout: Rollout, generator: torch.Generator) -> Updates:
        """One update: `beta penalty - <grad r(g(z')), z'>`."""
        assert isinstance(rollout, NoiseRollout)
        assert rollout.noise is not None
        std = self.process.prior_std
        z, noise_gradient, v = rollout.noise / std, std * rollout.noise_gradient, rollout.v

        def loss(rows: Tensor) -> Loss:
            shift = shift_of(self.model, self.conditions, take(rollout.prompt, rows))
            move = PENALTIES[self.penalty](shift, take(z, rows), take(v, rows))
            figures = {} if move.folds is None else {"fold_share": move.folds}
            return self.beta * move.nats - sum_event(take(noise_gradient, rows) * move.f), {
                "penalty_nats": move.nats.detach(),
                **figures,
            }

        yield Update("policy", [Term(len(z), loss, calls=CALLS[self.penalty](self.model.size))])


Config = Hypernoise
