"""Truth: a critic's formula by hand with a network of one's own; every method with a critic takes samples of every shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import accepts, close

import scoreaction as sa
from scoreaction.networks.critic import Critic

SHAPES = {"sequence": (3, 12), "points": (5, 3), "video": (2, 3, 4, 4)}
WITH_CRITICS: dict[str, Any] = {
    "score_action": sa.ScoreAction(updates=2, rows=8, critic_updates=2),
    "vard": sa.VARD(updates=2, rows=8, critic_updates=2),
    "pi_ft": sa.PIFT(stages=2, rows=8, critic_updates=2),
    "sqdf": sa.SQDF(updates=2, rows=8, correction=True, critic_updates=2, critic_rows=16),
}


class Net(nn.Module):
    """A small multiple of x, whatever its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return self.w * x


class Sums(nn.Module):
    """A critic of samples of any shape: a sum of squares, by one weight."""

    def __init__(self, width: int, *, wide: bool = False) -> None:
        super().__init__()
        self.width, self.wide, self.w = width, wide, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        value = self.w * x.flatten(1).square().sum(1) + t
        if condition is not None:
            value = value + condition.sum(1)
        return value[:, None].repeat(1, 2) if self.wide else value


def tune(shape: tuple[int, ...], algorithm: Any, critic: Any = None, *, prompts: list[str] | None = None) -> sa.Finetuner:
    encode = (lambda names: torch.tensor([[float(name)] for name in names])) if prompts else None
    model = sa.Model(Net(), process=sa.VP(), predicts="v", shape=shape, critic=critic, encode=encode)
    reward = sa.Reward(lambda x, _: x.flatten(1).mean(1), differentiable=True)
    train = sa.Train(iterations=1, batch=8, device="cpu")
    return sa.Finetuner(model, reward=reward, algorithm=algorithm, sampler=sa.Sampler(steps=3), train=train, prompts=prompts)


def trained(tuner: sa.Finetuner) -> None:
    """All figures are finite, the policy moved and so did the critic."""
    nets = {"policy": tuner.model.net, "critic": tuner.learner.networks["critic"]}
    before = {name: [p.detach().clone() for p in net.parameters()] for name, net in nets.items()}
    for metrics in tuner:
        assert all(math.isfinite(value) for value in metrics.values() if isinstance(value, float))
    for name, net in nets.items():
        assert any(not torch.equal(a, b) for a, b in zip(before[name], net.parameters(), strict=True)), name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", WITH_CRITICS)
def test_a_method_with_a_critic_takes_any_shape(name: str, shape: tuple[int, ...]) -> None:
    """Twin: a policy at a learning rate of nothing does not move."""
    still = tune(shape, WITH_CRITICS[name])
    still.optimisation.rates["policy"] = 0.0
    accepts(trained, tune(shape, WITH_CRITICS[name]), still=still)


@pytest.mark.parametrize("prompts", [None, ["1", "2"]], ids=["without prompts", "with prompts"])
@pytest.mark.parametrize("name", WITH_CRITICS)
def test_a_critic_of_ones_own_serves_shapes_that_ours_does_not(name: str, prompts: list[str] | None) -> None:
    """Twin: without it the shape is refused, and the line says what to give."""
    shape = (2, 2, 2, 2, 2)

    def serves(critic: Any) -> None:
        if critic is None:
            with pytest.raises(ValueError, match="critic=lambda width") as caught:
                tune(shape, WITH_CRITICS[name], prompts=prompts)
            raise AssertionError(str(caught.value))
        tuner = tune(shape, WITH_CRITICS[name], critic, prompts=prompts)
        net = tuner.learner.networks["critic"].net
        assert isinstance(net, Sums)
        assert net.width == (16 if prompts else 0)
        trained(tuner)

    accepts(serves, Sums, ours=None)


def test_the_value_is_the_formula_with_ones_own_network() -> None:
    """`m + alpha^2 (look - m) + sigma d F` with F = sum x^2 + t. Twins: without the skip, and another F."""
    torch.manual_seed(0)
    critic = Critic(sa.VP(), (4, 2), skip="alpha", network=Sums)
    rewards = torch.tensor([1.0, 3.0, 8.0])
    critic.scale.calibrate(rewards)
    x, t, look = torch.randn(5, 4, 2), torch.linspace(0.1, 0.9, 5, dtype=torch.float64), torch.randn(5)
    alpha, sigma = sa.VP().alpha(t), sa.VP().sigma(t)
    mean, spread = float(rewards.mean()), float(rewards.std(correction=0))
    own = x.flatten(1).square().sum(1) + t
    truth = mean + alpha**2 * (look - mean) + sigma * spread * own
    value = critic(x, t, torch.zeros(5, dtype=torch.long), look)
    close(value.detach(), truth, atol=1e-5, no_skip=truth - alpha**2 * (look - mean), other=truth - sigma * spread * t)


@pytest.mark.parametrize(
    ("critic", "said"),
    [
        (lambda width: Sums(width, wide=True), r"critic: its network must return \(2,\) or \(2, 1\) .* gave \(2, 2\)"),
        (lambda width: nn.Linear(3, 1), "critic: its network fails on x"),
    ],
    ids=["two numbers", "other arguments"],
)
def test_a_critic_that_does_not_fit_is_refused_before_the_run(critic: Any, said: str) -> None:
    """The right twins are above."""
    with pytest.raises(ValueError, match=f"^{said}"):
        tune((2,), sa.VARD(), critic)
