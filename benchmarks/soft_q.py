"""SQDF's soft Q, `r(x0_hat(x_t))`, against the exact soft value `beta log E[exp(r/beta) | x_t = x]`, by predictor and time.

    python benchmarks/soft_q.py         # results/soft_q.json and a table; a few minutes on one core

Root mean square error of the value (its mean taken out: a constant moves no policy) over its standard deviation, and of the
gradient over the gradient's root mean square, at 4,000 points of the pretrained law at t. `tweedie` is the reference's
posterior mean, `ddim n` n steps of its ODE, `consistency` a model distilled for it, `corrected` the critic of a corrected run
at its end.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from _harness import arguments, table

TIMES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
TASKS = {"mixture": 250, "linear_quadratic": 100}
POINTS = 4000


def learner_of(task: str, settings: list[str]) -> Any:
    from scoreaction.recipes.build import build
    from scoreaction.recipes.recipe import load_recipe

    return build(load_recipe(task, ["algorithm.name=sqdf", "sampler.steps=25", "train.seed=0", *settings]))


def errors(tuner: Any, task: str, **options: Any) -> dict[str, dict[str, float]]:
    """Of value and gradient, at each time."""
    from scoreaction.algorithms._soft_q import soft_q
    from scoreaction.sampling.experience import Points

    law, quadratic, process = tuner.model.law, tuner.reward.reward.quadratic, tuner.model.process
    beta, found = tuner.learner.beta, {}
    for time in TIMES:
        t = torch.tensor(time, dtype=torch.float64)
        x = law.noised(process, t).sample(POINTS, torch.Generator().manual_seed(0)).float()
        points, groups = Points(x, t.expand(POINTS), None), torch.zeros(POINTS, dtype=torch.long)
        truth = law.value(quadratic, beta, process, x.double(), t)
        slope = law.value_grad(quadratic, beta, process, x.double(), t)
        soft = soft_q(tuner.learner, points, groups, slope=True, **options)
        value, grad = soft.value, soft.grad
        if tuner.learner.config.correction:
            grad = tuner.learner.grad_q(points, groups, torch.zeros(POINTS))[0]
            with torch.no_grad():
                value = tuner.learner.critic(x, points.t, None, soft.value)
        off = value.double() - truth
        found[str(time)] = {
            "value": float(off.std() / truth.std()),
            "gradient": float((grad.double() - slope).square().sum(1).mean().sqrt() / slope.square().sum(1).mean().sqrt()),
        }
    return found


def main() -> None:
    options = arguments(__doc__ or "", "soft_q.json").parse_args()
    torch.set_num_threads(1)
    from scoreaction.commands.distill import distill_recipe
    from scoreaction.recipes.recipe import load_recipe

    out: dict[str, Any] = {}
    for task, iterations in TASKS.items():
        plain = learner_of(task, [])
        rows = {"tweedie": errors(plain, task)}
        for steps in (2, 4):
            rows[f"ddim {steps}"] = errors(plain, task, steps=steps)
        with tempfile.TemporaryDirectory() as folder:
            distill_recipe(load_recipe(task), Path(folder) / "consistency")
            distilled = learner_of(task, [f"model.consistency={folder}/consistency"])
            rows["consistency"] = errors(distilled, task, consistency=True)
        corrected = learner_of(task, ["algorithm.correction=true", f"train.iterations={iterations}"])
        for _ in corrected:
            pass
        rows["corrected"] = errors(corrected, task)
        out[task] = rows
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(out, indent=1) + "\n")
    for task, rows in out.items():
        for kind in ("value", "gradient"):
            print(f"\n{task}: error of the {kind}")
            body = [[name, *(f"{row[str(t)][kind]:.2f}" for t in TIMES)] for name, row in rows.items()]
            print(table(["predictor", *(f"t = {t}" for t in TIMES)], body))


if __name__ == "__main__":
    main()
