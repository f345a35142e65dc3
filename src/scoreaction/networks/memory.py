"""Memory that runs out: the same work again, with half the rows of a network call."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory with one row a network call; lower train.batch, take a smaller model, or train.precision: bf16"
"""The remedy where halving is of no use any more."""
OUT_OF_MEMORY_SHARDED = (
    "out of memory with {} rows a network call, and with train.shard one process cannot halve; lower train.max_rows"
)


class Limited(Protocol):
    """A model: the most rows of its network calls, whether processes share its network, and counts of its calls."""

    max_rows: int | None
    sharded: bool
    evaluations: Any


def is_out_of_memory(error: BaseException) -> bool:
    """True for the errors by which torch says that memory is full, on a GPU or on the CPU."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def fitting(model: Limited, rows: int, work: Callable[[int], T]) -> T:
    """`work(limit)`, whose network calls have at most `limit` rows; again with half of them where memory runs out.

    The model keeps the smaller limit, and the log says it; nothing of the batch is left out. MemoryError, with the remedy,
    where one row is too many, and for a sharded network, whose calls are those of all processes: one cannot halve alone.
    """
    limit = min(model.max_rows or rows, rows)
    while True:
        before = model.evaluations.forward, model.evaluations.backward
        try:
            return work(limit)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if model.sharded:
                raise MemoryError(OUT_OF_MEMORY_SHARDED.format(limit)) from error
            if limit < 2:
                raise MemoryError(OUT_OF_MEMORY) from error
        # out of the handler, whose traceback keeps the tensors of the failed call alive
        model.evaluations.forward, model.evaluations.backward = before
        smaller = limit // 2
        logging.getLogger(__name__).warning("out of memory with %d rows a network call: going on with %d", limit, smaller)
        logging.getLogger(__name__).warning("train.max_rows=%d begins with that", smaller)
        limit = model.max_rows = smaller
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
