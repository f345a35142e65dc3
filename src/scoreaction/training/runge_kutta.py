"""Runge-Kutta steps of games: several players, each with a loss of its own, move along their joint gradient flow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

Order = Literal[1, 2, 4]
TABLES: dict[int, tuple[tuple[float, ...], tuple[float, ...]]] = {
    1: ((), (1.0,)),
    2: ((1.0,), (1 / 2, 1 / 2)),
    4: ((1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
"""Of each order: where the later stages are, in steps along the one before, and the weights of all."""

Losses = Callable[[], Mapping[str, Tensor]]
Direction = dict[str, list[Tensor]]


class RungeKutta:
    """Explicit Runge-Kutta of `dtheta_p/dt = -grad_p L_p`, all players at once: Euler, Heun's or the classical fourth order.

    Simultaneous gradient steps turn outwards where players pull against each other: on `min_x max_y x y` a step of size h
    grows the radius by `sqrt(1 + h^2)`, by `sqrt(1 + h^4/4)` at order 2, and at order 4 shrinks it by
    `sqrt(1 - h^6/72 + h^8/576)`, up to h = 2.83. Every stage moves all players; with the others left where they were nothing is
    gained over Euler. Qin et al. 2020 (arXiv 2010.15040), with the penalty in every stage, so that it is an integration of the
    penalised field; there it is in the first only.

    players: the parameters of each by name. lr: the step size h, of all or by name; it may be changed between steps. penalty:
    by name, what a player pays for the squared norm of the others' gradients, `lambda sum_q ||grad_q L_q||^2`, as a
    discriminator may for its generator's. max_norm: the largest norm of the whole direction. modules: whose buffers (running
    statistics) change once a step, by its first stage. It has no state. ValueError for a parameter of two players or in
    fp16, whose gradients vanish without a scaler, and at a step for losses of other names, a loss that does not depend on its
    player, and one that is not finite.

    >>> x, y = (nn.Parameter(torch.tensor([value])) for value in (1.0, 0.0))
    >>> game = RungeKutta({"x": [x], "y": [y]}, lr=0.5, order=4)
    >>> for _ in range(100):
    ...     before = game.step(lambda: {"x": x * y, "y": -x * y})
    >>> round(float((x.detach() ** 2 + y.detach() ** 2).sqrt()), 3)  # (1 - .5^6/72 + .5^8/576)^50
    0.99
    """

    def __init__(
        self,
        players: Mapping[str, Sequence[nn.Parameter]],
        lr: float | Mapping[str, float],
        *,
        order: Order = 4,
        penalty: Mapping[str, float] | None = None,
        max_norm: float | None = None,
        modules: Iterable[nn.Module] = (),
    ) -> None:
        self.players = {name: list(parameters) for name, parameters in players.items()}
        self.lr = dict(lr) if isinstance(lr, Mapping) else dict.fromkeys(self.players, lr)
        self.order, self.penalty, self.max_norm = order, dict(penalty or {}), max_norm
        self.modules = list(modules)
        if order not in TABLES:
            raise ValueError(f"order: must be 1, 2 or 4 (got {order})")
        for key, names in (("lr", self.lr), ("penalty", self.penalty)):
            if not set(names) <= set(self.players) or (key == "lr" and set(names) != set(self.players)):
                raise ValueError(f"{key}: must name the players {', '.join(self.players)} (got {', '.join(names)})")
        for (first, own), (second, others) in combinations(self.players.items(), 2):
            if {id(p) for p in own} & {id(p) for p in others}:
                raise ValueError(f"players: {first} and {second} share a parameter; each needs its own")
        for name, parameters in self.players.items():
            if not parameters or any(p.dtype == torch.float16 for p in parameters):
                raise ValueError(f"players: {name} needs parameters, in float32, bfloat16 or float64")

    def step(self, losses: Losses) -> dict[str, float]:
        """One step of all players; `losses()` gives each loss at the parameters of now. Gives those before the step."""
        places, weights = TABLES[self.order]
        start = {name: [p.detach().clone() for p in parameters] for name, parameters in self.players.items()}
        try:
            slope, before = self._field(losses)
            buffers = [(buffer, buffer.clone()) for module in self.modules for buffer in module.buffers()]
            total = {name: [weights[0] * k for k in own] for name, own in slope.items()}
            for place, weight in zip(places, weights[1:], strict=True):
                self._move(start, slope, place)
                slope, _ = self._field(losses)
                total = {n: [t + weight * k for t, k in zip(own, slope[n], strict=True)] for n, own in total.items()}
        except BaseException:
            self._move(start, None, 0.0)
            raise
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self._move(start, total, self._share(total))
        return before

    def _field(self, losses: Losses) -> tuple[Direction, dict[str, float]]:
        """Minus each player's gradient of its own loss and penalty, and the losses."""
        values = losses()
        if set(values) != set(self.players):
            raise ValueError(f"losses: must be those of {', '.join(self.players)} (got {', '.join(values)})")
        gradients: dict[str, list[Tensor]] = {}
        for name, parameters in self.players.items():
            if not bool(torch.isfinite(values[name]).all()):
                raise ValueError(f"losses: that of {name} is not finite; lower lr")
            gradients[name] = self._gradient(name, values[name], parameters, graph=bool(self.penalty))
        slope = {name: [-g.detach() for g in own] for name, own in gradients.items()}
        for name, price in self.penalty.items():
            norms = [g.square().sum() for other, own in gradients.items() if other != name for g in own]
            paid = price * torch.stack(norms).sum()
            if paid.requires_grad:
                more = torch.autograd.grad(paid, self.players[name], retain_graph=True, allow_unused=True)
                slope[name] = [k if g is None else k - g for k, g in zip(slope[name], more, strict=True)]
        return slope, {name: float(value.detach().sum()) for name, value in values.items()}

    @staticmethod
    def _gradient(name: str, loss: Tensor, parameters: Sequence[nn.Parameter], *, graph: bool) -> list[Tensor]:
        gradients: Sequence[Tensor | None] = [None]
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=True, create_graph=graph, allow_unused=True)
        if all(g is None for g in gradients):
            raise ValueError(f"losses: that of {name} does not depend on its parameters; check that nothing detaches them")
        return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]

    @torch.no_grad()
    def _move(self, start: Direction, slope: Direction | None, share: float) -> None:
        """Puts every player at `start + share h slope`."""
        for name, parameters in self.players.items():
            for i, p in enumerate(parameters):
                p.copy_(start[name][i] if slope is None else start[name][i] + share * self.lr[name] * slope[name][i])

    def _share(self, direction: Direction) -> float:
        """The share of the step that `max_norm` leaves."""
        if self.max_norm is None:
            return 1.0
        norm = float(torch.stack([k.square().sum() for own in direction.values() for k in own]).sum().sqrt())
        return min(1.0, self.max_norm / norm) if norm > 0 else 1.0
