"""Steering and training on the mixture: reward, distance to the optimum, evaluations and queries a sample, by method.

    python -m benchmarks.steering       # results/steering.csv and its table; some 20 minutes on one core
    python -m benchmarks figures        # results/steering_or_training.png from the CSV

2,048 samples by DDIM of 50 steps at eta 1, of the pretrained model and of policies that were trained as in `benchmarks.exact`
for 25 steps; three seeds. The distance is the sliced W2 to as many samples of the known optimum, the mean over three of them.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs
from exact import TRAINERS as EXACT

N, STEPS, AGAINST = 2048, 50, 3
METHODS: dict[str, dict[str, Any]] = {  # a method's name in the table, and its settings
    "guidance": {"method": "guidance"},
    "svdd 16": {"method": "svdd"},
    "svdd 16, T = beta": {"method": "svdd_published", "select": "categorical"},
    "svdd 16, argmax": {"method": "svdd_published"},
    "best of 16": {"method": "best_of"},
    "best of 16, drawn": {"method": "best_of", "select": "categorical"},
    "smc 16": {"method": "smc"},
    "smc 16, weighted": {"method": "smc", "returns": "weighted"},
    "twisted 4": {"method": "twisted", "particles": 4},
    "twisted 16": {"method": "twisted"},
    "twisted 16, every 5": {"method": "twisted", "every": 5},
    "smc 512, all": {"method": "smc", "particles": 512, "returns": "all"},
    "twisted 512, all": {"method": "twisted", "particles": 512, "returns": "all"},
}


TRAINERS = ("score_action", "sqdf, corrected", "sqdf", "dpok")
ONCE = {"evaluations_per_sample": STEPS, "queries_per_sample": 0, "backward_per_sample": 0}


class Measured:
    """Samples of a seed beside those of the optimum."""

    def __init__(self, tuner: Any, seed: int) -> None:
        from scoreaction.training.exact_task import ExactTask

        task = ExactTask.of(tuner.model, tuner.reward.reward, 0.5)
        assert task is not None
        self.tuner, self.law, self.seed = tuner, task.optimum.law, seed
        self.generator = torch.Generator().manual_seed(1000 + seed)
        self.targets = [self.law.sample(N, self.generator) for _ in range(AGAINST)]

    def point(self, name: str, x: torch.Tensor, costs: Figures) -> Figures:
        """Reward and distance of samples, beside what they cost."""
        from scoreaction.training.exact_task import sliced_w2

        distance = sum(sliced_w2(x, target) for target in self.targets) / AGAINST
        return {"method": name, "reward": float(self.tuner.reward.reward(x, None).mean()), "distance": distance, **costs}

    def chain(self, predict: Any) -> torch.Tensor:
        """Samples of a policy on the sampler's chain."""
        from scoreaction.diffusion.noise import RowNoise
        from scoreaction.sampling.draw import run

        sampler = self.tuner.sampler.model_copy(update={"steps": STEPS})
        with torch.no_grad():
            return run(self.tuner.model, sampler, predict, N, RowNoise(self.seed, torch.arange(N)))


def steered(seed: int) -> Figures:
    """Every method at one seed, beside the base, the exact optimal policy on the same chain, and the optimum itself."""
    from scoreaction.sampling.steering import Steering
    from scoreaction.training.steering import steered as steer_run

    tuner = built("mixture", f"sampler.steps={STEPS}")
    own = Measured(tuner, seed)
    out = [
        own.point("optimum", own.law.sample(N, own.generator), {}),
        own.point("oracle", own.chain(lambda x, t: own.law.prediction(tuner.model.process, x, t)), ONCE),
        own.point("base", own.chain(tuner.model.reference), ONCE),
    ]
    for name, settings in METHODS.items():
        result = steer_run(tuner, tuner.sampler, Steering(**settings), n=N, prompts=None, seed=seed, reference=True)
        out.append(own.point(name, result.x0, result.figures))
    return {"n": N, "steps": STEPS, "curve": out}


def trained(seed: int) -> Figures:
    """Policies after training at one seed, and the evaluations and queries of it."""
    out = []
    for name in TRAINERS:
        settings = [setting.replace("BETA", "0.5") for setting in EXACT[name]]
        tuner = built("mixture", *settings, "sampler.steps=25", "train.iterations=250", f"train.seed={seed}")
        for _ in tuner:
            pass
        own, counts = Measured(tuner, seed), tuner.counts()
        training = {"training_evaluations": counts["model_evaluations"], "training_queries": counts["reward_queries"]}
        with tuner.model.averaged():
            out.append(own.point(f"{name}, trained", own.chain(tuner.model.predict), ONCE | training))
    return {"n": N, "steps": STEPS, "curve": out}


def figures_of(kind: str, seed: int) -> Figures:
    return {"mixture": steered, "trained": trained}[kind](seed)


if __name__ == "__main__":
    jobs: dict[str, Figures] = {
        f"{kind}/seed{seed}": {"kind": kind, "seed": seed} for kind in ("mixture", "trained") for seed in range(3)
    }
    run_jobs(figures_of, jobs, arguments(__doc__ or "", "steering").parse_args())
