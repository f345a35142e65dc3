"""Two processes that share networks, beside two of which each has all: `torchrun --nproc_per_node 2 tests/sharded.py FOLDER`.

They write what they found into FOLDER; with a second argument they go on with the run that is there, to so many iterations.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import many
import torch
from torch.distributed.fsdp import FSDPModule

import scoreaction as sa
from scoreaction.networks import adapters, sharding
from scoreaction.networks.sharding import whole
from scoreaction.training import run as runs
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

    def tuner(self, *, shard, iterations=ITERATIONS, output=None):
        return sa.Finetuner(
            many.conditional(self.lora), reward=sa.Reward(prompted, differentiable=True), algorithm=self.algorithm,
            sampler=sa.Sampler(steps=5, guidance=2.0), prompts=many.PROMPTS, output=output, held_out={"linear": many.linear},
            train=sa.Train(
                iterations=iterations, batch=self.batch, lr=2e-3, device="cpu", schedule="constant", ema_decay=0.9,
                max_rows=self.max_rows, samples_per_prompt=4, held_out_rows=7, select="reward_mean", shard=shard,
            ),
            evaluation=sa.Evaluation(n=13, steps=4),
        )  # fmt: skip


prompted = many.prompted
CASES = {
    "score_action": Case(sa.ScoreAction(beta=0.5, rows=20, updates=2)),
    "score_action, lora": Case(sa.ScoreAction(beta=0.5, rows=20, updates=2), lora=2),
    "ddpo": Case(sa.DDPO()),
    "ddpo, lora": Case(sa.DDPO(), lora=2),
    # one process has a part more than the other, and in the second case no row at all
    "score_action, uneven": Case(sa.ScoreAction(beta=0.5, rows=11, updates=3), max_rows=3),
    "score_action, one row": Case(sa.ScoreAction(beta=0.5, rows=1, updates=1)),
    "sqdf, uneven": Case(sa.SQDF(beta=0.5, rows=9), max_rows=2),
    "nft": Case(sa.NFT()),
    "draft, checkpointed": Case(sa.DRaFT(beta=0.5, last=2, gradient_checkpointing=True)),
}


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
    """Trained with gradients that are sums over processes."""
    tuner = case.tuner(shard=True)
    for module in tuner.model.net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return trained(tuner)


def written(folder):
    """The runs of all cases; weights as evaluation sees them, a saved model, a checkpoint, with their twins."""
    report = {"runs": {}}
    for name, case in CASES.items():
        whole_run, shared = case.tuner(shard=False), case.tuner(shard=True)
        report["runs"][name] = {"whole": trained(whole_run), "sharded": trained(shared)}
        if name == "score_action":
            report["held"] = sum(p.to_local().numel() for p in shared.model.net.parameters())
            report["all"] = sum(p.numel() for p in shared.model.net.parameters())
            report["outputs"] = {"whole": outputs(whole_run), "sharded": outputs(shared)}
            with patch.object(adapters, "replaced", swapped), patch("scoreaction.networks.model.replaced", swapped):
                report["outputs"]["swapped"] = outputs(shared)
            report["names"] = [list(tuner.model.parameters) for tuner in (whole_run, shared)]
            report["summaries"] = [tuner.summary() for tuner in (whole_run, shared)]
            for tuner, kind in ((whole_run, "whole"), (shared, "sharded")):
                tuner.save(folder / kind)
            with patch.object(sharding, "whole", lambda value: value.to_local()):
                shared.save(folder / "parts")
    case = CASES["score_action"]
    for kind, sharded in (("of_whole", False), ("of_sharded", True), ("chain", True)):
        list(case.tuner(shard=sharded, iterations=2, output=folder / kind))
    with patch.object(runs, "on_host", lambda tree, keep: parts(tree)):
        list(case.tuner(shard=True, iterations=2, output=folder / "of_parts"))
    report["resumed"] = resumed(folder / "of_whole", ITERATIONS)
    return report


def parts(tree):
    """The twin of `on_host`: of each tensor what this process holds."""
    if isinstance(tree, dict):
        return {key: parts(value) for key, value in tree.items()}
    return tree.to_local() if hasattr(tree, "to_local") else tree


def resumed(folder, iterations):
    """The rest of the run in the folder, by processes that share its networks."""
    tuner = CASES["score_action"].tuner(shard=True, iterations=iterations, output=folder)
    assert tuner.resume()
    return trained(tuner)


if __name__ == "__main__":
    torch.set_num_threads(1)
    World.joined("cpu")
    folder, more = Path(sys.argv[1]), sys.argv[2:]
    report = resumed(folder / "chain", int(more[0])) if more else written(folder)
    if World.current().leads:
        (folder / ("resumed.json" if more else "report.json")).write_text(json.dumps(report), encoding="utf-8")
    torch.distributed.destroy_process_group()
