"""Trajectories that are learned from more than once: first in first out, drawn by (trajectory, step)."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.sampling.experience import Experience

ON_DISK = 2**30
"""States of more bytes than this are kept in a file and mapped into memory."""


@dataclass(frozen=True)
class Drawn:
    """Rows of a buffer: slot and step (rows,), x, old x0_hat (rows, *shape), t, s, groups, importance (rows,)."""

    slot: Tensor
    step: Tensor
    x: Tensor
    old: Tensor
    t: Tensor
    s: Tensor
    groups: Tensor
    importance: Tensor


class Replay(nn.Module):
    """A buffer of `capacity` trajectories of `steps` steps, the newest over the oldest; it stays on the CPU.

    A pair (trajectory, step) is drawn with probability `P ~ p^priority` (0: uniformly), p what `set_priority` said last and the
    largest yet for one not seen; `importance` i gives each row the weight `(pairs P)^-i` over its largest (Schaul et al. 2016,
    arXiv 1511.05952, section 3.4). Trajectories older than `max_age` iterations are not drawn. Its state_dict is all of it.
    ValueError where neither memory nor disk holds it.

    >>> len(Replay(4, 2, (3,)).held())
    0
    """

    x: Tensor
    old: Tensor
    times: Tensor
    groups: Tensor
    born: Tensor
    weights: Tensor
    added: Tensor
    now: Tensor

    def __init__(
        self,
        capacity: int,
        steps: int,
        shape: Sequence[int],
        *,
        max_age: int | None = None,
        priority: float = 0.0,
        importance: float = 0.0,
        largest_in_memory: int = ON_DISK,
    ) -> None:
        super().__init__()
        self.max_age, self.priority, self.importance = max_age, priority, importance
        for name in ("x", "old"):
            self.register_buffer(name, _states((capacity, steps, *shape), largest_in_memory))
        self.register_buffer("times", torch.zeros(capacity, steps + 1, dtype=torch.float64))
        self.register_buffer("groups", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("born", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("weights", torch.zeros(capacity, steps))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))
        self.register_buffer("now", torch.zeros((), dtype=torch.long))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Replay:
        return self  # a move to the accelerator would take the whole buffer there

    def add(self, experience: Experience) -> None:
        """The trajectories of one iteration, each step's state with the policy's own x0_hat there."""
        _, batch = experience.size
        rollout, capacity = experience.rollout, len(self.times)
        self.now += 1
        slots = (self.added + torch.arange(batch)) % capacity
        self.added += batch
        kept = slice(max(0, batch - capacity), None)
        slots = slots[kept]
        self.x[slots] = rollout.x[:-1].transpose(0, 1)[kept].to(self.x)
        self.old[slots] = rollout.prediction.x0.transpose(0, 1)[kept].to(self.old)
        self.times[slots] = rollout.times
        self.groups[slots] = experience.groups[kept].to(self.groups)
        self.born[slots] = self.now
        self.weights[slots] = self.weights.max().clamp(min=1.0) if self.priority else 1.0

    def held(self) -> Tensor:
        """The slots that may be drawn."""
        known = torch.arange(min(int(self.added), len(self.times)))
        return known if self.max_age is None else known[self.now - self.born[known] < self.max_age]

    def draw(self, rows: int, steps: Tensor, generator: torch.Generator) -> Drawn:
        """rows pairs of a held trajectory and one of `steps`, with replacement."""
        held = self.held()
        pairs = self.weights[held][:, steps].flatten().double() ** self.priority
        chance = pairs / pairs.sum()
        if self.priority:
            chosen = torch.multinomial(chance, rows, replacement=True, generator=generator)
        else:
            chosen = torch.randint(len(pairs), (rows,), generator=generator)
        slot, step = held[chosen // len(steps)], steps[chosen % len(steps)]
        importance = (len(pairs) * chance[chosen]) ** -self.importance
        return Drawn(
            slot,
            step,
            self.x[slot, step],
            self.old[slot, step],
            self.times[slot, step],
            self.times[slot, step + 1],
            self.groups[slot],
            importance / importance.max() if self.importance else torch.ones(rows, dtype=torch.float64),
        )

    def set_priority(self, slot: Tensor, step: Tensor, priority: Tensor) -> None:
        """What those pairs weigh from now on; positive."""
        self.weights[slot, step] = priority.to(self.weights).clamp(min=1e-12)


def _states(shape: Sequence[int], largest_in_memory: int) -> Tensor:
    """Zeros, in memory or, where they are many, in an unnamed file that goes with the process."""
    size = 4 * math.prod(shape)
    if size <= largest_in_memory:
        return torch.zeros(*shape)
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if 2 * size > 0.9 * room:  # x and old; an empty file takes no room yet
        raise ValueError(
            f"algorithm.buffer: {shape[0]} trajectories need {2 * size / 2**30:.1f} GiB, more than memory or the"
            f" {room / 2**30:.0f} GiB free in the temporary folder hold; lower algorithm.buffer or sampler.steps"
        )
    file: Any = tempfile.NamedTemporaryFile(suffix=".replay", delete=False)  # noqa: SIM115
    with file:
        os.truncate(file.name, size)
    states = torch.from_file(file.name, shared=True, size=math.prod(shape)).view(*shape)
    os.unlink(file.name)
    return states
