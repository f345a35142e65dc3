"""SQDF's soft Q, `r(x0_hat(x_t))`, against the exact soft value `beta log E[exp(r/beta) | x_t = x]`, by predictor and time.

    python -m benchmarks.soft_q         # results/soft_q.csv and tables; a few minutes on one core

Root mean square error of the value (its mean taken out: a constant moves no policy) over its standard deviation, and of the
gradient over the gradient's root mean square, at 4,000 points of the pretrained law at t. `tweedie` is the reference's
posterior mean, `ddim n` n steps of its ODE, `consistency` a model distilled for it, `corrected` the critic of a corrected run
at its end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs

TIMES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TASKS = {"mixture": 250, "linear_quadratic": 100}
POINTS = 4000


PREDICTORS = ("tweedie", "ddim 2", "ddim 4", "consistency", "corrected")


def errors(tuner: Any, **options: Any) -> Figures:
    """Of value and gradient, at each time."""
    from scoreaction.algorithms._soft_q import soft_q
    from scoreaction.sampling.rollout import States

    law, quadratic, process = tuner.model.law, tuner.reward.reward.quadratic, tuner.model.process
    beta = tuner.learner.beta
    out: Figures = {"value": {}, "gradient": {}}
    for time in TIMES:
        t = torch.tensor(time, dtype=torch.float64)
        x = law.noised(process, t).sample(POINTS, torch.Generator().manual_seed(0)).float()
        states = States(x, t.expand(POINTS), torch.zeros(POINTS, dtype=torch.long))
        truth = law.value(quadratic, beta, process, x.double(), t)
        slope = law.value_grad(quadratic, beta, process, x.double(), t)
        soft = soft_q(tuner.learner, states, gradient=True, **options)
        value, grad = soft.value, soft.grad
        if tuner.learner.config.correction:
            grad = tuner.learner.gradient(states, torch.zeros(POINTS))[0]
            with torch.no_grad():
                value = tuner.learner.critic(*states, soft.value)
        off = value.double() - truth
        out["value"][time] = float(off.std() / truth.std())
        error = (grad.double() - slope).square().sum(1).mean().sqrt()
        out["gradient"][time] = float(error / slope.square().sum(1).mean().sqrt())
    return out


def measured(task: str, predictor: str, iterations: int) -> Figures:
    """Errors of a predictor; a corrected run has so many iterations."""
    from scoreaction.commands.distill import distill_recipe
    from scoreaction.recipes.recipe import load_recipe

    settings = ["algorithm.name=sqdf", "sampler.steps=25", "train.seed=0"]
    if predictor == "consistency":
        with tempfile.TemporaryDirectory() as folder:
            distill_recipe(load_recipe(task), Path(folder) / "consistency")
            return errors(built(task, *settings, f"model.consistency={folder}/consistency"), consistency=True)
    if predictor == "corrected":
        settings += ["algorithm.correction=true", f"train.iterations={iterations}"]
    tuner = built(task, *settings)
    for _ in tuner if predictor == "corrected" else ():
        pass
    return errors(tuner, **({"steps": int(predictor[5:])} if predictor.startswith("ddim") else {}))


if __name__ == "__main__":
    jobs = {
        f"{task}/{predictor}": {"task": task, "predictor": predictor, "iterations": iterations}
        for task, iterations in TASKS.items()
        for predictor in PREDICTORS
    }
    run_jobs(measured, jobs, arguments(__doc__ or "", "soft_q").parse_args())
