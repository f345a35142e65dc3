"""Truth: the law of a log-ratio of two Gaussians of one std, N(-d^2/2, d^2) at d stds apart; Adam's first step, lr long."""

import math
from typing import ClassVar

import pytest
import torch
from scipy.stats import norm
from torch import nn
from twins import close

import scoreaction as sa

VP, LR, BATCH = sa.VP(), 0.4, 20_000


class Shift(nn.Module):
    """`v = -sigma b` on data N(0, 1): the score moves by `alpha b`, x0_hat by `sigma^2 b`. times: where it was called."""

    times: ClassVar[set[float]] = set()

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond):
        self.times |= set(t.tolist())
        return -VP.sigma(t)[:, None].to(x) * self.b + 0 * x


def fraction(d, clip):
    """The chance that `|exp(l) - 1| > clip`, for l of N(-d^2/2, d^2)."""
    low, high = math.log1p(-clip), math.log1p(clip)
    return 1 - norm.cdf(high, -(d**2) / 2, d) + norm.cdf(low, -(d**2) / 2, d)


def first_step():
    """Of the posterior step of pure noise t -> s: how far b = 1 moves the mean, the noise's std, and that of x_s."""
    s, t = (torch.tensor(time, dtype=torch.float64) for time in sorted(Shift.times))
    k2 = VP.sigma2(s) / VP.sigma2(t) * (VP.sigma2(t) - (VP.alpha(t) / VP.alpha(s)) ** 2 * VP.sigma2(s))
    direction = (VP.sigma2(s) - k2).sqrt()
    move = VP.alpha(s) * VP.sigma2(t) - direction * VP.alpha(t) * VP.sigma(t)
    factor = VP.alpha(s) * VP.alpha(t) + direction * VP.sigma(t)
    return float(move), float(k2.sqrt()), float((factor**2 * VP.prior_std**2 + k2).sqrt())


def figures(**algorithm):
    """Of one iteration of two steps, of which the first alone has a density."""
    tuner = sa.Finetuner(
        sa.Model(Shift(), process=VP, predicts="v", shape=(1,)),
        reward=lambda x, c: x[:, 0],
        algorithm=sa.DDPO(baseline="batch", **algorithm),
        sampler=sa.Sampler(steps=2),
        train=sa.Train(iterations=1, batch=BATCH, lr=LR, device="cpu", max_rows=BATCH),
    )
    Shift.times.clear()  # that at which it was tried
    return next(iter(tuner))


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_the_clip_fraction_is_the_share_of_ratios_that_leave_the_clip(clip):
    """Two minibatches of the one step that has a density: the first at ratio 1, the second one step of Adam away."""
    found = figures(minibatches=2, clip=clip)["clip_fraction"]
    move, std, _ = first_step()
    d = LR * move / std
    close(
        found,
        fraction(d, clip) / 2,
        atol=0.01,
        third_of_the_clip=fraction(d, clip / 3) / 2,
        twice_the_clip=fraction(d, 2 * clip) / 2,
        above_only=(1 - norm.cdf(math.log1p(clip), -(d**2) / 2, d)) / 2,
        of_the_second_alone=fraction(d, clip),
    )


def test_the_gradient_is_a_sum_over_steps_and_a_mean_over_paths():
    """`E[A dl/db] = move/std E[A z]`, and A correlates with the noise z by std of the noise over std of x_s."""
    found = figures(minibatches=1)["grad_norm"]
    move, _, spread = first_step()
    truth = move / spread
    close(found, truth, rtol=0.03, atol=0, sum_over_paths=BATCH * truth, mean_over_steps=truth / 2, not_standardised=move)
