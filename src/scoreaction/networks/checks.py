"""Checks of a user's network when a model is made of it."""

from __future__ import annotations

import gc
import inspect
from typing import Any
from weakref import WeakSet

from torch import nn

_MODELS: WeakSet[Any] = WeakSet()
"""The models that are in use."""


def register(model: Any) -> None:
    """Remembers a model while it is in use, so that no other is made of its trained parameters."""
    _MODELS.add(model)


def check_net(net: nn.Module) -> None:
    """Raises ValueError for a network that is not called as `net(x, t, cond)`, or that another model trains."""
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


def _trained(net: nn.Module) -> bool:
    trained = {id(p) for model in _MODELS for p in model.parameters.values()}
    return any(id(p) in trained for p in net.parameters())
