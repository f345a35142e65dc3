"""Checks of a user's network when a model is made of it."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakSet

from torch import nn

from scoreaction.errors import check_kind

_MODELS: WeakSet[Any] = WeakSet()
"""The models that are in use."""


def register(model: Any) -> None:
    """Remembers a model while it is in use, so that no other is made of its trained parameters."""
    _MODELS.add(model)


def check_net(net: nn.Module) -> None:
    """ValueError for what is no module, is not called as `net(x, t, cond)`, or is trained by another model."""
    check_kind("net", net, nn.Module, "a torch.nn.Module whose forward takes (x, t, cond)")
    try:
        signature = inspect.signature(net.forward)
        signature.bind(None, None, None)
    except TypeError as error:
        raise ValueError(
            f"net: it is called as net(x, t, cond), and {type(net).__name__}.forward{signature} is not; give it three arguments"
            " (cond=None, where it has no conditions), or wrap it"
        ) from error
    if _trained(net) and gc.collect() >= 0 and _trained(net):  # a model that is no longer used may not be gone before
        raise ValueError(
            "net: another model trains it already, and would move this policy too; load it anew, or give a copy.deepcopy of it"
        )


def dimensions(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a sample as a tuple; UserError for a number in its place."""
    check_kind("shape", shape, Iterable, "(2,), or (3, 32, 32) of pictures")
    return tuple(shape)


def _trained(net: nn.Module) -> bool:
    trained = {id(p) for model in _MODELS for p in model.parameters.values()}
    return any(id(p) in trained for p in net.parameters())


def check_lora(rank: int | None, targets: Sequence[str] | None) -> None:
    """ValueError for a rank below 1, and for targets that are one text."""
    if rank is not None and rank < 1:
        raise ValueError(f"lora_rank: must be at least 1 (got {rank}); leave it out to train all parameters")
    if isinstance(targets, str):
        raise ValueError(f"lora_targets: must be a list of names (got {targets!r}); one name is [{targets!r}]")
