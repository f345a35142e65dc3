"""Checks of a model before training: that it is a function, a denoiser, and its own reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from scoreaction.commands.doctor.denoising import denoising_findings
from scoreaction.commands.doctor.finding import Finding, apart, in_words, judged, rounding
from scoreaction.networks.conditions import take
from scoreaction.report.numbers import number
from scoreaction.sampling.rollout import Rollout, States, roll_out
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Prediction

NO_SIGNAL, NEAR_DATA = 300.0, 30.0
"""Times that an error of eps may count in x0 at noise (DDPM's table has 157), and one of x0 in eps close to the data."""


@dataclass(frozen=True)
class Places:
    """Points to check at: trajectories of the pretrained model, and a state of each at its own time."""

    rollout: Rollout
    states: States


def sample_points(tuner: Finetuner, n: int, generator: torch.Generator) -> Places:
    """n trajectories of the pretrained model under the run's sampler."""
    prompt = torch.arange(n) % (len(tuner.prompts) if tuner.prompts else 1)
    model, sampler = tuner.model, tuner.sampler
    predict = partial(model.reference, conditions=tuner.conditions, prompt=prompt, guidance=sampler.guidance)
    noise = model.noise(generator, tuner.conditions, prompt)
    rollout = roll_out(model, sampler, predict, prompt, noise, times=sampler.times(model.process))
    step = torch.arange(n) % rollout.size[0]
    return Places(rollout, take(rollout.steps().states, step * n + torch.arange(n)))


def model_findings(tuner: Finetuner, places: Places, generator: torch.Generator) -> Iterator[Finding]:
    """The checks of the network; each names its remedy."""
    policy = _predict(tuner, places.states)
    yield _repeats(tuner, places, policy)
    yield _keeps_rows_apart(tuner, places, policy)
    if tuner.iteration == 0:
        yield _begins(tuner, places, policy)
    if tuner.prompts and len(tuner.prompts) > 1:
        yield _prompts(tuner, places, policy)
    yield _suits(tuner)
    yield from denoising_findings(tuner, generator)
    if not tuner.model.moves_noise:  # which is what its policy lives by
        yield _forgets(tuner, places)


def _predict(tuner: Finetuner, states: States) -> Prediction:
    return tuner.model.predict(states.x, states.t, tuner.conditions, prompt=states.prompt, guidance=tuner.sampler.guidance)


def _repeats(tuner: Finetuner, places: Places, policy: Prediction) -> Finding:
    difference = apart(policy, _predict(tuner, places.states))
    return judged(
        "the network answers the same twice",
        difference <= rounding(tuner),
        in_words(difference),
        f"answers differ by {difference:.1g} standard deviations",
        "take the randomness out of it: dropout that eval() does not reach, noise drawn in forward; or it is not finite",
    )


def _keeps_rows_apart(tuner: Finetuner, places: Places, policy: Prediction) -> Finding:
    rows = torch.arange(len(places.states.t))
    parts = [_predict(tuner, take(places.states, part)) for part in (rows[:1], rows[1:])]
    difference = apart(policy, Prediction(*(torch.cat(halves) for halves in zip(*parts, strict=True))))
    return judged(
        "a row's answer is its own",
        difference <= rounding(tuner),
        f"the same in another batch {in_words(difference)}",
        f"in another batch it differs by {difference:.1g} standard deviations",
        "take out what mixes rows: statistics over the batch, or a reshape that folds rows into another dimension",
    )


def _begins(tuner: Finetuner, places: Places, policy: Prediction) -> Finding:
    difference = apart(policy, reference_at(tuner, places))
    return judged(
        "the policy begins as the pretrained model",
        difference <= rounding(tuner),
        in_words(difference),
        f"it differs by {difference:.1g} standard deviations",
        "the adapters must begin at 0, and network and reference hold the same weights",
    )


def reference_at(tuner: Finetuner, places: Places) -> Prediction:
    """The prediction of the pretrained model there."""
    x, t, prompt = places.states
    return tuner.model.reference(x, t, tuner.conditions, prompt=prompt, guidance=tuner.sampler.guidance)


def _prompts(tuner: Finetuner, places: Places, policy: Prediction) -> Finding:
    check, prompts = "prompts matter", tuner.prompts or []
    if len(set(map(str, prompts))) == 1:
        seen = f"all {len(prompts)} prompts are the same, {str(prompts[0])[:60]!r}"
        return Finding(check, "note", seen, "look at how they are read; one line is enough for one prompt")
    others = places.states._replace(prompt=(places.states.prompt + 1) % len(prompts))
    difference = apart(policy, _predict(tuner, others))
    if difference == 0 and tuner.model.labelled:
        return Finding(check, "ok", "the network says the same for every label: training is to tell them apart")
    return judged(
        check,
        difference > 0,
        f"the next prompt changes the answer by {difference:.2g} standard deviations",
        "the network says the same for every prompt",
        "encode= must tell prompts apart, and the network use them",
    )


def _suits(tuner: Finetuner) -> Finding:
    """Weighs an error of the network at the ends of the grid: of eps as one of x0 at noise, of x0 as one of eps at the data."""
    check, model = "what is predicted is known at all times", tuner.model
    times = tuner.sampler.times(model.process)[:-1]
    acted = times[times > tuner.sampler.acts_from]
    at = {"eps": times[0], "score": times[0], "x0": acted[-1]}.get(model.predicts)
    if at is None:
        return Finding(check, "ok", f"a network of {model.predicts} errs alike at noise and at data")
    alpha, sigma = float(model.process.alpha(at)), float(model.process.sigma(at))
    other, times_as_large = ("x0", sigma / alpha) if model.predicts != "x0" else ("eps", alpha / sigma)
    seen = f"an error of {model.predicts} counts {number(times_as_large, 2)} times in {other} at t = {number(float(at), 2)}"
    if model.predicts == "x0" and times_as_large > NEAR_DATA:
        return Finding(check, "note", seen, "leave sampler.off_below out: the pretrained model acts where that is so")
    if times_as_large > NO_SIGNAL and model.project is None:
        return Finding(check, "note", seen, "end the table earlier (TableVP.cut), or give project= for data in a box")
    return Finding(check, "ok", seen)


def _forgets(tuner: Finetuner, places: Places) -> Finding:
    check, x = "samples forget their noise", places.rollout.x
    first, last = x[0] - x[0].mean(0), x[-1] - x[-1].mean(0)
    correlation = float((first * last).sum() / (first.square().sum() * last.square().sum()).sqrt())
    seen = f"correlation {correlation:.2g} at eta {tuner.sampler.eta:g}"
    if tuner.sampler.eta < 1:
        return Finding(
            check, "note", f"{seen}: what training aims at is not the tilted law, and holds at this eta only",
            "train with sampler.eta=1; the result then holds at any eta and solver",
        )  # fmt: skip
    if abs(correlation) > 0.1 + 3 / math.sqrt(first.numel()):
        return Finding(check, "note", f"{seen}: the optimum is not quite the tilted law", "alpha at t = 1 is far from 0")
    return Finding(check, "ok", seen)
