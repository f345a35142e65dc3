"""The linear-quadratic case as a run sees it: a policy of two parameters, and its exact value as a critic."""

from __future__ import annotations

from dataclasses import replace

import torch
from driving import each
from oracles.linear_quadratic import ScalarLQ
from scipy.integrate import solve_ivp
from torch import nn
from twins import F64, f64

import scoreaction as sa
from scoreaction.algorithms._setting import Objective, Setting
from scoreaction.diffusion.mixtures import Mixture, Quadratic
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.solvers import jittered
from scoreaction.networks.model import Model
from scoreaction.rewards._closed_form import QuadraticReward
from scoreaction.sampling.rollout import Rollout, States
from scoreaction.sampling.trajectory import trajectory
from scoreaction.types import Prediction

OLD, NEW = (-0.2, 0.3), (-0.6, 0.9)
BETA = 0.5
REWARD = QuadraticReward(Quadratic(torch.eye(1), torch.tensor([0.2]), torch.tensor([1.0])))
LAW = Mixture(f64([1.0]), f64([[0.3]]), f64([[[0.8]]]))


class Affine(nn.Module):
    """The score `s_pre + th0 alpha^2 x + th1 alpha` of data N(.3, .8), said as v, which is finite at every t."""

    def __init__(self, process, law=LAW):
        super().__init__()
        self.process, self.law, self.th = process, law, nn.Parameter(torch.zeros(2))

    def forward(self, x, t, cond):
        t = t.double()
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        exact = self.law.prediction(self.process, x, t)
        move = expand(self.th[0] * alpha, x) * x + self.th[1]
        v = expand(alpha, x) * exact.eps - expand(sigma, x) * exact.x0
        return v - expand(sigma * (alpha**2 + sigma**2), x) * move


def model(process, parameters=OLD):
    """The policy at these parameters; its reference is the exact score."""
    made = Model(Affine(process), process=process, predicts="v", shape=(1,), law=LAW)
    with torch.no_grad():
        made.parameters["th"].copy_(torch.tensor(parameters))
    return made


def setting(made, *, eta=1.0, steps=50, batch=64, max_rows=10**6, differentiable=True, **sampler):
    made.max_rows = max_rows
    reward = Objective(lambda x0, prompt: REWARD(x0), differentiable)
    return Setting(made, sa.Sampler(steps=steps, eta=eta, **sampler), reward, batch, None)


def none(batch):
    """The prompts of a batch without prompts."""
    return torch.zeros(batch, dtype=torch.long)


