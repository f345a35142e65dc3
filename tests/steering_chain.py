"""The chain of DDIM steps on N(.3, .8) with the reward x, in numpy: what each method of steering does to it, in closed form."""

from __future__ import annotations

import numpy as np
import torch
from affine import model

import scoreaction as sa
from scoreaction.sampling.steer import steer_x0
from scoreaction.sampling.steering import Steering
from scoreaction.world import ALONE

M0, V0, BETA = 0.3, 0.8, 0.5
VP = sa.VP()


def coefficients(t):
    """alpha, sigma^2 and the slope of x0_hat at t."""
    alpha = np.exp(-(0.1 * t + 9.95 * t * t) / 2)
    sigma2 = -np.expm1(-(0.1 * t + 9.95 * t * t))
    return alpha, sigma2, alpha * V0 / (alpha**2 * V0 + sigma2)


def steps(n, eta=1.0, rho=1.5):
    """A, b, k of `x_s ~ N(A x + b, k^2)`, B of a change of the score, and the slopes of x0_hat at t and at s, a row a step."""
    times, out = (np.arange(n, -1, -1) / n) ** rho, []
    for t, s in zip(times[:-1], times[1:], strict=True):
        (at, vt, here), (as_, vs, there) = coefficients(t), coefficients(s)
        k2 = eta**2 * vs / vt * (vt - (at / as_) ** 2 * vs)
        direction = np.sqrt(max(vs - k2, 0.0))
        a = (as_ * at * V0 + direction * np.sqrt(vt)) / (at**2 * V0 + vt)
        out.append((a, as_ * M0 - a * at * M0, np.sqrt(k2), as_ * vt / at - np.sqrt(vt) * direction, here, there))
    return out


def moments(n, shift, eta=1.0, rho=1.5, start=0.0):
    """Mean and variance of x0 where each step is moved by shift(k, B, slope at t, slope at s)."""
    mean, var = start, 1.0
    for a, b, k, gain, here, there in steps(n, eta, rho):
        mean, var = a * mean + b + shift(k, gain, here, there), a * a * var + k * k
    return mean, var


def log_z(n, rho=1.5):
    """log Z of the chain under exp(x/beta)."""
    mean, var = moments(n, lambda *step: 0.0, rho=rho)
    return mean / BETA + var / (2 * BETA**2)


def selected(n, m, temperature, eta=1.0, paths=20_000):
    """Mean of x0 where of m candidates one is taken with probability ~ exp(value/temperature), by simulation."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=paths)
    for a, b, k, _, _, there in steps(n, eta):
        c = (a * x + b)[:, None] + k * rng.normal(size=(paths, m))
        w = np.exp(there * (c - c.max(1, keepdims=True)) / temperature).cumsum(1)
        x = c[np.arange(paths), (rng.random(paths)[:, None] * w[:, -1:] > w).sum(1)]
    return x.mean()


def made(parameters=(0.0, 0.0)):
    """The model whose reference is the exact score; the policy is another one at parameters that are not 0."""
    torch.manual_seed(0)
    return model(VP, parameters)


def score(x0, texts):
    values = x0[:, 0]
    return lambda: values


def steered(settings, *, n, steps=50, seed=0, beta=BETA, model=None, reward=score, chunk=8192, world=ALONE, **sampling):
    """Samples of a method, (n,), and its figures."""
    sampler = sa.Sampler(steps=steps, **sampling)
    steering = Steering(**settings).settled(differentiable=True, sampler=sampler, beta=beta)
    out = steer_x0(model or made(), sampler, steering, reward, n=n, prompts=None, seed=seed, chunk=chunk, world=world)
    return out.x0[:, 0].double(), out.figures
