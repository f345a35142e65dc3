"""Running the sampler: a trajectory is a generator of visits, one a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.processes import Process
from scoreaction.diffusion.solvers import Past, Solver
from scoreaction.diffusion.transitions import Kernel
from scoreaction.networks.conditions import take
from scoreaction.types import Predict, Prediction


@dataclass(frozen=True)
class Visit:
    """One step of a trajectory: the `prediction` at (t, x), and the `transition` that led to `x_next` at s."""

    t: Tensor
    s: Tensor
    x: Tensor
    prediction: Prediction
    transition: Kernel
    x_next: Tensor


class Chosen(NamedTuple):
    """The states (rows, *shape) that follow a step, where a caller chooses them itself.

    prediction: that of the policy there, where it was evaluated to choose. parents (rows,): whose successor each state is,
    None where each row is its own.
    """

    x: Tensor
    prediction: Prediction | None = None
    parents: Tensor | None = None


Choose = Callable[[Any, Tensor, Tensor], Chosen]
"""Chooses the states at s of a transition t -> s: `choose(transition, t, s)`, t and s () float64."""


def trajectory(
    predict: Predict,
    process: Process,
    x: Tensor,
    times: Tensor,
    *,
    solver: Solver,
    eta: float,
    generator: Source | None = None,
    choose: Choose | None = None,
) -> Iterator[Visit]:
    """Steps from any stored x at times[0] down the grid, one `Visit` a step.

    x (batch, *shape); times decreasing float64. Nothing is kept between steps but what the solver looks back on. `choose`
    takes the place of sampling the transition.
    """
    past: Past | None = None
    known: Prediction | None = None
    for t, s in zip(times[:-1], times[1:], strict=True):
        prediction = predict(x, t) if known is None else known
        transition = solver.step(process, predict, prediction, x, t, s, eta, past)
        if choose is not None:
            x_next, known, parents = choose(transition, t, s)
        else:
            x_next, parents = transition.sample(generator), None
        yield Visit(t, s, x, prediction, transition, x_next)
        x, past = x_next, Past(t, prediction if parents is None else take(prediction, parents))
