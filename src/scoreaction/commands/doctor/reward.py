"""Checks of a reward: that it is a function of one sample, tells samples apart, and has the gradient it says."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from scoreaction.algorithms._likelihood_ratio import spread_is_rounding
from scoreaction.commands.doctor.finding import Finding, judged
from scoreaction.commands.doctor.model import Places
from scoreaction.report.numbers import number
from scoreaction.training.finetuner import Finetuner

STEPS = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3)
"""Step sizes of the finite difference, in standard deviations of the samples; the best one counts."""
SLOPES = 8
"""Samples whose gradient is looked at."""


def reward_findings(tuner: Finetuner, places: Places, generator: torch.Generator) -> Iterator[Finding]:
    """The checks of the reward on samples of the pretrained model."""
    samples = tuner.model.decode(places.rollout.x0)
    prompts = tuner.collector.texts(places.rollout.prompt)

    def score(rows: slice) -> Tensor:
        return tuner.reward(samples[rows], None if prompts is None else prompts[rows])

    n = len(samples)
    scores = score(slice(0, n))
    spread, noise = float(scores.std()), float((score(slice(0, n)) - scores).std()) / 2**0.5

    check = "the reward answers the same twice"
    if noise > 1e-6 * float(scores.abs().max()):
        yield Finding(
            check, "note", f"its noise is {number(noise, 2)}, the samples' spread {number(spread, 2)}",
            "noise is averaged over by training; averages of several answers cost queries and say more",
        )  # fmt: skip
    else:
        yield Finding(check, "ok", f"{n} samples")
        halves = torch.cat([score(slice(0, n // 2)), score(slice(n // 2, n))])
        difference = float((halves - scores).abs().max())
        yield judged(
            "a sample's reward is its own",
            difference <= 1e-2 * spread + 1e-5 * float(scores.abs().max()),
            "the same in a batch of half the size",
            f"in half the batch it is other by {number(difference, 2)}, the spread is {number(spread, 2)}",
            "score each row by itself; the algorithms do the standardising",
        )

    yield _spread(scores)
    yield _scale(tuner, scores)
    if tuner.reward.differentiable:
        yield _slope(tuner, places, prompts, generator)


def _spread(scores: Tensor) -> Finding:
    check, n = "the reward tells samples apart", len(scores)
    if spread_is_rounding(scores):
        return Finding(
            check, "wrong", f"all {n} samples of the pretrained model get {number(float(scores[0]))}",
            "nothing can be learned where all are equal: reward partial success, or begin with a model that sometimes succeeds",
        )  # fmt: skip
    commonest = int((scores == scores.mode().values).sum())
    seen = f"{number(float(scores.mean()))} on average, standard deviation {number(float(scores.std()), 2)}"
    if commonest > 0.9 * n:
        return Finding(
            check,
            "note",
            f"{seen}; {commonest} of {n} get the same",
            "larger batches, or a reward of partial success, learn faster",
        )
    return Finding(check, "ok", seen)


def _scale(tuner: Finetuner, scores: Tensor) -> Finding:
    """The tilted law on these n samples, `w = exp(r/beta)/sum`: its gain and its KL, which cannot pass log n.

    Further away to second order: the optimum gains `var/beta` at `var/(2 beta^2)` nats.
    """
    check, beta = "beta suits the reward's scale", tuner.learner.beta
    if not beta:
        return Finding(
            check, "note", "there is no price on the KL: nothing holds the model", "watch KL and diversity, stop early"
        )
    r, spread = scores.double(), float(scores.std())
    weights = torch.softmax(r / beta, 0)
    gain = float((weights * r).sum() - r.mean())
    nats = float((weights * torch.log((len(r) * weights).clamp(min=1e-300))).sum())
    second, farthest = spread**2 / (2 * beta**2), math.log(len(r))
    if nats > farthest - 1:
        seen = f"beta {beta:g}: the optimum is more than {nats:.1f} nats away, {number(second, 2)} to second order"
        if second > 100:
            return Finding(
                check, "note", seen, f"so far away samples become alike; beta {number(spread / 5, 2)} would ask for 12 nats"
            )
        return Finding(check, "ok", seen)
    seen = f"beta {beta:g}: the optimum gains about {number(gain, 2)} at {number(nats, 2)} nats"
    if nats < 0.01:
        return Finding(check, "note", seen, f"hardly anything will change; beta {number(spread, 2)} would ask for half a nat")
    return Finding(check, "ok", seen)


def _slope(tuner: Finetuner, places: Places, prompts: list[object] | None, generator: torch.Generator) -> Finding:
    """Its gradient by x0, through the decoder, against central differences along one random direction a sample."""
    check = "the reward's gradient is its own"
    x0, first = places.rollout.x0[:SLOPES], None if prompts is None else prompts[:SLOPES]

    def score(x: Tensor) -> Tensor:
        return tuner.reward(tuner.model.decode(x), first)

    with torch.enable_grad():
        leaf = x0.detach().requires_grad_(True)
        scores = score(leaf)
        if not scores.requires_grad:
            return Finding(
                check, "wrong", "it says that it is differentiable, and no gradient reaches the samples",
                "keep the graph in it, or leave differentiable out",
            )  # fmt: skip
        gradient = torch.autograd.grad(scores.sum(), leaf)[0]
    direction = torch.randn(x0.shape, generator=generator).to(x0)
    along = (gradient * direction).flatten(1).sum(1)
    if not float(gradient.abs().max()) > 0:
        return Finding(check, "wrong", "it is 0 at every sample", "look for clamp, round or argmax on the way to the score")
    unit = float(x0.std()) or 1.0
    errors = []
    for step in STEPS:
        h = step * unit
        numeric = (score(x0 + h * direction) - score(x0 - h * direction)) / (2 * h)
        errors.append(float((numeric - along).norm() / torch.maximum(numeric.norm(), along.norm())))
    error = min(errors)
    if not error <= 0.5:
        return Finding(
            check, "wrong", f"finite differences miss it by {error:.0%}",
            "something on the way to the score is detached, straight-through or rounded",
        )  # fmt: skip
    return Finding(check, "ok" if error < 0.1 else "note", f"finite differences agree to {error:.1%}")
