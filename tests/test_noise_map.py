"""Truth: closed forms of an affine map of noise, where penalties are minimised, and quadrature of a map that tilts it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from twins import F64, close, f64

from scoreaction.networks.noise_map import PENALTIES, frobenius, published

BETA, D = 0.5, 3
GENERATOR = torch.Generator().manual_seed(0)
A = torch.randn(D, D, generator=GENERATOR, dtype=F64) * 0.5 + torch.eye(D, dtype=F64) * 0.7
C, M = A @ A.T, f64([0.3, -0.2, 0.1])
SLOPE, MU = f64([0.4, -0.3, 0.2]), f64([1.0, 0.0, 0.5])
ROOT = torch.randn(D, D, generator=GENERATOR, dtype=F64)
Q = ROOT @ ROOT.T * 0.4 + 0.3 * torch.eye(D, dtype=F64)
EYE = torch.eye(D, dtype=F64)
POINTS = torch.cat([EYE, -EYE]) * D**0.5
"""Points whose means of polynomials of degree three are those of N(0, I)."""
PAIRS = [torch.stack(pair) for pair in zip(*itertools.product(POINTS, POINTS), strict=True)]


def reward(x, q):
    return x @ SLOPE - 0.5 * ((x - MU) @ q * (x - MU)).sum(1)


def minimiser(penalty, q):
    """Mean and covariance of the samples A z' + m where `beta penalty - r` is least over all affine f, and the penalty."""
    shift, slope = torch.zeros(D, dtype=F64, requires_grad=True), torch.zeros(D, D, dtype=F64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [shift, slope], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )
    z, v = PAIRS
    nats = torch.zeros(())

    def loss():
        nonlocal nats
        solver.zero_grad()
        move = penalty(lambda z: shift + z @ slope.T, z, v)
        nats = move.nats.mean()
        value = BETA * nats - reward(M + (z + move.f) @ A.T, q).mean()
        value.backward()
        return value

    solver.step(loss)
    change = A @ (EYE + slope.detach())
    return M + A @ shift.detach(), change @ change.T, nats.detach()


def tilted(q):
    """The law of the samples tilted by exp(r/beta), and its KL to theirs."""
    gain = torch.linalg.inv(EYE + C @ q / BETA)
    mean, cov = M + gain @ C @ (q @ (MU - M) + SLOPE) / BETA, gain @ C
    inverse = torch.linalg.inv(C)
    kl = 0.5 * (torch.trace(inverse @ cov) - D - torch.logdet(inverse @ cov) + (mean - M) @ inverse @ (mean - M))
    return mean, cov, kl


@pytest.mark.parametrize("name", PENALTIES)
def test_under_a_linear_reward_every_penalty_gives_the_tilted_law(name):
    """The KL is .641130, with the mean over the dimensions in the place of the sum it is not."""
    found, (mean, cov, kl) = minimiser(PENALTIES[name], torch.zeros(D, D, dtype=F64)), tilted(torch.zeros(D, D, dtype=F64))

    def averaged(f, z, v):
        move = PENALTIES[name](f, z, v)
        return move._replace(nats=move.nats / D)

    close(found[0], mean, atol=1e-6, mean_for_sum=minimiser(averaged, torch.zeros(D, D, dtype=F64))[0])
    close(found[1], cov, atol=1e-5, half=cov / 2)
    close(kl, 0.641130, atol=1e-6, other=0.7)
    close(found[2], kl, atol=1e-6, per_dimension=kl / D)


def test_under_a_quadratic_reward_the_exact_penalty_gives_the_tilted_law_and_the_others_do_not():
    """Of the published one the covariance is `A (I + A'QA/beta)^-2 A'`: the shrinkage twice."""
    mean, cov, kl = tilted(Q)
    found, approximate, naive = (minimiser(PENALTIES[name], Q) for name in ("exact", "frobenius", "published"))
    close(found[0], mean, atol=1e-5, published=mean + 0.1)
    close(found[1], cov, atol=1e-5, frobenius=approximate[1], published=naive[1])
    close(found[2], kl, atol=1e-5, frobenius=approximate[2], published=naive[2])
    shrinkage = torch.linalg.inv(EYE + A.T @ Q @ A / BETA)
    close(naive[1], A @ shrinkage @ shrinkage @ A.T, atol=1e-5, tilted=cov)
    close(naive[0], mean, atol=1e-5, base=M)


