"""Truth: gradients of the losses by hand; the fixed points of scalar Gaussian data, two numbers found by a root of ODEs."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from affine import none
from driving import each, run
from oracles.forward import TASK, coefficients, fixed_point
from test_contract import gains, improves, tuner_of
from torch import nn
from twins import F64, accepts, close, f64, same

import scoreaction as sa
from scoreaction.algorithms._forward import LaggedPolicy, drawn_times, flow_time, renoised
from scoreaction.algorithms._likelihood_ratio import clipped_surrogate
from scoreaction.algorithms._setting import Objective, Setting
from scoreaction.algorithms.awm import matching_score
from scoreaction.algorithms.nft import nft_loss
from scoreaction.algorithms.ram import ram_loss
from scoreaction.diffusion.predictions import expand, to_prediction
from scoreaction.sampling.rollout import Rollout
from scoreaction.types import Prediction

VP = sa.VP()
REWARD = lambda x: -TASK.q / 2 * (x[:, 0] - TASK.mu) ** 2 + TASK.l * x[:, 0]  # noqa: E731


class Rule(nn.Module):
    """The score of a rule, `slope x + offset`, moved by `th0 alpha^2 x + th1 alpha`; the base's while `base` is 1."""

    def __init__(self, rule, law):
        super().__init__()
        self.rule, self.law, self.th = rule, law, nn.Parameter(torch.zeros(2))
        self.register_buffer("base", torch.ones(()))

    def forward(self, x, t, cond):
        alpha, sigma2 = VP.alpha(t), VP.sigma2(t)
        law = (TASK.m, TASK.v)
        P = alpha**2 * law[1] + sigma2
        slope, offset = (-1 / P, alpha * law[0] / P) if self.base else coefficients(self.rule, TASK, self.law, alpha, sigma2)
        score = expand(slope + self.th[0] * alpha**2, x) * x + expand(offset + self.th[1] * alpha, x)
        prediction = to_prediction(VP, "score", x, t, score)
        return expand(alpha, x) * prediction.eps - expand(alpha.new_tensor(1.0) * sigma2.sqrt(), x) * prediction.x0


def at_rest(algorithm, rule, law=None, *, batch=4000, seed=0, **sampler):
    """A learner whose policy is that of a rule, and clean samples of that policy's law as its rollout."""
    law = law or (TASK.tilted if rule == "optimal" else settled(rule))
    made = sa.Model(Rule(rule, law), process=VP, predicts="v", shape=(1,))
    made.net.double()
    made.double = True
    made.net.base.zero_()
    learner = algorithm.build(
        Setting(made, sa.Sampler(steps=8, **sampler), Objective(lambda x0, prompt: REWARD(x0), False), batch, None)
    )
    learner.networks.double()
    generator = torch.Generator().manual_seed(seed)
    x0 = law[0] + law[1] ** 0.5 * torch.randn(batch, 1, generator=generator, dtype=F64)
    empty = torch.zeros(8, batch, 1, dtype=F64)
    times = learner.sampler.times(VP)
    rollout = Rollout(times, torch.cat([empty, x0[None]]), Prediction(empty, empty), Prediction(empty, empty), none(batch))
    return learner, replace(rollout, rewards=REWARD(x0), off_below=learner.sampler.acts_from), generator


@cache
def settled(rule):
    return fixed_point(rule, TASK, VP)


def pushed(gradients):
    """The mean gradient in its standard errors: the larger of the two parameters'."""
    values = torch.stack(gradients)
    return float((values.mean(0) / (values.std(0) / len(values) ** 0.5)).abs().max())


def rests(errors):
    assert errors < 4, f"{errors} standard errors from rest"


@pytest.mark.slow
def test_the_fixed_points_are_those_that_are_known():
    """Truth: scalar ODEs iterated to 1e-9 apart from here, in `v` and mean; the tilted law has a closed form."""
    close(settled("ram"), (0.7686, 0.3541), atol=1e-4, tilted=TASK.tilted)
    close(settled("ram_batch"), (0.7564, 0.3220), atol=1e-4, state_baseline=settled("ram"))
    close(TASK.tilted, (0.8538, 0.3077), atol=1e-4, ram=settled("ram"))
    close(fixed_point("optimal", TASK, VP), TASK.tilted, atol=1e-4, ram=settled("ram"))


