"""Truth: closed forms of the laws that pairs ask for, and autograd through the loss that two passes take apart.

Winners drawn with chance sigmoid(r(a) - r(b)) ask for p_pre exp(r/beta)/Z; good samples against the opponent's ask for
p_opponent^(1 - 1/scale) p_data^(1/scale). On tokens both are reached; on Gaussian states up to the finitely many times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from affine import LAW, none
from scipy.optimize import brentq, minimize
from scipy.special import expit
from torch import nn
from torch.nn.functional import softplus
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms._pairs import NoisedRatio, pair_update
from scoreaction.algorithms._setting import Examples, Objective, Setting
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import expand

VP = sa.VP()


def learner_of(model, *, algorithm=None, data=None, **sampler):
    chosen = sa.Sampler(**model.sampling | {"steps": 8} | model.sampling | sampler)
    objective = Objective(lambda x0, prompt: x0.sum(1), False)
    return model.learner(algorithm or sa.DPO(), Setting(model, chosen, objective, 4, None, data=data))


def update(learner, ratio, pairs, *, scale=0.5, seed=0, reference=None):
    """The update on pairs (2, n, *shape), with the same times and noise for the same seed."""
    generator, n = torch.Generator().manual_seed(seed), pairs.shape[1]
    fixed = {"scale": scale, "reference": reference or learner.pretrained, "generator": generator}
    return pair_update(learner, ratio, pairs, none(n), total=n, **fixed)


def stepped(found, weight=None):
    """The loss of the pairs, weighted (n,), with its gradient left on the parameters: of the surrogate, as the loop has it."""
    (term,) = found.terms
    values, figures = term.loss(torch.arange(len(term.rows)))
    n = len(values) if weight is None else len(weight)
    weight = torch.full((n,), 1 / n, dtype=F64) if weight is None else weight
    count = len(values) // n
    (values * weight.repeat(count) / count).sum().backward()
    return float((figures["pair_loss"][:n] * weight).sum())


# Gaussian states


class Tilted(nn.Module):
    """The v of a score between those of two laws: `s_a + c (s_b - s_a)`."""

    def __init__(self, first: Mixture, second: Mixture) -> None:
        super().__init__()
        self.laws, self.c = (first, second), nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, t, cond):
        a, b = (law.prediction(VP, x.double(), t) for law in self.laws)
        eps, x0 = a.eps + self.c * (b.eps - a.eps), a.x0 + self.c * (b.x0 - a.x0)
        return expand(VP.alpha(t), eps) * eps - expand(VP.sigma(t), eps) * x0


def tilted(shift=0.8 / 0.5):
    """The policy at c = 0 and its tilt by x/beta, beta .5, at c = 1."""
    other = Mixture(f64([1.0]), f64([[0.3 + shift]]), f64([[[0.8]]]))
    return sa.Model(Tilted(LAW, other), process=VP, predicts="v", shape=(1,))


def gaussian_pairs(n, seed=0):
    """Pairs of N(.3, .8), labelled by the reward x."""
    rng = np.random.default_rng(seed)
    a, b = 0.3 + math.sqrt(0.8) * rng.standard_normal((2, n))
    first = rng.random(n) < expit(a - b)
    return f64(np.stack([np.where(first, a, b), np.where(first, b, a)]))[..., None]


def test_two_passes_are_the_gradient_of_the_loss():
    """Truth: autograd through softplus of errors that are written out. Twins: a sign, a mean over dimensions, other times."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(4, 3, dtype=F64)

        def forward(self, x, t, cond):
            return self.body(torch.cat([x, t[:, None]], 1))

    model = sa.Model(Net(), process=VP, predicts="v", shape=(3,))
    with torch.no_grad():
        model.net.body.weight.mul_(1.5)
    learner, ratio, pairs = learner_of(model), NoisedRatio(4), torch.randn(2, 6, 3, dtype=F64)

    def whole(seed, scale=0.5, size=1.0):
        model.net.zero_grad()
        probes = ratio.probes(learner, pairs, none(6), 6, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            there = (model.reference(probes.x, probes.t).eps - probes.target).square().sum(1)
        here = (model.predict(probes.x, probes.t).eps - probes.target).square().sum(1)
        won, lost = (probes.weight * (there - here)).reshape(2, 4, 6).sum(1)
        loss = softplus(-scale * size * (won - lost)).mean()
        loss.backward()
        return loss.item(), model.net.body.weight.grad.clone()

    loss, gradient = whole(0)
    model.net.zero_grad()
    found, surrogate = stepped(update(learner, ratio, pairs)), model.net.body.weight.grad.clone()
    close(found, loss, atol=1e-12, other_times=whole(1)[0])
    wrong = {"sign": whole(0, -0.5)[1], "mean_over_dimensions": whole(0, size=1 / 3)[1], "other_times": whole(1)[1]}
    close(surrogate, gradient, atol=1e-12, **wrong)


@pytest.mark.parametrize("process", [sa.VP(), sa.Flow(), sa.VE()], ids=["vp", "flow", "ve"])
@pytest.mark.slow
def test_the_mean_log_ratio_is_that_of_the_laws(process):
    """Truth: log N(x; .9, .5) - log N(x; .3, .8), in standard errors. Twins: a constant weight, and half of it."""
    laws = [Mixture(f64([1.0]), f64([[m]]), f64([[[v]]])) for m, v in ((0.3, 0.8), (0.9, 0.5))]

    model = sa.Model(Tilted(*laws), process=VP, predicts="v", shape=(1,))
    learner, n = learner_of(model), 6000
    learner.process, points = process, f64([-0.6, 0.5, 1.8])

    def deviation(ratio, size=1.0):
        worst = 0.0
        for x in points:
            x0 = x.expand(1, n, 1)
            probes = ratio.probes(learner, x0, none(n), n, torch.Generator().manual_seed(1))
            base, other = (law.prediction(process, probes.x, probes.t) for law in laws)
            found = size * ratio.term(other, base, probes).reshape(-1, n).sum(0)
            truth = -((x - 0.9) ** 2) / 1.0 - math.log(0.5) / 2 + (x - 0.3) ** 2 / 1.6 + math.log(0.8) / 2
            worst = max(worst, abs(float((found.mean() - truth) / (found.std() / math.sqrt(n)))))
        return worst

    def right(z):
        assert z < 4, z

    accepts(
        right, deviation(NoisedRatio(4)), constant=deviation(NoisedRatio(4, "published")), half=deviation(NoisedRatio(4), 0.5)
    )


@dataclass(frozen=True)
class Apart(NoisedRatio):
    """Twin: winners and losers have noise of their own."""

    def probes(self, learner, x0, prompt, total, generator):
        right = super().probes(learner, x0, prompt, total, generator)
        own, half = x0.shape[1], len(right.t) // 2
        eps = right.target.clone()
        eps[half:] = eps[half:].unflatten(0, (-1, own)).roll(1, 1).flatten(0, 1)
        move = expand(VP.sigma(right.t), eps) * (eps - right.target)
        return right._replace(x=right.x + move, target=eps)


def scale_at_rest(ratio, pairs, low=-0.5, high=4.0):
    """The c at which the population's gradient vanishes."""
    model = tilted()
    learner = learner_of(model)

    def slope(c):
        model.net.zero_grad()
        with torch.no_grad():
            model.net.c.fill_(c)
        stepped(update(learner, ratio, pairs))
        return float(model.net.c.grad)

    return brentq(slope, low, high, xtol=1e-3)


@pytest.mark.long
def test_dpo_comes_to_the_tilted_gaussian():
    """Truth: c = 1, here the logistic fit of the same labels with the exact log ratio. Twins: noise apart, constant weight."""
    pairs = gaussian_pairs(1500)
    gap = (pairs[0] - pairs[1]).squeeze(1).numpy()
    best = brentq(lambda c: -(gap * expit(-c * gap)).mean(), 0, 4)
    apart, constant = scale_at_rest(Apart(16), pairs), scale_at_rest(NoisedRatio(16, "published"), pairs, high=60.0)
    close(scale_at_rest(NoisedRatio(16), pairs), best, atol=0.02, noise_apart=apart, constant_weight=constant)
    assert apart < 0.9 * best
    assert constant > 2 * best


class Bell(nn.Module):
    """The v of the exact score of N(m, exp(log_v))."""

    def __init__(self, m, v):
        super().__init__()
        self.m, self.log_v = nn.Parameter(f64(m)), nn.Parameter(f64(v).log())

    def forward(self, x, t, cond):
        alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
        variance = alpha**2 * self.log_v.exp() + sigma**2
        move = (x - alpha * self.m) / variance
        return alpha * sigma * move - sigma * (self.m + alpha * self.log_v.exp() * move)


@pytest.mark.long
def test_rounds_of_spin_come_to_the_law_of_the_data():
    """Data N(1, .5), start N(-.5, 1.5), scale 1, 8 times: means arrive first, N(1.3, .9), N(.95, .7), N(1.0, .6).

    Twin: scale 1/2, which cycles.
    """

    def rounds(scale, count):
        m, v = -0.5, 1.5
        for seed in range(count):
            rng = np.random.default_rng(seed)
            winner, loser = 1 + math.sqrt(0.5) * rng.standard_normal(3000), m + math.sqrt(v) * rng.standard_normal(3000)
            model = sa.Model(Bell(m, v), process=VP, predicts="v", shape=(1,))
            learner, pairs = learner_of(model), f64(np.stack([winner, loser]))[..., None]

            def value(at, model=model, learner=learner, pairs=pairs, seed=seed):
                model.net.zero_grad()
                with torch.no_grad():
                    model.net.m.fill_(at[0])
                    model.net.log_v.fill_(at[1])
                loss = stepped(update(learner, NoisedRatio(8), pairs, scale=scale, seed=seed))
                return loss, np.array([float(model.net.m.grad), float(model.net.log_v.grad)])

            m, log_v = minimize(value, [m, math.log(v)], jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 30}).x
            v = math.exp(log_v)
        return f64([m, v])

    found = rounds(1.0, 3)
    close(found, f64([1.0, 0.6]), atol=0.1, untrained=f64([-0.5, 1.5]), cycles=rounds(0.5, 2))


