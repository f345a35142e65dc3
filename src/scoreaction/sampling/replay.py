"""A replay buffer of trajectories: first in, first out, drawn by (trajectory, step)."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import to_prediction
from scoreaction.networks.model import Model
from scoreaction.sampling.rollout import Rollout, Steps

ON_DISK = 2**30
"""States of more bytes than this are kept in a file and mapped into memory."""


class Replay(nn.Module):
    """A buffer of `capacity` trajectories of `steps` steps, the newest over the oldest; it stays on the CPU.

    A pair (trajectory, step) is drawn with probability `P ~ p^priority` (0: uniformly), p the last `set_priority` and the
    largest yet for one not seen; `importance` i gives each row the weight `(pairs P)^-i` over its largest (Schaul et al. 2016,
    arXiv 1511.05952, section 3.4). Trajectories older than `max_age` iterations are not drawn. Its state_dict is all of it.
    ValueError where neither memory nor disk holds it.

    >>> len(Replay(4, 2, (3,)).slots())
    0
    """

    x: Tensor
    old: Tensor
    times: Tensor
    prompts: Tensor
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
    ) -> None:
        super().__init__()
        self.max_age, self.priority, self.importance = max_age, priority, importance
        shapes = [(capacity, states, *shape) for states in (steps + 1, steps)]
        together = 4 * sum(math.prod(each) for each in shapes)
        for name, each in zip(("x", "old"), shapes, strict=True):
            self.register_buffer(name, _states(each, together))
        self.register_buffer("times", torch.zeros(capacity, steps + 1, dtype=torch.float64))
        self.register_buffer("prompts", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("born", torch.zeros(capacity, dtype=torch.long))
        self.register_buffer("weights", torch.zeros(capacity, steps))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))
        self.register_buffer("now", torch.zeros((), dtype=torch.long))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Replay:
        return self  # a move to the accelerator would take the whole buffer there

    def add(self, rollout: Rollout) -> None:
        """Stores the trajectories of one iteration, each step's state with the policy's own x0_hat there."""
        _, batch = rollout.size
        capacity = len(self.times)
        self.now += 1
        slots = (self.added + torch.arange(batch)) % capacity
        self.added += batch
        newest = slice(max(0, batch - capacity), None)
        slots = slots[newest]
        self.x[slots] = rollout.x.transpose(0, 1)[newest].to(self.x)
        self.old[slots] = rollout.old.x0.transpose(0, 1)[newest].to(self.old)
        self.times[slots] = rollout.times
        self.prompts[slots] = rollout.prompt[newest].to(self.prompts)
        self.born[slots] = self.now
        self.weights[slots] = self.weights.max().clamp(min=1.0) if self.priority else 1.0

    def slots(self) -> Tensor:
        """Slots of the trajectories that may be drawn."""
        known = torch.arange(min(int(self.added), len(self.times)))
        return known if self.max_age is None else known[self.now - self.born[known] < self.max_age]

    def draw(self, model: Model, rows: int, numbers: Tensor, generator: torch.Generator) -> Steps:
        """`rows` pairs of a slot and one of the steps with these `numbers`, with replacement, on the model's device.

        `path` is the slot; weight is the number of steps times the importance weight.
        """
        slots = self.slots()
        pairs = self.weights[slots][:, numbers].flatten().double() ** self.priority
        chance = pairs / pairs.sum()
        if self.priority:
            chosen = torch.multinomial(chance, rows, replacement=True, generator=generator)
        else:
            chosen = torch.randint(len(pairs), (rows,), generator=generator)
        path, step = slots[chosen // len(numbers)], numbers[chosen % len(numbers)]
        importance = (len(pairs) * chance[chosen]) ** -self.importance
        importance = importance / importance.max() if self.importance else torch.ones(rows, dtype=torch.float64)
        x, x_next, x0 = (
            states[path, number].to(model.device) for states, number in ((self.x, step), (self.x, step + 1), (self.old, step))
        )
        t, s = self.times[path, step], self.times[path, step + 1]
        old = to_prediction(model.process, "x0", x, t, x0)
        return Steps(x, t, s, x_next, old, None, self.prompts[path], path, step, importance * len(numbers))

    def set_priority(self, path: Tensor, step: Tensor, priority: Tensor) -> None:
        """Sets the priorities of these pairs; positive."""
        self.weights[path, step] = priority.to(self.weights).clamp(min=1e-12)


def _states(shape: Sequence[int], together: int) -> Tensor:
    """Storage of states, all 0: in memory or, where they are many, in an unnamed file that ends with the process.

    together: the bytes of all such files, for which there must be room; an empty one takes none yet.
    """
    size = 4 * math.prod(shape)
    if size <= ON_DISK:
        return torch.zeros(*shape)
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if together > 0.9 * room:
        raise ValueError(
            f"algorithm.buffer: {shape[0]} trajectories need {together / 2**30:.1f} GiB, more than memory or the"
            f" {room / 2**30:.0f} GiB free in the temporary folder hold; lower algorithm.buffer or sampler.steps"
        )
    with tempfile.NamedTemporaryFile(suffix=".replay") as file:  # its bytes live on, mapped, without its name
        return torch.from_file(file.name, shared=True, size=math.prod(shape)).view(*shape)
