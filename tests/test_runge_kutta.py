"""Truth: the stability function R of each order on games whose flow is linear, and observed orders on one that is not."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from twins import F64, close

import scoreaction as sa
from scoreaction.training import runge_kutta

ROTATION = {
    1: lambda h: math.sqrt(1 + h**2),
    2: lambda h: math.sqrt(1 + h**4 / 4),
    4: lambda h: math.sqrt(1 - h**6 / 72 + h**8 / 576),
}


def numbers(*values):
    return [nn.Parameter(torch.tensor([value], dtype=F64)) for value in values]


def bilinear(x, y):
    return lambda: {"x": x * y, "y": -x * y}


def radius(h, order, steps=20, *, game=bilinear, **settings):
    """The modulus of one step, from (1, 0)."""
    x, y = numbers(1.0, 0.0)
    optimiser = sa.RungeKutta({"x": [x], "y": [y]}, lr=h, order=order, **settings)
    for _ in range(steps):
        optimiser.step(game(x, y))
    return math.hypot(float(x.detach()), float(y.detach())) ** (1 / steps)


@pytest.mark.parametrize("h", [0.1, 1.0, 2.9])
def test_moduli_on_the_bilinear_game(h, monkeypatch):
    """R(ih). Twins: another order's weights, and stages that move one player only, which is Euler."""

    def apart():
        x, y = numbers(1.0, 0.0)
        for _ in range(20):
            fixed = [p.detach().clone() for p in (x, y)]
            moved = []
            for own, loss in ((x, lambda x, y: x * y), (y, lambda y, x: -x * y)):
                other = fixed[1] if own is x else fixed[0]
                sa.RungeKutta({"own": [own]}, lr=h).step(lambda own=own, loss=loss, other=other: {"own": loss(own, other)})
                moved.append(own.detach().clone())
                own.data = fixed[0 if own is x else 1].clone()
            x.data, y.data = moved
        return math.hypot(float(x.detach()), float(y.detach())) ** (1 / 20)

    found = {order: radius(h, order) for order in ROTATION}
    for order, truth in ROTATION.items():
        others = {f"order_{other}": value for other, value in found.items() if other != order}
        close(found[order], truth(h), atol=1e-9, **others)
    close(apart(), ROTATION[1](h), atol=1e-9, fourth=found[4])
    monkeypatch.setitem(runge_kutta.TABLES, 4, ((0.5, 0.5, 1.0), (0.5, 0.5, 0.0, 0.0)))
    close(found[4], ROTATION[4](h), atol=1e-9, half_and_half=radius(h, 4))


def test_the_penalty_pulls_inwards():
    """R(h M) of the field -y, x - 2 lambda y, lambda .1, h .5, whose spectral radii are known. Twins: half the price, none."""

    def stable(order, price):
        step = 0.5 * torch.tensor([[0.0, -1.0], [1.0, -2 * price]], dtype=F64)
        return sum(torch.linalg.matrix_power(step, k) / math.factorial(k) for k in range(order + 1))

    def moved(order, price):
        x, y = numbers(1.0, 0.0)
        optimiser = sa.RungeKutta({"x": [x], "y": [y]}, lr=0.5, order=order, penalty={"y": price})
        for _ in range(2):
            optimiser.step(bilinear(x, y))
        return torch.cat([x, y]).detach()

    for order, radius in ((1, 1.0724), (2, 0.95296), (4, 0.95125)):
        exact = stable(order, 0.1)
        close(
            torch.linalg.eigvals(exact).abs().max(),
            radius,
            atol=5e-5,
            without=torch.linalg.eigvals(stable(order, 0.0)).abs().max(),
        )
        truth = (exact @ exact)[:, 0]
        close(moved(order, 0.1), truth, atol=1e-12, half=moved(order, 0.05), none=moved(order, 0.0))


def flow(order, n):
    x, y = numbers(1.0, 0.5)
    optimiser = sa.RungeKutta({"x": [x], "y": [y]}, lr=2.0 / n, order=order)
    for _ in range(n):
        optimiser.step(lambda: {"x": x * y + x**4 / 4, "y": -x * y + y**2 / 4})
    return torch.cat([x, y]).detach()


@pytest.mark.slow
def test_orders_on_a_game_that_is_not_linear():
    """Observed orders 1.04, 2.09, 4.14 between 40 and 80 steps. Twin: the order next to it."""
    truth = flow(4, 320)
    for order, expected in ((1, 1.04), (2, 2.09), (4, 4.14)):
        errors = [float((flow(order, n) - truth).abs().max()) for n in (40, 80)]
        close(math.log2(errors[0] / errors[1]), expected, atol=0.1, another=expected + 1)


def test_one_player_follows_the_gradient_flow_of_a_quadratic():
    """`theta <- R(-h a) theta`, a = 3. A step size by name; clipped to the norm of the whole direction."""
    z, (theta,) = -0.2 * 3, numbers(2.0)
    optimiser = sa.RungeKutta({"theta": [theta]}, lr={"theta": 0.2})
    before = optimiser.step(lambda: {"theta": 1.5 * theta**2})
    close(before["theta"], 6.0, after=1.5 * float(theta.detach()) ** 2)
    close(theta, 2 * (1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24), atol=1e-12, euler=2 * (1 + z))
    clipped = sa.RungeKutta({"theta": [theta]}, lr=1.0, order=1, max_norm=0.5)
    place = theta.detach().clone()
    clipped.step(lambda: {"theta": 1.5 * theta**2})
    close(place - theta, 0.5, atol=1e-12, whole=3 * place)


