"""Running the sampler: a trajectory is a generator of visits; a rollout keeps what an update needs, and no graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import GridName, Past, Solver, SolverName, find_solver, time_grid
from scoreaction.diffusion.transitions import Transition
from scoreaction.networks.model import Model
from scoreaction.types import Predict, Prediction


class Sampler(BaseModel):
    """How samples are drawn: solver, number of steps, noise level eta, time grid, guidance.

    negative_prompt: what guidance leads away from, instead of the unconditional prediction.

    >>> Sampler(steps=10, eta=1.0).solver
    'ddim'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    solver: SolverName = "ddim"
    steps: int = Field(50, ge=1)
    eta: float = Field(1.0, ge=0, le=1)
    grid: GridName = "power"
    guidance: float = Field(1.0, ge=0)
    negative_prompt: str | None = None

    def find(self) -> Solver:
        """The solver, refused where it cannot step at this eta."""
        return find_solver(self.solver, self.eta)

    def times(self, process: Process) -> Tensor:
        """The time grid, (steps + 1,) float64."""
        return time_grid(process, self.steps, name=self.grid)


@dataclass(frozen=True)
class Visit:
    """One step of a trajectory: at (t, x) the network said `prediction`, and `transition` led to `x_next` at s."""

    t: Tensor
    s: Tensor
    x: Tensor
    prediction: Prediction
    transition: Transition
    x_next: Tensor


def trajectory(
    predict: Predict,
    process: Process,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    eta: float,
    generator: torch.Generator | None = None,
) -> Iterator[Visit]:
    """Steps from any stored x at times[0] down the grid, one `Visit` a step.

    x (batch, *shape); times decreasing float64. Nothing is kept between steps but what the solver looks back on.
    """
    past: Past | None = None
    for t, s in zip(times[:-1], times[1:], strict=True):
        prediction = predict(x, t)
        transition = solver.step(process, predict, prediction, x, t, s, eta, past)
        x_next = transition.sample(generator) if float(transition.std) > 0 else transition.mean
        yield Visit(t, s, x, prediction, transition, x_next)
        x, past = x_next, Past(t, prediction)


@dataclass(frozen=True)
class Rollout:
    """A batch of trajectories: times (N+1,), x (N+1, batch, *shape), predictions (N, batch, *shape).

    prediction is the policy's own; action is what was done, the same but for exploration.
    """

    times: Tensor
    x: Tensor
    prediction: Prediction
    action: Prediction

    @property
    def x0(self) -> Tensor:
        """Where the trajectories ended."""
        return self.x[-1]


def initial_noise(model: Model, n: int, generator: torch.Generator) -> Tensor:
    """x at t = 1: (n, *shape) float32 noise of the process's prior std, drawn on the CPU so that seeds travel."""
    return (model.process.prior_std * torch.randn(n, *model.shape, generator=generator)).to(model.device)


@torch.no_grad()
def roll_out(
    model: Model,
    sampler: Sampler,
    predict: Predict,
    n: int,
    generator: torch.Generator,
    *,
    times: Tensor,
    explore: Callable[[Tensor, Tensor, Prediction], Prediction] | None = None,
) -> Rollout:
    """n trajectories under `predict` on the grid `times`, without a graph; `explore` changes what is done with it."""
    x, steps = initial_noise(model, n, generator), len(times) - 1
    states, said, done = torch.empty(steps + 1, *x.shape, dtype=x.dtype, device=x.device), Kept(steps), Kept(steps)
    states[0] = x
    asked: list[Prediction] = []

    def act(x: Tensor, t: Tensor) -> Prediction:
        asked.append(predict(x, t))
        return asked[-1] if explore is None else explore(x, t, asked[-1])

    visits = trajectory(act, model.process, x, times, solver=sampler.find(), eta=sampler.eta, generator=generator)
    for i, visit in enumerate(visits):
        states[i + 1] = visit.x_next
        done.add(visit.prediction)
        if explore is not None:
            said.add(asked[0])  # a solver may ask again within its step
        asked.clear()
    action = done.all()
    return Rollout(times, states, action if explore is None else said.all(), action)


class Kept:
    """`rows` predictions, written into one place one after another, so that there is never a second copy of them all."""

    def __init__(self, rows: int) -> None:
        self.rows, self.count = rows, 0
        self.into: Prediction | None = None

    def add(self, prediction: Prediction, rows: int | None = None) -> None:
        """The next one; or the next `rows`, one each along the first dimension."""
        x0, eps = (part if rows else part[None] for part in (prediction.x0, prediction.eps))
        if self.into is None:
            self.into = Prediction(*(part.new_empty(self.rows, *part.shape[1:]) for part in (x0, eps)))
        place = slice(self.count, self.count + len(x0))
        self.into.x0[place], self.into.eps[place] = x0, eps
        self.count += len(x0)

    def all(self) -> Prediction:
        """All of them, in a new first dimension."""
        if self.into is None or self.count < self.rows:
            raise ValueError(f"{self.count} of {self.rows} predictions are there")
        return self.into


def joined(rollouts: list[Rollout]) -> Rollout:
    """Rollouts of the same times as one, their trajectories side by side."""
    if len(rollouts) == 1:
        return rollouts[0]

    def side_by_side(predictions: list[Prediction]) -> Prediction:
        return Prediction(torch.cat([p.x0 for p in predictions], 1), torch.cat([p.eps for p in predictions], 1))

    x, said = torch.cat([rollout.x for rollout in rollouts], 1), side_by_side([rollout.prediction for rollout in rollouts])
    explored = any(rollout.action is not rollout.prediction for rollout in rollouts)
    return Rollout(rollouts[0].times, x, said, side_by_side([rollout.action for rollout in rollouts]) if explored else said)


def stacked(predictions: list[Prediction]) -> Prediction:
    """One prediction with a new first dimension."""
    return Prediction(torch.stack([p.x0 for p in predictions]), torch.stack([p.eps for p in predictions]))
