"""Every check here is shown to bite: it accepts the right thing and rejects a deliberately wrong one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

F64 = torch.float64


def f64(value: Any) -> torch.Tensor:
    return torch.as_tensor(value, dtype=F64)


def accepts(check: Callable[..., None], right: Any, /, **wrong: Any) -> None:
    """`check(right)` passes, and raises AssertionError for every named wrong variant."""
    check(right)
    for name, variant in wrong.items():
        try:
            check(variant)
        except AssertionError:
            continue
        pytest.fail(f"the check also accepts its twin {name!r}")


def same(actual: Any, truth: Any, /, **wrong: Any) -> None:
    """`actual` is `truth`, tensors to the bit, and no wrong variant is."""

    def check(value: Any) -> None:
        equal = torch.equal(value, truth) if isinstance(truth, torch.Tensor) else value == truth
        assert equal, f"{value} is not {truth}"

    accepts(check, actual, **wrong)


def close(actual: Any, truth: Any, /, *, atol: float = 1e-6, rtol: float = 0.0, **wrong: Any) -> None:
    """`actual` equals `truth` and no wrong variant does; an infinite or undefined number equals nothing."""

    def check(value: Any) -> None:
        value, expected = torch.broadcast_tensors(f64(value), f64(truth))
        assert bool(torch.isfinite(value).all()), f"not finite: {value}"
        apart = (value - expected).abs()
        assert bool((apart <= atol + rtol * expected.abs()).all()), f"{value} is not {expected}"

    accepts(check, actual, **wrong)
