"""Steering without training on the mixture: reward, distance to the optimum, evaluations and queries a sample, by method.

    python -m benchmarks.steering       # results/steering.csv and its table; some ten minutes on one core

2,048 samples by the pretrained model's DDIM of 50 steps at eta 1, three seeds. The distance is the sliced W2 to as many samples
of the known optimum, the mean over three of them.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs

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


def steered(seed: int) -> Figures:
    """Every method at one seed, beside the base, the exact optimal policy on the same chain, and the optimum itself."""
    from scoreaction.diffusion.noise import RowNoise
    from scoreaction.sampling.draw import run
    from scoreaction.sampling.steering import Steering
    from scoreaction.training.exact_task import ExactTask, sliced_w2
    from scoreaction.training.steering import steered as steer_run

    tuner = built("mixture", f"sampler.steps={STEPS}")
    task = ExactTask.of(tuner.model, tuner.reward.reward, tuner.beta)
    assert task is not None
    law, generator, rows = task.optimum.law, torch.Generator().manual_seed(1000 + seed), torch.arange(N)
    targets = [law.sample(N, generator) for _ in range(AGAINST)]

    def point(name: str, x: torch.Tensor, costs: Figures) -> Figures:
        distance = sum(sliced_w2(x, target) for target in targets) / AGAINST
        return {"method": name, "reward": float(tuner.reward.reward(x, None).mean()), "distance": distance, **costs}

    def chain(predict: Any) -> torch.Tensor:
        with torch.no_grad():
            return run(tuner.model, tuner.sampler, predict, N, RowNoise(seed, rows))

    once = {"evaluations_per_sample": STEPS, "queries_per_sample": 0, "backward_per_sample": 0}
    out = [
        point("optimum", law.sample(N, generator), {}),
        point("oracle", chain(lambda x, t: law.prediction(tuner.model.process, x, t)), once),
        point("base", chain(tuner.model.reference), once),
    ]
    for name, settings in METHODS.items():
        result = steer_run(tuner, tuner.sampler, Steering(**settings), n=N, prompts=None, seed=seed, reference=True)
        out.append(point(name, result.x0, result.figures))
    return {"n": N, "steps": STEPS, "curve": out}


if __name__ == "__main__":
    run_jobs(
        steered, {f"mixture/seed{seed}": {"seed": seed} for seed in range(3)}, arguments(__doc__ or "", "steering").parse_args()
    )
