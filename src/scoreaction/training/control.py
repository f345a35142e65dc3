"""Control with delay: an action now, from a state seen some steps ago and the actions since (SAID, arXiv 2603.01553)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoreaction.networks.model import Model
from scoreaction.sampling.known import Known
from scoreaction.training.steering import steer

Judge = Callable[[Tensor, Tensor], Tensor]
"""`critic(states, actions) -> (n,)`, higher is better: states (n, S), actions (n, A)."""


class Belief(NamedTuple):
    """Draws of the present state (M, S), and with each an action that the data have there, (M, A)."""

    states: Tensor
    actions: Tensor


class DelayedController:
    """Acts on a state of `delay` steps ago by a diffusion model of windows, with a critic of the present state and action.

    model: of windows `(s_0, a_0, s_1, a_1, ..., s_d, a_d)`, (d + 1)(S + A) numbers a row, d the delay. The first state and all
    actions but the last are given to steering as `known` within `std`, and `particles` windows are drawn of the rest: what the
    state may be now, and actions for it. Of the first `choices` of those actions the one is taken that has the best mean of the
    critic over all states. bounds: least and largest action, numbers or (A,), as a space's `low` and `high`; actions beyond are
    brought to them before the critic sees them. Other settings are those of `steer`. Futures are not imagined: who tilts whole
    windows by their reward tilts the noise of the system as well, and is too hopeful. The data's actions may depend on the
    first state of a window, on what was before it and on noise, not on the states after: else the actions since would seem to
    tell what those were. ValueError where the numbers do not fit one another.

    >>> import scoreaction as sa
    >>> windows = sa.gaussian_mixture.build(sa.gaussian_mixture.Config(means=[[0.0, 0.0, 0.0, 0.0]], std=1.0))
    >>> controller = DelayedController(windows, lambda s, a: -(s + a)[:, 0] ** 2, delay=1, state=1, particles=32, steps=10)
    >>> controller.act([0.5], [[0.1]], seed=1).shape
    torch.Size([1])
    """

    def __init__(
        self,
        model: Model,
        critic: Judge,
        *,
        delay: int,
        state: int,
        particles: int = 512,
        choices: int = 64,
        bounds: tuple[Any, Any] | None = None,
        **steering: Any,
    ) -> None:
        if delay < 0:
            raise ValueError(f"delay: must be 0 or more steps (got {delay})")
        if len(model.shape) != 1 or model.shape[0] % (delay + 1) or model.shape[0] // (delay + 1) <= state or state < 1:
            raise ValueError(
                f"state: windows of delay {delay} have {delay + 1} states and actions, and the model's {model.shape} are not as"
                f" many pairs with states of {state} numbers"
            )
        if particles < 2 or choices < 1:
            raise ValueError(f"particles: must be 2 or more, and choices 1 or more (got {particles} and {choices})")
        self.model, self.critic, self.delay, self.state = model, critic, delay, state
        self.particles, self.choices = particles, choices
        self.action = model.shape[0] // (delay + 1) - state
        self.bounds = None if bounds is None else _checked(bounds, self.action)
        self.std: float = steering.pop("std", 0.1)
        self.steering = {"method": "twisted", "steps": 50, **steering}

    def window(self, observation: Sequence[float] | Tensor, actions: Sequence[Any] | Tensor) -> list[float | None]:
        """The known part of a window, with None for what is not known."""
        seen, taken = _flat(observation), _flat(actions)
        if len(seen) != self.state or len(taken) != self.delay * self.action:
            raise ValueError(
                f"act: needs a state of {self.state} numbers and the {self.delay} actions since, of {self.action} each (got"
                f" {len(seen)} and {len(taken)} numbers)"
            )
        values: list[float | None] = [None] * ((self.delay + 1) * (self.state + self.action))
        values[: self.state] = seen.tolist()
        for step, action in enumerate(taken.view(self.delay, self.action).tolist()):
            first = step * (self.state + self.action) + self.state
            values[first : first + self.action] = action
        return values

    def believe(self, observation: Sequence[float] | Tensor, actions: Sequence[Any] | Tensor, *, seed: int = 0) -> Belief:
        """Draws what the present may be: observation (S,) of `delay` steps ago, actions (delay, A) since, the oldest first.

        Numbers, arrays, tensors, or lists of them.
        """
        known = Known(values=self.window(observation, actions), std=self.std)
        many = self.particles
        drawn = steer(
            self.model, None, n=many, particles=many, returns="all", known=known, seed=seed, **self.steering
        )  # fmt: skip
        present = self.model.decode(drawn.x0).double()[:, -(self.state + self.action) :]
        if self.delay == 0:  # the state is known itself
            present[:, : self.state] = _flat(observation).to(present)
        return Belief(present[:, : self.state], present[:, self.state :])

    @torch.no_grad()
    def act(self, observation: Sequence[float] | Tensor, actions: Sequence[Any] | Tensor, *, seed: int = 0) -> Tensor:
        """The action now (A,): of those that the windows have, the one with the best mean over the believed states."""
        states, every = self.believe(observation, actions, seed=seed)
        choices = every[: self.choices]
        if self.bounds is not None:
            choices = choices.clamp(*(bound.to(choices) for bound in self.bounds))
        every_state, every_action = states.repeat(len(choices), 1), choices.repeat_interleave(len(states), 0)
        values = self.critic(every_state, every_action).view(len(choices), len(states)).mean(1)
        return choices[int(values.argmax())]


def _flat(part: Any) -> Tensor:
    """The numbers of a tensor, an array, or a list of either, (n,) float64 on the host."""
    if isinstance(part, Tensor):
        return part.detach().cpu().double().reshape(-1)
    if isinstance(part, list | tuple):
        return torch.cat([torch.zeros(0, dtype=torch.float64), *map(_flat, part)])
    return torch.as_tensor(np.asarray(part, dtype=np.float64)).reshape(-1)


def _checked(bounds: Any, action: int) -> tuple[Tensor, Tensor]:
    """Both bounds as (A,); ValueError where they are of no action of so many numbers, or in the wrong order."""
    low, high = map(_flat, bounds) if isinstance(bounds, list | tuple) and len(bounds) == 2 else (torch.zeros(0),) * 2
    if any(len(bound) not in (1, action) for bound in (low, high)) or not bool((low < high).all()):
        raise ValueError(
            f"bounds: must be a least and a largest action, numbers or {action} of them each, the least first (got {bounds})"
        )
    return low.expand(action), high.expand(action)
