"""The trust region: what one iteration may move the policy, in nats of path KL."""

from __future__ import annotations

from dataclasses import dataclass

from scoreaction.algorithms._learner import State

MOST_TRUST = 1e3
"""The largest penalty on leaving the old policy, in betas: beyond it nothing moves."""
LEAP = 100.0
"""An iteration that moves so many times the region is taken back. Adam's first steps move twenty of it on digits."""
RECOVERY = 1.1
"""An iteration that is not taken back lengthens the steps by this factor, up to those of `train.lr`."""


@dataclass
class TrustState(State):
    """The trust region of a policy, as it is now.

    trust: the penalty on leaving the old policy, in betas; kl_to_old: the path KL in nats that the last update saw to it.
    step_share: the share of `train.lr` with which the policy learns, halved where an iteration left the region by far;
    taken_back: how often the last one did.
    """

    trust: float = 1.0
    kl_to_old: float = 0.0
    step_share: float = 1.0
    taken_back: float = 0.0


def adapt_trust(state: TrustState, kl_to_old: float, *, least: float, region: float) -> None:
    """Doubles the penalty where the last update left the region, and lets it fall back by a tenth elsewhere.

    Rounding cannot be penalised away: the limit is the region and twice the `kl_floor` that the run has measured.
    """
    factor = 2.0 if kl_to_old > region + 2 * (state.kl_floor or 0.0) else 0.9
    state.kl_to_old, state.trust = kl_to_old, min(max(least, state.trust * factor), max(least, MOST_TRUST))


def leaps(state: TrustState, kl_to_old: float, *, first: float, region: float) -> bool:
    """True where an iteration has moved the policy so far that it is taken back, or its KL is not finite.

    first: the KL that the iteration's first update saw, before anything moved; it is above 0 where an older policy took the
    steps, in a replay or as the average that samples.

    >>> [leaps(TrustState(), kl, first=0.0, region=0.1) for kl in (8.0, 12.0, float("nan"))]
    [False, True, True]
    """
    return not kl_to_old <= LEAP * (max(region, first) + 2 * (state.kl_floor or 0.0))
