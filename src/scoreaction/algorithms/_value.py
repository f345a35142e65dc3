"""Values of states: what a critic regresses on, its regression, and the look-ahead that stands in its skip."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._updates import Loss, Term, Update, Updates
from scoreaction.diffusion.kl import g2_integral, kl_rate
from scoreaction.diffusion.noise import RowNoise, Source, drawn_seed
from scoreaction.diffusion.predictions import expand
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.transitions import sum_event
from scoreaction.networks.conditions import take
from scoreaction.networks.critic import Critic, Skip
from scoreaction.networks.surrogate import Surrogate, zeroth_order
from scoreaction.networks.token_layers import TokenCritic
from scoreaction.sampling.look_ahead import look_ahead
from scoreaction.sampling.rollout import Rollout, States
from scoreaction.types import Prediction
from scoreaction.world import Rows

LookAhead = Literal["auto", "reward", "surrogate", "zeroth_order", "none"]


def running_cost(process: Process, eta: float, rollout: Rollout, squares: Tensor | None = None) -> Tensor:
    """`(c/eta)^2/2 integral of g^2 ||s - s_pre||^2` over each step of the policy, in nats at eta > 0: (n, batch).

    squares (n, batch): the squared score difference at each state, by default that of the rollout's predictions.

    Trapezoid in the squared score difference, with the integral of g^2 over the step; the last step, at whose end no score
    is evaluated, takes its beginning. On coarse grids it is above the path KL, by most on VE; with the path KL itself in
    its place a policy that was trained on a coarse grid overshoots further.
    """
    t, s = rollout.acted[:-1], rollout.acted[1:]
    if squares is None:
        squares = torch.stack([sum_event(step**2) for step in rollout.difference().eps])
        squares = squares / process.sigma2(t).to(squares)[:, None]
    ends = torch.cat([squares[1:], squares[-1:]])
    weight = kl_rate(eta) / 2 * g2_integral(process, t, s)
    return weight.to(squares)[:, None] * (squares + ends) / 2


def kl_to_go(process: Process, eta: float, rollout: Rollout, squares: Tensor | None = None) -> Tensor:
    """The running cost from each state that the policy acted in to the end: (n, batch)."""
    return running_cost(process, eta, rollout, squares).flip(0).cumsum(0).flip(0)


def critic_updates(
    critic: Critic | TokenCritic,
    states: States,
    rows: Rows,
    look: Tensor | None,
    target: Tensor,
    *,
    updates: int,
    generator: torch.Generator,
    network: str = "critic",
) -> Updates:
    """The martingale loss `E integral (V(t, x_t) - target)^2 dt`: V becomes the conditional mean of the target (rows,).

    states, look and target are at these rows; look is the look-ahead, None without skip. An update takes an eighth of the
    list, and its loss is in units of the rewards' variance. Jia and Zhou 2022 (arXiv 2108.06655), section 4.1.
    """
    size, spread = max(1, rows.total // 8), float(critic.scale.spread)

    def loss(drawn: Rows, numbers: Tensor) -> Loss:
        here = drawn.own[numbers]
        error = ((critic(*take(states, here), take(look, here)) - take(target, here)) / spread).square()
        return error, {f"{network}_loss": error}

    for _ in range(updates):
        drawn = rows.redrawn(size, generator)
        yield Update(network, [Term(drawn, partial(loss, drawn), calls=0)])


def visited_updates(
    learner: Learner, critic: Critic, rollout: Rollout, cost: Tensor | None, *, updates: int, generator: torch.Generator
) -> Updates:
    """The regression of V on the reward less the cost to go, at the states of the policy's steps and at the end of the last.

    cost (n, batch) in units of reward, None without one.
    """
    n, batch = rollout.size
    states = States(rollout.x[: n + 1].flatten(0, 1), rollout.acted.repeat_interleave(batch), rollout.prompt.repeat(n + 1))
    target = rollout.rewards.expand(n + 1, batch)
    if cost is not None:
        target = target - torch.cat([cost, torch.zeros_like(cost[:1])])
    rows = learner.world.rows((n + 1) * batch * learner.world.size)
    yield from critic_updates(critic, states, rows, None, target.flatten(), updates=updates, generator=generator)


@dataclass(frozen=True)
class ValuedRollout(Rollout):
    """A rollout with what its critic learns from, at the `chosen` rows of its steps.

    look (rows,) is the look-ahead r(x0_hat) and grad_look (rows, *shape) its gradient in x, zero without skip; target (rows,)
    is `r(x0) - beta * KL to go` from there on.
    """

    chosen: Rows = field(kw_only=True)
    look: Tensor = field(kw_only=True)
    grad_look: Tensor = field(kw_only=True)
    target: Tensor = field(kw_only=True)


class StateValue:
    """The value of Score as Action, `V = c_skip r(x0_hat) + c_out F`: its critic, and the look-ahead in its skip.

    x0_hat is the pretrained model's. `look_ahead` is the reward's own value and gradient, a fitted `surrogate` of a black-box
    reward, its `zeroth_order` gradient, or nothing; `auto` takes `reward` where it is differentiable, and `surrogate` where it
    is not or rewards come late.
    """

    def __init__(self, learner: Learner, *, look_ahead: LookAhead, skip: Skip, lr: float, std: float) -> None:
        if look_ahead == "reward" and not learner.reward.differentiable:
            raise ValueError(
                "algorithm.look_ahead: this reward has no gradient; use surrogate, zeroth_order or none, or wrap it in"
                " Reward(fn, differentiable=True)"
            )
        if look_ahead in ("reward", "zeroth_order") and learner.delay:
            raise ValueError(
                f"algorithm.look_ahead: {look_ahead} takes answers of the reward at once, and with train.reward_delay they come"
                " late; set it to surrogate or none"
            )
        auto: LookAhead = "reward" if learner.reward.differentiable and not learner.delay else "surrogate"
        self.learner, self.std = learner, std
        self.look_ahead = auto if look_ahead == "auto" else look_ahead
        process, shape = learner.process, learner.model.shape
        own: dict[str, Any] = {"conditions": learner.conditions, "network": learner.model.critic}
        skip = "none" if self.look_ahead == "none" else skip
        self.critic = Critic(process, shape, skip=skip, **own)
        learner.networks["critic"], learner.lr["critic"] = self.critic, lr
        self.surrogate = Surrogate(process, shape, **own) if self.look_ahead == "surrogate" else None
        if self.surrogate is not None:
            learner.networks["surrogate"], learner.lr["surrogate"] = self.surrogate, lr

    def remember(self, rollout: Rollout) -> float | None:
        """Shows the rewards of a batch to the surrogate, if there is one: the share of their variance that it had foreseen."""
        if self.surrogate is None:
            return None
        gather = self.learner.world.gather
        batch = gather(rollout.x0), gather(rollout.prompt), gather(rollout.rewards)
        foreseen = self.surrogate.foreseen(*batch) if int(self.surrogate.seen) else None
        self.surrogate.remember(*batch)
        self.surrogate.fit_line()
        return foreseen

    def prepare(self, rollout: Rollout, chosen: Rows, generator: torch.Generator) -> ValuedRollout:
        """The pretrained predictions at the policy's states, and the look-ahead with its gradient at the chosen ones."""
        states, seed = rollout.steps().states, drawn_seed(generator)
        flat = Prediction(torch.empty_like(states.x), torch.empty_like(states.x))
        look, grad_look = states.x.new_zeros(len(chosen)), states.x.new_zeros(len(chosen), *states.x.shape[1:])

        def look_ahead(numbers: Tensor) -> None:
            part = chosen.part(numbers)
            prediction, value, grad = self.look(take(states, part.own), RowNoise(seed, part.place))
            put(flat, part.own, prediction)
            put((look, grad_look), numbers, (value, grad))

        learner = self.learner
        own = torch.arange(len(chosen))
        learner.together(lambda: learner.in_parts(own, look_ahead))
        others = torch.ones(len(states.t), dtype=torch.bool).index_fill(0, chosen.own, False).nonzero().flatten()
        with torch.no_grad():
            for rows in self.learner.parts(others):
                put(flat, rows, self.learner.pretrained(*take(states, rows)))
        complete = Rollout(**vars(rollout) | {"pretrained": Prediction(*(p.unflatten(0, rollout.size) for p in flat))})
        to_go = kl_to_go(self.learner.process, self.learner.sampler.eta, complete)
        target = (rollout.rewards[None] - self.learner.beta * to_go).flatten()
        return ValuedRollout(**vars(complete), chosen=chosen, look=look, grad_look=grad_look, target=take(target, chosen.own))

    def look(self, states: States, generator: Source) -> tuple[Prediction, Tensor, Tensor]:
        """The pretrained prediction at these states, the look-ahead r(x0_hat) there and its gradient in x."""
        if self.look_ahead == "none":
            with torch.no_grad():
                prediction = self.learner.pretrained(*states)
            return prediction, prediction.x0.new_zeros(len(prediction.x0)), torch.zeros_like(prediction.x0)

        def value(x: Tensor) -> tuple[Tensor, Prediction]:
            prediction = self.learner.pretrained(x, states.t, states.prompt)
            return self._reward_of(prediction.x0, states.prompt, generator), prediction

        values, grad, prediction = look_ahead(states.x, value, gradient=True)
        return Prediction(*(part.detach() for part in prediction)), values, grad

    def _reward_of(self, x0: Tensor, prompt: Tensor, generator: Source) -> Tensor:
        if self.surrogate is not None:
            return self.surrogate(x0, prompt)
        if self.look_ahead == "reward":
            return self.learner.reward(x0, prompt)
        noise = self.learner.noise(generator, prompt)
        return zeroth_order(lambda x0: self.learner.reward(x0, prompt), x0, self.std, noise)

    def gradient(self, states: States, grad_look: Tensor) -> Tensor:
        """grad V at these states: `c_skip grad r(x0_hat) + c_out grad F`, (rows, *shape)."""
        grad = self.critic.gradient(*states)
        return grad + expand(self.critic.coefficients(states.t)[0], grad) * grad_look

    def updates(self, rollout: ValuedRollout, *, critic: int, generator: torch.Generator) -> Updates:
        """The regression of the critic on the rollout's targets."""
        chosen, look, target = rollout.chosen, rollout.look, rollout.target
        states = take(rollout.steps().states, chosen.own)
        yield from critic_updates(self.critic, states, chosen, look, target, updates=critic, generator=generator)

    def surrogate_updates(self, updates: int, generator: torch.Generator, *, rows: int = 64) -> Updates:
        """The regression of the surrogate's network on remembered samples."""
        surrogate = self.surrogate
        if surrogate is None:
            return

        def loss(slots: Tensor, numbers: Tensor) -> Loss:
            error = surrogate.loss(slots[numbers])
            return error, {"surrogate_loss": error}

        here = self.learner.world.rows(rows)
        for _ in range(updates):
            slots = surrogate.draw(rows, generator)[here.place]
            yield Update("surrogate", [Term(here, partial(loss, slots), calls=0)])


def put(record: tuple[Tensor, ...], rows: Tensor, values: tuple[Tensor, ...]) -> None:
    """Writes rows of tensors: the inverse of `take`."""
    for into, value in zip(record, values, strict=True):
        into[rows.to(into.device)] = value
