"""Two processes that share networks, beside two of which each has all; what they found goes into FOLDER.

`torchrun --nproc_per_node 2 tests/sharded.py FOLDER compare NAME...` trains these cases both ways; `write NAME...` saves what
they make too, and `resume N` goes on with a run that was written, to N iterations. `nodes NAME...` compares as if every two
processes were those of a node.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import many
import torch

import scoreaction as sa
from scoreaction.networks import sharding
from scoreaction.networks.sharding import whole
from scoreaction.training.checkpoints import save_tree
from scoreaction.world import World

ITERATIONS = 4
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """An algorithm on the network with conditions."""

    algorithm: sa.algorithms.Algorithm
    lora: int | None = None
    batch: int = 16
    max_rows: int | None = None
    labels: tuple[str, ...] | None = None
    again: int = 0
    """Rows of an iteration that are evaluated once more where the network is shared: its steps cannot be differentiated as they
    are drawn."""

    @property
    def prompts(self):
        return many.PROMPTS if self.labels is None else [f"{text} | {label}" for text in many.PROMPTS for label in self.labels]

    def tuner(self, *, shard, iterations=ITERATIONS, output=None):
        return sa.Finetuner(
            many.conditional(self.lora, self.labels), reward=sa.Reward(prompted, differentiable=True), algorithm=self.algorithm,
            sampler=sa.Sampler(steps=4, guidance=2.0), prompts=self.prompts, output=output, held_out={"linear": many.linear},
            train=sa.Train(
                iterations=iterations, batch=self.batch, lr=2e-3, device="cpu", schedule="constant", ema_decay=0.9,
                max_rows=self.max_rows, samples_per_prompt=4, held_out_rows=7, select="reward_mean", shard=shard,
            ),
            evaluation=sa.Evaluation(n=13, steps=4),
        )  # fmt: skip


prompted = many.prompted
few = {"critic_updates": 4, "surrogate_updates": 4}
CASES = {
    "score_action": Case(sa.ScoreAction(beta=0.5, rows=20, updates=2, **few)),
    "score_action, lora": Case(sa.ScoreAction(beta=0.5, rows=20, updates=2, **few), lora=2),
    "ddpo": Case(sa.DDPO()),
    "ddpo, lora": Case(sa.DDPO(), lora=2),
    # one process has a part more than the other, or no row at all
    "score_action, uneven": Case(sa.ScoreAction(beta=0.5, rows=11, updates=3, **few), max_rows=3),
    "score_action, one row": Case(sa.ScoreAction(beta=0.5, rows=1, updates=1, **few)),
    "score_action, taken back": Case(sa.ScoreAction(beta=0.5, rows=20, updates=3, trust_region=1e-7, **few)),
    "sqdf, uneven": Case(sa.SQDF(beta=0.5, rows=9), max_rows=2),
    "nft": Case(sa.NFT()),
    "ddpo, labels": Case(sa.DDPO(), labels=("small", "large")),
    "ddpo, lora and labels": Case(sa.DDPO(), lora=2, labels=("small", "large")),
    # the last two steps of 16 trajectories, with guidance
    "draft, checkpointed": Case(sa.DRaFT(beta=0.5, last=2, gradient_checkpointing=True), again=2 * 16 * 2),
}
QUICK = [*CASES][:4]


def weights(tuner):
    return torch.cat([whole(p).detach().flatten() for p in tuner.model.parameters.values()]).tolist()


def trained(tuner):
    metrics = [{key: value for key, value in row.items() if key != "seconds"} for row in tuner]
    return {"metrics": metrics, "weights": weights(tuner)}


@contextmanager
def swapped(parameters, values):
    """The twin of `replaced`: other tensors in the place of the parameters' own."""
    own = {name: p.data for name, p in parameters.items()}
    for name, value in values.items():
        parameters[name].data = value
    yield
    for name, p in parameters.items():
        p.data = own[name]


def output(tuner):
    with torch.no_grad():
        return tuner.model.predict(X, torch.tensor(0.5), torch.arange(4)).x0.tolist()


def outputs(tuner):
    """The network's output with the weights as they are, with the averaged ones, and again."""
    raw = output(tuner)
    with tuner.model.averaged():
        averaged = output(tuner)
    return {"raw": raw, "averaged": averaged, "again": output(tuner)}


def summed(case):
    """The twin of a mean: trained with gradients that are sums over processes."""
    own = World.average_gradients

    def doubled(world, parameters, figures):
        for p in parameters:
            p.grad *= world.size
        return own(world, parameters, figures)

    with patch.object(World, "average_gradients", doubled):
        return trained(case.tuner(shard=True))


def compared(names):
    """The cases trained both ways."""
    return {
        name: {kind: trained(CASES[name].tuner(shard=kind == "sharded")) for kind in ("whole", "sharded")} for name in names
    }


def written(folder):
    """Weights as evaluation sees them, saved models and states of a run both ways, and their twins."""
    case = CASES["ddpo"]
    report = {"summed": summed(case), "outputs": {}, "summaries": {}, "names": {}, "held": {}}
    for kind in ("whole", "sharded"):
        tuner = case.tuner(shard=kind == "sharded", iterations=2, output=folder / f"run of {kind}")
        list(tuner)
        report["names"][kind] = list(tuner.model.parameters)
        report["held"][kind] = sum(local(p).numel() for p in tuner.model.net.parameters())
        report["summaries"][kind] = {name: v for name, v in tuner.summary().items() if name not in ("seconds", "prompts")}
        saved(tuner, folder / kind)
        report["outputs"][kind] = outputs(tuner)
    with patch("scoreaction.networks.weights.replaced", swapped):
        report["outputs"]["swapped"] = outputs(tuner)
    with patch.object(sharding, "whole", local):
        saved(tuner, folder / "parts")
    report["resumed"] = resumed(folder / "run of whole", ITERATIONS)
    return report


def saved(tuner, folder):
    """Writes the model and the state."""
    tuner.save(folder)
    state = tuner.state()
    if World.current().leads:
        save_tree(folder / "state", {**state, "seconds": 0.0})


def local(value):
    """The twin of `whole`: what this process holds."""
    return value.to_local() if hasattr(value, "to_local") else value


def resumed(folder, iterations, *, shard=True):
    """The rest of the run in the folder."""
    tuner = CASES["ddpo"].tuner(shard=shard, iterations=iterations, output=folder)
    assert tuner.resume()
    return trained(tuner)


if __name__ == "__main__":
    torch.set_num_threads(1)
    World.joined("cpu")
    folder, (what, *more) = Path(sys.argv[1]), sys.argv[2:]
    does = {
        "compare": lambda: compared(more),
        "write": lambda: {**written(folder), "runs": compared(more)},
        "nodes": lambda: compared(more),
        "resume": lambda: resumed(folder / "run of sharded", int(more[0])),
    }
    if what == "nodes":  # of two processes each
        os.environ["LOCAL_WORLD_SIZE"] = "2"
    report = does[what]()
    if World.current().leads:
        (folder / f"{what}.json").write_text(json.dumps(report), encoding="utf-8")
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch's threads may abort while an interpreter is taken down, once in hundreds of runs
