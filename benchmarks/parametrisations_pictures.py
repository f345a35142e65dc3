"""Trainers on networks that predict v, eps or x0 of handwritten digits: the same pretrained prediction, learned in each kind.

    python -m benchmarks.parametrisations_pictures      # results/parametrisations_pictures.csv and its table; resumes

The network is the shipped one, whose v is converted, plus what training changes of its output: `y = p x0 + q eps + F - F_pre`,
F the network and (x0, eps) the prediction of F_pre, which stays. So the pretrained models are one and the same, and a change of
the weights is one of v, of eps or of x0. Settings are those of the recipe `digits` and by default, runs are short.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from _harness import Figures, arguments, run_jobs, summary
from torch import nn

import scoreaction as sa
from scoreaction.diffusion.predictions import Predicts, from_prediction, to_prediction
from scoreaction.models import digits
from scoreaction.rewards import ink, legibility
from scoreaction.tasks.digits.networks import PROMPTS, DigitsNet, load_net

BETA, ITERATIONS, SEEDS = 0.1, 6, 1
SIZES: dict[str, Any] = {"rows": 80, "updates": 8}
CRITIC: dict[str, Any] = {**SIZES, "critic_updates": 16}
TRAINERS: dict[str, Any] = {
    "score_action": sa.ScoreAction(beta=BETA, **CRITIC),
    "sqdf": sa.SQDF(beta=BETA, **SIZES),
    "dpok": sa.DPOK(beta=BETA),
}
NETWORKS: dict[str, tuple[Predicts, float | None]] = {
    "v": ("v", None),
    "eps": ("eps", None),
    "x0": ("x0", None),
    "x0, off below 0.06": ("x0", 0.06),
}
"""Networks by name: what they predict, and `sampler.off_below`, by default None."""
HELD = ("score_action", "dpok")
"""Trainers that are also run with the earlier time."""


class InKind(nn.Module):
    """The digits' network as one of another kind: its change is added to the pretrained prediction of that kind."""

    def __init__(self, net: DigitsNet, kind: Predicts) -> None:
        super().__init__()
        self.net, self.kind = net, kind
        self.pretrained = deepcopy(net).requires_grad_(False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None) -> torch.Tensor:
        process, t64 = self.net.process, t.double()
        v = self.pretrained(x, t, cond)
        known = from_prediction(process, self.kind, t64, to_prediction(process, "v", x, t64, v))
        return known + self.net(x, t, cond) - v


def model_of(kind: Predicts) -> sa.Model:
    """The model `digits` with a network of this kind."""
    own = digits.build(digits.Config())
    parts: dict[str, Any] = {
        key: getattr(own, key) for key in ("process", "shape", "encode", "null", "decode", "invert", "features")
    }
    return sa.Model(InKind(load_net(), kind), predicts=kind, **parts)


def train(trainer: str, network: str, seed: int, iterations: int) -> Figures:
    """The summary of one run."""
    kind, off_below = NETWORKS[network]
    tuner = sa.Finetuner(
        model_of(kind),
        reward=ink.build(ink.Config(differentiable=trainer == "sqdf")),
        algorithm=TRAINERS[trainer],
        sampler=sa.Sampler(steps=10, eta=1.0, guidance=2.0, off_below=off_below),
        train=sa.Train(iterations=iterations, batch=32, lr=1e-4, max_rows=512, seed=seed, device="cpu"),
        prompts=PROMPTS,
        held_out={"legibility": legibility.build(legibility.Config())},
        evaluation=sa.Evaluation(n=80, steps=20),
    )
    nats = [metrics["kl_nats"] for metrics in tuner]
    return summary(tuner) | {"kl_most": max(nats), "off_below": tuner.sampler.acts_from}


def jobs() -> dict[str, Figures]:
    """All runs by name."""
    return {
        f"{trainer}/{network}/seed{seed}": {"trainer": trainer, "network": network, "seed": seed, "iterations": ITERATIONS}
        for seed in range(SEEDS)
        for trainer in TRAINERS
        for network, (_, off_below) in NETWORKS.items()
        if off_below is None or trainer in HELD
    }


if __name__ == "__main__":
    run_jobs(train, jobs(), arguments(__doc__ or "", "parametrisations_pictures").parse_args())
