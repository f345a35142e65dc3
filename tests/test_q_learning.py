"""Truth: the linear-quadratic case in closed form, its chain by recursion, and quadrature over the sampler's noise."""

import math

import numpy as np
import pytest
import torch
from affine import BETA, LAW, OLD, REWARD, ExactValue, experienced, gradient, model, setting
from test_vard import GRADIENTS
from twins import F64, accepts, close, f64

import scoreaction as sa
from scoreaction.algorithms.q_learning import td_residual
from scoreaction.diffusion.kernel_density import KernelDensity
from scoreaction.diffusion.kl import g2_integral
from scoreaction.diffusion.solvers import ddim_step, noise_std, time_grid
from scoreaction.models import from_data
from scoreaction.types import Prediction

VP = sa.VP()
QUADRATIC = REWARD.quadratic
BEST = LAW.tilted(QUADRATIC, BETA)


def value(x, t):
    return LAW.value(QUADRATIC, BETA, VP, x, t)


@pytest.mark.parametrize("t", [0.05, 0.2, 0.5, 0.8])
def test_the_temporal_difference_is_zero_for_every_action(t):
    """In the mean over the sampler's noise, at the optimum, to the second order of the step. Twins: the mean square of one
    estimate with an error in the place of two, no loss of the action, another beta."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    t, dt = f64(t), 1e-5
    x, actions = f64([[-1.5], [0.2], [1.1]]), f64([-3.0, -0.5, 0.4, 2.0])
    pretrained, best = LAW.score(VP, x, t), BEST.score(VP, x, t)
    g2, f = VP.g2(t), VP.f(t)

    def largest(**change):
        worst = 0.0
        for a in actions:
            action = torch.full_like(x, float(a))
            mean, std = x - dt * f * x + dt * g2 * action, torch.sqrt(g2 * dt)
            after = sum(w * value(mean + z * std, t - dt) for z, w in zip(nodes, weights / weights.sum(), strict=True))
            fixed = {"policy": best, "scores": (pretrained, pretrained), "beta": BETA}
            residual = td_residual(action, value=value(x, t), value_next=after, g2dt=g2 * dt, **fixed | change)
            worst = max(worst, float((residual / dt).abs().max()))
        return worst

    close(
        largest(), 0.0, atol=2e-3 * float(g2), noisy_square=largest(scores=(pretrained + 0.3, pretrained + 0.3)),
        policy_elsewhere=largest(policy=best + 0.3), other_beta=largest(beta=2 * BETA),
    )  # fmt: skip


def learner(steps, batch, made=None, **config):
    made = made or model(VP)
    made.net.double()
    return sa.QLearning(beta=BETA, **config).build(setting(made, steps=steps, batch=batch))


def signals(steps, batch, seeds=2, *, theta=0.05, exact=None):
    """Minus the gradient of one iteration's losses at the old policy, with the exact value in the critic's place."""
    exact, draws = exact or ExactValue(VP, 1.0, OLD), []
    for seed in range(seeds):
        made = learner(steps, batch, updates=1, rows=10**7, trust=0.0, critic_updates=1, theta=theta)
        made.critic.forward = lambda x, t, prompt, look=None: exact.value(x, t)
        rollout = experienced(made, batch, torch.Generator().manual_seed(seed))
        draws.append(-gradient(made.model, made.updates(rollout, torch.Generator().manual_seed(seed))))
    return torch.stack(draws)


@pytest.mark.slow
def test_with_the_exact_value_it_is_the_policy_gradient_for_every_theta():
    """Twins: the sign, a mean over steps, no exploration but the sampler's own."""
    for theta in (0.05, 0.5):
        fine = signals(200, 300, theta=theta).mean(0)
        close(fine, f64(GRADIENTS[1.0]), atol=0.04, sign=-fine, mean_over_steps=fine / 200, forgotten=0 * fine)


def chain(steps, follow):
    """Mean, variance and mean reward of the end of the chain whose affine policy `follow(t, s)` gives, and its policies."""
    times, mean, variance, policies = time_grid(VP, steps, name="power"), 0.0, 1.0, []
    for t, s in zip(times[:-1], times[1:], strict=True):
        ratio, k2 = float(VP.alpha(s) / VP.alpha(t)), float(noise_std(VP, t, s, 1.0) ** 2)
        gain = ratio * VP.sigma2(t) - VP.sigma(t) * torch.sqrt((VP.sigma2(s) - k2).clamp(min=0))
        offset, slope = follow(t, s, ratio, float(gain))
        policies.append((offset, slope))
        factor = ratio + float(gain) * slope
        mean, variance = factor * mean + float(gain) * offset, factor**2 * variance + k2
    reward = -((mean - 1) ** 2 + variance) / 2 + 0.2 * mean
    return (mean, variance, reward), policies


