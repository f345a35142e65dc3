"""Result of a check of `doctor`, and the distance of two predictions at the same points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from scoreaction.training.finetuner import Finetuner
from scoreaction.types import Prediction


@dataclass(frozen=True)
class Finding:
    """A check: ok, worth a note, or wrong; the observation, and a remedy where one is due."""

    check: str
    verdict: Literal["ok", "note", "wrong"]
    seen: str
    remedy: str = ""


def judged(check: str, right: bool, ok: str, wrong: str, remedy: str) -> Finding:
    """The finding of a check that is right or wrong."""
    return Finding(check, "ok", ok) if right else Finding(check, "wrong", wrong, remedy)


def rounding(tuner: Finetuner) -> float:
    """Change of a prediction, in its standard deviations, that rounding may cause when the batch has another shape."""
    return 5e-2 if tuner.half else 1e-3


def apart(one: Prediction, other: Prediction) -> float:
    """The largest difference, in standard deviations of what is predicted; NaN where a prediction is not finite."""
    differences = []
    for a, b in ((one.eps, other.eps), (one.x0, other.x0)):
        differences.append((a - b).abs().max() / (a.float().std() or 1.0))
    return float(torch.stack(differences).max())  # which, unlike Python's, keeps NaN


def in_words(difference: float) -> str:
    """A difference in words."""
    return "to the bit" if difference == 0 else f"to {difference:.1g} standard deviations"