def test_three_players_move_together():
    """A ring, L_i = theta_i theta_{i+1}: the flow -A theta of a permutation A, whose exponential series is known."""
    players = numbers(1.0, 0.0, 0.5)
    start = torch.cat(players).detach()
    sa.RungeKutta({str(i): [p] for i, p in enumerate(players)}, lr=0.3).step(
        lambda: {str(i): p * players[(i + 1) % 3] for i, p in enumerate(players)}
    )
    step = -0.3 * torch.roll(torch.eye(3, dtype=F64), 1, 1)
    series = term = torch.eye(3, dtype=F64)
    for k in range(1, 5):
        term = term @ step / k
        series = series + term
    close(torch.cat(players), series @ start, atol=1e-12, euler=start + step @ start, the_other_way=series.T @ start)


def test_other_ways_to_play():
    """Alternating steps stay on their circle's scale, and Adam at .05 goes from radius 1 to 13.3 in 2,000 steps."""
    x, y = numbers(1.0, 0.0)
    first, second = (sa.RungeKutta({"own": [p]}, lr=0.5, order=1) for p in (x, y))
    largest = 0.0
    for _ in range(200):
        first.step(lambda: {"own": x * y.detach()})
        second.step(lambda: {"own": -x.detach() * y})
        largest = max(largest, math.hypot(float(x.detach()), float(y.detach())))
    assert largest < 1.3
    both = nn.Parameter(torch.tensor([1.0, 0.0], dtype=F64))
    adam = torch.optim.Adam([both], lr=0.05)
    for _ in range(2000):
        both.grad = torch.stack([both[1], -both[0]]).detach()
        adam.step()
    close(float(both.detach().norm()), 13.3, atol=0.1, fourth_order=radius(0.05, 4, 100))


@pytest.mark.long
def test_a_gan_of_two_numbers():
    """Dirac GAN, softplus, h .5, 2,000 steps: radius .988, .131, .089. Twin: the order before."""

    def at(order):
        x, y = numbers(1.0, 1.0)
        optimiser = sa.RungeKutta({"x": [x], "y": [y]}, lr=0.5, order=order)
        for _ in range(2000):
            optimiser.step(lambda: {"x": softplus(-x * y), "y": softplus(x * y)})
        return math.hypot(float(x.detach()), float(y.detach()))

    found = [at(order) for order in (1, 2, 4)]
    close(found, [0.988, 0.131, 0.089], atol=6e-4, one_before=[1.0, 0.988, 0.131])


def test_running_statistics_change_once_a_step():
    """Truth: the buffer after one evaluation. Twin: a step that does not know of the module."""
    torch.manual_seed(0)
    data = torch.randn(16, 1)

    def mean(modules):
        net = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        with torch.no_grad():
            net[0].weight.fill_(2.0)
            net[0].bias.fill_(1.0)
        known = {"modules": [net]} if modules else {}
        sa.RungeKutta({"net": list(net.parameters())}, lr=0.1, **known).step(
            lambda: {"net": (net(data) - data).square().mean()}
        )
        return float(net[1].running_mean)

    close(mean(True), 0.1 * float(2 * data.mean() + 1), atol=1e-6, every_stage=mean(False))


def test_players_stay_where_they_were_if_a_stage_fails():
    """Twin: the loss of the second stage, which is where it failed."""
    x, y = numbers(1.0, 0.0)
    calls = []

    def losses():
        calls.append(float(x.detach()))
        return {"x": x * y + x, "y": -x * y * (float("nan") if len(calls) == 2 else 1.0)}

    with pytest.raises(ValueError, match="losses: that of y is not finite"):
        sa.RungeKutta({"x": [x], "y": [y]}, lr=0.5).step(losses)
    close(x, 1.0, second_stage=calls[1])


def test_what_is_no_game_is_refused():
    x, y = numbers(1.0, 0.0)
    players = {"x": [x], "y": [y]}
    for settings, why in (
        ({"players": {"x": [x], "y": [x, y]}}, "x and y share a parameter"),
        ({"order": 3}, "order: must be 1, 2 or 4"),
        ({"lr": {"x": 0.1}}, "lr: must name the players x, y"),
        ({"penalty": {"z": 0.1}}, "penalty: must name"),
        ({"players": {"x": []}}, "x needs parameters"),
        ({"players": {"x": [nn.Parameter(torch.ones(1).half())]}}, "x needs parameters, in float32"),
    ):
        with pytest.raises(ValueError, match=why):
            sa.RungeKutta(**{"players": players, "lr": 0.1} | settings)
    game = sa.RungeKutta(players, lr=0.1)
    for losses, why in (
        (lambda: {"x": x * y}, "must be those of x, y"),
        (lambda: {"x": x * y, "y": -x.detach() * y.detach()}, "that of y does not depend on its parameters"),
        (lambda: {"x": x * y, "y": -x}, "that of y does not depend on its parameters"),
    ):
        with pytest.raises(ValueError, match=why):
            game.step(losses)
    game.step(bilinear(x, y))