def affine(law, t):
    """The score of a noised Gaussian as offset and slope."""
    a, v, m = VP.alpha(t), float(law.covariances[0]), float(law.means[0])
    P = a**2 * v + VP.sigma2(t)
    return float(a * m / P), float(-1 / P)


def stop(t, s, ratio, gain):
    """The policy at which the differences have no mean: `mu = s + (gain/w) E grad V(s, x_s)/beta`."""
    h0, h1 = (b - p for b, p in zip(affine(BEST, s), affine(LAW, s), strict=True)) if s > 0 else (1.2 / BETA, -1 / BETA)
    p0, p1 = affine(LAW, t)
    c = gain / float(g2_integral(VP, t, s))
    return (p0 + c * h0) / (1 - c * h1 * gain), (p1 + c * h1 * ratio) / (1 - c * h1 * gain)


def test_it_stops_where_the_recursion_says_near_the_optimum():
    """The differences of 4,000 episodes at the policy of the recursion. Twins: the pretrained policy, twice the step to the
    optimum; and the law there, beside the one of the optimum's score on the same chain."""
    steps, generator = 25, torch.Generator().manual_seed(0)
    for count, law in ((25, (0.8888, 0.2202, 0.0615)), (100, (0.8625, 0.2809, 0.0226))):
        same_chain = chain(count, lambda t, s, ratio, gain: affine(BEST, t))[0]
        close(chain(count, stop)[0], law, atol=2e-4, exact_score=same_chain)
    close(same_chain, (0.8538, 0.2845, 0.0178), atol=2e-4, law_itself=(0.8538, 0.3077, 0.0062))
    times, theta = time_grid(VP, steps, name="power"), 0.3

    def largest(policies):
        x, worst = torch.randn(4000, 1, generator=generator, dtype=F64), 0.0
        for (offset, slope), t, s in zip(policies, times[:-1], times[1:], strict=True):
            sigma, w = VP.sigma(t), g2_integral(VP, t, s)
            policy, var = offset + slope * x, theta / (BETA * VP.g2(t))
            noise = torch.sqrt(var) * torch.randn(x.shape, generator=generator, dtype=F64)

            def taken(action, x=x, t=t, s=s, sigma=sigma):
                eps = -sigma * action
                return ddim_step(VP, Prediction((x - sigma * eps) / VP.alpha(t), eps), t, s, 1.0)

            step = taken(policy + noise)
            after = step.mean + step.std * torch.randn(x.shape, generator=generator, dtype=F64)
            instead = after - step.mean + taken(policy).mean
            ends = [value(y, s) if s > 0 else QUADRATIC(y) for y in (after, instead)]
            fixed = {"policy": policy, "scores": (LAW.score(VP, x, t),) * 2, "value": value(x, t), "g2dt": w, "beta": BETA}
            delta = [td_residual(a, value_next=v, **fixed) for a, v in zip((policy + noise, policy), ends, strict=True)]
            signal = (noise[:, 0] * (delta[0] - delta[1]) / (w * var))[:, None] / BETA
            for feature in (torch.ones_like(x), (x - x.mean()) / x.std()):
                z = (signal * feature).mean() / ((signal * feature).std() / math.sqrt(len(x)) + 1e-12)
                worst = max(worst, float(z.abs()))
            x = after
        return worst

    right = chain(steps, stop)[1]
    pretrained = [affine(LAW, t) for t in times[:-1]]
    twice = [(2 * a - c, 2 * b - d) for (a, b), (c, d) in zip(right, pretrained, strict=True)]
    close(largest(right), 0.0, atol=4.0, pretrained=largest(pretrained), twice=largest(twice))


