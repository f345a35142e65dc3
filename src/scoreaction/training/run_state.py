"""The state of a run, as checkpoints keep it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scoreaction.networks.sharding import distributed_as, on_host
from scoreaction.rewards._weighted import WeightedSum

if TYPE_CHECKING:
    from scoreaction.training.run import Run


def state_of(run: Run) -> dict[str, Any]:
    """All that changes, of all processes, which all must ask: what a resumed run needs to equal the uninterrupted one."""
    counts = run.counts()
    state = {
        "iteration": run.iteration,
        "seconds": run.seconds,
        "policy": dict(run.model.parameters.items()),
        "average": run.model.average,
        "networks": run.learner.networks.state_dict(),
        "optimisers": run.optimisation.state(),
        "learner": vars(run.learner.state),
        "generator": run.generator.get_state(),
        "scaler": run.optimisation.scaler.state_dict(),
        "queries": counts["reward_queries"],
        "moments": run.reward.reward.moments if isinstance(run.reward.reward, WeightedSum) else None,
        "evaluations": [counts["model_evaluations"], counts["model_backward_rows"]],
    }
    if run.late.delay:
        state["late"] = run.late.state()
    if run.rounds is not None:
        state["rounds"] = run.rounds.state()
    if run.selection is not None:
        state["selection"] = run.selection.state(run.model.selected)
    return on_host(state, keep=run.world.leads) if run.model.sharded else state


def restore_weights(run: Run, state: dict[str, Any]) -> None:
    """Restores the model's part of a state: all that drawing needs."""
    with torch.no_grad():
        for name, parameter in run.model.parameters.items():
            parameter.copy_(distributed_as(state["policy"][name], parameter))
    for name, kept in (("average", state["average"]), ("selected", state.get("selection", {}).get("weights"))):
        setattr(run.model, name, None if kept is None else {k: _part(run, k, v) for k, v in kept.items()})


def _part(run: Run, name: str, value: Tensor) -> Tensor:
    return distributed_as(value.to(run.model.device), run.model.parameters[name])


def restore(run: Run, state: dict[str, Any]) -> None:
    """Restores a state."""
    restore_weights(run, state)
    run.iteration, run.seconds = state["iteration"], state["seconds"]
    own = run.learner.networks.state_dict()
    run.learner.networks.load_state_dict(
        {k: distributed_as(v, own[k]) if k in own else v for k, v in state["networks"].items()}
    )
    run.optimisation.load_state(state["optimisers"])
    run.learner.state = replace(run.learner.state, **state["learner"])
    run.generator.set_state(state["generator"])
    run.optimisation.scaler.load_state_dict(state["scaler"])
    leads = int(run.world.leads)  # counts are those of all: the first process has them
    run.reward.queries = leads * state["queries"]
    if isinstance(run.reward.reward, WeightedSum):
        run.reward.reward.moments = state["moments"]
    run.model.evaluations.forward, run.model.evaluations.backward = (leads * count for count in state["evaluations"])
    if run.late.delay:
        run.late.load_state(state["late"])
    if run.rounds is not None:
        run.rounds.load_state(state["rounds"])
    if run.selection is not None:
        run.selection.load_state(state["selection"])
