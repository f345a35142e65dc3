"""Truth: the fixed points of steps that act alone, by the closed form of the Gaussian chain."""

from __future__ import annotations

import pytest
import torch
from affine import BETA, LAW
from test_windows import VP, chain
from torch import nn
from twins import close, f64

import scoreaction as sa
from scoreaction.algorithms._windows import Window
from scoreaction.diffusion.predictions import expand


class Table(nn.Module):
    """The exact score, and of each step of the grid a slope and an offset of its own."""

    def __init__(self, steps):
        super().__init__()
        self.times, self.th = sa.Sampler(steps=steps).times(VP), nn.Parameter(torch.zeros(steps, 2))

    def forward(self, x, t, cond):
        t = t.double()
        step = (self.times[None, :-1] - t[:, None]).abs().argmin(1)
        exact = LAW.prediction(VP, x, t)
        move = self.th[step, :1] * (x - 0.3 * expand(VP.alpha(t), x)) + self.th[step, 1:]
        sigma = expand(VP.sigma(t), x)
        return expand(VP.alpha(t), x) * (exact.eps - sigma * move) - sigma * (
            exact.x0 + sigma**2 / expand(VP.alpha(t), x) * move
        )


def ends(steps, pulls):
    """Mean and variance of x_0 where step i moves its mean m to `(m + k^2 h/beta)/D`, `D = 1 + Pi k^2/beta`, pulls (Pi, h)."""
    A, k = chain(steps)
    times = sa.Sampler(steps=steps).times(VP)
    alpha = VP.alpha(times)
    mean, variance = f64(0.0), f64(1.0)
    for i in range(steps):
        mean, variance = A[i] * mean + 0.3 * (alpha[i + 1] - A[i] * alpha[i]), A[i] ** 2 * variance
        if pulls[i] is not None:
            Pi, h = pulls[i]
            D = 1 + Pi * k[i] ** 2 / BETA
            mean, variance = (mean + k[i] ** 2 * h / BETA) / D, variance / D**2
        variance = variance + k[i] ** 2
    return mean, variance


def fixed_point(steps, inside):
    """Where DPOK rests that acts in these steps: each maximises the reward to come less beta times its own KL alone.

    r = -(x - 1)^2/2, of the value `-Pi x^2/2 + h x` of the steps after it.
    """
    A, k = chain(steps)
    alpha = VP.alpha(sa.Sampler(steps=steps).times(VP))
    Pi, h, pulls = f64(1.0), f64(1.0), []
    for i in reversed(range(steps)):
        offset = 0.3 * (alpha[i + 1] - A[i] * alpha[i])
        acts = inside[i] and k[i] > 0
        pulls.append((Pi, h) if acts else None)
        D = 1 + Pi * k[i] ** 2 / BETA if acts else f64(1.0)
        push = k[i] ** 2 * h / BETA if acts else f64(0.0)
        slope, shift = A[i] / D, (offset + push) / D
        Pi, h = slope**2 * Pi, slope * (h - Pi * shift)
    return ends(steps, pulls[::-1])


def test_where_windows_rest():
    """The mean rewards that the page quotes, of 50 steps. Twin: the reward of the mean, without the variance."""
    times = sa.Sampler(steps=50).times(VP)[:-1]
    inside = [times >= 0, times > 0.6, times < 0.3, times < 0]
    laws = [fixed_point(50, steps.tolist()) for steps in inside]
    close(
        [-((mean - 1) ** 2 + variance) / 2 for mean, variance in laws],
        [-0.235, -0.579, -0.268, -0.598],
        atol=5e-4,
        of_the_mean=[-((mean - 1) ** 2) / 2 for mean, _ in laws],
    )


@pytest.mark.long
def test_a_fixed_window_converges_to_its_own_optimum():
    """The law of x_0 of DPOK on a table of steps, by the window's closed form. Twins: the full window's, the base's."""
    steps = 6
    tuner = sa.Finetuner(
        sa.Model(Table(steps), process=VP, predicts="v", shape=(1,)),
        reward=lambda x, c: -((x[:, 0] - 1) ** 2) / 2,
        algorithm=sa.DPOK(
            beta=BETA, baseline="branch", branches=8, window=Window(kind="fixed", start=0.36, size=0.4), clip=10.0
        ),
        sampler=sa.Sampler(steps=steps),
        train=sa.Train(iterations=120, batch=512, lr=4e-2, device="cpu", ema=False),
    )
    list(tuner)
    inside = (tuner.learner.windows.step_weight > 0).tolist()  # of the last iteration, as of all
    assert inside == [False, False, False, True, True, False]
    with torch.no_grad():
        A, k = chain(steps)
        times = sa.Sampler(steps=steps).times(VP)
        mean, variance = f64(0.0), f64(1.0)
        for i in range(steps):
            law = tuner.model.predict if inside[i] else tuner.model.reference
            probe = law(torch.tensor([[0.0], [1.0]]), times[i])
            k2 = k[i] ** 2
            out = VP.alpha(times[i + 1]) * probe.x0 + (VP.sigma2(times[i + 1]) - k2).clamp(min=0).sqrt() * probe.eps
            slope, offset = out[1, 0] - out[0, 0], out[0, 0]
            mean, variance = slope * mean + offset, slope**2 * variance + k2
    truth = torch.stack(fixed_point(steps, inside))
    full, base = torch.stack(fixed_point(steps, [True] * steps)), torch.stack(fixed_point(steps, [False] * steps))
    close(torch.stack([mean, variance]), truth, atol=0.02, full=full, base=base)
