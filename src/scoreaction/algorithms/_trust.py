"""The trust region: what one iteration may move the policy, in nats of path KL."""

from __future__ import annotations

from dataclasses import dataclass

from scoreaction.algorithms._learner import State

MOST_TRUST = 1e3
"""The largest penalty on leaving the old policy, in betas: beyond it nothing moves."""


@dataclass
class TrustState(State):
    """The penalty on leaving the old policy, in betas, and the path KL in nats that the last update saw to it."""

    trust: float = 1.0
    kl_to_old: float = 0.0


def adapt_trust(state: TrustState, kl_to_old: float, *, least: float, region: float) -> None:
    """Doubles the penalty where the last update left the region, and lets it fall back by a tenth elsewhere.

    Rounding cannot be penalised away: the limit is the region and twice the `kl_floor` that the run has measured.
    """
    factor = 2.0 if kl_to_old > region + 2 * (state.kl_floor or 0.0) else 0.9
    state.kl_to_old, state.trust = kl_to_old, min(max(least, state.trust * factor), max(least, MOST_TRUST))
