"""The processes of a run: which rows each one holds, and what they tell one another. One process is a world of one.

Row i of whatever has a batch dimension is held by process `i mod size`. What is chosen (prompts, times, the rows of an update)
is drawn by every process alike, from one generator, and each keeps its own; noise has a stream for every row. So a result does
not depend on the number of processes, but for rounding.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(hours=1)
"""The time that a process waits for the others: a reward may be slow on one of them."""

T = TypeVar("T")


class OtherProcess(RuntimeError):
    """Another process of the run failed; `kinds` are the names of its error's class and of that class's bases."""

    shared = True
    """The first process says it for all."""

    def __init__(self, message: str, kinds: tuple[str, ...]) -> None:
        super().__init__(message)
        self.kinds = kinds


class Stranded(RuntimeError):
    """This process failed while the others wait for its part of a sharded network: it can only end, and be ended with them."""


def is_lost_peer(error: BaseException) -> bool:
    """True for the errors by which torch.distributed says that another process is gone.

    >>> is_lost_peer(RuntimeError("Connection closed by peer [127.0.0.1]:4022"))
    True
    """
    texts = ("onnection closed by peer", "onnection reset by peer", "Broken pipe", "ncclRemoteError")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Rows:
    """A list of rows that all processes drew alike, of which each has those that it holds.

    own (n,): the row numbers, in what this process holds; place (n,): their places in the list of all, `total` long.

    >>> Rows(torch.tensor([7, 5]), torch.tensor([0, 2]), total=4).part(torch.tensor([1])).own
    tensor([5])
    """

    own: Tensor
    place: Tensor
    total: int

    def __len__(self) -> int:
        return len(self.own)

    def part(self, where: Tensor) -> Rows:
        """These of the own rows, as rows of the same list."""
        return Rows(self.own[where], self.place[where], self.total)

    def chunk(self, parts: int) -> list[Rows]:
        """The list cut into as many parts as `torch.chunk` makes of it."""
        return [self._between(int(c[0]), int(c[-1]) + 1) for c in torch.arange(self.total).chunk(parts) if len(c)]

    def tensor_split(self, parts: int) -> list[Rows]:
        """The list cut into exactly this many parts, the last ones empty where it is short."""
        ends = [0, *(len(c) for c in torch.arange(self.total).tensor_split(parts))]
        ends = torch.tensor(ends).cumsum(0).tolist()
        return [self._between(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True)]

    def _between(self, begin: int, end: int) -> Rows:
        here = (self.place >= begin) & (self.place < end)
        return Rows(self.own[here], self.place[here] - begin, end - begin)

    def redrawn(self, count: int, generator: torch.Generator) -> Rows:
        """count of the list, drawn with replacement: `own` are then numbers of this list's own rows."""
        known = torch.full((self.total,), -1).scatter(0, self.place, torch.arange(len(self)))
        drawn = known[torch.randint(self.total, (count,), generator=generator)]
        (place,) = (drawn >= 0).nonzero(as_tuple=True)
        return Rows(drawn[place], place, count)


