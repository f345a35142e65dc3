"""The pathwise kernel: improve the policy through one step against a look-ahead value. Score as Action, SQDF, VARD, PI-FT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner, Setting, Update
from scoreaction.diffusion.kl import score_weight
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import ddim_step, noise_std
from scoreaction.diffusion.transitions import sum_event
from scoreaction.sampling.experience import Experience, Points
from scoreaction.types import Prediction

MOST_TRUST = 1e3
"""The dearest that leaving the old policy becomes, in betas: beyond it nothing moves."""


@dataclass(frozen=True)
class Rates:
    """How the dynamics and the running reward weigh the score at noise level eta.

    drift: c = (1 + eta^2)/2, the score's factor in the drift `c g^2 a`; charge: the KL costs `charge/2 g^2 ||a - a_pre||^2`
    a unit of time, `(c/eta)^2` at eta > 0 (Girsanov). At eta = 0 the path KL is infinite and charge is 1: a quadratic
    cost of the action, whose optimum is not the tilted law.
    """

    drift: float
    charge: float

    @classmethod
    def at(cls, eta: float) -> Rates:
        """The rates of this eta."""
        drift = (1 + eta**2) / 2
        return cls(drift, (drift / eta) ** 2 if eta > 0 else 1.0)


def advantage_rate(
    process: Process, t: Tensor, eta: float, beta: float, *, grad_value: Tensor, action: Tensor, old: Tensor, pretrained: Tensor
) -> Tensor:
    """The advantage per unit of time of acting with the score `action` at (t, x), where the policy's own is `old`.

    `q = c g^2 <grad V, a - s_old> - (beta/2)(c/eta)^2 g^2 (||a - s_pre||^2 - ||s_old - s_pre||^2)`: closed form, with no
    Hessian and no time derivative, because the drift is affine in the action and the noise is free of it. All tensors
    (batch, *shape), t () or (batch,), result (batch,). Zhao et al. 2025 (arXiv 2502.01819), theorem 3 and eq. 18.
    `J(theta) - J(old) = E_theta integral of q dtau`.
    """
    rates = Rates.at(eta)
    g2 = process.g2(t).to(action)
    gain = rates.drift * sum_event(grad_value * (action - old))
    cost = beta / 2 * rates.charge * (sum_event((action - pretrained) ** 2) - sum_event((old - pretrained) ** 2))
    return g2 * (gain - cost)


@dataclass(frozen=True)
class Weights:
    """What a step t -> s makes of a change of x0_hat: it moves the state by `pull dx0` and costs `stay/2 ||dx0||^2` nats.

    pull, stay () or (rows,) float64. The action is carried as x0_hat, `s = (alpha x0_hat - x)/sigma^2`, so that it is there at
    pure noise too.
    """

    pull: Tensor
    stay: Tensor

    @classmethod
    def of_path(cls, process: Process, t: Tensor, s: Tensor, eta: float) -> Weights:
        """Continuous time: `c g^2` and `(c/eta)^2 g^2` on scores, the integral of g^2 over [s, t] at the midpoint.

        They mean the same on every grid; nothing at alpha_t = 0, where the score says nothing of x0.
        """
        rates, signal = Rates.at(eta), process.alpha(t) / process.sigma2(t)
        integral = score_weight(process, t, s)
        return cls(rates.drift * integral * signal, rates.charge * integral * signal**2)

    @classmethod
    def of_chain(cls, process: Process, t: Tensor, s: Tensor, eta: float) -> Weights:
        """The DDIM(eta) step that is taken: `pull = alpha_s - sqrt(sigma_s^2 - k^2) alpha_t/sigma_t`, `stay = pull^2/k^2`.

        stay is infinite where k = 0.
        """
        k2 = noise_std(process, t, s, eta) ** 2
        direction = torch.sqrt((process.sigma2(s) - k2).clamp(min=0))
        pull = process.alpha(s) - direction * process.alpha(t) / process.sigma(t)
        return cls(pull, pull**2 / k2)

    @classmethod
    def of_step(cls, process: Process, t: Tensor, s: Tensor, eta: float) -> Weights:
        """Continuous time, and the chain's own at alpha_t = 0, for a value that is asked at x_s."""
        path, chain = cls.of_path(process, t, s, eta), cls.of_chain(process, t, s, eta)
        pure = process.alpha(t) == 0
        if bool((pure & torch.isinf(chain.stay)).any()):
            raise ValueError("sampler.steps: one step from pure noise to data has no noise to move; use at least 2")
        return cls(torch.where(pure, chain.pull, path.pull), torch.where(pure, chain.stay, path.stay))

    def take(self, rows: Tensor) -> Weights:
        """These rows."""
        return Weights(self.pull[rows], self.stay[rows])


def lookahead_loss(
    x0: Tensor, *, weights: Weights, grad_value: Tensor, reference: Tensor, old: Tensor, beta: float, trust: float
) -> Tensor:
    """Minus what the policy's x0_hat gains over one step, with a penalty on leaving the old one.

    `-pull <grad V, x0> + stay/2 (beta ||x0 - x0_pre||^2 + trust ||x0 - x0_old||^2)`. With the weights of the path its gradient
    at x0_old is that of the policy gradient `E integral (ds)^T [c g^2 grad V - beta (c/eta)^2 g^2 (s - s_pre)]`.
    x0, grad_value, reference, old (rows, *shape); result (rows,).
    """
    gain = weights.pull.to(x0) * sum_event(grad_value * x0)
    stay = beta * sum_event((x0 - reference) ** 2) + trust * sum_event((x0 - old) ** 2)
    return weights.stay.to(x0) / 2 * stay - gain


