"""Truth: a scalar linear system with quadratic cost, whose belief under delay is Gaussian and whose best action is linear."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.diffusion.mixtures import Mixture
from scoreaction.diffusion.predictions import expand
from scoreaction.training.control import DelayedController

A, B, Q, R, NOISE = 1.1, 0.5, 1.0, 0.2, 0.3
VARIANCE, SPREAD = 2.0, 1.5
"""Of the first states of the data, and the std of its actions."""


def riccati():
    """Cost-to-go P and gain L of the best controller, by iteration to the end."""
    p = 1.0
    for _ in range(1000):
        p = Q + A * A * p - (A * B * p) ** 2 / (R + B * B * p)
    return p, A * B * p / (R + B * B * p)


P, GAIN = riccati()


def windows(delay, gain=0.0):
    """The exact law of `(x_0, u_0, ..., x_d, u_d)` under actions `-gain x` and noise."""
    basis = torch.eye(2 * delay + 2, dtype=torch.float64)  # x_0, then of each step the action's noise and the system's
    loadings, x = [], math.sqrt(VARIANCE) * basis[0]
    for step in range(delay + 1):
        u = -gain * x + SPREAD * basis[1 + 2 * step]
        loadings += [x, u]
        if step < delay:
            x = A * x + B * u + math.sqrt(NOISE) * basis[2 + 2 * step]
    factor = torch.stack(loadings)
    return Mixture(f64([1.0]), torch.zeros(1, len(factor), dtype=torch.float64), (factor @ factor.T)[None])


class Exact(nn.Module):
    """The v of a law."""

    def __init__(self, law):
        super().__init__()
        self.law, self.unused = law, nn.Parameter(torch.zeros(()))

    def forward(self, x, t, cond):
        prediction, t = self.law.prediction(sa.VP(), x.double(), t.double()), t.double()
        v = expand(sa.VP().alpha(t), x) * prediction.eps - expand(sa.VP().sigma(t), x) * prediction.x0
        return v.to(x) + 0 * self.unused


def critic(states, actions):
    """Minus the cost of an action now and of the best ones later, up to a constant."""
    x, u = states[:, 0], actions[:, 0]
    return -(Q * x**2 + R * u**2 + P * (A * x + B * u) ** 2)


def controller(delay, gain=0.0, **more):
    law = windows(delay, gain)
    model = sa.Model(Exact(law), process=sa.VP(), predicts="v", shape=(len(law.means[0]),), law=law)
    return DelayedController(model, critic, **{"delay": delay, "state": 1, "particles": 1024} | more)


def present(seen, actions):
    """Mean and variance of the state now."""
    mean = seen
    for u in actions:
        mean = A * mean + B * u
    return mean, NOISE * sum(A ** (2 * i) for i in range(len(actions)))


@pytest.mark.parametrize("delay", [1, 3])
def test_the_belief_is_the_law_of_the_present_state(delay):
    """Mean and variance of the predictor. Twins: the state as it was seen; without what the actions did; certain; by windows
    of data whose actions followed states that the controller has not seen, so that its own actions seem to tell of them."""
    seen, actions = 1.0, [1.6, -0.5, 1.4][:delay]

    def believed(gain):
        states = controller(delay, gain).believe([seen], [[u] for u in actions], seed=3).states[:, 0]
        return float(states.mean()), float(states.std())

    mean, variance = present(seen, actions)
    still = present(seen, [0.0] * delay)[0]
    twins = {"stale": (seen, 0.0), "still": (still, 0.0), "certain": (mean, 0.0)}
    twins |= {"confounded": believed(0.9)} if delay > 1 else {}  # with one step the only action is of the state that was seen
    close(believed(0.0), (mean, math.sqrt(variance)), atol=0.2, **twins)


def told(delay, lag):
    """The present state's best linear prediction from the first state of a window and the actions since, (delay + 1,).

    The actions of the data are `-0.9 x` of `lag` steps before, where that was, and noise.
    """
    basis = torch.eye(2 * (lag + delay) + 1, dtype=torch.float64)
    states, actions = [math.sqrt(VARIANCE) * basis[0]], []
    for step in range(lag + delay):
        actions.append(SPREAD * basis[1 + 2 * step] - (0.9 * states[step - lag] if step >= lag else 0.0))
        states.append(A * states[-1] + B * actions[-1] + math.sqrt(NOISE) * basis[2 + 2 * step])
    given = torch.stack([states[lag], *actions[lag:]])
    return torch.linalg.solve(given @ given.T, given @ states[-1])


@pytest.mark.parametrize("delay", [2, 3])
def test_windows_that_were_recorded_under_the_delay_are_not_confounded(delay):
    """The prediction is the system's own. Twins: actions that follow states within the window."""
    system = f64([A**delay, *(A ** (delay - 1 - i) * B for i in range(delay))])
    twins = {f"lag {lag}": told(delay, lag) for lag in range(delay - 1)}
    close(told(delay, delay), system, atol=1e-9, **twins)
    close(told(delay, delay + 2), system, atol=1e-9, **twins)


