"""The state of a run, as checkpoints keep it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoreaction.algorithms._learner import Learner
from scoreaction.networks.model import Model
from scoreaction.networks.sharding import distributed_as, on_host
from scoreaction.rewards import CountedReward
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.training.best_weights import Selection
from scoreaction.training.late import Late
from scoreaction.training.online import Rounds
from scoreaction.training.optimizer import Optimisation
from scoreaction.world import World


class RunState:
    """The parts of a run that change, and what a checkpoint has of them."""

    model: Model
    learner: Learner
    reward: CountedReward
    optimisation: Optimisation
    rounds: Rounds | None
    selection: Selection | None
    late: Late
    generator: torch.Generator
    world: World
    iteration: int
    seconds: float

    def counts(self) -> dict[str, Any]:
        """Costs so far of all processes together, which all must ask: reward queries, rows of network evaluations, seconds."""
        own = [self.reward.queries, self.model.evaluations.forward, self.model.evaluations.backward]
        names = ("reward_queries", "model_evaluations", "model_backward_rows")
        together = map(int, self.world.reduced([float(count) for count in own], "sum"))
        return dict(zip(names, together, strict=True)) | {"seconds": round(self.seconds, 3)}

    def state(self) -> dict[str, Any]:
        """All that changes, of all processes, which all must ask: what a resumed run needs to equal the uninterrupted one."""
        counts = self.counts()
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "policy": dict(self.model.parameters.items()),
            "average": self.model.average,
            "networks": self.learner.networks.state_dict(),
            "optimisers": self.optimisation.state(),
            "learner": vars(self.learner.state),
            "generator": self.generator.get_state(),
            "scaler": self.optimisation.scaler.state_dict(),
            "queries": counts["reward_queries"],
            "moments": self.reward.reward.moments if isinstance(self.reward.reward, WeightedSum) else None,
            "evaluations": [counts["model_evaluations"], counts["model_backward_rows"]],
        }
        if self.late.delay:
            state["late"] = self.late.state()
        if self.rounds is not None:
            state["rounds"] = self.rounds.state()
        if self.selection is not None:
            state["selection"] = self.selection.state(self.model.selected)
        return on_host(state, keep=self.world.leads) if self.model.sharded else state

    def load_weights(self, state: dict[str, Any]) -> None:
        """Restores the model's part of a `state`: all that drawing needs."""
        with torch.no_grad():
            for name, parameter in self.model.parameters.items():
                parameter.copy_(distributed_as(state["policy"][name], parameter))
        for name, kept in (("average", state["average"]), ("selected", state.get("selection", {}).get("weights"))):
            setattr(self.model, name, None if kept is None else {k: self._part(k, v) for k, v in kept.items()})

    def _part(self, name: str, value: Tensor) -> Tensor:
        return distributed_as(value.to(self.model.device), self.model.parameters[name])

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores a `state`."""
        self.load_weights(state)
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        own = self.learner.networks.state_dict()
        self.learner.networks.load_state_dict(
            {k: distributed_as(v, own[k]) if k in own else v for k, v in state["networks"].items()}
        )
        self.optimisation.load_state(state["optimisers"])
        self.learner.state = replace(self.learner.state, **state["learner"])
        self.generator.set_state(state["generator"])
        self.optimisation.scaler.load_state_dict(state["scaler"])
        leads = int(self.world.leads)  # counts are those of all: the first process has them
        self.reward.queries = leads * state["queries"]
        if isinstance(self.reward.reward, WeightedSum):
            self.reward.reward.moments = state["moments"]
        self.model.evaluations.forward, self.model.evaluations.backward = (leads * count for count in state["evaluations"])
        if self.late.delay:
            self.late.load_state(state["late"])
        if self.rounds is not None:
            self.rounds.load_state(state["rounds"])
        if self.selection is not None:
            self.selection.load_state(state["selection"])
