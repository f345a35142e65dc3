"""The trained weights of a model, their averages and the best of them, and the evaluations that they cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoreaction.networks.adapters import replaced


@dataclass
class Evaluations:
    """Network evaluations, in rows: forwards of policy and reference (guidance counts two), and backwards."""

    forward: int = 0
    backward: int = 0


class Weights:
    """A model's trained parameters by name, their moving average, and those that were best."""

    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor] | None
    selected: dict[str, Tensor] | None
    evaluations: Evaluations

    def average_weights(self, decay: float) -> None:
        """One step of the exponential moving average of the trained weights: `a <- decay a + (1 - decay) w`."""
        with torch.no_grad():
            if self.average is None:
                self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
            names = list(self.average)
            torch._foreach_lerp_([self.average[n] for n in names], [self.parameters[n].detach() for n in names], 1 - decay)

    def select_weights(self) -> None:
        """Keeps the averaged weights as they are (the policy's own where there is no average)."""
        self.selected = {name: value.detach().clone() for name, value in (self.average or self.parameters).items()}

    def averaged(self) -> AbstractContextManager[None]:
        """Context in which the policy has its selected or else its averaged weights (its own if there is neither)."""
        return replaced(self.parameters, self.selected or self.average or {})

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Context in which network evaluations are not counted: measuring is not training."""
        kept, self.evaluations = self.evaluations, Evaluations()
        try:
            yield
        finally:
            self.evaluations = kept