def test_the_differences_vanish_at_the_optimum_and_the_plain_ones_do_not():
    """The variance of what the policy follows: with that of mu taken off, and, as printed, without. Twin: without."""
    t, s, theta = f64(0.3), f64(0.29), 0.05
    generator = torch.Generator().manual_seed(0)
    x = VP.alpha(t) * BEST.sample(4000, generator) + VP.sigma(t) * torch.randn(4000, 1, generator=generator, dtype=F64)
    policy, var, w = BEST.score(VP, x, t), theta / (BETA * VP.g2(t)), g2_integral(VP, t, s)
    noise = torch.sqrt(var) * torch.randn(x.shape, generator=generator, dtype=F64)
    gain = VP.alpha(s) * VP.sigma2(t) / VP.alpha(t) - VP.sigma(t) * torch.sqrt(VP.sigma2(s) - noise_std(VP, t, s, 1.0) ** 2)
    own = ddim_step(VP, Prediction((x + VP.sigma2(t) * policy) / VP.alpha(t), -VP.sigma(t) * policy), t, s, 1.0).sample(
        generator
    )
    fixed = {"policy": policy, "scores": (LAW.score(VP, x, t),) * 2, "value": value(x, t), "g2dt": w, "beta": BETA}
    acted = td_residual(policy + noise, value_next=value(own + gain * noise, s), **fixed)
    plain = noise[:, 0] * acted / (w * var)
    without = noise[:, 0] * (acted - td_residual(policy, value_next=value(own, s), **fixed)) / (w * var)
    assert float(plain.std()) > 20 * float(without.std())

    def small(signal):
        assert float(signal.std()) < 0.5

    accepts(small, without, plain=plain)


@pytest.mark.slow
def test_exploration_adds_its_own_variance():
    """The chain of the pretrained policy by recursion, theta dt/beta more a step. Twin: of theta 0."""
    steps, batch = 50, 60_000
    for theta, truth in ((0.5, 0.7202), (0.05, 0.7066)):
        made = learner(steps, batch, model(VP, (0.0, 0.0)), theta=theta)
        generator = torch.Generator().manual_seed(1)
        x = made.explore(torch.zeros(batch, dtype=torch.long), made.sampler.times(VP), generator).x0
        spread = float(x.var())
        close(spread, truth, atol=0.0115, **({"none": 0.7051, "twice": 0.7360} if theta == 0.5 else {"large": 0.7202}))


def rows_of(n):
    return 0.3 + math.sqrt(0.8) * torch.randn(n, 1, generator=torch.Generator().manual_seed(2), dtype=F64)


def estimates(m, t, places, draws=4000):
    """Scores at these states by m points of a Gaussian's 20,000, of which each draw has its own."""
    law, generator = KernelDensity.at(rows_of(20_000), std=1e-3), torch.Generator().manual_seed(m)
    x = places.repeat_interleave(draws)[:, None]
    chosen = torch.randint(20_000, (len(x), m), generator=generator)
    return law.score_by(VP, x, t, chosen).view(len(places), draws)


def test_few_points_give_the_score_of_a_narrower_law():
    """The slope of the mean estimate: of one point that of the mean's own, and nearer to the law's with more of them."""
    t = f64(0.3)
    alpha, sigma2 = VP.alpha(t), VP.sigma2(t)
    P = alpha**2 * 0.8 + sigma2
    places = alpha * 0.3 + torch.sqrt(P) * f64([-1.0, 1.0])
    slopes = {}
    for m in (1, 16, 64, 256):
        mean = estimates(m, t, places).mean(1)
        slopes[m] = float((mean[1] - mean[0]) / (places[1] - places[0]))
    close(slopes[1], -1 / sigma2, rtol=0.03, law=-1 / P)
    close(slopes[256], -1 / P, rtol=0.05, one=slopes[1])
    assert slopes[1] < slopes[16] < slopes[64] < slopes[256]
    whole = KernelDensity.at(rows_of(300), std=0.1)
    everyone = torch.arange(300).repeat(4, 1)
    x = f64([[-1.0], [0.0], [0.5], [2.0]])
    close(
        whole.score_by(VP, x, t, everyone), whole.score(VP, x, t), atol=1e-9, half=whole.score_by(VP, x, t, everyone[:, :150])
    )


def test_the_variance_of_an_estimate_is_a_cost_that_two_estimates_do_not_have():
    """`beta/2 g^2 Var` with 16 points at five places, by which a square is too large, and a product of two is not."""
    t = f64(0.2919)
    P = VP.alpha(t) ** 2 * 0.8 + VP.sigma2(t)
    places = VP.alpha(t) * 0.3 + torch.sqrt(P) * f64([-2.0, -1.0, 0.0, 1.0, 2.0])
    first, second = estimates(16, t, places, 8000).chunk(2, 1)
    price = BETA / 2 * VP.g2(t)
    close(price * first.var(1), [0.21, 0.07, 0.05, 0.07, 0.22], atol=0.0, rtol=0.25, flat=[0.12] * 5)
    square = first.mean(1) ** 2
    close(price * (first * second).mean(1), price * square, atol=0.06, of_one=price * (first**2).mean(1))


