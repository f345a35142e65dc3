"""What a check of `doctor` finds, and how far two predictions of the same points are apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scoreaction.finetuner import Finetuner
from scoreaction.types import Prediction

Verdict = Literal["ok", "note", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One check: ok, worth a note, or wrong; what was seen, and what to do where something is to be done."""

    check: str
    verdict: Verdict
    seen: str
    remedy: str = ""


def rounding(tuner: Finetuner) -> float:
    """What the precision of a run may change in a prediction, in its standard deviations, when the batch has another shape."""
    return 5e-2 if tuner.half else 1e-3


def apart(one: Prediction, other: Prediction) -> float:
    """The largest difference, in standard deviations of what is predicted."""
    found = []
    for a, b in ((one.eps, other.eps), (one.x0, other.x0)):
        spread = float(a.float().std()) or 1.0
        found.append(float((a - b).abs().max()) / spread)
    return max(found)


def told(difference: float) -> str:
    """A difference in words."""
    return "to the bit" if difference == 0 else f"to {difference:.1g} standard deviations"