def test_of_one_number_the_three_variances_are_known():
    """v/(1 + x), v/(1 + x/2)^2 and v/(1 + x)^2 with x = v q/beta, for N(.3, .8), q 1: .30769, .24691 and .11834."""
    v, q, z = 0.8, 1.0, f64([[1.0], [-1.0]])

    def variance(penalty):
        slope = torch.zeros((), dtype=F64, requires_grad=True)
        solver = torch.optim.LBFGS([slope], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss():
            solver.zero_grad()
            move = penalty(lambda z: slope * z, z, torch.ones_like(z))
            value = BETA * move.nats.mean() + 0.5 * q * v * (z + move.f).square().mean()
            value.backward()
            return value

        solver.step(loss)
        return float(v * (1 + slope.detach()) ** 2)

    found = [variance(PENALTIES[name]) for name in ("exact", "frobenius", "published")]
    close(found, [0.30769, 0.24691, 0.11834], atol=1e-5, swapped=[found[2], found[1], found[0]])


WEIGHTS, MEANS, STD = np.array([0.5, 0.5]), np.array([2.0, -2.0]), 0.3


def monotone():
    """The map f whose z + f(z) has the density `N(z) exp(T(z)/2)/Z`, T the flow of N(0, 1) to two modes; on a grid of z."""
    z = np.linspace(-7, 7, 60001)
    y = np.linspace(-5, 5, 400001)
    cdf = (WEIGHTS[:, None] * stats.norm.cdf((y - MEANS[:, None]) / STD)).sum(0)
    flow = np.interp(stats.norm.cdf(z), cdf, y)
    mass = stats.norm.pdf(z) * np.exp(flow / 2.0)
    cumulated = np.concatenate([[0.0], np.cumsum((mass[1:] + mass[:-1]) / 2)])
    return z, np.interp(stats.norm.cdf(z), cumulated / cumulated[-1], z) - z


def test_the_noise_tilted_costs_what_the_tilted_samples_cost():
    """Two modes, reward x, beta 2: .3390 nats by quadrature, `E r/beta - log Z` of the samples. Twin: `1/2 E f^2`."""
    z, f = (torch.from_numpy(values) for values in monotone())

    def shift(x):
        """Linear between the points of the grid."""
        place = torch.searchsorted(z, x.detach()[:, 0].contiguous()).clamp(1, len(z) - 1)
        slope = (f[place] - f[place - 1]) / (z[place] - z[place - 1])
        return (f[place - 1] + slope * (x[:, 0] - z[place - 1]))[:, None]

    nodes = torch.linspace(-5, 5, 4001, dtype=F64)[:, None] + 1e-5
    density = torch.exp(-nodes[:, 0].square() / 2)
    mean = {
        name: (density * PENALTIES[name](shift, nodes, torch.ones_like(nodes)).nats).sum() / density.sum() for name in PENALTIES
    }
    tilt = np.log(WEIGHTS) + MEANS / 2 + STD**2 / 8
    log_z = np.logaddexp(*tilt)
    kl = (np.exp(tilt - log_z) * (MEANS + STD**2 / 2)).sum() / 2 - log_z
    close(kl, 0.339, atol=5e-4, without_z=kl + log_z)
    close(mean["exact"], kl, atol=3e-3, published=mean["published"])


def test_a_map_that_folds_is_known():
    """z + f(z) = -2 z turns the line over; the twin, z/2, does not."""
    z = torch.randn(5, 1, dtype=F64, generator=GENERATOR)

    def turned(slope):
        return PENALTIES["exact"](lambda z: slope * z, z, z).folds.tolist()

    close(turned(-3.0), [1.0] * 5, flat=turned(-0.5))


def test_the_second_order_has_the_direction_that_it_is_given():
    """`1/2 |f|^2 + 1/2 |J v|^2` of a linear f, J v by hand. Twins: J' v, no direction."""
    z, v = (torch.randn(4, D, dtype=F64, generator=GENERATOR) for _ in range(2))
    jacobian = torch.randn(D, D, dtype=F64, generator=GENERATOR)
    found = frobenius(lambda z: z @ jacobian.T, z, v).nats
    truth = 0.5 * ((z @ jacobian.T) ** 2).sum(1) + 0.5 * ((v @ jacobian.T) ** 2).sum(1)
    turned = truth + 0.5 * ((v @ jacobian) ** 2).sum(1) - 0.5 * ((v @ jacobian.T) ** 2).sum(1)
    close(found, truth, atol=1e-9, transposed=turned, without=published(lambda z: z @ jacobian.T, z, v).nats)


def test_the_published_optimum_moves_mass_across_the_gap_cheaply():
    """Two modes, beta 2, each z moved where `f^2 - T(z + f)` is least: .9735 right for .225. Twin: the tilt, .8808 at .339."""
    z = np.linspace(-6, 6, 4001)
    y = np.linspace(-5, 5, 200001)
    cdf = (WEIGHTS[:, None] * stats.norm.cdf((y - MEANS[:, None]) / STD)).sum(0)
    flow = np.interp(stats.norm.cdf(z), cdf, y)
    best = np.stack([z[np.argmax(flow - (z - at) ** 2)] for at in z])
    density = stats.norm.pdf(z) / stats.norm.pdf(z).sum()
    moves = torch.from_numpy(best - z)[:, None]
    cost = PENALTIES["published"](lambda _: moves, torch.from_numpy(z)[:, None], moves).nats
    found = float(torch.from_numpy(density) @ cost)
    end = np.interp(best, z, flow)
    close([found, density @ (end > 0), density @ end], [0.225, 0.9735, 1.758], atol=0.005, tilted=[0.339, 0.8808, 1.568])