@pytest.mark.slow
def test_ram_rests_at_its_fixed_point():
    """The product's updates with the batch's mean as baseline: no mean gradient there, and one at the tilted law."""

    def errors(rule, law=None, **options):
        found = []
        for seed in range(12):
            algorithm = sa.RAM(beta=TASK.beta, baseline="batch", minibatches=1, **options)
            learner, rollout, generator = at_rest(algorithm, rule, law, seed=seed)
            ((_, loss, _),) = run(learner.updates(rollout, generator))
            found.append(torch.autograd.grad(loss, learner.model.parameters["th"])[0].double())
        return pushed(found)

    wrong = {"tilted": errors("optimal"), "state_baseline": errors("ram"), "base": errors("ram", (TASK.m, TASK.v))}
    accepts(rests, errors("ram_batch"), **wrong)


@pytest.mark.long
def test_the_rams_equation_rests_at_the_known_law_with_the_exact_baseline():
    """Truth: N(.7686, .3541) where the baseline is `E[r | x_t]`; with the mean reward in its place it does not rest there."""

    def errors(rule, *, baseline=True):
        found = []
        for seed in range(12):
            learner, rollout, generator = at_rest(sa.RAM(beta=TASK.beta), rule, seed=seed)
            points = renoised(learner, rollout, drawn_times(learner, 8, generator, power=1.0), generator)
            policy, base = (f(*points.states) for f in (learner.policy, learner.pretrained))
            mean, variance = learner.model.net.law if rule != "optimal" else TASK.tilted
            alpha, sigma2 = (f(points.t)[:, None] for f in (VP.alpha, VP.sigma2))
            P = alpha**2 * variance + sigma2
            x0_hat, left = mean + variance * alpha / P * (points.x - alpha * mean), variance * sigma2 / P
            value = (REWARD(x0_hat) - TASK.q / 2 * left[:, 0]) if baseline else rollout.rewards.mean()
            advantage = (rollout.rewards[points.path] - value) / TASK.beta
            fixed = {"pretrained": base.eps - base.x0, "noised": points.velocity, "advantage": advantage}
            loss = ram_loss(policy.eps - policy.x0, **fixed).mean()
            found.append(torch.autograd.grad(loss, learner.model.parameters["th"])[0].double())
        return pushed(found)

    accepts(rests, errors("ram"), tilted=errors("optimal"), mean_baseline=errors("ram", baseline=False))


X, Y, Z, W = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
A = f64([2.0, -1.0, 0.5, 0.0, 3.0])


def slope_of(loss):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def test_the_gradient_of_ram_by_hand():
    """`2/d (v - v_pre - a (u - v))`, nothing through the target."""
    found = slope_of(lambda v: ram_loss(v, pretrained=Y, noised=Z, advantage=A))
    a = A[:, None]
    wrong = {
        "through": 2 / 3 * (1 + a) * (X - Y - a * (Z - X)),
        "no_anchor": 2 / 3 * -a * (Z - X),
        "flipped": X - Y + a * (Z - X),
    }
    close(found, 2 / 3 * (X - Y - a * (Z - X)), atol=1e-12, **wrong)


def test_the_gradient_of_nft_by_hand():
    """`2/d (r (y+ - c)/e+ - (1 - r)(y- - c)/e-)`; and without the sizes e the minimum is `old + (2r - 1)/b (c - old)`."""
    r, b = f64([0.0, 0.2, 0.5, 0.9, 1.0]), 0.7
    found = slope_of(lambda x0: nft_loss(x0, old=Y, clean=Z, r=r, strength=b))

    def by_hand(r, b, size=True):
        errors = [Y + b * (X - Y) - Z, Y - b * (X - Y) - Z]
        plus, minus = (e / (e.abs().mean(1, keepdim=True) if size else 1.0) for e in errors)
        return 2 / 3 * (r[:, None] * plus - (1 - r[:, None]) * minus)

    close(
        found, by_hand(r, b), atol=1e-12, swapped=by_hand(1 - r, b), no_size=by_hand(r, b, size=False), strength=by_hand(r, 1.0)
    )
    best = Y + (2 * r[:, None] - 1) / b * (Z - Y)
    plus, minus = Y + b * (best - Y) - Z, Y - b * (best - Y) - Z
    close(r[:, None] * plus - (1 - r[:, None]) * minus, 0.0, atol=1e-12, swapped=(1 - r[:, None]) * plus - r[:, None] * minus)


def test_the_gradient_of_awm_by_hand():
    """`-tau e^(p-1) 2/d (v - u)`; with p = 1 that of the plain error."""
    tau, p = f64([0.1, 0.3, 0.5, 0.7, 0.9]), 0.25
    by_hand = lambda p: -(tau * (X - Y).square().mean(1) ** (p - 1))[:, None] * 2 / 3 * (X - Y)  # noqa: E731
    found = slope_of(lambda v: matching_score(v, noised=Y, tau=tau, power=p))
    close(found, by_hand(p), atol=1e-8, plain=by_hand(1.0), flipped=-by_hand(p))
    close(slope_of(lambda v: matching_score(v, noised=Y, tau=tau, power=1.0)), by_hand(1.0), atol=1e-12, huber=by_hand(p))


