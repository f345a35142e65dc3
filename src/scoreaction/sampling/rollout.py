"""Rollouts: a batch of trajectories, of which each keeps what an update needs, and no graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from scoreaction.diffusion.noise import Source
from scoreaction.diffusion.predictions import PredictionBuffer, mapped
from scoreaction.networks.conditions import take
from scoreaction.networks.model import Model
from scoreaction.networks.prompt_chooser import Decisions
from scoreaction.sampling.sampler import Sampler
from scoreaction.sampling.trajectory import Choose, trajectory
from scoreaction.types import Predict, Prediction
from scoreaction.world import ALONE, World

ALL = slice(None)


class States(NamedTuple):
    """States that networks are evaluated at, one a row: x (rows, *shape), t (rows,) float64, prompt (rows,) its number."""

    x: Tensor
    t: Tensor
    prompt: Tensor


class Steps(NamedTuple):
    """Steps t -> s of trajectories, one a row: the one record that an update is made of, and `take` picks its rows.

    x, x_next (rows, *shape), t, s (rows,) float64. old and pretrained are the predictions at (t, x) of the policy that
    sampled and of the pretrained model, (rows, *shape); pretrained is None where it was not evaluated. prompt, path and step
    (rows,): the number of the prompt, of the trajectory, and of the step in it. weight (rows,) float64: how many steps the row
    counts for, so that the mean over random rows of `weight * f` estimates the sum of f over a trajectory.
    """

    x: Tensor
    t: Tensor
    s: Tensor
    x_next: Tensor
    old: Prediction
    pretrained: Prediction | None
    prompt: Tensor
    path: Tensor
    step: Tensor
    weight: Tensor

    @property
    def states(self) -> States:
        """The states that the steps begin at."""
        return States(self.x, self.t, self.prompt)


def once(model: Model, predict: Callable[[Tensor, Tensor, Tensor], Prediction], steps: Steps) -> Prediction:
    """`predict(x, t, prompt)` at these steps; of a causal model by one row a path, its latest step.

    The tokens that the earlier steps have shown are among those of the latest, and what comes after a position does not change
    its prediction, so that the first masked position of every step has its own; later ones are not read.
    """
    if not model.causal:
        return predict(*steps.states)
    paths, path = steps.path.unique(return_inverse=True)
    rows = max(1, len(path))
    latest = torch.zeros_like(paths).scatter_reduce(0, path, steps.step * rows + torch.arange(len(path)), "amax") % rows
    return take(predict(*take(steps.states, latest)), path)


@dataclass(frozen=True)
class Rollout:
    """A batch of trajectories, and once they were scored their rewards: what one iteration learns from.

    times (N+1,) float64; x (N+1, batch, *shape); old (N, batch, *shape) the predictions of the policy that sampled; action
    the predictions that were followed, the same but for exploration; prompt (batch,) the numbers of the prompts; rewards
    (batch,), empty before they are known; pretrained (n, rows, *shape), the predictions of the pretrained model in the first n
    steps, those that the policy acted in, of the trajectories `compared_at` (n, rows), by default of all, None before it was
    evaluated; reward_gradient
    (batch, *shape), by x0 before decoding, None where the algorithm does not need it. off_below is the sampler's: at times
    before it `old` is the pretrained model. noise (batch, *shape): what the policy moved to x[0], where it moves the noise.
    weight (N, batch): what each step of each path counts for, None where all count alike. step_weight (N,) float64: what each
    step counts for beside that, 0 outside the window of steps that are learned from; None is 1 for all. decisions: those of a
    policy that chooses prompts.
    """

    times: Tensor
    x: Tensor
    old: Prediction
    action: Prediction
    prompt: Tensor
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    pretrained: Prediction | None = None
    compared_at: Tensor | None = None
    reward_gradient: Tensor | None = None
    off_below: float = 0.0
    noise: Tensor | None = None
    weight: Tensor | None = None
    step_weight: Tensor | None = None
    decisions: Decisions | None = None

    @property
    def x0(self) -> Tensor:
        """The ends of the trajectories, (batch, *shape)."""
        return self.x[-1]

    @property
    def size(self) -> tuple[int, int]:
        """(n, trajectories), n the number of steps that the policy acted in: they come first."""
        return int((self.times[:-1] >= self.off_below).sum()), self.x.shape[1]

    @property
    def acted(self) -> Tensor:
        """The times of the steps that the policy acted in, (n + 1,)."""
        return self.times[: self.size[0] + 1]

    def steps(self) -> Steps:
        """The steps that the policy acted in, the first step of every trajectory first: row `step * batch + path`.

        Views of the rollout, no copies.
        """
        n, batch = self.size
        complete = self.pretrained is not None and self.compared_at is None
        return Steps(
            x=self.x[:n].flatten(0, 1),
            t=self.times[:n].repeat_interleave(batch),
            s=self.times[1 : n + 1].repeat_interleave(batch),
            x_next=self.x[1 : n + 1].flatten(0, 1),
            old=flattened(take(self.old, slice(n))),
            pretrained=flattened(self.pretrained) if complete and self.pretrained is not None else None,
            prompt=self.prompt.repeat(n),
            path=torch.arange(batch).repeat(n),
            step=torch.arange(n).repeat_interleave(batch),
            weight=torch.full((n * batch,), float(n), dtype=torch.float64),
        )

    def compared(self) -> tuple[Tensor, Prediction, Prediction]:
        """The states at which policy and pretrained model are compared, and both predictions there, (n, rows, *shape)."""
        if self.pretrained is None:
            raise ValueError("the pretrained model has not been evaluated yet")
        n, batch = self.size
        chosen = slice(None) if self.compared_at is None else rows_at(self.compared_at, batch)
        x = take(self.x[:n].flatten(0, 1), chosen).unflatten(0, (n, -1))
        return x, unflattened(take(flattened(take(self.old, slice(n))), chosen), n), self.pretrained

    def difference(self) -> Prediction:
        """Policy minus pretrained model at the states that are compared, (n, rows, *shape)."""
        _, old, pretrained = self.compared()
        return mapped(torch.sub, old, pretrained)


def compared(steps: int, batch: int, count: int, world: World = ALONE) -> tuple[Tensor, Tensor]:
    """The trajectories, of a process's own, that are compared at each step, (steps, rows), and whether each counts.

    At each step `count` of all processes' count, other ones at the next, so that few states see many trajectories: a mean over
    all is estimated without bias and more closely than by whole trajectories, whose steps are alike. Processes whose part is
    smaller at a step have one row there that does not count.

    >>> compared(3, 4, 2)[0].tolist()
    [[0, 1], [2, 3], [0, 1]]
    """
    first = torch.arange(steps)[:, None] * count
    place = -((world.rank - first) // world.size) + torch.arange(-(-count // world.size))
    return place % batch, world.rank + place * world.size < first + count


def rows_at(trajectories: Tensor, batch: int) -> Tensor:
    """The row numbers, `step * batch + trajectory`, of these trajectories at each step, (steps, rows)."""
    return (torch.arange(len(trajectories))[:, None] * batch + trajectories).flatten()


def flattened(prediction: Prediction) -> Prediction:
    """(N, batch, *shape) as (N * batch, *shape)."""
    return mapped(lambda part: part.flatten(0, 1), prediction)


def unflattened(prediction: Prediction, steps: int) -> Prediction:
    """(N * batch, *shape) back to (N, batch, *shape)."""
    return mapped(lambda part: part.unflatten(0, (steps, -1)), prediction)


@torch.no_grad()
def roll_out(
    model: Model,
    sampler: Sampler,
    predict: Predict,
    prompt: Tensor,
    generator: Source,
    *,
    times: Tensor,
    x: Tensor | None = None,
    explore: Callable[[Tensor, Tensor, Prediction], Prediction] | None = None,
    choose: Choose | None = None,
) -> Rollout:
    """A trajectory under `predict` for each prompt (batch,), on the grid `times`, without a graph.

    x (batch, *shape): the states at times[0], by default noise. `explore(x, t, prediction)` gives the prediction that is
    followed in place of the policy's own; `choose` as in `trajectory`.
    """
    x, steps = model.start(len(prompt), generator) if x is None else x, len(times) - 1
    states, old, action = x.new_empty(steps + 1, *x.shape), PredictionBuffer(steps), PredictionBuffer(steps)
    states[0] = x
    own: list[Prediction] = []

    def act(x: Tensor, t: Tensor) -> Prediction:
        own.append(predict(x, t))
        return own[-1] if explore is None else explore(x, t, own[-1])

    visits = trajectory(
        act, model.process, x, times, solver=sampler.find(), eta=sampler.eta, generator=generator, choose=choose
    )
    for i, visit in enumerate(visits):
        states[i + 1] = visit.x_next
        action.add(mapped(lambda part: part[None], visit.prediction))
        if explore is not None:
            old.add(mapped(lambda part: part[None], own[0]))  # a solver may evaluate again within its step
        own.clear()
    followed = action.all()
    own_actions = followed if explore is None else old.all()
    return Rollout(times, states, own_actions, followed, prompt, off_below=sampler.acts_from)


def with_rows(rollout: Rollout, rows: Tensor, new: Rollout) -> Rollout:
    """The rollout with other trajectories in these rows, and their rewards; new may begin later on the grid.

    States and predictions are overwritten in place.
    """
    first = len(rollout.times) - len(new.times)
    rollout.x[first:, rows] = new.x
    for own, other in ((rollout.old, new.old), (rollout.action, new.action)):
        for part, values in zip(own, other, strict=True):
            part[first:, rows] = values
    return replace(rollout, rewards=rollout.rewards.index_copy(0, rows.to(rollout.rewards.device), new.rewards))


def joined(rollouts: list[Rollout], order: Tensor | slice = ALL) -> Rollout:
    """Rollouts of the same times as one, their trajectories side by side in this order."""
    first = rollouts[0]
    if len(rollouts) == 1:
        return first

    def side_by_side(*parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)[:, order]

    old = mapped(side_by_side, *(rollout.old for rollout in rollouts))
    explored = any(rollout.action is not rollout.old for rollout in rollouts)
    action = mapped(side_by_side, *(rollout.action for rollout in rollouts)) if explored else old
    x, prompt = side_by_side(*(rollout.x for rollout in rollouts)), torch.cat([rollout.prompt for rollout in rollouts])[order]
    noises = [rollout.noise for rollout in rollouts if rollout.noise is not None]
    noise = torch.cat(noises)[order] if noises else None
    decided = [rollout.decisions for rollout in rollouts if rollout.decisions is not None]
    decisions = Decisions(*(side_by_side(*parts) for parts in zip(*decided, strict=True))) if decided else None
    return replace(first, x=x, old=old, action=action, prompt=prompt, noise=noise, decisions=decisions)


def followed(start: Rollout, end: Rollout) -> Rollout:
    """A rollout and the one that goes on from its x0, as one, with the rewards of the latter; both without exploration."""
    old = mapped(lambda *parts: torch.cat(parts), start.old, end.old)
    times, x = torch.cat([start.times, end.times[1:]]), torch.cat([start.x, end.x[1:]])
    return replace(end, times=times, x=x, old=old, action=old)
