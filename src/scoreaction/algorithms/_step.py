"""One step of the policy against a value: the published chain form of SQDF, PI-FT and reward back-propagation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._updates import Loss, Term
from scoreaction.diffusion.kl import drift_rate, g2_integral, kl_rate
from scoreaction.diffusion.noise import RowNoise, normal
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import ddim_step, noise_std
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import States, Steps
from scoreaction.types import Prediction
from scoreaction.world import Rows


class StepWeights(NamedTuple):
    """A step t -> s weighs a change of x0_hat: it moves the state by `shift dx0` and costs `cost/2 ||dx0||^2` nats.

    Both () or (rows,) float64. The action is carried as x0_hat, `score = (alpha x0_hat - x)/sigma^2`, so that it is there at
    pure noise too.
    """

    shift: Tensor
    cost: Tensor

    @classmethod
    def of_path(cls, process: Process, t: Tensor, s: Tensor, eta: float) -> StepWeights:
        """Continuous time: `c g^2` and `(c/eta)^2 g^2` on scores, the integral of g^2 over [s, t] at the midpoint.

        They mean the same on every grid; nothing at alpha_t = 0, where the score says nothing of x0.
        """
        signal, integral = process.alpha(t) / process.sigma2(t), g2_integral(process, t, s)
        return cls(drift_rate(eta) * integral * signal, kl_rate(eta) * integral * signal**2)

    @classmethod
    def of_chain(cls, process: Process, t: Tensor, s: Tensor, eta: float) -> StepWeights:
        """The DDIM(eta) step itself: `shift = alpha_s - sqrt(sigma_s^2 - k^2) alpha_t/sigma_t`, `cost = shift^2/k^2`.

        cost is infinite where k = 0.
        """
        k2 = noise_std(process, t, s, eta) ** 2
        direction = torch.sqrt((process.sigma2(s) - k2).clamp(min=0))
        shift = process.alpha(s) - direction * process.alpha(t) / process.sigma(t)
        return cls(shift, shift**2 / k2)

    @classmethod
    def of_step(cls, process: Process, t: Tensor, s: Tensor, eta: float) -> StepWeights:
        """Continuous time, and the chain's own at alpha_t = 0, for a value that is evaluated at x_s."""
        path, chain = cls.of_path(process, t, s, eta), cls.of_chain(process, t, s, eta)
        pure = process.alpha(t) == 0
        if bool((pure & torch.isinf(chain.cost)).any()):
            raise ValueError("sampler.steps: one step from pure noise to data has no noise to move; use at least 2")
        return cls(torch.where(pure, chain.shift, path.shift), torch.where(pure, chain.cost, path.cost))


Weigh = Callable[[Process, Tensor, Tensor, float], StepWeights]


def step_loss(
    x0: Tensor, *, weights: StepWeights, grad_value: Tensor, pretrained: Tensor, old: Tensor, beta: float, trust: float
) -> Tensor:
    """Minus what the policy's x0_hat gains over one step, with a penalty on leaving the old one, (rows,).

    `-shift <grad V, x0> + cost/2 (beta ||x0 - x0_pre||^2 + trust ||x0 - x0_old||^2)`; all tensors (rows, *shape).
    """
    gain = weights.shift.to(x0) * sum_event(grad_value * x0)
    price = beta * sum_event((x0 - pretrained) ** 2) + trust * sum_event((x0 - old) ** 2)
    return weights.cost.to(x0) / 2 * price - gain


def minimiser(
    weights: StepWeights, *, grad_value: Tensor, pretrained: Tensor, old: Tensor, beta: float, trust: float
) -> Tensor:
    """The minimum of `step_loss`: `(beta x0_pre + trust x0_old + shift/cost grad V)/(beta + trust)`, (rows, *shape).

    Without trust it is one inner iteration of PI-FT (Han et al. 2024, arXiv 2412.18164); trust damps it by
    `beta/(beta + trust)`.
    """
    step = expand(weights.shift / weights.cost, grad_value) * grad_value
    return (beta * pretrained + trust * old + step) / (beta + trust)


def step_gap(learner: Learner, steps: Steps, prediction: Prediction, gradient: Tensor, *, weigh: Weigh) -> Tensor:
    """The nats from a prediction at these steps to the minimum of their `step_loss` without trust, (rows,)."""
    assert steps.pretrained is not None
    weights = weigh(learner.process, steps.t, steps.s, learner.sampler.eta)
    fixed = {"grad_value": gradient, "pretrained": steps.pretrained.x0, "old": steps.old.x0}
    best = minimiser(weights, **fixed, beta=learner.beta, trust=0.0)
    return weights.cost.to(gradient) / 2 * sum_event((prediction.x0 - best) ** 2)


def next_states(learner: Learner, steps: Steps, prediction: Prediction, z: Tensor) -> States:
    """The states that the policy's own step leads to: `x_s = mean + k z` at s, z (rows, *shape) standard normal."""
    step = ddim_step(learner.process, prediction, steps.t, steps.s, learner.sampler.eta)
    return States(step.mean + expand(step.std, step.mean) * z, steps.s, steps.prompt)


def noise_of(learner: Learner, steps: Steps, rows: Rows, seed: int) -> Tensor:
    """Standard normal noise for each row, by its place in the list of all: (rows, *shape)."""
    return normal(steps.x.shape, learner.noise(RowNoise(seed, rows.place), steps.prompt), steps.x.dtype).to(steps.x.device)


GradValue = Callable[[Steps, Prediction, Tensor], Tensor]
"""`grad_value(steps, prediction, numbers) -> (rows, *shape)`: grad V at the state, or where the policy's own step leads.

numbers (rows,) are those of the rows in their update.
"""


def step_term(learner: Learner, steps: Steps, rows: Rows, grad_value: GradValue, *, weigh: Weigh, trust: float) -> Term:
    """`weight * step_loss` at these steps, trust in betas; the log has `kl_to_old` over a whole path, in nats.

    rows: those of the list that the steps were taken from.
    """

    def loss(numbers: Tensor) -> Loss:
        part = take(steps, numbers)
        assert part.pretrained is not None
        prediction = learner.policy(*part.states)
        weights = weigh(learner.process, part.t, part.s, learner.sampler.eta)
        value = step_loss(
            prediction.x0,
            weights=weights,
            grad_value=grad_value(part, Prediction(*(values.detach() for values in prediction)), numbers),
            pretrained=part.pretrained.x0,
            old=part.old.x0,
            beta=learner.beta,
            trust=trust * learner.beta,
        )
        kl_to_old = (part.weight * weights.cost).to(value) / 2 * sum_event((prediction.x0 - part.old.x0) ** 2)
        return part.weight.to(value) * value, {"kl_to_old": kl_to_old}

    return Term(rows, loss)


def known(gradient: Tensor) -> GradValue:
    """A `GradValue` of gradients that are known already, one for each row of the update."""
    return lambda steps, prediction, numbers: take(gradient, numbers)


def learnable(learner: Learner, times: Tensor, *, chain: bool) -> Tensor:
    """The numbers of the steps that the policy is learned at; times are those of the steps that it acted in.

    On the chain a step without noise is the pretrained model's; on the path the score says nothing of x0 at pure noise.
    """
    t, s = times[:-1], times[1:]
    moves = noise_std(learner.process, t, s, learner.sampler.eta) if chain else learner.process.alpha(t)
    numbers = (moves > 0).nonzero().flatten()
    if len(numbers) == 0:
        raise ValueError("sampler.steps: one step from pure noise to data has nothing to learn from; use at least 2")
    return numbers
