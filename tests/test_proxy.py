"""Truth: scikit-learn's BayesianRidge, the sampling law of least squares, the rate 1/sqrt(n), and units that do not matter."""

import math

import pytest
import torch
from sklearn.linear_model import BayesianRidge
from twins import accepts, close, f64

from scoreaction.networks.proxy import Proxy, fit_ridge, mean_std

NOISE = 0.7


def linear_data(n, *, seed=0, features=4):
    """x standard normal, y = x w + noise: (n, features), (n,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    w = torch.linspace(-2, 1, features, dtype=torch.float64)
    return x, x @ w + NOISE * torch.randn(n, generator=generator, dtype=torch.float64)


def fitted(x, y, *, groups=None, seed=1, **options):
    proxy = Proxy(x.shape[1], **options)
    no_groups = torch.zeros(len(x), dtype=torch.long)
    proxy.fit(x.float(), no_groups if groups is None else groups, y.float(), torch.Generator().manual_seed(seed))
    return proxy


def judged(proxy, x):
    return proxy.judge(x.float(), torch.zeros(len(x), dtype=torch.long))


def test_the_posterior_is_that_of_scikit_learn():
    """Mean, noise and the mean answer's standard deviation; scikit-learn's includes the noise of one answer."""
    x, y = linear_data(60)
    model = BayesianRidge(fit_intercept=False, tol=1e-12, max_iter=10000).fit(x.numpy(), y.numpy())
    ridge = fit_ridge(x, y)
    close(ridge.mean, model.coef_, atol=1e-8, least_squares=torch.linalg.lstsq(x, y[:, None]).solution[:, 0])
    close(ridge.noise_std, model.alpha_**-0.5, atol=1e-8, variance=1 / model.alpha_)
    at, _ = linear_data(5, seed=3)
    one_answer = f64(model.predict(at.numpy(), return_std=True)[1])
    penalty = model.lambda_ / model.alpha_
    unscaled = torch.linalg.inv(x.T @ x + penalty * torch.eye(4, dtype=torch.float64))
    close(
        mean_std(at, ridge.factor),
        (one_answer**2 - 1 / model.alpha_).sqrt(),
        atol=1e-8,
        one_answer=one_answer,
        without_the_noise=(at @ unscaled * at).sum(1).sqrt(),
        without_the_root=ridge.noise_std**2 * (at @ unscaled * at).sum(1),
    )


def test_the_bonus_falls_as_one_over_root_n():
    at, _ = linear_data(64, seed=5)
    bonus = [float(judged(fitted(*linear_data(n), kind="ucb", hidden=0), at)[1].mean()) for n in (800, 3200, 12800)]

    def mean_instead_of_sum(n):  # a covariance that is an average over rows says the same however many there are
        x, _ = linear_data(n)
        return float((at @ torch.linalg.inv(x.T @ x / n + torch.eye(4, dtype=torch.float64)) * at).sum(1).sqrt().mean())

    constant = [mean_instead_of_sum(n) for n in (800, 3200, 12800)]

    def check(values):
        for before, after in zip(values[:-1], values[1:], strict=True):
            assert 1.8 < before / after < 2.2, values

    accepts(check, bonus, mean_instead_of_sum=constant, one_over_n=[1.0, 0.25, 0.0625])
    truth = NOISE * float((1 + at.square().sum(1)).sqrt().mean()) / math.sqrt(12800)
    close(bonus[-1], truth, rtol=0.1, atol=0, one_answer=NOISE, without_the_noise=truth / NOISE)


def test_the_bonus_is_larger_where_nothing_was_asked():
    """And so an optimist expects more there than a pessimist does, and they agree where much was asked."""
    x, y = linear_data(200)
    groups, places = torch.zeros(2, dtype=torch.long), torch.tensor([[0.0], [8.0]]).expand(2, 4)

    def seeks_what_is_unknown(optimism):
        proxy = fitted(x, y, kind="ucb", hidden=0, optimism=optimism)
        mean, std = proxy.judge(places, groups)
        assert float(std[1]) > 5 * float(std[0])
        bonus = proxy(places, groups) - mean
        assert float(bonus[1]) > 5 * float(bonus[0]) > 0

    accepts(seeks_what_is_unknown, 1.0, pessimism=-1.0, indifference=0.0)


@pytest.mark.slow
def test_the_bootstrap_spread_is_the_sampling_error_of_least_squares():
    """`std(x) = noise sqrt(x^T (X^T X)^-1 x)` with a constant among x (Efron 1979)."""
    x, y = linear_data(2000)
    proxy = fitted(x, y, kind="ensemble", hidden=0, members=200)
    at, _ = linear_data(6, seed=7)
    with_one, at_one = (torch.cat([torch.ones(len(part), 1, dtype=torch.float64), part], 1) for part in (x, at))
    truth = NOISE * (at_one @ torch.linalg.inv(with_one.T @ with_one) * at_one).sum(1).sqrt()
    same_rows = Proxy(4, hidden=0, members=200)
    same_rows.load_state_dict(proxy.state_dict())
    same_rows.heads.copy_(same_rows.heads[:1].expand_as(same_rows.heads))
    close(
        judged(proxy, at)[1],
        truth,
        rtol=0.2,
        atol=0,
        one_answer=truth + NOISE,
        of_their_mean=truth / math.sqrt(200),
        same_rows=judged(same_rows, at)[1],
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ensemble", "ucb"])
def test_hidden_layers_learn_what_a_line_cannot(kind):
    generator = torch.Generator().manual_seed(2)
    x, at = torch.randn(500, 3, generator=generator), torch.randn(300, 3, generator=generator)

    def truth(x):
        return 5 + torch.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2]

    y = truth(x) + 0.1 * torch.randn(500, generator=generator)

    def good(proxy):
        error = (judged(proxy, at)[0] - truth(at)).square().mean().sqrt()
        assert float(error) < 0.5 * float(truth(at).std())

    accepts(good, fitted(x, y, kind=kind, members=3), a_line=fitted(x, y, kind=kind, hidden=0), unfitted=Proxy(3, kind=kind))


@pytest.mark.slow
def test_the_generator_is_all_the_randomness_there_is():
    x, y = linear_data(20)
    first = judged(fitted(x, y, members=2), x)[0]

    def check(answers):
        assert torch.equal(answers, first)

    torch.manual_seed(3)
    accepts(check, judged(fitted(x, y, members=2), x)[0], other_seed=judged(fitted(x, y, members=2, seed=8), x)[0])


@pytest.mark.parametrize("kind", ["ensemble", "ucb"])
def test_optimism_adds_deviations_and_gradients_flow(kind):
    x, y = linear_data(100)
    proxy = fitted(x, y, kind=kind, hidden=0)
    at = x[:3].float().requires_grad_(True)
    groups = torch.zeros(3, dtype=torch.long)
    mean, std = judged(proxy, at)
    found = {}
    for optimism in (0.0, 2.0, -1.0):
        proxy.optimism = optimism
        found[optimism] = proxy(at, groups)
    close(found[0.0], mean, with_doubt=mean + std)
    close(found[2.0], mean + 2 * std, mean=mean, pessimism=mean - 2 * std)
    close(found[-1.0], mean - std, mean=mean, optimism=mean + std)
    (grad,) = torch.autograd.grad(found[2.0].sum(), at)
    step = torch.zeros(3, 4)
    step[:, 1] = 1e-2
    proxy.optimism = 2.0
    slope = (proxy(at + step, groups) - proxy(at - step, groups)).detach() / 2e-2
    close(grad[:, 1], slope, rtol=0.02, atol=1e-3, of_the_mean_alone=torch.autograd.grad(mean.sum(), at)[0][:, 1])


@pytest.mark.slow
def test_units_of_reward_and_features_do_not_matter():
    x, y = linear_data(80)
    plain, other = fitted(x, y), fitted(1000 * x + 5, 100 * y - 7)
    at, _ = linear_data(10, seed=4)
    moved_mean, moved_std = judged(other, 1000 * at + 5)
    mean, std = judged(plain, at)
    close(moved_mean, 100 * mean - 7, atol=0.3, unscaled=mean)
    close(moved_std, 100 * std, atol=0.3, unscaled=std, shifted=100 * std - 7)


@pytest.mark.slow
def test_each_prompt_has_its_own_level():
    x, _ = linear_data(300)
    groups = torch.arange(300) % 3
    y = torch.tensor([0.0, 5.0, -3.0])[groups] + 0.1 * x[:, 0]
    proxy = fitted(x, y, groups=groups, kinds=3, kind="ucb")
    asked = proxy(torch.zeros(3, 4), torch.arange(3))
    close(asked, [0.0, 5.0, -3.0], atol=0.3, without_prompts=judged(fitted(x, y, kind="ucb"), torch.zeros(3, 4))[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ensemble", "ucb"])
def test_equal_rewards_are_learned_too(kind):
    x, _ = linear_data(8)
    x[:, 2] = 1.0  # a feature that never varies
    mean, std = judged(fitted(x, torch.full((8,), 3.0), kind=kind), x)
    close(mean, 3.0, zero=torch.zeros(8))
    assert float(std.max()) < 0.01
