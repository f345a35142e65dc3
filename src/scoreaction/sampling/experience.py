"""What one iteration learns from: trajectories with rewards, and the points at which networks are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoreaction.networks.conditions import take
from scoreaction.sampling.rollout import Kept, Rollout
from scoreaction.types import Conditions, Prediction


def over_rows(predict: Callable[[Tensor, Tensor, Conditions], Prediction], points: Points, max_rows: int) -> Prediction:
    """`predict` at many points, at most `max_rows` of them in one network call."""
    if len(points.x) <= max_rows:
        return predict(points.x, points.t, points.conditions)
    kept = Kept(len(points.x))
    for rows in torch.arange(len(points.x)).split(max_rows):
        piece = points.take(rows)
        kept.add(predict(piece.x, piece.t, piece.conditions), len(rows))
    return kept.all()


@dataclass(frozen=True)
class Points:
    """Places where networks are asked: x (rows, *shape), t (rows,) float64, and the conditions of each row.

    told holds conditions, owner (rows,) which of them a row has (None: row i the i-th). Texts are large: they are not
    repeated for every step, only gathered for the rows that are asked.
    """

    x: Tensor
    t: Tensor
    told: Conditions
    owner: Tensor | None = None

    @property
    def conditions(self) -> Conditions:
        """The conditions of each row: (rows, ...)."""
        return self.told if self.owner is None else take(self.told, self.owner)

    def take(self, rows: Tensor) -> Points:
        """The points with these indices."""
        owner = rows if self.owner is None else self.owner[rows.to(self.owner.device)]
        return Points(self.x[rows.to(self.x.device)], self.t[rows.to(self.t.device)], self.told, owner)


@dataclass(frozen=True)
class Experience:
    """What one iteration of sampling brought home: trajectories, their rewards (batch,) and prompts.

    groups (batch,) numbers the prompts; reference is the pretrained model's prediction at the visited states,
    (N, rows, *shape) for the first `rows` trajectories, None before it was asked; reward_gradient (batch, *shape) that of the
    reward by x0, before decoding, None where the algorithm did not ask for it.
    """

    rollout: Rollout
    rewards: Tensor
    conditions: Conditions
    groups: Tensor
    reference: Prediction | None = None
    reward_gradient: Tensor | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(steps, trajectories)."""
        return len(self.rollout.times) - 1, self.rollout.x.shape[1]

    def points(self, trajectories: int | None = None) -> Points:
        """The visited states of the first trajectories (all by default), steps outermost: (N * trajectories, *shape)."""
        steps, batch = self.size
        n = trajectories or batch
        x = self.rollout.x[:-1, :n].flatten(0, 1)
        return Points(x, self.rollout.times[:-1].repeat_interleave(n), self.conditions, torch.arange(n).repeat(steps))

    def difference(self) -> Prediction:
        """Policy minus reference at the visited states, (N, rows, *shape)."""
        if self.reference is None:
            raise ValueError("the reference has not been asked yet")
        rows = self.reference.eps.shape[1]
        policy = self.rollout.prediction
        return Prediction(policy.x0[:, :rows] - self.reference.x0, policy.eps[:, :rows] - self.reference.eps)
