"""What a check of `doctor` finds, and how far two predictions of the same points are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Prediction


@dataclass(frozen=True)
class Finding:
    """One check: ok, worth a note, or wrong; what was seen, and what to do where something is to be done."""

    check: str
    verdict: Literal["ok", "note", "wrong"]
    seen: str
    remedy: str = ""


def judged(check: str, right: bool, ok: str, wrong: str, remedy: str) -> Finding:
    """The finding of a check that is right or wrong."""
    return Finding(check, "ok", ok) if right else Finding(check, "wrong", wrong, remedy)


def rounding(tuner: Finetuner) -> float:
    """What the precision of a run may change in a prediction, in its standard deviations, when the batch has another shape."""
    return 5e-2 if tuner.half else 1e-3


def apart(one: Prediction, other: Prediction) -> float:
    """The largest difference, in standard deviations of what is predicted; NaN where a prediction is not finite."""
    found = []
    for a, b in ((one.eps, other.eps), (one.x0, other.x0)):
        found.append((a - b).abs().max() / (a.float().std() or 1.0))
    return float(torch.stack(found).max())  # which, unlike Python's, keeps NaN


def told(difference: float) -> str:
    """A difference in words."""
    return "to the bit" if difference == 0 else f"to {difference:.1g} standard deviations"