T, EPS = f64([0.05, 0.3, 0.5, 0.7, 0.95])[:, None], torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=F64)


def test_nft_is_what_flow_factory_minimises():
    """Truth: its formula, in velocities at `x_t = (1 - t) x0 + t eps`, errors over their mean size, the sum over beta."""
    v, v_old, clean, r, beta = X, Y, Z, f64([0.0, 0.2, 0.5, 0.9, 1.0]), 0.7
    x_t = (1 - T) * clean + T * EPS

    def published(plus, minus):
        parts = []
        for velocity in (plus, minus):
            off = x_t - T * velocity - clean
            parts.append((off.square() / off.abs().mean(1, keepdim=True).clip(min=1e-5)).mean(1))
        return (r * parts[0] + (1 - r) * parts[1]) / beta

    plus, minus = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
    found = nft_loss(x_t - T * v, old=x_t - T * v_old, clean=clean, r=r, strength=beta)
    close(found, published(plus, minus), atol=1e-12, swapped=published(minus, plus), lagged=published(v, 2 * v_old - v))


def test_awm_is_what_flow_factory_maximises():
    """Truth: its `ghuber` score and clipped ratio, from the same random velocities, noise and advantages."""
    target, advantage, clip = EPS - Z, A - 1, 0.05

    def score(v, power=0.25):
        error = (v - target).square().mean(1)
        return -((error + 1e-10) ** power - 1e-10**power) * T[:, 0] / power

    def published(new, old):
        ratio = (new - old).exp()
        return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))

    new, old = (matching_score(v, noised=target, tau=T[:, 0], power=0.25) for v in (X, Y))
    found = clipped_surrogate(new - old, advantage, clip)
    close(found, published(score(X), score(Y)), atol=1e-12, swapped=published(score(Y), score(X)),
          huber=published(score(X, 0.5), score(Y, 0.5)))  # fmt: skip


def test_awms_first_gradient_is_the_advantage_weighted_matching():
    """Truth: `-mean A grad l`, by the closed form of l's gradient in v, at the policy that sampled: every ratio is 1."""
    learner, rollout, generator = at_rest(sa.AWM(baseline="batch", minibatches=1, kl=0.0, each=3), "ram", batch=50)
    seen = generator.get_state()
    ((_, loss, figures),) = run(learner.updates(rollout, generator))
    found = torch.autograd.grad(loss, learner.model.parameters["th"])[0].double()
    close(figures["log_ratio_first"], 0.0, atol=1e-6, moved=0.1)
    generator.set_state(seen)
    points = renoised(learner, rollout, drawn_times(learner, 3, generator, power=0.0), generator)
    prediction, tau = learner.policy(*points.states), flow_time(VP, points.t)
    v = prediction.eps - prediction.x0
    error = (v - points.velocity).detach()
    advantage = ((rollout.rewards - rollout.rewards.mean()) / rollout.rewards.std(correction=0))[points.path]

    def by_hand(advantage):
        slope = advantage * tau * error[:, 0].square() ** (0.25 - 1) * 2
        return torch.autograd.grad((slope[:, None] * error * v).mean(), learner.model.parameters["th"], retain_graph=True)[
            0
        ].double()

    close(
        found,
        by_hand(advantage),
        atol=0,
        rtol=1e-3,
        flipped=by_hand(-advantage),
        no_baseline=by_hand(rollout.rewards[points.path]),
    )


def test_nfts_first_gradient_is_along_the_good_samples():
    """Truth: `clip 2 (2r - 1)(old - c)/e` at the old policy, and nothing of the KL, which begins there too."""
    learner, rollout, generator = at_rest(sa.NFT(baseline="batch", minibatches=1, kl=0.0), "ram", batch=50)
    seen = generator.get_state()
    ((_, loss, _),) = run(learner.updates(rollout, generator))
    found = torch.autograd.grad(loss, learner.model.parameters["th"])[0].double()
    generator.set_state(seen)
    points = renoised(learner, rollout, rollout.times[:-1, None].expand(8, 50), generator)
    x0 = learner.policy(*points.states).x0
    error = (x0 - points.x0).detach()
    A = ((rollout.rewards - rollout.rewards.mean()) / rollout.rewards.std(correction=0)).clamp(-5, 5)[points.path]

    def by_hand(A):
        slope = 5 * 2 * (A / 5)[:, None] * error.sign()
        return torch.autograd.grad((slope * x0).mean(), learner.model.parameters["th"], retain_graph=True)[0].double()

    close(found, by_hand(A), atol=0, rtol=1e-4, flipped=by_hand(-A), not_clipped=by_hand(3 * A))


