"""What a computation holds in memory and how much it computes, tensor by tensor; also of tensors that are not there."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


class LiveMemory(TorchDispatchMode):
    """Within it every new storage is added to `live` (bytes) and taken off when it is freed; `peak` is the most so far.

    What was there before is not counted. It counts what PyTorch asks for: not the workspaces of kernels, nor what an
    allocator holds in reserve.

    >>> with LiveMemory() as memory:
    ...     kept = torch.zeros(1000)
    ...     _ = (kept + 1).sum()
    >>> memory.peak >= 8000 and memory.live < 5000
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), known)
        return out

    def _add(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in self._sizes or key in known:  # a view, or written in place
            return
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@dataclass
class Measured:
    """Peak bytes and floating-point operations of a computation."""

    peak: int = 0
    flops: int = 0


def _attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


@contextmanager
def measured() -> Iterator[Measured]:
    """Within it memory and operations are counted; the result is filled when it ends."""
    on_cpu: dict[Any, Callable[..., Any]] = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    found = Measured()
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as operations, LiveMemory() as memory:
        yield found
    found.peak, found.flops = memory.peak, operations.get_total_flops()
