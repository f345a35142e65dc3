"""Truth: the values of closed forms found by other routes, quadrature, and identities of the tilted law."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from twins import F64, close, f64

from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.diffusion.processes import VE, VP, CosineVP, Flow
from scoreaction.models import gaussian_mixture
from scoreaction.training.exact_task import sliced_w2

FOUR = Mixture.isotropic([[2, 0], [-2, 0], [0, 2], [0, -2]], std=0.3)
LINEAR = Quadratic.linear([1.0, 0.5])
ONE = Mixture(f64([0.4, 0.6]), f64([[-1.0], [0.7]]), f64([[[0.3]], [[0.5]]]))
ONE_REWARD = Quadratic(f64([[0.8]]), f64([0.4]), f64([1.2]))
FULL = Mixture(
    f64([0.2, 0.5, 0.3]),
    f64([[0.0, 1.0], [1.0, -0.5], [-1.0, 0.2]]),
    f64([[[0.5, 0.2], [0.2, 0.3]], [[0.4, -0.1], [-0.1, 0.9]], [[0.3, 0.0], [0.0, 0.2]]]),
)
FULL_REWARD = Quadratic(f64([[0.7, 0.3], [0.3, -0.2]]), f64([0.5, -1.0]), f64([0.3, 0.1]))
PROCESSES = [VP(), Flow(), VE(sigma_max=5.0), CosineVP()]


def points(n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(0))


def integral(function, *arguments) -> float:
    return quad(lambda u: float(function(u, *arguments)), -14, 14, epsabs=1e-12, epsrel=1e-11, limit=400, points=[-1, 0, 0.7])[
        0
    ]


def test_recipe_mixture_has_the_known_optimum():
    optimum = FOUR.optimum(LINEAR, 0.5)
    close(optimum.law.weights, [0.878619, 0.000294744, 0.118908, 0.00217788], atol=1e-6, untilted=FOUR.weights)
    close(optimum.law.means - FOUR.means, [0.18, 0.09], atol=1e-12, no_beta=FOUR.covariances[0] @ LINEAR.l)
    close(optimum.log_z, 2.968109, twice_beta=FOUR.optimum(LINEAR, 1.0).log_z)
    close(optimum.reward, 2.098379, of_the_base=FOUR.mean_reward(LINEAR))
    close(optimum.kl_nats, 1.228649, in_reward_units=0.5 * optimum.kl_nats)
    close(optimum.objective, 1.484055, of_log_z=optimum.log_z)


def test_tilted_law_is_the_density_times_the_exponential_reward():
    for law, reward, beta in ((FULL, FULL_REWARD, 0.5), (ONE, ONE_REWARD, 0.3), (FOUR, LINEAR, 0.5)):
        x = points(50, law.dimension)
        optimum = law.optimum(reward, beta)
        truth = law.log_prob(x) + reward(x) / beta - optimum.log_z
        close(
            optimum.law.log_prob(x),
            truth,
            atol=1e-10,
            other_beta=law.tilted(reward, 2 * beta).log_prob(x),
            wrong_sign=law.tilted(Quadratic(reward.Q, -reward.l, reward.mu), beta).log_prob(x),
        )


def test_normaliser_reward_and_kl_by_quadrature():
    beta, optimum = 0.3, ONE.optimum(ONE_REWARD, 0.3)

    def density(u: float) -> float:
        return math.exp(ONE.log_prob(f64([[u]])).item() + ONE_REWARD(f64([[u]])).item() / beta)

    z = integral(density)
    mean_reward = integral(lambda u: density(u) * ONE_REWARD(f64([[u]])).item()) / z
    close(optimum.log_z, math.log(z), atol=1e-9, no_determinant=math.log(z) + 0.5 * math.log(1 + 0.3 * 0.8 / beta))
    close(optimum.reward, mean_reward, atol=1e-9, base=ONE.mean_reward(ONE_REWARD))
    close(optimum.kl_nats, mean_reward / beta - math.log(z), atol=1e-9, without_z=mean_reward / beta)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("time", [0.05, 0.4, 0.95])
def test_score_and_prediction_are_those_of_the_convolution(process, time):
    t, x = f64(time), f64(0.6)
    alpha, sigma = process.alpha(t).item(), process.sigma(t).item()

    def joint(u: float) -> float:
        noise = (x.item() - alpha * u) / sigma
        return math.exp(ONE.log_prob(f64([[u]])).item() - noise**2 / 2) / (sigma * math.sqrt(2 * math.pi))

    def over_noise(function) -> float:
        """Integral over x0, on the scale on which the joint density lives."""
        if alpha * 3 < sigma:
            return integral(function)
        width = 12 * sigma / alpha
        return quad(function, x.item() / alpha - width, x.item() / alpha + width, epsabs=1e-13, limit=400)[0]

    evidence = over_noise(joint)
    posterior_mean = over_noise(lambda u: u * joint(u)) / evidence
    at = x.reshape(1, 1)
    prediction = ONE.prediction(process, at, t)
    close(ONE.log_prob_at(process, at, t), [math.log(evidence)], atol=1e-8, of_the_data=ONE.log_prob(at))
    close(
        ONE.noised(process, t).log_prob(at), [math.log(evidence)], atol=1e-8, earlier=ONE.noised(process, 0.9 * t).log_prob(at)
    )
    close(prediction.x0, [[posterior_mean]], atol=1e-8, x_itself=at)
    close(
        alpha * prediction.x0 + sigma * prediction.eps, at, atol=1e-12, swapped=alpha * prediction.eps + sigma * prediction.x0
    )
    close(ONE.score(process, at, t), -prediction.eps / sigma, atol=1e-9, noise=prediction.eps)


def test_score_is_the_gradient_and_time_may_differ_by_row():
    process, x = VP(), points(4, 2).requires_grad_()  # batch 2 d would hide a wrong broadcast, so also d = 4 below
    t = f64([0.1, 0.3, 0.7, 1.0])
    (gradient,) = torch.autograd.grad(FULL.log_prob_at(process, x, t).sum(), x)
    close(FULL.score(process, x, t).detach(), gradient, atol=1e-10, reversed=FULL.score(process, x, t.flip(0)).detach())
    square = Mixture.isotropic(torch.eye(4, dtype=F64), std=0.5)
    at = points(4, 4)
    whole = square.prediction(process, at, t)
    rows = [square.prediction(process, at[i : i + 1], t[i]) for i in range(4)]
    close(whole.x0, torch.cat([row.x0 for row in rows]), atol=1e-12, transposed=whole.x0.T)
    close(whole.eps, torch.cat([row.eps for row in rows]), atol=1e-12, transposed=whole.eps.T)


def test_prediction_is_finite_at_both_ends_and_in_float32():
    x = points(3, 2)
    noise = FULL.prediction(Flow(), x, f64(1.0))
    close(noise.x0, FULL.weights @ FULL.means, atol=1e-12, from_eps=(x - noise.eps) / Flow().alpha(f64(1.0)))
    close(noise.eps, x, atol=1e-12, minus_x0=x - noise.x0)
    data = FULL.prediction(Flow(), x, f64(0.0))
    close(data.x0, x, atol=1e-12, mean=(FULL.weights @ FULL.means).expand(3, 2))
    close(data.eps, torch.zeros(3, 2), atol=1e-12, x=x)
    single = FULL.prediction(VP(), x.float(), f64(0.3))
    assert single.x0.dtype == single.eps.dtype == torch.float32
    close(single.eps, FULL.prediction(VP(), x, f64(0.3)).eps, atol=1e-5, other_time=FULL.prediction(VP(), x, f64(0.31)).eps)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_soft_value_is_the_log_expectation_and_solves_hjb(process):
    """eta = 1: `-dV/dt + (-f x + g^2 s_pre) V' + 1/2 g^2 (V'' + V'^2/beta) = 0`."""
    beta = 0.3
    x, t = f64([[-0.8], [0.1], [1.3]]).requires_grad_(), f64(0.37).requires_grad_()
    value = ONE.value(ONE_REWARD, beta, process, x, t)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    close(ONE.value_grad(ONE_REWARD, beta, process, x, t).detach(), slope.detach(), atol=1e-9, no_beta=slope.detach() / beta)
    (bend,) = torch.autograd.grad(slope.sum(), x, retain_graph=True)
    rate = torch.stack([torch.autograd.grad(v, t, retain_graph=True)[0] for v in value])
    with torch.no_grad():
        f, g2 = process.f(t), process.g2(t)
        drift = (-f * x + g2 * ONE.score(process, x, t)).squeeze(1)
        v1, v2 = slope.squeeze(1), bend.squeeze(1)
        residual = -rate + drift * v1 + g2 / 2 * (v2 + v1**2 / beta)
        scale = float((g2 * v1**2 / beta).max())
        close(residual / scale, 0.0, atol=1e-9, no_beta=(-rate + drift * v1 + g2 / 2 * (v2 + v1**2)) / scale)
        alpha, sigma = process.alpha(t).item(), process.sigma(t).item()

    def joint(u: float) -> float:
        return math.exp(ONE.log_prob(f64([[u]])).item() - ((0.1 - alpha * u) / sigma) ** 2 / 2)

    expectation = integral(lambda u: joint(u) * math.exp(ONE_REWARD(f64([[u]])).item() / beta)) / integral(joint)
    mean = integral(lambda u: joint(u) * ONE_REWARD(f64([[u]])).item()) / integral(joint)
    close(value[1].item(), beta * math.log(expectation), atol=1e-7, mean_instead_of_soft=mean)


def test_detached_skip_term_loses_the_gradient():
    """Gaussian data, linear reward: V = r(x0_hat) + constant, so a skip r(x0_hat) without gradient leaves nothing."""
    law, reward = Mixture.isotropic([[0.3]], std=0.9), Quadratic.linear([1.0])
    x, t = f64([[0.2], [1.1]]).requires_grad_(), f64(0.1)
    (through,) = torch.autograd.grad(reward(law.prediction(VP(), x, t).x0).sum(), x)
    close(law.value_grad(reward, 0.5, VP(), x, t).detach(), through, atol=1e-10, detached=0 * through)


def test_no_optimum_is_refused():
    with pytest.raises(ValueError, match="raise beta"):
        ONE.tilted(Quadratic(f64([[-1.0]]), f64([0.0]), f64([0.0])), 0.3)
    ONE.tilted(Quadratic(f64([[-1.0]]), f64([0.0]), f64([0.0])), 0.6)
    with pytest.raises(ValueError, match="beta must be positive"):
        ONE.tilted(ONE_REWARD, 0.0)
    with pytest.raises(ValueError, match="dimensions"):
        FOUR.tilted(ONE_REWARD, 1.0)
    with pytest.raises(ValueError, match="symmetric"):
        Quadratic(f64([[0.0, 1.0], [0.0, 0.0]]), f64([0.0, 0.0]), f64([0.0, 0.0]))
    with pytest.raises(ValueError, match="positive semi-definite"):
        Mixture(f64([1.0]), f64([[0.0]]), f64([[[-1.0]]]))


def test_samples_have_the_law():
    draws = FULL.sample(100_000, torch.Generator().manual_seed(1))
    mean, within = FULL.weights @ FULL.means, torch.einsum("k,kij->ij", FULL.weights, FULL.covariances)
    close(draws.mean(0), mean, atol=0.015, first_component=FULL.means[0])
    between = torch.einsum("k,ki,kj->ij", FULL.weights, FULL.means - mean, FULL.means - mean)
    close(draws.T.cov(), within + between, atol=0.03, within_only=within)
    again = FULL.sample(10, torch.Generator().manual_seed(1))
    assert torch.equal(again, FULL.sample(10, torch.Generator().manual_seed(1)))


def test_reward_value_and_gradient():
    x = points(6, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(FULL_REWARD(x).sum(), x)
    truth = FULL_REWARD.l - (x.detach() - FULL_REWARD.mu) @ FULL_REWARD.Q
    close(gradient, truth, atol=1e-12, wrong_sign=-truth)
    assert FULL_REWARD(x.detach().float()).dtype == torch.float32
    rows = [
        float(FULL_REWARD.l @ row - (row - FULL_REWARD.mu) @ FULL_REWARD.Q @ (row - FULL_REWARD.mu) / 2) for row in x.detach()
    ]
    close(FULL_REWARD(x).detach(), rows, atol=1e-12, no_half=f64(rows) * 2)


@pytest.mark.slow
def test_sliced_distance_of_known_pairs():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4000, 1, generator=generator, dtype=F64)
    spread = float(x.square().mean().sqrt())
    close(sliced_w2(x, 2 * x.flip(0)), spread, atol=1e-9, first_power=float(x.abs().mean()), squared=spread**2)
    y = torch.randn(4000, 3, generator=generator, dtype=F64)
    shift = f64([1.0, -2.0, 0.5])
    close(sliced_w2(y, y + shift), float(shift.norm()) / math.sqrt(3), rtol=0.05, atol=0, largest=float(shift.norm()))
    assert sliced_w2(y, y[torch.randperm(4000)]) < 1e-12
    assert sliced_w2(y, y + shift) == sliced_w2(y, y + shift)
    with pytest.raises(ValueError, match="one shape"):
        sliced_w2(x, x[:-1])


def test_sliced_distance_agrees_with_numpy_quantiles():
    x, y = points(500, 2), points(1000, 2)[500:] * 1.5
    directions = torch.randn(200, 2, generator=torch.Generator().manual_seed(20250201), dtype=F64).numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    squares = [np.mean((np.sort(x.numpy() @ u) - np.sort(y.numpy() @ u)) ** 2) for u in directions]
    close(sliced_w2(x, y), math.sqrt(np.mean(squares)), atol=1e-12, mean_of_roots=np.mean(np.sqrt(squares)))


@pytest.mark.parametrize("kind", ["vp", "cosine", "ve", "flow"])
def test_a_networks_output_of_one_changes_predictions_by_no_more_under_any_process(kind):
    """Truth: of the process scaled to alpha^2 + sigma^2 = 1, eps is changed by alpha sigma F and x0 by -sigma^2 F/scale."""
    model = gaussian_mixture.build(gaussian_mixture.Config(process=kind))
    process, x = model.process, points(64, 2).float()
    with torch.no_grad():
        model.net.change.last.bias.fill_(1.0)
        for time in (1.0, 0.7, 0.2):
            t = f64(time)
            moved, base = model.predict(x, t), model.reference(x, t)
            alpha, sigma2 = process.alpha(t), process.sigma2(t)
            eps = -alpha * sigma2.sqrt() / (alpha**2 + sigma2)
            wrong = {"unscaled": eps * (alpha**2 + sigma2)} if kind == "ve" else {}
            close((moved.eps - base.eps), eps, atol=2e-5, sign=-eps + 1e-3, **wrong)
            close(
                process.alpha(t) * (moved.x0 - base.x0) + sigma2.sqrt() * (moved.eps - base.eps), 0.0, atol=2e-4, x0_alone=1.0
            )