def test_v_is_fitted_to_what_comes_and_not_to_its_own_next_value():
    """Slopes of V at four times, of a linear reward without cost: regression on the end finds the true ones, and the mean
    square of the temporal difference, differentiated in full, others that fall with the step."""
    steps, reward = 100, 1.0
    times = time_grid(VP, steps, name="power")
    _, policies = chain(steps, lambda t, s, ratio, gain: affine(LAW, t))
    factors, noises, variances = [], [], [float(VP.alpha(f64(1.0)) ** 2 * 0.8 + VP.sigma2(f64(1.0)))]
    for (_, slope), t, s in zip(policies, times[:-1], times[1:], strict=True):
        ratio, k2 = VP.alpha(s) / VP.alpha(t), noise_std(VP, t, s, 1.0) ** 2
        gain = ratio * VP.sigma2(t) - VP.sigma(t) * torch.sqrt((VP.sigma2(s) - k2).clamp(min=0))
        factors.append(float(ratio + gain * slope))
        noises.append(float(k2))
        variances.append(factors[-1] ** 2 * variances[-1] + noises[-1])
    true = np.array([np.prod(factors[i:]) for i in range(steps)]) * reward
    H, rhs = np.zeros((steps, steps)), np.zeros(steps)
    for i in range(steps):
        H[i, i] += variances[i]
        if i + 1 < steps:
            H[i + 1, i + 1] += factors[i] ** 2 * variances[i] + noises[i]
            H[i, i + 1] = H[i + 1, i] = -factors[i] * variances[i]
        else:
            rhs[i] = factors[i] * variances[i] * reward
    full = np.linalg.solve(H, rhs)
    made = learner(steps, 4000, model(VP, (0.0, 0.0)), critic_updates=1)
    made.critic.double()
    rollout = experienced(made, 4000, torch.Generator().manual_seed(0))
    at = [int((times[:-1] - t).abs().argmin()) for t in (0.5, 0.3, 0.1, 0.05)]
    ends = rollout.x0[:, 0]
    slopes = [float(torch.cov(torch.stack([rollout.x[i, :, 0], ends]))[0, 1] / rollout.x[i, :, 0].var()) for i in at]
    close(true[at], [0.229, 0.543, 0.918, 0.976], atol=2e-3, full=[0.0, 0.001, 0.117, 0.333])
    close(full[at], [0.0, 0.001, 0.117, 0.333], atol=2e-3, true=true[at])
    close(slopes, true[at], atol=0.07, full_gradient=full[at])


def test_a_run_on_points_of_a_table_learns():
    """Rewards rise, and the critic's cost is of products. Twin: with the sign flipped they fall."""

    def rise(sign):
        torch.manual_seed(0)
        tuner = sa.Finetuner(
            from_data.build(from_data.Config(data="moons", hidden=32, depth=2)),
            reward=lambda x, prompts: sign * x[:, 0],
            algorithm=sa.QLearning(beta=0.5, points=64, updates=4, critic_updates=16),
            sampler=sa.Sampler(steps=6),
            train=sa.Train(iterations=5, batch=64, lr=1e-2, device="cpu"),
        )
        log = list(tuner)
        return log[-1]["reward_mean"] - log[0]["reward_mean"], sign

    def rises(found):
        change, sign = found
        assert change > 0.1, found

    up = rise(1.0)
    accepts(rises, up, down=(-up[0], 1.0))


BAD = {
    "points": (lambda: sa.QLearning(points=16), "must be at least 64: a score from few points is that of a narrower law"),
    "eta": (lambda: sa.QLearning().build(setting(model(VP), eta=0.5)), "sampler.eta: .*set it to 1"),
    "solver": (lambda: sa.QLearning().build(setting(model(VP), solver="sde_dpmpp")), "sampler.solver: .*looks back; use ddim"),
    "table": (lambda: sa.QLearning(points=64).build(setting(model(VP))), "algorithm.points: this model has no table"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_it_cannot_do_is_refused_with_the_remedy(case):
    """Twin: the settings as they should be."""
    wrong, why = BAD[case]
    with pytest.raises(ValueError, match=why):
        wrong()
    sa.QLearning().build(setting(model(VP)))
