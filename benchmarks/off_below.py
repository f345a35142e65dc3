"""The exact optimal policy of each exact task, with the reference acting below a time: what that costs, and the KL it saves.

    python -m benchmarks.off_below       # results/off_below.csv and its table; a few minutes on one core

Nothing is trained: the policy is the score of the tilted law above `off_below` and that of the data below, 50 steps of DDIM at
eta 1. The distance is the sliced W2 of 4,096 samples to as many of the optimum, the mean over three draws.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs

N, DRAWS, STEPS = 4096, 3, 50
TASKS = ("mixture", "mixture16", "linear_quadratic")
TIMES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)


@torch.no_grad()
def gated(task: str) -> Figures:
    """Distance, reward and path KL of the optimal policy with each `off_below`."""
    from scoreaction.diffusion.noise import RowNoise
    from scoreaction.diffusion.predictions import Prediction
    from scoreaction.sampling.rollout import roll_out
    from scoreaction.training.exact_task import ExactTask

    tuner = built(task, f"sampler.steps={STEPS}")
    model, sampler, rows = tuner.model, tuner.sampler, torch.arange(N)
    exact = ExactTask.of(model, tuner.reward.reward, tuner.beta)
    assert exact is not None

    def drawn(off_below: float, seed: int) -> Any:
        def predict(x: torch.Tensor, t: torch.Tensor) -> Prediction:
            law = exact.law if t < off_below else exact.optimum.law
            return law.prediction(model.process, x, t)

        prompt = torch.zeros(N, dtype=torch.long)
        return roll_out(model, sampler, predict, prompt, RowNoise(seed, rows), times=sampler.times(model.process))

    def point(off_below: float) -> Figures:
        rollouts = [drawn(off_below, seed) for seed in range(DRAWS)]
        first = rollouts[0]
        base = [exact.law.prediction(model.process, x, t) for x, t in zip(first.x[:-1], first.times[:-1], strict=True)]
        pretrained = Prediction(*(torch.stack(parts) for parts in zip(*base, strict=True)))
        kl, _ = model.kls(sampler.find(), first.times, first.x[:-1], first.old, pretrained, 1.0)
        distance = exact.distance(lambda seed: rollouts[seed].x0, N, 0, repeats=DRAWS)
        reward = torch.cat([tuner.reward.reward(rollout.x0, None) for rollout in rollouts]).mean()
        return {"off_below": off_below, "distance": distance, "reward": float(reward), "kl_nats": float(kl.mean())}

    optimum = {"optimum_reward": exact.optimum.reward, "optimum_kl_nats": exact.optimum.kl_nats}
    return {"task": task, "floor": exact.floor(N, 0), **optimum, "curve": [point(t) for t in TIMES]}


if __name__ == "__main__":
    run_jobs(gated, {task: {"task": task} for task in TASKS}, arguments(__doc__ or "", "off_below").parse_args())