@pytest.mark.parametrize("delay", [0, 2])
def test_the_action_is_the_best_for_the_mean_of_the_belief(delay):
    """`-L E[x]`, as near as the closest of the actions that were drawn. Twins: of the state as it was seen; of the data."""
    seen, actions = 1.5, [-0.9, -0.7][:delay]
    act = controller(delay).act([seen], [[u] for u in actions], seed=2)
    mean, _ = present(seen, actions)
    accepts(lambda u: _near(u, -GAIN * mean, 0.4), float(act), **({"stale": -GAIN * seen} if delay else {}), still=0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_action_is_the_best_within_bounds(sign):
    """The cost is convex: the bound next to the best action, and the critic sees none beyond. Twins: no bounds; the other."""
    seen, limit = -3.0 * sign, 0.5  # the best action is -GAIN * seen

    def acted(bounds):
        judged = []
        few = controller(0, bounds=bounds, particles=128)
        few.critic = lambda states, actions: judged.append(actions) or critic(states, actions)
        return float(few.act([seen], [], seed=4)), float(judged[0].abs().max())

    (action, largest), free = acted((-limit, f64([limit]))), acted(None)
    close(action, sign * limit, free=free[0], other=-sign * limit)
    close(largest, limit, free=free[1])


def _near(value, truth, most):
    assert abs(value - truth) < most, (value, truth)


def test_a_window_is_made_of_numbers_arrays_or_tensors():
    """The pairs in their order, what is not known left out. Twin: the two actions the other way round."""
    model = sa.gaussian_mixture.build(sa.gaussian_mixture.Config(means=[[0.0] * 9], std=1.0))
    late = DelayedController(model, critic, delay=2, state=1)
    forms = (
        [[1.0, 2.0], [3.0, 4.0]],
        [np.array([1.0, 2.0]), np.array([3.0, 4.0])],
        [f64([1, 2]), f64([3, 4])],
        f64([[1, 2], [3, 4]]),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16),
    )
    for actions in forms:
        for state in ([5.0], np.array([5.0], dtype=np.float32), f64([5])):
            other = late.window(state, [actions[1], actions[0]])
            same(late.window(state, actions), [5.0, 1.0, 2.0, None, 3.0, 4.0, None, None, None], other_order=other)


def test_numbers_that_do_not_fit_are_refused():
    for change, message in (({"delay": 3}, "state: windows of delay 3"), ({"state": 2}, "state: "), ({"delay": -1}, "delay: ")):
        law = windows(1)
        model = sa.Model(Exact(law), process=sa.VP(), predicts="v", shape=(4,))
        with pytest.raises(ValueError, match=message):
            DelayedController(model, critic, **{"delay": 1, "state": 1} | change)
    with pytest.raises(ValueError, match="particles: must be 2"):
        controller(1, particles=1)
    for bounds in ((1.0, -1.0), (f64([0.0, 0.0]), 1.0), (0.0, math.nan), (0.0, 1.0, 2.0), 5.0):
        with pytest.raises(ValueError, match="bounds: must be a least and a largest action, numbers or 1 of them"):
            controller(1, bounds=bounds)
    with pytest.raises(ValueError, match="act: needs a state of 1 numbers and the 1 actions since"):
        controller(1).act([0.0], [])