# The opponent


def test_the_opponent_is_the_policy_when_its_round_began():
    """Losers and reference are of its weights, and a round ends after `round` iterations. Twin: a longer round."""
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    data = sa.Samples(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    tuner = sa.Finetuner(
        model, reward=sa.Reward(lambda x, prompts: x[:, 0] * 0), algorithm=sa.SPIN(round=2, times=2, updates=2), data=data,
        sampler=sa.Sampler(steps=3), train=sa.Train(iterations=3, batch=8, lr=1e-2),
    )  # fmt: skip
    kls = [metrics["kl_nats"] for metrics in tuner]
    close(kls[:2], [0.0, 0.0], atol=1e-12, of_the_third=[0.0, kls[2]])
    assert kls[2] > 1e-3
    assert tuner.learner.state.fought == 1
    opponent = dict(zip(model.parameters, tuner.learner.opponent.buffers(), strict=True))
    assert any(not torch.equal(p, opponent[name]) for name, p in model.parameters.items())
    tuner.learner.opponent.follow(0.0)
    assert all(torch.equal(p, opponent[name]) for name, p in model.parameters.items())


def test_winners_have_the_prompts_of_their_losers():
    """Truth: samples whose value is their prompt's number. Prompts of one text share their samples."""
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config())
    learner = learner_of(model, algorithm=sa.SPIN())
    numbers = torch.tensor([0, 1, 1, 0, 2])
    x0 = numbers[:, None].expand(-1, 2).float()
    learner.data = Examples(x0, None, numbers, torch.tensor([0, 1, 2, 1]))
    prompt = torch.tensor([3, 0, 2, 1, 3, 3])
    found = learner._winners(prompt, torch.Generator().manual_seed(0))[:, 0].tolist()
    close(found, [1, 0, 2, 1, 1, 1], atol=0, by_number=prompt.tolist())
