"""A replay buffer of trajectories: first in, first out, drawn by (trajectory, step)."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import to_prediction
from scoreaction.networks.model import Model
from scoreaction.sampling.rollout import Rollout, Steps
from scoreaction.world import ALONE, Rows, World

ON_DISK = 2**30
"""States of more bytes than this are kept in a file and mapped into memory."""


class Replay(nn.Module):
    """A buffer of `capacity` trajectories of `steps` steps, the newest over the oldest; it stays on the CPU.

    A pair (trajectory, step) is drawn with probability `P ~ p^priority` (0: uniformly), p the last `set_priority` and the
    largest yet for one not seen; `importance` i gives each row the weight `(pairs P)^-i` over its largest (Schaul et al. 2016,
    arXiv 1511.05952, section 3.4). Trajectories older than `max_age` iterations are not drawn. Its state_dict is all of it.

    A slot is held by process `slot mod size`. Slots that are equal modulo `classes`, the common divisor of capacity and batch,
    are a class; rows are drawn from the classes in turn, each by the P of its own class, so that every process draws as many.
    ValueError where the processes do not share the capacity evenly, or neither memory nor disk holds it.

    >>> Replay(4, 2, (3,), batch=2).known()
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
        batch: int,
        max_age: int | None = None,
        priority: float = 0.0,
        importance: float = 0.0,
        world: World = ALONE,
    ) -> None:
        super().__init__()
        self.capacity, self.classes, self.world = capacity, math.gcd(capacity, batch), world
        self.max_age, self.priority, self.importance = max_age, priority, importance
        if capacity % world.size:
            raise ValueError(
                f"algorithm.buffer: {capacity} trajectories are not shared evenly by {world.size} processes; change it"
            )
        slots = capacity // world.size
        shapes = [(slots, states, *shape) for states in (steps + 1, steps)]
        check_room([4 * math.prod(each) for each in shapes], f"algorithm.buffer: {slots} trajectories", "algorithm.buffer")
        for name, each in zip(("x", "old"), shapes, strict=True):
            self.register_buffer(name, stored(each))
        self.register_buffer("times", torch.zeros(slots, steps + 1, dtype=torch.float64))
        self.register_buffer("prompts", torch.zeros(slots, dtype=torch.long))
        self.register_buffer("born", torch.zeros(slots, dtype=torch.long))
        self.register_buffer("weights", torch.zeros(slots, steps))
        self.register_buffer("added", torch.zeros((), dtype=torch.long))
        self.register_buffer("now", torch.zeros((), dtype=torch.long))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Replay:
        return self  # a move to the accelerator would take the whole buffer there

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, value in self.named_buffers():
            destination[prefix + name] = self.world.gather(value) if value.ndim else value

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {k: v[self.world.stripe(len(v))] if k.startswith(prefix) and v.ndim else v for k, v in state_dict.items()}
        super()._load_from_state_dict(own, prefix, *rest)

    def add(self, rollout: Rollout) -> None:
        """Stores this process's trajectories of one iteration, each step's state with the policy's own x0_hat there."""
        _, batch = rollout.size
        self.now += 1
        slots = (self.added // self.world.size + torch.arange(batch)) % len(self.times)
        self.added += batch * self.world.size
        self.x[slots] = rollout.x.transpose(0, 1).to(self.x)
        self.old[slots] = rollout.old.x0.transpose(0, 1).to(self.old)
        self.times[slots] = rollout.times
        self.prompts[slots] = rollout.prompt.to(self.prompts)
        self.born[slots] = self.now
        largest = self.world.reduced([float(self.weights.max())], "max")[0] if self.priority else 1.0
        self.weights[slots] = max(largest, 1.0)

    def known(self) -> int:
        """The number of trajectories, of all processes, that may be drawn."""
        return len(self._ages()) * self.classes

    def _ages(self) -> Tensor:
        """The numbers, in their class, of the slots that may be drawn: the same in every class, as batches fill all of them."""
        ages = torch.arange(min(int(self.added), self.capacity) // self.classes)
        born = self.born[ages * self.classes // self.world.size]
        return ages if self.max_age is None else ages[self.now - born < self.max_age]

    def draw(self, model: Model, rows: int, numbers: Tensor, generator: torch.Generator) -> tuple[Steps, Rows]:
        """`rows` pairs of a slot and one of the steps with these `numbers`, with replacement, on the model's device.

        Those that this process holds, and their rows in the list of all. `path` is the own slot; weight is the number of steps
        times the importance weight.
        """
        first = int(torch.randint(self.classes, (), generator=generator))
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
        kind, ages = (first + torch.arange(rows)) % self.classes, self._ages()
        (place,) = (kind % self.world.size == self.world.rank).nonzero(as_tuple=True)
        pairs = len(ages) * len(numbers)
        slots = (ages[None] * self.classes + kind[place, None]) // self.world.size  # of each row's class, (rows, ages)
        if self.priority:
            weights = self.weights[slots][..., numbers].flatten(1).double() ** self.priority
            chance = weights / weights.sum(1, keepdim=True)
            pair = torch.searchsorted(chance.cumsum(1), uniform[place, None]).clamp(max=pairs - 1)
            scarce = (pairs * chance.gather(1, pair)[:, 0]) ** -self.importance
            largest = self.world.reduced([float(scarce.max()) if len(scarce) else 0.0], "max")[0]
            pair, importance = pair[:, 0], scarce / largest
        else:
            pair, importance = (uniform[place] * pairs).long(), torch.ones(len(place), dtype=torch.float64)
        path, step = slots.gather(1, pair[:, None] // len(numbers))[:, 0], numbers[pair % len(numbers)]
        x, x_next, x0 = (
            states[path, number].to(model.device) for states, number in ((self.x, step), (self.x, step + 1), (self.old, step))
        )
        t, s = self.times[path, step], self.times[path, step + 1]
        old = to_prediction(model.process, "x0", x, t, x0)
        steps = Steps(x, t, s, x_next, old, None, self.prompts[path], path, step, importance * len(numbers))
        return steps, Rows(torch.arange(len(place)), place, rows)

    def set_priority(self, path: Tensor, step: Tensor, priority: Tensor) -> None:
        """Sets the priorities of these pairs; positive."""
        self.weights[path, step] = priority.to(self.weights).clamp(min=1e-12)


def check_room(sizes: Sequence[int], what: str, key: str) -> None:
    """ValueError, which says what needs the room, where the temporary folder has too little for tensors of so many bytes."""
    together, room = sum(sizes), shutil.disk_usage(tempfile.gettempdir()).free
    if max(sizes) > ON_DISK and together > 0.9 * room:
        raise ValueError(
            f"{what} need {together / 2**30:.1f} GiB, more than memory or the {room / 2**30:.0f} GiB free in the temporary"
            f" folder hold; lower {key} or sampler.steps"
        )


def stored(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Storage of states, all 0: in memory or, where they are many, in an unnamed file that ends with the process.

    There must be room for it, see `check_room`; an empty file takes none yet.
    """
    size = dtype.itemsize * math.prod(shape)
    if size <= ON_DISK:
        return torch.zeros(*shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(suffix=".replay") as file:  # its bytes live on, mapped, without its name
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(*shape)
