"""The lean adjoint of Adjoint Matching under the exact optimal policy, against the exact gradient of the soft value.

    python -m benchmarks.adjoints       # results/adjoints.csv and a table; a minute on one core

Where the method's fixed point is the optimum, `E<a, grad V*>/E||grad V*||^2` is 1; `E||a||^2/E||grad V*||^2` says how noisy
a is.
"""

from __future__ import annotations

from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs

PATHS = 2000
TASKS = ("linear_quadratic", "mixture16", "mixture")


def measured(task: str, steps: int) -> Figures:
    """At nine steps of the chain, from noise to data."""
    from dataclasses import replace

    from scoreaction.sampling.rollout import roll_out

    tuner = built(task, "algorithm.name=adjoint_matching", f"sampler.steps={steps}")
    model, beta, process = tuner.model, tuner.learner.beta, tuner.model.process
    quadratic, law = tuner.reward.reward.quadratic, tuner.model.law
    optimum = law.optimum(quadratic, beta).law
    generator, times = torch.Generator().manual_seed(0), tuner.sampler.times(process)
    prompt = torch.zeros(PATHS, dtype=torch.long)
    rollout = roll_out(model, tuner.sampler, lambda x, t: optimum.prediction(process, x, t), prompt, generator, times=times)
    slope = quadratic.l - (rollout.x0.double() - quadratic.mu) @ quadratic.Q
    adjoints: Any = tuner.learner.prepare(replace(rollout, reward_gradient=slope.float()), generator)
    points = []
    for i in range(0, steps, max(1, steps // 8)):
        truth = law.value_grad(quadratic, beta, process, rollout.x[i].double(), times[i])
        size, adjoint = float(truth.square().sum(1).mean()), adjoints.adjoint[i].double()
        along = (adjoint * truth).sum(1) / size
        points.append(
            {
                "t": float(times[i]),
                "along": float(along.mean()),
                "error": float(along.std()) / PATHS**0.5,
                "moment": float(adjoint.square().sum(1).mean()) / size,
            }
        )
    return {"curve": points}


if __name__ == "__main__":
    jobs = {f"{task}, {steps} steps": {"task": task, "steps": steps} for task in TASKS for steps in (25, 100)}
    run_jobs(measured, jobs, arguments(__doc__ or "", "adjoints").parse_args())
