"""Parameters of tests, of which the slow ones are marked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def with_long(names: Iterable[str], *quick: str) -> list[Any]:
    """Every name is a parameter, and each but those of `quick` is marked as long."""
    names = list(names)
    assert set(quick) <= set(names), f"not among the names: {set(quick) - set(names)}"
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


def with_slow(names: Iterable[str], *slow: str) -> list[Any]:
    """Every name is a parameter, and each of `slow` is marked as such."""
    names = list(names)
    assert set(slow) <= set(names), f"not among the names: {set(slow) - set(names)}"
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]