def improved(weights: Weights, *, grad_value: Tensor, reference: Tensor, old: Tensor, beta: float, trust: float) -> Tensor:
    """Where `lookahead_loss` is least: `(beta x0_pre + trust x0_old + pull/stay grad V)/(beta + trust)`, (rows, *shape).

    Without trust it is one inner iteration of PI-FT (Han et al. 2024, arXiv 2412.18164); trust damps it by
    `beta/(beta + trust)`.
    """
    step = expand(weights.pull / weights.stay, grad_value) * grad_value
    return (beta * reference + trust * old + step) / (beta + trust)


@dataclass(frozen=True)
class Decisions:
    """Steps t -> s at which the policy is improved, one a row.

    points where it acts, s where the step goes, groups the prompts' numbers, weights of the step, reference and old x0_hat of
    the pretrained and of the behaviour policy, scale what each row counts for, index what it is to whoever made it.
    """

    points: Points
    s: Tensor
    groups: Tensor
    weights: Weights
    reference: Tensor
    old: Tensor
    scale: Tensor
    index: Tensor

    def take(self, rows: Tensor) -> Decisions:
        """These rows."""
        near = rows.to(self.reference.device)
        return Decisions(
            self.points.take(rows),
            self.s[rows],
            self.groups[rows.to(self.groups.device)],
            self.weights.take(rows),
            self.reference[near],
            self.old[near],
            self.scale[rows],
            self.index[rows],
        )


Weigh = Callable[[Process, Tensor, Tensor, float], Weights]


def decisions_at(setting: Setting, experience: Experience, chosen: Tensor, weigh: Weigh) -> Decisions:
    """The steps of an iteration with these numbers (steps outermost), drawn at random: each counts for all N steps.

    The reference must have been asked at all visited states.
    """
    steps, batch = experience.size
    assert experience.reference is not None
    assert experience.reference.x0.shape[1] == batch
    times = experience.rollout.times
    t, s = (part.repeat_interleave(batch)[chosen] for part in (times[:-1], times[1:]))
    near = chosen.to(experience.rollout.x.device)
    return Decisions(
        experience.points().take(chosen),
        s,
        experience.groups.repeat(steps)[chosen.to(experience.groups.device)],
        weigh(setting.model.process, t, s, setting.sampler.eta),
        experience.reference.x0.flatten(0, 1)[near],
        experience.rollout.prediction.x0.flatten(0, 1)[near],
        torch.full((len(chosen),), float(steps)),  # a time is drawn with probability 1/N: the integral, not its mean
        torch.arange(len(chosen)),
    )


def stepped(setting: Setting, decisions: Decisions, prediction: Prediction, generator: torch.Generator) -> Points:
    """Where the policy's own step leads from these points: x_s = mean + k z at s."""
    process, eta = setting.model.process, setting.sampler.eta
    step = ddim_step(process, prediction, decisions.points.t, decisions.s, eta)
    return Points(step.sample(generator), decisions.s, decisions.points.conditions)


Look = Callable[[Decisions, Prediction], Tensor]
"""`look(decisions, prediction) -> grad V (rows, *shape)`, at the state or where the policy's own step leads."""


def given(grad: Tensor, decisions: Decisions, prediction: Prediction) -> Tensor:
    """A `Look` at gradients that are known already, by the decisions' index."""
    return grad[decisions.index.to(grad.device)]


def improvement(learner: Learner, decisions: Decisions, look: Look, *, trust: float) -> Iterator[Update]:
    """One policy update: the mean over rows of `scale * lookahead_loss`, in pieces of at most `max_rows`.

    trust is in betas. Logs `kl_to_old`, the KL to the behaviour policy over a whole path, in nats.
    """
    pieces = torch.arange(len(decisions.s)).split(learner.setting.max_rows)
    for i, rows in enumerate(pieces):
        part = decisions.take(rows)
        said = learner.policy(part.points.conditions)(part.points.x, part.points.t)
        grad = look(part, Prediction(said.x0.detach(), said.eps.detach()))
        loss = lookahead_loss(
            said.x0,
            weights=part.weights,
            grad_value=grad,
            reference=part.reference,
            old=part.old,
            beta=learner.beta,
            trust=trust * learner.beta,
        )
        moved = part.scale * part.weights.stay / 2 * sum_event((said.x0.detach() - part.old) ** 2).cpu()
        metrics = {"kl_to_old": float(moved.mean())}
        yield Update((part.scale.to(loss) * loss).sum() / len(decisions.s), "policy", metrics, step=i == len(pieces) - 1)


def adapt_trust(state: dict[str, Any], kl_to_old: float, *, least: float, region: float) -> None:
    """Doubles the penalty on leaving the old policy where the last update found it too far, and lets it fall back.

    What is rounding cannot be held: too far is the region and twice the `kl_floor` that the run has measured.
    """
    factor = 2.0 if kl_to_old > region + 2 * state.get("kl_floor", 0.0) else 0.9
    state.update(kl_to_old=kl_to_old, trust=min(max(least, state["trust"] * factor), max(least, MOST_TRUST)))


def perturbed(
    process: Process, x: Tensor, t: Tensor, prediction: Prediction, size: float, generator: torch.Generator
) -> Prediction:
    """Exploration on the action: `eps + size z`, x0 to match; left alone at alpha = 0, where eps does not act."""
    if size == 0 or float(process.alpha(t)) == 0:
        return prediction
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    eps = prediction.eps + size * noise
    return Prediction((x - expand(process.sigma(t), x) * eps) / expand(process.alpha(t), x), eps)
