"""Memory and operations of a computation, tensor by tensor; fake tensors are counted like others."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def operations(packet: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Floating-point operations of one call: those of matrix products, convolutions and attention."""
    if packet is ATTENTION:
        return sdpa_flop_count(*(part.shape for part in args[:3]))
    if packet is ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(part.shape for part in args[:4]))
    count = flop_registry.get(packet)
    return 0 if count is None else count(*args, **kwargs, out_val=out)


class LiveMemory(TorchDispatchMode):
    """Context in which every new storage is added to `live` (bytes) and taken off when it is freed; `peak` is the most so far.

    `flops` adds up floating-point operations. What was there before is not counted. It counts what PyTorch asks for: not the
    workspaces of kernels, nor what an allocator holds in reserve.

    >>> with LiveMemory() as memory:
    ...     kept = torch.zeros(1000)
    ...     _ = (kept + 1).sum()
    >>> memory.peak >= 8000 and memory.live < 5000
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += operations(func._overloadpacket, args, kwargs or {}, out)
        before, after = (
            {leaf.untyped_storage()._cdata: leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
            for tree in ((args, kwargs), out)
        )
        for key in after.keys() - before.keys() - self._sizes.keys():  # no view, and not written in place
            self._sizes[key] = after[key].nbytes()
            self.live += self._sizes[key]
            weakref.finalize(after[key], self._drop, key)
        self.peak = max(self.peak, self.live)
        return out

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
