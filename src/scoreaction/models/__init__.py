"""Pretrained models: a file each, with a `Config` and `build(config) -> Model`, imported on demand."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from scoreaction.models._records import Card, Skeleton

__all__ = ["Card", "Skeleton"]


def __getattr__(name: str) -> Any:
    try:
        return import_module(f"scoreaction.models.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"scoreaction.models.{name}":
            raise
        raise AttributeError(f"scoreaction.models: there is no model {name!r}; see scoreaction list models") from error
