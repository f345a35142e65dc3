"""Checks that the network is a posterior mean: noise is put on the pretrained model's own samples, and it must be found."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scoreaction.commands.doctor.finding import Finding
from scoreaction.diffusion.noise import kept
from scoreaction.diffusion.predictions import expand
from scoreaction.networks.conditions import take
from scoreaction.sampling.draw import run
from scoreaction.sampling.sampler import Sampler
from scoreaction.training.finetuner import Finetuner

SNRS = (64.0, 16.0, 4.0, 1.0, 0.25)
"""Signal-to-noise ratios that are checked at, for samples as wide as the model's own."""
EXACT = {"solver": "dpmpp_2m", "eta": 0.0, "steps": 50, "grid": "power", "guidance": 1.0}
"""A sampler that ends at the model's law itself; a coarse one of the SDE ends beside it, and the check would see that."""
NUMBERS = 2**14
"""Numbers that the samples have in all, at least."""
TOLERANCE = 0.12
"""Error of the identity that a trained network may have; those that ship have 0.07 at most, wrong processes 0.24 at least."""
EXCESS = 0.01
"""Mean square error of eps, beside the unavoidable, of a network of little training: it shows where little is known of eps."""
WIDEST = 512
"""Dimensions up to which each direction is looked at."""


class Level(NamedTuple):
    """A level: the ratio of the identity and its standard error, the mean square of eps_hat, errors of eps and of a line."""

    ratio: float
    deviation: float
    square: float
    error: float
    line: float


@torch.no_grad()
def denoising_findings(tuner: Finetuner, generator: torch.Generator) -> Iterator[Finding]:
    """The posterior mean of the noise, `eps_hat = E[eps | x]`, at five levels, and in every direction.

    `E[eps . eps_hat] = E |eps_hat|^2`, since what is left is orthogonal to every function of x.
    """
    check, model = "the network finds the noise", tuner.model
    if model.true_cfg is not None:
        yield Finding(check, "note", "not looked at: a network with guidance as an input predicts no mean of the noise")
        return
    n = max(min(tuner.train.batch, 64), math.ceil(NUMBERS / math.prod(model.shape)))
    prompt = torch.arange(n) % (len(tuner.prompts) if tuner.prompts else 1)
    policy = partial(model.reference, conditions=tuner.conditions, prompt=prompt)
    inside = take(model.inside(tuner.conditions), prompt)
    numbers = kept(torch.ones(n, *model.shape), inside).flatten(1)
    x0 = run(model, Sampler(**EXACT), policy, n, model.noise(generator, tuner.conditions, prompt))  # type: ignore[arg-type]
    variance = _variance(x0.flatten(1).double().cpu(), numbers)
    levels = []
    for snr in SNRS:
        t = _time_of(tuner, snr / max(variance, 1e-12))
        eps = torch.randn(x0.shape, generator=generator).to(x0)
        eps_hat = policy(expand(model.process.alpha(t), x0) * x0 + expand(model.process.sigma(t), x0) * eps, t).eps
        noise, noise_hat = (kept(part, inside).flatten(1).double().cpu() for part in (eps, eps_hat))
        levels.append(_level(noise, noise_hat, snr, float(numbers.mean())))
    yield _judge(levels)
    if eps_hat[0].numel() <= WIDEST and n >= 2 * eps_hat[0].numel():
        eps_hat = eps_hat if inside is None else torch.where(inside.to(eps_hat.device), eps_hat, eps)
        yield _directions(eps_hat.flatten(1).double())


def _time_of(tuner: Finetuner, snr: float) -> Tensor:
    times = torch.linspace(0, 1, 4097, dtype=torch.float64)[1:-1]
    process = tuner.model.process
    return times[(process.log_snr(times) - math.log(snr)).abs().argmin()]


def _variance(x0: Tensor, numbers: Tensor) -> float:
    """Variance of the numbers around their means over samples; numbers (n, d) is 1 at them and 0 in padding."""
    count = numbers.sum(0)
    away = numbers * (x0 - x0.sum(0) / count.clamp(min=1))
    return float(away.square().sum() / (count - 1).clamp(min=0).sum().clamp(min=1))


def _level(eps: Tensor, eps_hat: Tensor, snr: float, share: float) -> Level:
    """share: the part of a sample that is numbers, where the rest, 0 here, is padding."""
    products, squares = (eps * eps_hat).sum(1), eps_hat.square().sum(1)
    ratio = float(products.sum() / squares.sum())
    deviation = float((products - ratio * squares).std() / squares.mean()) / math.sqrt(len(eps))
    square, error = (float(part.square().mean()) / share for part in (eps_hat, eps_hat - eps))
    return Level(ratio, deviation, square, error, snr / (1 + snr))


def _judge(levels: list[Level]) -> Finding:
    check = "the network finds the noise"
    errors, ratios = (
        ", ".join(f"{value:.2g}" for value in values)
        for values in ([level.error for level in levels], [level.ratio for level in levels])
    )
    seen = f"error {errors} of 1 at signal-to-noise {', '.join(f'{snr:g}' for snr in SNRS)}"
    remedy = "predicts, process, or the direction and unit of t do not fit this network, or it was never trained"
    if not all(level.error <= 1.0 + 4 * level.deviation for level in levels):
        return Finding(check, "wrong", f"{seen}: it knows less than nothing", remedy)
    beyond = [abs(level.ratio - 1) - TOLERANCE - 3 * level.deviation for level in levels]
    if not all(off <= 0 for off in beyond):
        seen = f"{seen}; E[eps eps_hat]/E[eps_hat^2] is {ratios}, and 1 of a posterior mean"
        if all(off <= EXCESS / level.square for off, level in zip(beyond, levels, strict=True)):
            return Finding(check, "note", seen, "a schedule that is nearly this network's, or one that needs more training")
        return Finding(check, "wrong", seen, remedy)
    bent = max(level.error / level.line for level in levels)
    if bent > 1.15:
        return Finding(check, "note", f"{seen}: {bent:.2g} times that of the best straight line", f"perhaps {remedy}")
    return Finding(check, "ok", seen)


def _directions(eps_hat: Tensor) -> Finding:
    """At much noise eps_hat has variance in every direction, as the noise has; where it has none, the samples keep theirs."""
    check = "every direction is denoised"
    values = torch.linalg.eigvalsh(torch.cov(eps_hat.T).reshape(eps_hat.shape[1], eps_hat.shape[1]))
    silent = int((values < 1e-4 * values.mean()).sum())
    if silent:
        return Finding(
            check, "wrong", f"the network says nothing of the noise in {silent} of {len(values)} directions: it stays",
            "give Model the projection onto the space of the data, project=lambda x0: x0 - x0.mean(1, keepdim=True)",
        )  # fmt: skip
    return Finding(check, "ok", f"{len(values)} of them")