@dataclass(frozen=True)
class World:
    """Process `rank` of the `size` of a run, and its messages to the others, in torch.distributed's default group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """The world of this process's group; of one where there is none."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else cls()

    @classmethod
    def joined(cls, device: str) -> World:
        """The world that the launcher's environment asks for (RANK, WORLD_SIZE, MASTER_ADDR), or a group that exists already.

        ValueError where the environment asks for one and it cannot be joined, or one was joined that it does not ask for, or
        whose messages cannot hold numbers of the host.
        """
        wanted = int(os.environ.get("WORLD_SIZE", "1"))
        if not (dist.is_available() and dist.is_initialized()):
            if wanted == 1:
                return cls()
            accelerated = device != "cpu" and torch.accelerator.is_available()
            kind = torch.accelerator.current_accelerator() if accelerated else None
            if kind is not None:
                torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "gloo" if kind is None else f"cpu:gloo,{kind.type}:{dist.get_default_backend_for_device(kind)}"
            try:
                dist.init_process_group(backend, timeout=PATIENCE)
                atexit.register(_leave)
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"WORLD_SIZE: the environment asks for {wanted} processes and they do not meet ({error}); start them with"
                    " torchrun, or unset WORLD_SIZE for one process"
                ) from error
        if dist.get_world_size() > 1 and "cpu:" not in dist.get_backend_config():
            raise ValueError(
                f"the process group that exists has the backend {dist.get_backend_config()}, and a run sends numbers of the"
                " host too: make it with backend cpu:gloo,cuda:nccl"
            )
        world = cls.current()
        if "WORLD_SIZE" in os.environ and world.size != wanted:
            raise ValueError(f"WORLD_SIZE: the environment asks for {wanted} processes, and {world.size} are in the group")
        return world

    @property
    def leads(self) -> bool:
        """True in the process that writes and speaks for all."""
        return self.rank == 0

    # rows

    def stripe(self, total: int) -> Tensor:
        """The numbers, of `total` rows, that this process holds; none where there are fewer rows than processes.

        >>> World(5, 8).stripe(4).tolist(), World(1, 8).stripe(10).tolist()
        ([], [1, 9])
        """
        return torch.arange(min(self.rank, total), total, self.size)

    def own(self, every: Tensor) -> Tensor:
        """The own of all rows."""
        return every[self.rank :: self.size]

    def rows(self, total: int) -> Rows:
        """All rows that are held, in their order."""
        own = self.stripe(total)
        return Rows(torch.arange(len(own)), own, total)

    def dealt(self, steps: int, batch: int, count: int, generator: torch.Generator) -> Rows:
        """count rows of a batch's steps, none twice: each trajectory in turn, from a random one on, at a random step of it.

        batch: the trajectories of this process, each of so many steps. A row has the number `step * batch + trajectory`. Any
        stretch of the list holds as many rows of every process, and at most one more.

        >>> World().dealt(3, 2, 6, torch.Generator()).own.sort().values.tolist()
        [0, 1, 2, 3, 4, 5]
        """
        everyone = batch * self.size
        order = torch.rand(everyone, steps, generator=generator).argsort(1)
        first = int(torch.randint(everyone, (), generator=generator))
        place = torch.arange(min(count, everyone * steps))
        trajectory = (first + place) % everyone
        own = trajectory % self.size == self.rank
        step = order[trajectory[own], place[own] // everyone]
        return Rows(step * batch + trajectory[own] // self.size, place[own], len(place))

    # messages

    def gather(self, own: Tensor, total: int | None = None) -> Tensor:
        """The rows of all processes in their order, (total, ...): by default all hold as many as this one."""
        if self.size == 1:
            return own
        total = len(own) * self.size if total is None else total
        most = -(-total // self.size)
        padded = torch.cat([own, own.new_zeros(most - len(own), *own.shape[1:])]).contiguous()
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.stack(parts, 1).flatten(0, 1)[:total]

    def merged(self, own: Tensor, place: Tensor, total: int) -> Tensor:
        """All processes' rows, each at its place, (total, ...)."""
        whole = own.new_zeros(total, *own.shape[1:]).index_copy(0, place.to(own.device), own)
        if self.size > 1:
            dist.all_reduce(whole)
        return whole

    def reduced(self, values: list[float], how: str = "mean") -> list[float]:
        """The mean, sum or max over processes of each value, in double precision."""
        if self.size == 1 or not values:
            return list(values)
        message = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(message, dist.ReduceOp.MAX if how == "max" else dist.ReduceOp.SUM)
        return (message / self.size if how == "mean" else message).tolist()

    def any(self, flag: bool) -> bool:
        """True if it is so in any process."""
        return self.reduced([float(flag)], "max")[0] > 0

    def average_gradients(self, parameters: Iterable[Tensor], figures: list[float]) -> list[float]:
        """Each gradient becomes its mean over processes; returns the mean of each figure.

        A missing one counts as 0; one that no process has stays missing, so that Adam makes no step of it. All in one message,
        in float32 or better. Sharded parameters (FSDP) were averaged in their backward pass.
        """
        chosen = [p for p in parameters if not isinstance(p, DTensor)]
        if self.size == 1:
            return figures
        if not chosen:
            return self.reduced(figures)
        kind = torch.float64 if chosen[0].dtype == torch.float64 else torch.float32
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().to(kind) for p in chosen]
        more = [*(float(p.grad is not None) for p in chosen), *figures]
        flat = torch.cat([*parts, torch.tensor(more, dtype=kind, device=parts[0].device)])
        dist.all_reduce(flat)
        flat /= self.size
        *gradients, last = flat.split([*(p.numel() for p in chosen), len(more)])
        means = last.tolist()
        for p, part, there in zip(chosen, gradients, means, strict=False):
            p.grad = part.view_as(p).to(p.dtype) if there else None
        return means[len(chosen) :]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Every process's become the first one's."""
        if self.size > 1:
            with torch.no_grad():
                for tensor in tensors:
                    if not isinstance(tensor, DTensor):
                        dist.broadcast(tensor, 0)

    def broadcast(self, value: T) -> T:
        """The first process's value; of the others it is not read."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def every(self, value: T) -> list[T]:
        """Every process's value, by rank; for small things."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T], *, sends: bool = False) -> T:
        """Returns what `work` does here; where it raises in any process it raises in all, so that none waits for ever.

        The process whose work failed raises its own error, the others `OtherProcess`. Where work `sends` messages of its own
        (calls of a sharded network) they are not to be reached, and the one that failed raises `Stranded`.
        """
        if self.size == 1:
            return work()
        if sends:
            try:
                return work()
            except Exception as error:
                if getattr(error, "shared", False):  # it is raised in every process alike
                    raise
                raise Stranded(f"process {self.rank} of {self.size}: {type(error).__name__}: {error}") from error
        failure: Exception | None = None
        try:
            result = work()
        except Exception as error:  # noqa: BLE001  whatever it is, the others must hear of it
            failure = error
        if not self.any(failure is not None):
            return result
        kinds = () if failure is None else tuple(kind.__name__ for kind in type(failure).__mro__)
        reports = self.every((kinds, str(failure)))
        if failure is not None:
            vars(failure)["shared"] = True
            raise failure
        rank = next(rank for rank, (kinds, _) in enumerate(reports) if kinds)
        kinds, message = reports[rank]
        raise OtherProcess(f"process {rank} of {self.size}: {kinds[0]}: {message}", kinds)


ALONE = World()
"""One process."""
