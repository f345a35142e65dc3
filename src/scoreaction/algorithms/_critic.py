"""What critics are taught: reward minus the KL still to be paid, from every visited state on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Setting, Update
from scoreaction.algorithms._pathwise import Rates
from scoreaction.diffusion.kl import score_weight
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.critic import Critic
from scoreaction.sampling.experience import Experience, Points


def running_cost(setting: Setting, experience: Experience) -> Tensor:
    """`charge/2 integral of g^2 ||s - s_pre||^2` over each step, in nats at eta > 0: (N, batch).

    Trapezoid in the squared score difference, with the integral of g^2 over the step; the last step, which ends where no
    score was asked, takes its beginning. On coarse grids it is above the path KL, by most on VE; with the path KL itself in
    its place a policy that was trained on a coarse grid overshoots further.
    """
    times, process = experience.rollout.times, setting.model.process
    t, s = times[:-1], times[1:]
    squares = torch.stack([sum_event(step**2) for step in experience.difference().eps])
    squares = squares / process.sigma2(t).to(squares)[:, None]
    ahead = torch.cat([squares[1:], squares[-1:]])
    weight = Rates.at(setting.sampler.eta).charge / 2 * score_weight(process, t, s)
    return weight.to(squares)[:, None] * (squares + ahead) / 2


def kl_to_go(setting: Setting, experience: Experience) -> Tensor:
    """The running cost from each visited state to the end: (N, batch)."""
    return running_cost(setting, experience).flip(0).cumsum(0).flip(0)


def calibrated(value: Tensor, target: Tensor) -> Tensor:
    """`m + rho (V - mean V)` with the means of each step: m of the target, rho in [0, 1] its regression on V; (N, batch).

    value must not have been fitted to this batch. Then rho says how far it can be believed: where it explains nothing the
    baseline is the batch's mean, and where it is right it stays (the coefficient of a control variate; Glasserman 2003,
    section 4.1).

    >>> calibrated(torch.tensor([[5.0, 7.0, 9.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 2., 3.]])
    >>> calibrated(torch.tensor([[9.0, 7.0, 5.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 2., 2.]])
    """
    mean = target.mean(1, keepdim=True)
    away = value - value.mean(1, keepdim=True)
    spread = away.square().sum()
    rho = ((away * (target - mean)).sum() / spread).clamp(0, 1) if spread > 0 else 0.0
    return mean + rho * away


def fit_critic(
    critic: Critic, points: Points, look: Tensor | None, target: Tensor, *, updates: int, generator: torch.Generator
) -> Iterator[Update]:
    """`critic_updates` of a critic at points, with the look-ahead's value there (rows,), or None where its skip has none."""

    def value(rows: Tensor) -> Tensor:
        part = points.take(rows)
        seen = None if look is None else look[rows.to(look.device)]
        return critic(part.x, part.t, part.conditions, seen)

    yield from critic_updates(value, target, spread=float(critic.scale.spread), updates=updates, generator=generator)


def critic_updates(
    value: Callable[[Tensor], Tensor], target: Tensor, *, spread: float, updates: int, generator: torch.Generator
) -> Iterator[Update]:
    """The martingale loss `E integral (V(t, x_t) - target)^2 dt`: V becomes the conditional mean of the target.

    value(rows) is V at those of the points that target (rows,) is of; an update takes an eighth of them. The loss is in units
    of `spread` squared. Jia and Zhou 2022 (arXiv 2108.06655), section 4.1.
    """
    size = max(1, len(target) // 8)
    for _ in range(updates):
        rows = torch.randint(len(target), (size,), generator=generator)
        loss = ((value(rows) - target[rows.to(target.device)]) / spread).square().mean()
        yield Update(loss, "critic", {"critic_loss": float(loss.detach())})
