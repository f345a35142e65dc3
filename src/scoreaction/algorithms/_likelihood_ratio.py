"""The likelihood-ratio kernel: log densities of the steps that were taken, advantages, the clipped surrogate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._setting import Setting
from scoreaction.algorithms._updates import Largest, Loss, Term
from scoreaction.diffusion.transitions import Kernel
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout, Steps, once
from scoreaction.types import Prediction
from scoreaction.world import Rows, World


def refuse_without_density(setting: Setting, algorithm: str) -> None:
    """ValueError unless every step but a noiseless one has a density that can be had again, and one step has noise."""
    sampler, process = setting.sampler, setting.model.process
    if sampler.eta == 0:
        raise ValueError(f"sampler.eta: {algorithm} needs densities and eta 0 has none; set sampler.eta above 0, 1 is safe")
    if not sampler.find().markov:
        raise ValueError(
            f"sampler.solver: {algorithm} needs densities and {sampler.solver} looks back; use ddim or euler_maruyama"
        )
    if not bool(process.has_density(sampler.times(process)[1:]).any()):
        raise ValueError(f"sampler.steps: no step has a density, which {algorithm} needs; use more of them, at least 2")


def with_density(learner: Learner, times: Tensor, *, exploration: float = 0.0) -> Tensor:
    """The numbers of the policy's steps on this grid that have a density: one stretch, only the ends of a path lack it.

    Not the last step where its std is 0, not pure noise when exploring.
    """
    process = learner.process
    has_density = process.alpha(times[:-1]) > 0 if exploration > 0 else process.has_density(times[1:])
    return (has_density & (times[:-1] >= learner.sampler.acts_from)).nonzero().flatten()


def steps_with_density(learner: Learner, rollout: Rollout, *, exploration: float = 0.0) -> Steps:
    """The policy's steps that have a density, those of the rollout's window where it has one: views of it, no copies.

    Each counts for all of them, times the rollout's `step_weight`.
    """
    numbers, weight = with_density(learner, rollout.times, exploration=exploration), rollout.step_weight
    if weight is not None:
        numbers = numbers[weight[numbers] > 0]
    if len(numbers) == 0:
        raise ValueError("sampler.steps: no step has a density to learn from; use more of them, at least 2")
    _, batch = rollout.size
    steps = take(rollout.steps(), slice(int(numbers[0]) * batch, (int(numbers[-1]) + 1) * batch))
    each = torch.full_like(steps.weight, float(len(numbers)))
    return steps._replace(weight=each if weight is None else each * weight[steps.step])


def transition(learner: Learner, prediction: Prediction, steps: Steps) -> Kernel:
    """The law of x_next at these steps, for these predictions; where the order goes by confidence, by that of the steps."""
    sampler, solver = learner.sampler, learner.sampler.find()
    if solver.by_reference:
        tokens: Any = prediction
        prediction = tokens._replace(confidence=cast(Any, steps.old).confidence)  # the pretrained model's, and it is the same
    return solver.step(learner.process, _never, prediction, steps.x, steps.t, steps.s, sampler.eta, None)


def _never(x: Tensor, t: Tensor) -> Prediction:
    raise AssertionError("a step with a density asks the network once")


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float | None) -> Tensor:
    """`-min(rho A, clip(rho, 1-e, 1+e) A)` with `rho = exp(log_ratio)`, (rows,). Schulman et al. 2017 (1707.06347), eq. 7.

    The ratio is of densities summed over dimensions. Without a clip: `-rho A`, whose gradient at rho = 1 is REINFORCE's.

    >>> clipped_surrogate(torch.tensor([0.5]), torch.tensor([1.0]), 0.2)
    tensor([-1.2000])
    """
    ratio = torch.exp(log_ratio)
    if clip is None:
        return -ratio * advantage
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


MOST_WEIGHT = 3.0
"""The weight of a step of an older policy at most. On r = x^2 of N(0, 1) it leaves all of the gradient at a shift of 0.3."""


def truncated_surrogate(log_ratio: Tensor, advantage: Tensor, most: float = MOST_WEIGHT) -> Tensor:
    """`-rho A` up to rho = most and its tangent in log rho beyond, (rows,): the gradient is `-min(rho, most) A grad log p`.

    Truncated importance weights (Espeholt et al. 2018, arXiv 1802.01561, section 4.1), for steps that an older policy took. A
    clip would cut just those samples that carry the gradient.

    >>> truncated_surrogate(torch.tensor([0.0, 2.0]).requires_grad_(), torch.tensor([1.0, 1.0])).detach()
    tensor([-1.0000, -5.7042])
    """
    bound = math.log(most)
    return -advantage * (log_ratio.clamp(max=bound).exp() + most * (log_ratio - bound).clamp(min=0))


def spread_is_rounding(rewards: Tensor) -> bool:
    """True if rewards differ by no more than rounding: max - min against a relative 1e-6."""
    return float(rewards.max() - rewards.min()) <= 1e-6 * float(rewards.abs().max())


def standardised(rewards: Tensor, groups: Tensor | None = None) -> Tensor:
    """`(r - mean)/std` over all or within each group; 0 where rewards differ by rounding only, (batch,).

    >>> standardised(torch.tensor([1.0, 3.0])).tolist()
    [-1.0, 1.0]
    """
    if groups is None:
        if spread_is_rounding(rewards):
            return torch.zeros_like(rewards)
        return (rewards - rewards.mean()) / rewards.std(correction=0)
    out = torch.zeros_like(rewards)
    for group in groups.unique():
        out[groups == group] = standardised(rewards[groups == group])
    return out


def step_kl(learner: Learner, prediction: Prediction, steps: Steps) -> Tensor:
    """`KL(p_theta(x_s|x_t) || p_pre(x_s|x_t))` of these steps, (rows,)."""
    assert steps.pretrained is not None
    return transition(learner, prediction, steps).kl(transition(learner, steps.pretrained, steps))


def minibatches(world: World, steps: int, batch: int, *, epochs: int, count: int, generator: torch.Generator) -> Iterator[Rows]:
    """Passes over all steps of all trajectories in `count` shuffled minibatches each."""
    for _ in range(epochs):
        yield from world.dealt(steps, batch, steps * batch * world.size, generator).chunk(count)


Law = Callable[[Prediction, Steps], Kernel]
"""The law of an outcome at these steps, for these predictions: (rows,) of them."""
Penalty = Callable[[Prediction, Steps], Loss]


def ratio_term(
    learner: Learner,
    steps: Steps,
    rows: Rows,
    advantage: Tensor,
    *,
    law: Law,
    outcome: Tensor,
    clip: float | None,
    first: bool,
    penalty: Penalty | None = None,
) -> Term:
    """`weight (clipped surrogate + penalty)` at these rows of steps, `log rho = log p_theta(outcome) - log p_old(outcome)`.

    advantage and outcome have a row for each step: (steps,), (steps, *shape). first: the policy is still the one that sampled,
    so that the largest absolute log-ratio (`log_ratio_first` in the log) must be rounding. Where rewards come late an older one
    sampled: ratios begin elsewhere (`log_ratio_stale`), and the weights are truncated in the place of the clip.
    """
    stale = learner.delay > 0

    def loss(numbers: Tensor) -> Loss:
        here = rows.own[numbers]
        part = take(steps, here)
        prediction = once(learner.model, learner.policy, part)
        log_ratio = law(prediction, part).log_ratio(law(part.old, part), take(outcome, here))
        gain, size = take(advantage, here), log_ratio.detach().abs()
        value = truncated_surrogate(log_ratio, gain) if stale else clipped_surrogate(log_ratio, gain, clip)
        figures: dict[str, Tensor | Largest] = {"log_ratio": Largest(size)}
        if stale:
            figures["truncated_fraction"] = log_ratio.detach().gt(math.log(MOST_WEIGHT)).float()
        elif clip is not None:
            figures["clip_fraction"] = (log_ratio.detach().exp() - 1).abs().gt(clip).float()
        if first:
            figures["log_ratio_stale" if stale else "log_ratio_first"] = Largest(size)
        if penalty is not None:
            cost, more = penalty(prediction, part)
            value, figures = value + cost, figures | more
        return part.weight.to(value) * value, figures

    return Term(rows, loss)