@pytest.mark.parametrize(("process", "off"), [(VP, 0.0), (sa.Flow(), 0.0), (VP, 0.4), (sa.VE(), 0.0)])
def test_samples_are_noised_at_times_of_the_flows_clock(process, off):
    """Truth: moments of the density `2 tau`, and of the uniform one, between its ends; one time in each part; x by hand."""
    learner, rollout, generator = at_rest(sa.RAM(), "ram", batch=2000, off_below=off)
    learner.process = process
    low, high = (float(flow_time(process, f64(t))) for t in (off, 1.0))
    for power in (1.0, 0.0):
        t = drawn_times(learner, 4, generator, power=power)
        assert float(t.min()) >= off
        tau = flow_time(process, t)
        mean = lambda p: (p + 1) / (p + 2) * (high ** (p + 2) - low ** (p + 2)) / (high ** (p + 1) - low ** (p + 1))  # noqa: E731
        close(tau.mean(), mean(power), atol=5e-3, other_density=mean(1 - power))
        parts = (tau ** (power + 1) - low ** (power + 1)) / (high ** (power + 1) - low ** (power + 1)) * 4
        same(parts.floor().clamp(0, 3).long().unique(dim=1).flatten().tolist(), [0, 1, 2, 3], once=[0, 0, 2, 3])
    points = renoised(learner, rollout, t, generator)
    same(points.path[:2001].tolist(), [*range(2000), 0], by_sample=torch.arange(2001).div(4, rounding_mode="floor").tolist())
    alpha, sigma = process.alpha(points.t)[:, None], process.sigma(points.t)[:, None]
    x = alpha * rollout.x0[points.path] + sigma * points.eps
    close(points.x, x, atol=1e-6, rtol=1e-6, not_scaled=rollout.x0[points.path] + sigma * points.eps + 1e-3)
    close([float(points.eps.mean()), float(points.eps.std())], [0.0, 1.0], atol=0.05, half=[0.0, 0.5])


def test_lagged_weights_follow_and_act():
    """Truth: `w_old <- decay w_old + (1 - decay) w` by hand; the trained weights are there again afterwards."""
    learner, rollout, generator = at_rest(sa.NFT(lag=0.3, most_lag=0.5), "ram", batch=20)
    model, old = learner.model, learner.old
    with torch.no_grad():
        model.parameters["th"].fill_(4.0)
    seen = []
    for _ in range(3):  # decays .3, .5, .5
        run(learner.updates(rollout, generator))
        seen.append(float(dict(old.named_buffers())["weight0"][0]))
    close(seen, [2.8, 3.4, 3.7], atol=1e-6, no_limit=[2.8, 3.28, 3.352])
    with old.acting():
        close(model.parameters["th"].detach(), [3.7, 3.7], atol=1e-6, trained=[4.0, 4.0])
    close(model.parameters["th"].detach(), [4.0, 4.0], atol=0, lagged=[3.7, 3.7])
    copied = LaggedPolicy(model)
    copied.load_state_dict(old.state_dict())
    close(dict(copied.named_buffers())["weight0"], [3.7, 3.7], atol=1e-6, new=[4.0, 4.0])


def test_nft_samples_from_the_lagged_policy():
    learner, _, _ = at_rest(sa.NFT(), "ram", batch=6)
    times = learner.sampler.times(VP)
    explored = lambda: learner.explore(none(6), times, torch.Generator().manual_seed(0)).x0  # noqa: E731
    before = explored()
    with torch.no_grad():
        learner.model.parameters["th"].fill_(0.5)
    after = explored()
    learner.old.follow(0.0)
    same(after, before, trained=explored())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ram", "nft", "awm"])
def test_any_solver_will_do(name):
    """Six deterministic steps that look back, which DDPO refuses."""
    sampler = sa.Sampler(solver="dpmpp_2m", eta=0.0, steps=6)

    def tuner(algorithm, sign):
        return tuner_of(algorithm, sign, differentiable=False, sampler=sampler)

    with pytest.raises(ValueError, match="needs densities"):
        tuner("ddpo", 1)
    accepts(improves, gains(tuner(name, 1), 1), flipped=gains(tuner(name, -1), -1))


def test_awms_anchor_is_the_average_or_the_base():
    """The first iteration: at the average nothing is paid; the distance to the base is."""

    def losses(**options):
        learner, rollout, generator = at_rest(sa.AWM(minibatches=1, baseline="batch", **options), "ram", batch=40)
        return float(next(each(learner.updates(rollout, generator)))[1])

    close(losses(kl=5.0), losses(kl=0.0), atol=1e-6, to_base=losses(kl=5.0, kl_to="pretrained"))
