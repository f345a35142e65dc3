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


def distance(t, s):
    """How many stds the mean of the posterior step t -> s moves for b = LR."""
    t, s = (torch.tensor(time, dtype=torch.float64) for time in (t, s))
    k2 = VP.sigma2(s) / VP.sigma2(t) * (VP.sigma2(t) - (VP.alpha(t) / VP.alpha(s)) ** 2 * VP.sigma2(s))
    direction = (VP.sigma2(s) - k2).sqrt()
    return LR * float((VP.alpha(s) * VP.sigma2(t) - direction * VP.alpha(t) * VP.sigma(t)) / k2.sqrt())


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_the_clip_fraction_is_the_share_of_ratios_that_leave_the_clip(clip):
    """Two minibatches of the one step that has a density: the first at ratio 1, the second one step of Adam away."""
    Shift.times.clear()
    tuner = sa.Finetuner(
        sa.Model(Shift(), process=VP, predicts="v", shape=(1,)),
        reward=lambda x, c: x[:, 0],
        algorithm=sa.DDPO(minibatches=2, clip=clip),
        sampler=sa.Sampler(steps=2),
        train=sa.Train(iterations=1, batch=BATCH, lr=LR, device="cpu", max_rows=BATCH),
        evaluation=sa.Evaluation(n=2, steps=2),
    )
    found = next(iter(tuner))["clip_fraction"]
    s, t = sorted(Shift.times)
    d = distance(t, s)
    close(
        found,
        fraction(d, clip) / 2,
        atol=0.01,
        third_of_the_clip=fraction(d, clip / 3) / 2,
        twice_the_clip=fraction(d, 2 * clip) / 2,
        above_only=(1 - norm.cdf(math.log1p(clip), -(d**2) / 2, d)) / 2,
        of_the_second_alone=fraction(d, clip),
    )
