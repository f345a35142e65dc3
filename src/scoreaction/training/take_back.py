"""Taking back: an iteration whose policy leaves the trust region by far goes on from where it began, with half the steps."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from scoreaction.algorithms._learner import Learner
from scoreaction.algorithms._trust import LEAP, RECOVERY, TrustState, leaps
from scoreaction.world import World


class TakeBack:
    """The policy and its optimiser as they were before an iteration, on the host, and the measure of how far it has gone.

    Every update measures `kl_to_old` of the policy before its own step, so that the measure costs nothing; what the last step
    did is measured where it is in `doubt`. An iteration that `leaps`, or whose gradient is not finite, is taken back: weights
    and optimiser are restored, the steps are halved, for the updates to come and the next iterations, and the log says it. All
    processes decide alike: figures and gradient are those of all.
    """

    def __init__(self, state: TrustState, region: float, optimiser: torch.optim.Optimizer, iteration: int) -> None:
        self.state, self.region, self.optimiser, self.iteration = state, region, optimiser, iteration
        self.parameters: list[Tensor] = [p for group in optimiser.param_groups for p in group["params"]]
        self.weights = [_on_host(p) for p in self.parameters]
        self.moments = [{key: _on_host(value) for key, value in optimiser.state.get(p, {}).items()} for p in self.parameters]
        self.first: float | None = None
        self.seen, self.steps = 0.0, 0
        """The KL that the last update saw, and the steps that were made and not taken back."""
        state.taken_back = 0.0

    @classmethod
    def of(cls, learner: Learner, optimiser: torch.optim.Optimizer, iteration: int) -> TakeBack | None:
        """That of a learner with a trust region; None for the others, whose steps stay."""
        if learner.trust_region is None or not isinstance(learner.state, TrustState):
            return None
        return cls(learner.state, learner.trust_region, optimiser, iteration)

    def begin(self) -> None:
        """Shortens the steps as earlier iterations have made them; the optimiser has the whole rate."""
        for group in self.optimiser.param_groups:
            group["lr"] *= self.state.step_share

    def refuses(self, figures: dict[str, float], norm: float = 0.0) -> bool:
        """Takes the iteration back where the policy, measured so, left the region by far or its gradient is not finite.

        True where it did: the step that these belong to is not to be made.
        """
        self.seen = figures["kl_to_old"]
        self.first = self.seen if self.first is None else self.first
        left = leaps(self.state, self.seen, first=self.first, region=self.region) or not math.isfinite(norm)
        if left and self.steps:  # of a policy that has not moved the fault is another one
            self._restore()
            return True
        return False

    @property
    def doubt(self) -> bool:
        """True where the last step may have left the region by far: the first one, or one of a policy that was outside.

        From within, a step as long as those before it leads at most to four times the KL, a square of the distance.
        """
        outside = leaps(self.state, LEAP * self.seen, first=self.first or 0.0, region=self.region)
        return self.steps == 1 or (self.steps > 1 and outside)

    def end(self) -> None:
        """Lengthens the steps after an iteration that was not taken back."""
        if not self.state.taken_back:
            self.state.step_share = min(1.0, RECOVERY * self.state.step_share)

    @torch.no_grad()
    def _restore(self) -> None:
        for p, weight, moments in zip(self.parameters, self.weights, self.moments, strict=True):
            _own(p).copy_(weight)
            now = self.optimiser.state[p]
            if not moments:  # there were none before the first step
                now.clear()
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    _own(now[key]).copy_(value)
                else:
                    now[key] = value
        for group in self.optimiser.param_groups:
            group["lr"] /= 2
        state, self.steps = self.state, 0
        state.step_share, state.taken_back = state.step_share / 2, state.taken_back + 1
        if World.current().leads:
            logging.getLogger(__name__).warning(
                "iteration %d: the policy left its trust region of %g nats by far: taken back, steps are now %.3g of train.lr",
                self.iteration + 1, self.region, state.step_share,
            )  # fmt: skip


def _own(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, to write into; any other tensor itself."""
    return value.to_local() if isinstance(value, DTensor) else value


def _on_host(value: Any) -> Any:
    return _own(value.detach()).to("cpu", copy=True) if isinstance(value, Tensor) else value