def exactly(found, batch, seed=0, times=None):
    """A rollout of an iteration in float64, on a grid of its own or the one given; with the reward's gradient."""
    process, generator = found.process, torch.Generator().manual_seed(seed)
    found.model.net.double()
    sampler = found.sampler
    times = jittered(sampler.times(process), generator) if times is None else times
    x = process.prior_std * torch.randn(batch, 1, generator=generator, dtype=F64)
    prompt = none(batch)
    with torch.no_grad():
        options = {"solver": sampler.find(), "eta": sampler.eta, "generator": generator}
        visits = list(trajectory(lambda x, t: found.policy(x, t, prompt), process, x, times, **options))
    old = Prediction(*(torch.stack(parts) for parts in zip(*(v.prediction for v in visits), strict=True)))
    x = torch.stack([v.x for v in visits] + [visits[-1].x_next])
    leaf = x[-1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(REWARD(leaf).sum(), leaf)
    return found.prepare(Rollout(times, x, old, old, prompt, REWARD(x[-1]), reward_gradient=gradient), generator)


def gradient(made, updates):
    """Of the sum of the policy's losses, all at the policy as it is, in float64."""
    loss = sum(value for update, value, _ in each(updates) if update.network == "policy")
    return torch.autograd.grad(loss, made.parameters["th"])[0].double()


def points(x, t):
    return States(f64(x), f64(t), none(len(x)))


def problem(process, eta):
    return ScalarLQ(process, m=0.3, v=0.8, q=1.0, l=0.2, mu=1.0, beta=BETA, eta=eta)


def policy(process, parameters):
    """A(t) and b(t) as functions of a number."""
    slope, offset = parameters
    alpha = lambda t: float(process.alpha(f64(t)))  # noqa: E731
    return (lambda t: slope * alpha(t) ** 2), (lambda t: offset * alpha(t))


class ExactValue:
    """`V = -Pi x^2/2 + h x + e` of the affine policy, dense in t; and its law N(M, Var) at every t, by ODEs."""

    def __init__(self, process, eta, parameters, *, end=1.0):
        lq, (A, b), c = problem(process, eta), policy(process, parameters), (1 + eta**2) / 2
        self.end = end if process.alpha(f64(1.0)) > 0 else min(end, 0.9995)
        price = BETA * (c / eta) ** 2

        def rates(t):
            f, g2, alpha, P = lq._rates(t)
            return f, g2, -f + c * g2 * (A(t) - 1 / P), c * g2 * (alpha * lq.m / P + b(t))

        def value(t, y):
            _, g2, F, H = rates(t)
            Pi, h, _ = y
            w = price * g2
            return [
                2 * F * Pi + w * A(t) ** 2,
                F * h - H * Pi - w * A(t) * b(t),
                H * h - eta**2 * g2 * Pi / 2 - w * b(t) ** 2 / 2,
            ]

        def moments(tau, y):
            _, g2, F, H = rates(self.end - tau)
            return [F * y[0] + H, 2 * F * y[1] + eta**2 * g2]

        options = {"rtol": 1e-9, "atol": 1e-10, "method": "DOP853"}
        start = lq.marginal(f64(self.end))
        self.nodes = self.end * (1 - torch.linspace(1, 0, 1001, dtype=F64) ** 2)  # dense where a flow's rates are large
        self.value_at = f64(solve_ivp(value, (0, self.end), lq.terminal_value(), t_eval=self.nodes.numpy(), **options).y)
        taus = (self.end - self.nodes).flip(0)
        law = solve_ivp(moments, (0, self.end), start, t_eval=taus.numpy().clip(0, self.end), **options).y
        self.law_at = f64(law).flip(1)

    def _at(self, table, t):
        t = t.double().clamp(0, self.end)
        i = torch.searchsorted(self.nodes, t.contiguous()).clamp(1, len(self.nodes) - 1)
        w = (t - self.nodes[i - 1]) / (self.nodes[i] - self.nodes[i - 1])
        return (1 - w) * table[:, i - 1] + w * table[:, i]

    def value(self, x, t):
        """x (rows, 1), t (rows,) -> (rows,)."""
        Pi, h, e = (part.to(x) for part in self._at(self.value_at, t))
        return -Pi * x[:, 0] ** 2 / 2 + h * x[:, 0] + e

    def grad(self, x, t):
        """(rows, 1)."""
        Pi, h, _ = (part.to(x) for part in self._at(self.value_at, t))
        return (-Pi * x[:, 0] + h)[:, None]

    def law(self, t):
        """Mean and variance at t (rows,), under this policy."""
        return self._at(self.law_at, t)


def learner(process, eta, estimator, *, steps, batch, parameters=OLD, look="reward", exact=None, sampler=None, **options):
    """A learner of the affine policy; with `exact` the critic is the closed-form value."""
    made = model(process, parameters)
    config = sa.ScoreAction(beta=BETA, estimator=estimator, look_ahead=look, **{"trust": 0.0, **options})
    found = config.build(setting(made, eta=eta, steps=steps, batch=batch, **(sampler or {})))
    if exact is not None:
        with_value(found, exact)
    return found, made


def with_value(found, exact):
    """The learner with this value and its gradient in the place of its critic's."""
    found.value.gradient = lambda states, grad_look: exact.grad(states.x, states.t)
    found.value.critic.forward = lambda x, t, prompt, look=None: exact.value(x, t)
    without_critic(found)


def without_critic(found):
    """The learner without updates of its critic."""
    found.value.updates = lambda rollout, critic, generator: iter(())


def experienced(found, batch, generator):
    rollout = found.explore(none(batch), found.times(generator), generator)
    return found.prepare(replace(rollout, rewards=REWARD(rollout.x0)), generator)
