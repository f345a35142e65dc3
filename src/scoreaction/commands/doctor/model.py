"""Checks of a model before training: that it is a function, a denoiser, and its own reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scoreaction.commands.doctor.finding import Finding, apart, in_words, judged, rounding
from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Rollout, Sampler, States, roll_out
from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Prediction

SNRS = (16.0, 4.0, 1.0)
"""Signal-to-noise ratios at which the network must know something of the noise."""


@dataclass(frozen=True)
class Places:
    """Points to check at: trajectories of the pretrained model, and a state of each at its own time."""

    rollout: Rollout
    states: States


def sample_points(tuner: Finetuner, n: int, generator: torch.Generator) -> Places:
    """n trajectories of the pretrained model under the run's sampler."""
    prompt = torch.arange(n) % (len(tuner.prompts) if tuner.prompts else 1)
    rollout = _trajectories(tuner, tuner.sampler, prompt, generator)
    step = torch.arange(n) % rollout.size[0]
    return Places(rollout, take(rollout.steps().states, step * n + torch.arange(n)))


def _trajectories(tuner: Finetuner, sampler: Sampler, prompt: Tensor, generator: torch.Generator) -> Rollout:
    model = tuner.model
    predict = partial(model.reference, conditions=tuner.conditions, prompt=prompt, guidance=sampler.guidance)
    return roll_out(model, sampler, predict, prompt, generator, times=sampler.times(model.process))


def model_findings(tuner: Finetuner, places: Places, generator: torch.Generator) -> Iterator[Finding]:
    """The checks of the network; each names its remedy."""
    policy = _predict(tuner, places.states)
    yield _repeats(tuner, places, policy)
    yield _keeps_rows_apart(tuner, places, policy)
    if tuner.iteration == 0:
        yield _begins(tuner, places, policy)
    if tuner.prompts and len(set(map(str, tuner.prompts))) > 1:
        yield _prompts(tuner, places, policy)
    yield _denoises(tuner, places, generator)
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
    others = places.states._replace(prompt=(places.states.prompt + 1) % len(tuner.prompts or []))
    difference = apart(policy, _predict(tuner, others))
    return judged(
        "prompts matter",
        difference > 0,
        f"the next prompt changes the answer by {difference:.2g} standard deviations",
        "the network says the same for every prompt",
        "encode= must tell prompts apart, and the network use them",
    )


def _denoises(tuner: Finetuner, places: Places, generator: torch.Generator) -> Finding:
    """Noise is put on the pretrained model's own samples; the posterior mean errs less than 0, and than any straight line.

    E||eps - E[eps|x]||^2 <= E||eps - k x||^2 for every k, of which the best gives D alpha^2 v/(alpha^2 v + sigma^2).
    """
    check, model = "the network finds the noise", tuner.model
    if model.true_cfg is not None:
        return Finding(check, "note", "not looked at: a network with guidance as an input predicts no mean of the noise")
    sampler, prompt = tuner.sampler.model_copy(update={"guidance": 1.0}), places.rollout.prompt
    own = places.rollout if tuner.sampler.guidance <= 1 or tuner.conditions is None else None
    x0, n = (own or _trajectories(tuner, sampler, prompt, generator)).x0, len(prompt)
    times = math.ceil(4096 / x0.numel())
    many, prompts = x0.repeat(times, *[1] * (x0.ndim - 1)), prompt.repeat(times)
    v = float((x0 - x0.mean(0)).square().sum() / (n - 1) / x0[0].numel())
    errors, worst, bent = [], 0.0, 0.0
    for snr in SNRS:
        t = _time_of(tuner, snr)
        alpha, sigma = float(model.process.alpha(t)), math.sqrt(float(model.process.sigma2(t)))
        eps = torch.randn(many.shape, generator=generator).to(many)
        prediction = model.reference(alpha * many + sigma * eps, t, tuner.conditions, prompt=prompts)
        error = float((prediction.eps - eps).square().mean())
        line = alpha**2 * v / (alpha**2 * v + sigma**2)
        errors.append(f"{error:.2g}")
        worst, bent = max(worst, error), max(bent, error / max(line, 1e-12))
    seen = f"error {', '.join(errors)} of 1 at signal-to-noise {', '.join(f'{snr:g}' for snr in SNRS)}"
    remedy = "predicts, process or the direction of t do not fit this network, or it was never trained"
    if not worst <= 1.0:
        return Finding(check, "wrong", f"{seen}: it knows less than nothing", remedy)
    if bent > 1.15:
        return Finding(check, "note", f"{seen}: {bent:.2g} times that of the best straight line", f"perhaps {remedy}")
    return Finding(check, "ok", seen)


def _time_of(tuner: Finetuner, snr: float) -> Tensor:
    times = torch.linspace(0, 1, 4097, dtype=torch.float64)[1:]
    process = tuner.model.process
    return times[(process.log_snr(times) - math.log(snr)).abs().argmin()]


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
